"""The figures and sentences about a finished loop are computed from its days."""

import pytest

from evergreen.contracts.decision import Verdict
from evergreen.contracts.errors import InputError
from evergreen.laboratory.results import LoopResults
from evergreen.laboratory.story import policy_name, tell


def _with_ours(results: LoopResults, change) -> LoopResults:
    """The same results, every day of the loop changed."""
    arms = [
        arm.model_copy(update={"days": tuple(change(day) for day in arm.days)}) if arm.policy == "ours" else arm
        for arm in results.arms
    ]
    return results.model_copy(update={"arms": tuple(arms)})


def test_change_is_measured_in_shares_of_the_oracle(results):
    change = tell(results).change
    assert (change.begins, change.low_day) == (5, 6)
    assert (change.before, change.low) == pytest.approx((0.75, 0.45))
    assert (change.noticed, change.answered) == (5, 6)
    assert change.recovered == 7
    assert change.won_back == pytest.approx((0.72 - 0.45) / (0.75 - 0.45))


def test_a_harder_day_for_everyone_is_no_loss(results):
    def harder(day):
        if day.day < 5:
            return day
        return day.model_copy(update={"expected_rate": 0.75 * 0.04, "oracle_rate": 0.04})

    change = tell(_with_ours(results, harder)).change
    assert change.loss == pytest.approx(0)
    assert change.won_back is None


def test_costs_are_compared_from_the_event_on(results):
    ours, never, daily = tell(results).costs
    assert [cost.policy for cost in (ours, never, daily)] == ["ours", "never", "daily"]
    assert ours.click_rate == pytest.approx(0.08 * (0.50 + 0.45 + 7 * 0.72) / 9)
    assert (ours.trainings, ours.released, ours.cpu_seconds) == (2, 1, 20.0)
    assert (daily.trainings, daily.released, daily.cpu_seconds) == (14, 14, 140.0)
    assert (never.oracle_share, never.trainings) == (pytest.approx(0.5), 0)


def test_headline_says_what_was_gained_and_what_it_cost(results):
    assert tell(results).headline.replace("\xa0", " ") == (
        "33 % more clicks than without retraining, for 14 % of what training daily costs"
    )


def test_headline_of_a_loop_that_did_worse_says_so(results):
    story = tell(_with_ours(results, lambda day: day.model_copy(update={"expected_rate": 0.03})))
    assert story.headline.replace("\xa0", " ").startswith("25 % fewer clicks than without retraining")


def test_loop_that_trains_nothing_has_won_nothing_back(results):
    idle = _with_ours(
        results,
        lambda day: day.model_copy(
            update={"retraining": None, "verdict": Verdict.KEEP, "raised": (), "model_versions": {"dlrm-0": 9}}
        ),
    )
    story = tell(idle)
    assert (story.change.noticed, story.change.answered, story.change.won_back) == (None, None, None)
    assert "The monitors raised nothing. No other model has served since." in story.paragraphs[0]


def test_recovery_that_is_not_enough_is_told_of_the_last_day(results):
    story = tell(_with_ours(results, lambda d: d.model_copy(update={"expected_rate": 0.08 * 0.6}) if d.day > 6 else d))
    assert story.change.recovered is None
    assert story.change.won_back == pytest.approx(0.5)
    assert "By the last day 50\xa0% of the loss was won back." in story.paragraphs[0]


def test_going_back_to_a_better_model_wins_back_too(results):
    back = _with_ours(
        results,
        lambda day: day.model_copy(update={"retraining": None, "model_versions": {"a": 6, "b": 4 + 9 * (day.day > 6)}}),
    )
    assert tell(back).change.won_back == pytest.approx(0.9)


def test_trainings_are_told_with_what_became_of_them(results):
    def refused(day):
        training = day.retraining and day.retraining.model_copy(update={"released": False})
        return day.model_copy(update={"retraining": training})

    words = "The loop trained 2 models on the evenings of days 2 and 6; "
    assert f"{words}1 went out, 1 did not pass." in tell(results).paragraphs[0]
    assert f"{words}none passed." in tell(_with_ours(results, refused)).paragraphs[0]


def test_schedule_alone_does_not_count_as_noticing(results):
    on_schedule = _with_ours(
        results, lambda day: day.model_copy(update={"raised": ("schedule",) if day.day < 9 else ("quality",)})
    )
    assert tell(on_schedule).change.noticed == 9


def test_alarms_and_failed_calls_are_told(results):
    alarmed = _with_ours(
        results,
        lambda d: d.model_copy(update={"verdict": Verdict.ALARM, "failures": 2}) if d.day in (8, 9) else d,
    )
    happened, compared = tell(alarmed).paragraphs
    assert "It raised an alarm on the evenings of days 8 and 9." in happened
    assert "4 calls to the loop's server failed." in compared


def test_stable_world_has_no_event(make_results):
    story = tell(make_results("stable"))
    assert story.change is None
    assert story.costs[0].click_rate == pytest.approx(0.08 * (5 * 0.75 + 0.50 + 0.45 + 7 * 0.72) / 14)


def test_loop_alone_is_told_against_the_oracle(make_results):
    story = tell(make_results(policies=("ours",)))
    assert story.headline == "67\xa0% of the clicks that an oracle gets"
    assert len(story.costs) == 1


def test_results_without_the_loop_are_refused(make_results):
    with pytest.raises(InputError, match=r"'ours': no days of it among the results \(never\)"):
        tell(make_results(policies=("never",)))


def test_policies_have_names_for_people():
    assert [policy_name(p) for p in ("ours", "daily", "every-3-days")] == [
        "the loop",
        "retrained daily",
        "retrained every 3 days",
    ]
