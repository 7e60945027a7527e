"""The gate: quiet in a world that stays, awake in one that moves, silent where there is too little to say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import pyarrow as pa
import pytest

from evergreen.contracts.monitoring_report import Aspect, DriftFinding, DriftStatus
from evergreen.monitoring.gate import IN_SERVICE, SAME_WEEKDAY, TRAINING, GateConfig, drift_gate, drift_of_column
from evergreen.monitoring.profile import Profile, fit_cells, make_profile

NUMBERS = tuple(f"number_{i}" for i in range(8))
CATEGORIES = ("category_0", "category_1")


def rows(num_users: int, seed: int, *, shift: Mapping[str, float] | None = None) -> pa.Table:
    """Ten rows a user or so; half of a number's variance lies between users, who also have a favourite category."""
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_users), rng.geometric(0.1, num_users))
    num_rows = len(users)
    columns: dict[str, object] = {"user_id": [f"s{seed}u{user}" for user in users]}
    for name in NUMBERS:
        values = rng.normal(size=num_users)[users] + rng.normal(size=num_rows)
        columns[name] = values / np.sqrt(2) + (shift or {}).get(name, 0.0)
    for name in CATEGORIES:
        favourite = rng.integers(5, size=num_users)[users]
        columns[name] = np.array(list("abcde"))[
            np.where(rng.random(num_rows) < 0.5, favourite, rng.integers(5, size=num_rows))
        ]
    return pa.table(columns)


@cache
def training() -> Profile:
    table = rows(3_000, seed=0)
    return make_profile([table], fit_cells(table.drop_columns(["user_id"])))


def profile(table: pa.Table) -> Profile:
    return make_profile([table], training().cells)


def judge(table: pa.Table, **options: object) -> DriftFinding:
    return drift_gate(profile(table), {TRAINING: training()}, **options)


def replaced(table: pa.Table, **columns: object) -> pa.Table:
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return table


def test_a_world_that_stays_raises_no_alarm() -> None:
    statuses = [judge(rows(num_users, seed)).status for seed, num_users in enumerate([200, 300, 600] * 20, start=1)]
    assert statuses.count(DriftStatus.DRIFTED) <= 1  # of 60, when 0.12 are promised
    assert statuses.count(DriftStatus.UNKNOWN) == 0


def test_without_the_users_the_same_world_would_raise_alarms() -> None:
    def by_row(table: pa.Table) -> pa.Table:
        return replaced(table, user_id=[f"row{i}" for i in range(table.num_rows)])

    table = by_row(rows(3_000, seed=0))
    reference = make_profile([table], fit_cells(table.drop_columns(["user_id"])))
    config = GateConfig(max_false_discoveries=0.05, min_effective_users=10)
    windows = [make_profile([by_row(rows(60, seed))], reference.cells) for seed in range(1, 21)]
    naive = [drift_gate(window, {TRAINING: reference}, config=config).status for window in windows]
    aware = [judge(rows(60, seed), config=config).status for seed in range(1, 21)]
    assert naive.count(DriftStatus.DRIFTED) > 10 > 4 > aware.count(DriftStatus.DRIFTED)


def test_a_shift_of_two_columns_of_ten_is_caught_within_two_windows() -> None:
    shift = {"number_1": 0.3, "number_5": -0.3}
    caught = [
        any(judge(rows(400, 1_000 + 2 * pair + k, shift=shift)).status is DriftStatus.DRIFTED for k in range(2))
        for pair in range(12)
    ]
    assert all(caught)
    finding = judge(rows(1_000, seed=77, shift=shift))
    assert set(finding.columns) == set(shift)
    assert finding.details["number_5"].against[TRAINING].aspects[Aspect.LOCATION].effect == pytest.approx(-0.3, abs=0.1)
    assert finding.score == pytest.approx(0.2)


def test_a_tiny_shift_is_no_drift_however_significant() -> None:
    finding = judge(rows(20_000, seed=9, shift={"number_0": 0.09}))
    test = finding.details["number_0"].against[TRAINING].aspects[Aspect.LOCATION]
    assert test.adjusted_p_value < 0.005
    assert finding.status is DriftStatus.STABLE and not test.drifted


def test_few_users_decide_nothing_however_many_rows_they_have() -> None:
    table = rows(20, seed=3, shift=dict.fromkeys(NUMBERS, 2.0))
    many = pa.concat_tables([table] * 50)
    for window in (table, many):
        finding = judge(window)
        assert (finding.status, finding.score) == (DriftStatus.UNKNOWN, None)
        assert "effective users, at least 50 are needed" in finding.reason


def test_one_loud_user_is_not_the_world() -> None:
    loud = replaced(rows(300, seed=5, shift=dict.fromkeys(NUMBERS, 5.0)), user_id=["bot"] * rows(300, seed=5).num_rows)
    window = pa.concat_tables([rows(300, seed=4), loud])
    assert judge(window).status is DriftStatus.UNKNOWN  # half of the rows are one user's


def test_a_feature_that_turns_to_zeros_drifts_at_once() -> None:
    table = rows(200, seed=6)
    finding = judge(replaced(table, number_2=np.zeros(table.num_rows)))
    assert finding.columns == ("number_2",)
    assert finding.details["number_2"].against[TRAINING].aspects[Aspect.SHAPE].drifted


def test_a_feature_that_goes_missing_drifts() -> None:
    table = rows(300, seed=6)
    rng = np.random.default_rng(0)
    part = pa.array(table["number_2"].to_numpy(), mask=rng.random(table.num_rows) < 0.2)
    for values, share in ((part, 0.2), (pa.nulls(table.num_rows, pa.float64()), 1.0)):
        finding = judge(replaced(table, number_2=values))
        test = finding.details["number_2"].against[TRAINING].aspects[Aspect.MISSING]
        assert finding.columns == ("number_2",) and test.drifted
        assert test.effect == pytest.approx(share, abs=0.03)


def test_a_category_that_grows_and_a_new_one_drift() -> None:
    table = rows(600, seed=8)
    rng = np.random.default_rng(0)
    for value in ("a", "never seen"):
        moved = np.where(rng.random(table.num_rows) < 0.3, value, table["category_1"].to_numpy(zero_copy_only=False))
        assert judge(replaced(table, category_1=moved)).columns == ("category_1",)


def test_wider_spread_at_the_same_mean_is_drift_of_the_shape() -> None:
    table = rows(800, seed=10)
    finding = judge(replaced(table, number_4=table["number_4"].to_numpy() * 1.6))
    aspects = finding.details["number_4"].against[TRAINING].aspects
    assert finding.columns == ("number_4",)
    assert aspects[Aspect.SHAPE].drifted and not aspects[Aspect.LOCATION].drifted


def test_tiny_movements_of_a_nearly_constant_value_are_no_drift() -> None:
    """A smoothed rate is its prior for most users, and the prior moves a little every day."""

    def rate(table: pa.Table, prior: float, seed: int) -> pa.Table:
        rng = np.random.default_rng(seed)
        rates = np.where(rng.random(table.num_rows) < 0.8, prior, rng.random(table.num_rows) * 0.2)
        return table.append_column("rate", pa.array(rates))

    table = rate(rows(2_000, seed=0), 0.0200, seed=0)
    reference = make_profile([table], fit_cells(table.select(["rate"])))
    window = make_profile([rate(rows(800, seed=1), 0.0201, seed=1)], reference.cells)
    test = drift_gate(window, {TRAINING: reference}).details["rate"].against[TRAINING].aspects[Aspect.SHAPE]
    assert test.p_value < 1e-6 and not test.drifted


def test_what_the_training_data_had_on_such_days_is_seasonal() -> None:
    weekend = {"number_0": 0.5, "number_3": 0.5}
    references = {TRAINING: training(), SAME_WEEKDAY: profile(rows(800, seed=11, shift=weekend))}
    finding = drift_gate(profile(rows(500, seed=12, shift=weekend)), references)
    assert finding.status is DriftStatus.SEASONAL
    assert set(finding.columns) == set(weekend) and finding.score == 0
    other = drift_gate(
        profile(rows(500, seed=12, shift={"number_0": -0.5, "number_3": 0.5, "number_6": 0.5})), references
    )
    assert other.status is DriftStatus.DRIFTED
    assert set(other.columns) == {"number_0", "number_6"}
    assert other.details["number_3"].status is DriftStatus.SEASONAL


def test_a_weekday_with_too_few_users_clears_nothing() -> None:
    weekend = {"number_0": 0.5, "number_3": 0.5}
    references = {TRAINING: training(), SAME_WEEKDAY: profile(rows(15, seed=13, shift=weekend))}
    finding = drift_gate(profile(rows(500, seed=12, shift=weekend)), references)
    assert finding.status is DriftStatus.DRIFTED
    assert finding.details["number_0"].against[SAME_WEEKDAY].drifted is None


CHOSEN = {"number_0": 0.5, "number_3": 0.5}
"""A model shows other items than those that it learned from."""


def test_what_the_model_shows_since_its_first_days_is_stable() -> None:
    window = profile(rows(500, seed=12, shift=CHOSEN))
    assert drift_gate(window, {TRAINING: training()}).columns == tuple(CHOSEN)
    in_service = profile(rows(800, seed=11, shift=CHOSEN))
    finding = drift_gate(window, {TRAINING: training(), IN_SERVICE: in_service})
    assert (finding.status, finding.score, finding.columns) == (DriftStatus.STABLE, 0, ())
    assert finding.details["number_0"].against[TRAINING].drifted, "it is still told"


def test_what_is_unlike_training_and_first_days_drifts() -> None:
    references = {TRAINING: training(), IN_SERVICE: profile(rows(800, seed=11, shift=CHOSEN))}
    moved = {**CHOSEN, "number_0": 1.0, "number_6": 0.5}
    finding = drift_gate(profile(rows(500, seed=12, shift=moved)), references)
    assert finding.status is DriftStatus.DRIFTED and set(finding.columns) == {"number_0", "number_6"}
    assert finding.details["number_3"].status is DriftStatus.STABLE
    column = finding.details["number_0"]
    effects = [column.against[label].aspects[Aspect.LOCATION].effect for label in (TRAINING, IN_SERVICE)]
    assert effects == pytest.approx([1.0, 0.5], abs=0.15)
    assert column.main is column.against[IN_SERVICE] and "number_0 (location +0.4" in finding.reason


def test_what_goes_back_to_the_training_data_is_no_drift() -> None:
    references = {TRAINING: training(), IN_SERVICE: profile(rows(800, seed=11, shift=CHOSEN))}
    assert drift_gate(profile(rows(500, seed=12)), references).status is DriftStatus.STABLE


def test_weekday_that_first_days_did_not_have_is_seasonal() -> None:
    weekend = {name: shift + 0.5 for name, shift in CHOSEN.items()}
    references = {
        TRAINING: training(),
        IN_SERVICE: profile(rows(800, seed=11, shift=CHOSEN)),
        SAME_WEEKDAY: profile(rows(800, seed=13, shift=weekend)),
    }
    finding = drift_gate(profile(rows(500, seed=12, shift=weekend)), references)
    assert finding.status is DriftStatus.SEASONAL and set(finding.columns) == set(weekend)


def test_first_days_with_too_few_users_clear_nothing() -> None:
    references = {TRAINING: training(), IN_SERVICE: profile(rows(15, seed=13, shift=CHOSEN))}
    finding = drift_gate(profile(rows(500, seed=12, shift=CHOSEN)), references)
    assert finding.status is DriftStatus.DRIFTED and set(finding.columns) == set(CHOSEN)
    column = finding.details["number_0"]
    assert column.main is column.against[TRAINING] and "effective users" in (column.against[IN_SERVICE].reason or "")


def test_one_column_is_scored_against_the_first_days_where_there_are_such() -> None:
    window = profile(rows(800, seed=19, shift={"number_0": 0.4}))
    in_service = profile(rows(800, seed=11, shift={"number_0": 0.4}))
    alone = drift_of_column("number_0", window, {TRAINING: training()})
    beside = drift_of_column("number_0", window, {TRAINING: training(), IN_SERVICE: in_service})
    assert alone.status is DriftStatus.DRIFTED and alone.score == pytest.approx(4.0, abs=1.0)
    assert beside.status is DriftStatus.STABLE and beside.score is not None and beside.score < 1


def test_columns_the_model_does_not_care_about_do_not_raise_the_alarm() -> None:
    table = rows(600, seed=14, shift={"number_0": 1.0})
    weights = {**dict.fromkeys((*NUMBERS, *CATEGORIES), 1.0), "number_0": 0.1, "not compared": 50.0}
    finding = judge(table, weights=weights)
    assert finding.status is DriftStatus.STABLE and finding.columns == ("number_0",)
    assert finding.score == pytest.approx(0.1 / 9.1)
    assert judge(table, weights={"number_0": 3.0, "number_1": 7.0}).score == pytest.approx(0.3)


def test_heavier_columns_are_named_first() -> None:
    table = rows(600, seed=15, shift={"number_0": 1.0, "number_6": 1.0})
    assert judge(table, weights={"number_0": 1.0, "number_6": 2.0}).columns == ("number_6", "number_0")


def test_ids_are_not_tested() -> None:
    table = rows(300, seed=16)
    cells = fit_cells(table, ids=["user_id"])
    one = make_profile([table], cells)
    finding = drift_gate(make_profile([rows(300, seed=17)], cells), {TRAINING: one})
    assert "user_id" not in finding.details and "ids" in finding.left_out["user_id"]
    assert finding.status is DriftStatus.STABLE


def test_more_columns_ask_for_more_evidence() -> None:
    """Benjamini-Hochberg: what one column alone would show is not enough among many."""
    table = rows(400, seed=18, shift={"number_0": 0.2})
    among_many = judge(table).details["number_0"].against[TRAINING].aspects[Aspect.LOCATION]
    alone = drift_of_column("number_0", profile(table), {TRAINING: training()}).details["number_0"]
    alone_test = alone.against[TRAINING].aspects[Aspect.LOCATION]
    assert alone_test.p_value == among_many.p_value
    assert alone_test.adjusted_p_value < among_many.adjusted_p_value


def test_one_column_is_scored_in_units_of_its_threshold() -> None:
    table = rows(800, seed=19, shift={"number_0": 0.4})
    finding = drift_of_column("number_0", profile(table), {TRAINING: training()})
    assert finding.status is DriftStatus.DRIFTED
    assert finding.score == pytest.approx(4.0, abs=1.0)
    assert finding.reason.startswith("number_0: location +0.")


def test_what_does_not_fit_together_is_an_error() -> None:
    window = profile(rows(100, seed=20))
    other = make_profile([rows(100, seed=21)], fit_cells(rows(100, seed=21)))
    with pytest.raises(ValueError, match="'training' is needed"):
        drift_gate(window, {SAME_WEEKDAY: training()})
    with pytest.raises(ValueError, match="not counted in the cells of 'training'"):
        drift_gate(window, {TRAINING: other})
    with pytest.raises(ValueError, match="weight of 'number_0': -1"):
        drift_gate(window, {TRAINING: training()}, weights={"number_0": -1.0})
    with pytest.raises(ValueError, match="column 'price': not among"):
        drift_of_column("price", window, {TRAINING: training()})
