"""The local runner: what a person sees while steps run and when one fails."""

from pathlib import Path

import pytest
from kfp import dsl

from evergreen.contracts.errors import InputError
from pipelines.local import run_locally

IMAGE = "evergreen-pipeline-python:test"


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def count_lines(path: str) -> int:
    """Count, and say so."""
    import logging

    from evergreen.contracts.errors import InputError
    from evergreen.step import pipeline_step

    with pipeline_step("count_lines"):
        if not path:
            raise InputError("path is empty:\nname a file")
        logging.getLogger("evergreen.test").info("counting %s", path)
    print("not for people")
    return 3


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def divide_by_zero() -> float:
    """Fail as code with a bug does."""
    return 1 / 0


@dsl.pipeline(name="counting")
def counting(path: str) -> int:
    """One good step."""
    return count_lines(path=path).output


@dsl.pipeline(name="buggy")
def buggy() -> float:
    """One bad step."""
    return divide_by_zero().output


def _run(pipeline, arguments, folder: Path) -> tuple[dict, list[str]]:
    told: list[str] = []
    outputs = run_locally(pipeline, arguments, root=folder / "root", log=folder / "run.log", on_progress=told.append)
    return outputs, told


def test_outputs_come_back_and_only_marked_lines_are_told(tmp_path: Path) -> None:
    outputs, told = _run(counting, {"path": "log.csv"}, tmp_path)
    assert outputs == {"Output": 3}
    assert told[0] == "count_lines: counting log.csv"
    assert told[1].startswith("count_lines: done in ")
    assert len(told) == 2
    assert "not for people" in (tmp_path / "run.log").read_text()


def test_a_step_error_is_raised_again_as_what_it_was(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^path is empty:\nname a file$"):
        _run(counting, {"path": ""}, tmp_path)


def test_a_bug_shows_the_end_of_the_log_and_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError") as caught:
        _run(buggy, {}, tmp_path)
    assert str(tmp_path / "run.log") in str(caught.value)


def test_print_is_left_as_it_was(tmp_path: Path) -> None:
    import builtins

    before = builtins.print
    _run(counting, {"path": "log.csv"}, tmp_path)
    assert builtins.print is before
