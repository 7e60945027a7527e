"""`evergreen demo` refuses what cannot work before it starts, and tells a day in a line."""

from datetime import date

from click.testing import CliRunner

from evergreen.cli.demo import day_line, demo
from evergreen.contracts.decision import Verdict
from evergreen.contracts.errors import InputError
from evergreen.laboratory.results import LoopDay


def _day(verdict: Verdict | None) -> LoopDay:
    return LoopDay(
        day=5,
        date=date(2025, 2, 5),
        model_versions={},
        requests=1_000,
        click_rate=0.05,
        expected_rate=0.0512,
        oracle_rate=0.08,
        random_rate=0.02,
        failures=0,
        verdict=verdict,
        reason="quality: normalized entropy +12 %.",
    )


def test_unknown_scenario_is_refused_and_the_others_are_listed(tmp_path):
    result = CliRunner().invoke(demo, ["--out", str(tmp_path / "out"), "--scenario", "winter"])
    assert isinstance(result.exception, InputError)
    assert "taste-shift" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_line_of_a_day_has_its_rates_and_the_reason_of_an_act():
    line = day_line("ours", _day(Verdict.RETRAIN))
    assert "day  5  Wed 2025-02-05  expected  5.12% of at best  8.00%" in line
    assert "normalized entropy +12 %" in line
    assert "normalized entropy" not in day_line("ours", _day(Verdict.KEEP))
    assert day_line("never", _day(None)).endswith("8.00%")
