"""The command line refuses what cannot work before anything long starts, and says how to mend it."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from evergreen.cli import _COMMANDS, cli
from evergreen.contracts.errors import InputError

RUN = ["run", "--mapping", "simulated", "--data", "nowhere"]


def _invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, list(arguments))
    return result.exit_code, result.output


@pytest.mark.parametrize("command", [*_COMMANDS])
def test_every_command_has_help(command: str) -> None:
    code, output = _invoke(command, "--help")
    assert code == 0
    assert "Usage:" in output


@pytest.mark.parametrize("package", ["torch", "feast", "kfp", "kserve", "evidently", "pandas"])
def test_help_imports_nothing_heavy(package: str) -> None:
    script = (
        "import sys; from evergreen.cli import cli; cli(['--help'], standalone_mode=False); "
        f"sys.exit({package!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--as-of", "yesterday"], "'yesterday' is not an ISO 8601 time"),
        (["--as-of", "2025-01-30"], "has no offset from UTC; write e.g. 2025-01-30T00:00:00+00:00"),
        (["--models", "deepfm,gpt"], "'gpt': no such model; choose among popularity, "),
        (["--models", "deepfm,deepfm"], "each once"),
        (["--latency-budget-ms", "0"], "'--latency-budget-ms'"),
    ],
)
def test_run_refuses_a_bad_option(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, output = _invoke(*RUN, "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert message in output


def test_run_does_not_touch_a_folder_with_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, output = _invoke(*RUN, "--out", str(tmp_path))
    assert code == 2
    assert "holds something else" in output
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_simulate_names_the_parameter_and_the_limit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_users=0: input should be greater than or equal to"):
        CliRunner().invoke(cli, ["simulate", "log", "--out", str(tmp_path), "--num-users", "0"], catch_exceptions=False)


def test_context_needs_a_name_and_a_value() -> None:
    code, output = _invoke("recommend", "--url", "http://127.0.0.1:1", "--user", "u", "--context", "device")
    assert code == 2
    assert "--context 'device': write NAME=VALUE" in output


def test_an_error_for_people_has_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "evergreen.cli",
            "run",
            "--mapping",
            "nope",
            "--data",
            "x",
            "--out",
            str(tmp_path / "o"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: mapping 'nope': neither a shipped mapping")
    assert "Traceback" not in done.stderr
