"""What the runbook tells a person to type exists: targets, commands, parameters, files, objects; and every alert."""

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from evergreen.cli import cli
from pipelines.monitoring import monitoring_pipeline
from pipelines.rollback import rollback_pipeline
from pipelines.training import training_pipeline

ROOT = Path(__file__).parents[2]
RUNBOOK = ROOT / "docs" / "runbook.md"
TEXT = RUNBOOK.read_text()
PIPELINES = {"training": training_pipeline, "monitoring": monitoring_pipeline, "rollback": rollback_pipeline}
RULES = ROOT / "manifests" / "components" / "monitoring" / "prometheus-rule.yaml"

KINDS = {
    "inferenceservice": "InferenceService",
    "deployment": "Deployment",
    "statefulset": "StatefulSet",
    "cronjob": "CronJob",
    "secret": "Secret",
    "svc": "Service",
    "pod": "Pod",
}
MADE_ELSEWHERE = {
    ("InferenceService", "evergreen-canary"),  # the release step's
    ("Deployment", "evergreen-predictor"),  # KServe makes these two of the InferenceService
    ("Service", "evergreen-predictor"),
    ("Service", "ml-pipeline"),  # Kubeflow Pipelines' own
    ("Service", "seaweedfs"),
    ("Secret", "evergreen-redis"),  # manifests/kind/cluster makes them
    ("Secret", "evergreen-s3"),
    ("Secret", "evergreen-tokens"),  # a person's
    ("Pod", "redis-0"),
}


def _commands() -> list[str]:
    """What stands in sh blocks and in code spans, a command each, without its continuation lines' breaks."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", TEXT, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^ *```.*?^ *```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    return [line for line in lines if line] + re.findall(r"`([^`\n]+)`", prose)


COMMANDS = _commands()


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _headings(page: str) -> set[str]:
    return {_slug(heading) for heading in re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)}


def _kebab(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def _alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def _objects() -> set[tuple[str, str]]:
    """Kind and name of every object in manifests/ and examples/."""
    found = set(MADE_ELSEWHERE)
    for file in [*(ROOT / "manifests").rglob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")]:
        for made in yaml.safe_load_all(file.read_text()):
            if isinstance(made, dict) and "kind" in made and "name" in made.get("metadata", {}):
                found.add((made["kind"], made["metadata"]["name"]))
    return found


@pytest.mark.parametrize("alert", _alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_has_a_heading_which_its_runbook_url_leads_to(alert: dict[str, Any]) -> None:
    page, anchor = alert["annotations"]["runbook_url"].rsplit("#", 1)
    assert page.endswith("docs/runbook.md")
    assert anchor == _kebab(alert["alert"])
    assert anchor in _headings(TEXT), f"docs/runbook.md has no heading for {alert['alert']}"


def test_a_heading_below_alerts_is_of_an_alert() -> None:
    section = re.search(r"^## Alerts\n(.*?)^## ", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert section is not None
    assert _headings(section[1]) == {_kebab(alert["alert"]) for alert in _alerts()}


def test_links_to_headings_lead_somewhere() -> None:
    for page, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", TEXT):
        target = RUNBOOK.parent / page if page else RUNBOOK
        assert anchor in _headings(target.read_text()), f"{page}#{anchor}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = {found for command in COMMANDS for found in re.findall(r"^make ([a-z][a-z0-9-]*)", command)}
    assert shown
    assert shown <= targets


@pytest.mark.parametrize("line", sorted({c for c in COMMANDS if re.search(r"(^| -- +)evergreen [a-z]", c)}))
def test_a_command_of_ours_exists_with_its_options(line: str) -> None:
    """Those that run in a pod too, which tests/contract/test_docs.py does not see."""
    words = shlex.split(line[line.index("evergreen ", line.find(" -- ") + 1) :])[1:]
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(cli), words[0])
        assert found is not None, f"no command {words[0]!r} in: {line}"
        command, words = found, words[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("line", [command for command in COMMANDS if command.startswith("kfp run create")])
def test_a_run_gives_a_compiled_pipeline_what_it_needs(line: str) -> None:
    words = shlex.split(line)
    name = Path(words[words.index("-f") + 1])
    assert name.parent == Path("pipelines/compiled")
    inputs = PIPELINES[name.stem].component_spec.inputs
    given = {word.split("=")[0] for word in words if "=" in word}
    needed = {parameter for parameter, value in inputs.items() if not value.optional and value.default is None}
    assert needed <= given <= set(inputs)


def test_the_documented_pipeline_parameters_are_parameters() -> None:
    known = {name for pipeline in PIPELINES.values() for name in pipeline.component_spec.inputs}
    for name in ("latency_budget_ms", "test_hours", "feature_batch_hours", "training_days", "late_days"):
        assert f"`{name}`" in TEXT
        assert name in known


def test_objects_that_kubectl_is_asked_for_exist() -> None:
    objects, seen = _objects(), 0
    for command in (command for command in COMMANDS if "kubectl" in command):
        words = command.split(" -- ")[0]
        for kind, name in re.findall(rf"\b({'|'.join(KINDS)})[/ ]([a-z][a-z0-9-]+)", words):
            if name in ("generic",):
                continue
            seen += 1
            assert (KINDS[kind], name) in objects, f"{kind}/{name}: no manifest has it: {command}"
        for name in re.findall(r"\b(?:exec|describe pod) (?:-it )?([a-z][a-z0-9-]+)", words):
            assert ("Pod", name) in objects, command
        for name in re.findall(r"create secret generic ([a-z0-9-]+)", words):
            assert ("Secret", name) in objects, command
        for name in re.findall(r"(?<= -n )[a-z]+", words):
            assert name in ("evergreen", "kubeflow"), command
    assert seen > 15


def test_the_picture_of_the_cluster_knows_every_network_policy_and_none_that_is_not() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = re.search(r"^## The cluster\n(.*?)^### ", page, flags=re.DOTALL | re.MULTILINE)
    assert section is not None
    policies = {name for kind, name in _objects() if kind == "NetworkPolicy"}
    told = set(re.findall(r"`([a-z-]+)`", section[1]))
    assert policies <= told
    rows = re.findall(r"^\| (`[a-z-]+`.*?) \| ", section[1], flags=re.MULTILINE)
    for row in rows[: rows.index(next(row for row in rows if "`gateway`" in row)) + 1]:
        assert set(re.findall(r"`([a-z-]+)`", row)) - {"production", "canary"} <= policies


def test_files_of_the_repository_exist() -> None:
    paths = {
        word
        for command in COMMANDS
        for word in re.findall(r"(?<![\w/.:$-])(?:manifests|examples|pipelines|docs)/[\w./-]+", command)
    }
    assert len(paths) > 4
    for path in paths - {f"pipelines/compiled/{name}.yaml" for name in PIPELINES}:
        assert (ROOT / path).exists(), path


def test_thresholds_that_the_runbook_names_are_those_of_the_decision() -> None:
    from evergreen.contracts.decision import DecisionConfig

    assert DecisionConfig().budget == 3
    assert DecisionConfig().season.days == 7
    defaults = {name: p.default for name, p in inspect.signature(monitoring_pipeline.pipeline_func).parameters.items()}
    assert defaults["training_days"] + defaults["late_days"] == 35
