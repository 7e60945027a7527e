"""The scorecard adds up, and every test and file that it names is there and runs by itself."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ml-test-score.md").read_text()
SECTIONS = {
    part.splitlines()[0]: re.findall(
        r"^\| (\d+) \| (.+?) \| (0|0\.5|1) \| (.+?) \| (.*?) ?\|$", part, flags=re.MULTILINE
    )
    for part in PAGE.split("\n## ")[1:]
}
NAMED = sorted(set(re.findall(r"`([a-z_]+/[^`\s]+|[^`\s]+::[^`\s]+)`", PAGE)))

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def test_every_section_has_its_seven_tests() -> None:
    assert list(SECTIONS) == ["Data", "Model", "Infrastructure", "Monitoring"]
    for rows in SECTIONS.values():
        assert [row[0] for row in rows] == [str(number) for number in range(1, 8)]


def test_points_add_up_and_the_least_section_is_the_score() -> None:
    sums = {name: sum(float(points) for _, _, points, _, _ in rows) for name, rows in SECTIONS.items()}
    told = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|$", PAGE.split("\n## ")[0], flags=re.MULTILINE))
    assert {name: float(points) for name, points in told.items()} == sums
    [score] = re.findall(r"^\| \*\*score\*\* \| \*\*([\d.]+)\*\* \|$", PAGE, flags=re.MULTILINE)
    assert float(score) == min(sums.values())


def test_a_point_needs_a_test_and_less_than_a_point_a_reason() -> None:
    for rows in SECTIONS.values():
        for _, test, points, what, missing in rows:
            assert float(points) == 0 or "`tests/" in what, test
            assert float(points) == 1 or missing, test


@pytest.mark.parametrize("named", NAMED)
def test_what_is_named_exists(named: str) -> None:
    file, _, name = named.partition("::")
    path = ROOT / file
    assert path.exists(), f"docs/ml-test-score.md names {file}"
    if name:
        functions = {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, FUNCTION)}
        assert name in functions, f"docs/ml-test-score.md names {named}"
        marks = [ast.unparse(mark) for mark in functions[name].decorator_list]
        assert "pytest.mark.heavy" not in marks, f"{named} does not run by itself: `make test` leaves it out"
    elif path.name.startswith("test_"):
        assert "def test_" in path.read_text(), f"{file} has no test"
