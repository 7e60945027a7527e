from __future__ import annotations

from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from evergreen.contracts.errors import InputError
from evergreen.contracts.mapping import Mapping
from evergreen.simulator.config import SimulatorConfig
from evergreen.simulator.log import EVENTS, TRUTH, simulate_log
from evergreen.simulator.population import CRAWLER, DEVICES, SILENT_BOT
from evergreen.simulator.world import World

SMALL = SimulatorConfig(num_users=200, num_items=100, num_days=2, events_per_day=1_000)


def _files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def _column(table, name):
    return table[name].to_numpy()


def test_same_config_gives_the_same_bytes(tmp_path):
    simulate_log(SMALL, tmp_path / "one")
    simulate_log(SMALL, tmp_path / "two")
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_another_seed_gives_another_log(tmp_path):
    simulate_log(SMALL, tmp_path / "one")
    simulate_log(SMALL.model_copy(update={"seed": 1}), tmp_path / "two")
    one, two = _files(tmp_path / "one"), _files(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(one[name] != two[name] for name in one)


def test_a_longer_log_begins_like_a_shorter_one_of_the_same_world(tmp_path):
    """Nothing that happens on a day may depend on how the log goes on, given the same items and traffic."""
    fixed = {"new_item_fraction": 0, "new_user_fraction": 0, "start": "2025-01-06T00:00:00Z", "num_crawlers": 0}
    for days in (7, 14):
        config = SimulatorConfig(num_users=100, num_items=50, num_days=days, events_per_day=200, **fixed)
        simulate_log(config, tmp_path / str(days))
    short, long = _files(tmp_path / "7"), _files(tmp_path / "14")
    assert all(short[name] == long[name] for name in short if name != "config.json")


def test_log_has_exactly_the_events_asked_for(simulation):
    config = simulation.config
    assert simulation.events.num_rows == simulation.truth.num_rows == config.num_days * config.events_per_day
    assert simulation.events.schema.equals(EVENTS)
    assert simulation.truth.schema.equals(TRUTH)


def test_one_file_a_day_holds_that_day_in_time_order(simulation):
    files = sorted((simulation.path / "events").iterdir())
    assert [file.stem for file in files] == [f"2025-01-0{day}" for day in range(1, 6)]
    for file in files:
        times = pq.read_table(file)["event_timestamp"]
        assert {time.date() for time in (times[0].as_py(), times[-1].as_py())} == {date.fromisoformat(file.stem)}
        assert np.all(np.diff(times.to_numpy()) >= np.timedelta64(0, "us"))


def test_about_two_percent_are_clicked(simulation):
    assert 0.01 < pc.mean(simulation.events["clicked"]).as_py() < 0.03


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_click_rate_holds_for_other_seeds(tmp_path, seed):
    simulate_log(SimulatorConfig(num_days=2, events_per_day=5_000, seed=seed), tmp_path / "log")
    truth = pq.read_table(tmp_path / "log" / "truth")
    assert 0.01 < pc.mean(truth["click_probability"]).as_py() < 0.03


def test_first_position_is_clicked_far_more_though_not_more_relevant(simulation):
    people = ~_column(simulation.truth, "is_bot")
    position, relevance = _column(simulation.truth, "position"), _column(simulation.truth, "relevance")
    clicked = _column(simulation.events, "clicked")
    first, low = people & (position == 1), people & (position >= 4)
    assert clicked[first].mean() > 2 * clicked[low].mean()
    assert relevance[first].mean() == pytest.approx(relevance[low].mean(), rel=0.15)


def test_truth_rows_belong_to_event_rows(simulation):
    for name in ("request_id", "item_id", "position"):
        assert simulation.events[name].equals(simulation.truth[name])


def test_true_probabilities_agree_with_the_clicks_in_every_tenth(simulation):
    probability, clicked = _column(simulation.truth, "click_probability"), _column(simulation.events, "clicked")
    for tenth in np.array_split(np.argsort(probability), 10):
        expected, variance = probability[tenth].sum(), (probability[tenth] * (1 - probability[tenth])).sum()
        assert abs(clicked[tenth].sum() - expected) < 4.5 * np.sqrt(variance) + 1e-9


def test_truth_is_out_of_reach_of_the_mapping(simulation):
    mapping = Mapping.load("simulated")
    reached = {file.relative_to(simulation.path).parts[0] for file in simulation.path.glob(mapping.source.pattern)}
    assert reached == {"events"}
    assert not {"click_probability", "relevance", "is_bot"} & set(EVENTS.names)


def test_mapping_reads_every_column_of_the_log():
    mapping = Mapping.load("simulated")
    named = set(mapping.columns.model_dump(exclude_none=True).values())
    named |= {mapping.timestamp.column, mapping.label.column, mapping.rating.column}
    named |= {feature.column for feature in mapping.all_features.values()}
    assert named == set(EVENTS.names)


def test_new_items_keep_appearing(simulation):
    day = _column(simulation.events, "event_timestamp").astype("datetime64[D]").astype(int)
    day -= day.min()
    items = simulation.events["item_id"].to_numpy()
    first_day = {}
    for item, shown in zip(items, day, strict=True):
        first_day.setdefault(item, shown)
    appeared = np.bincount(list(first_day.values()), minlength=5)
    assert (appeared[1:] >= 10).all()


def test_no_item_is_shown_before_its_publication(simulation):
    world = World(simulation.config)
    published = dict(zip(world.items.ids, world.items.published, strict=True))
    shown = zip(simulation.events["item_id"].to_pylist(), _column(simulation.events, "event_timestamp"), strict=True)
    assert all(published[item] <= at for item, at in shown)


def test_slates_have_five_to_ten_different_items_in_order(simulation):
    grouped = simulation.events.group_by("request_id").aggregate(
        [("item_id", "count"), ("position", "max"), ("position", "min")]
        + [(name, "count_distinct") for name in ("item_id", "user_id", "event_timestamp")]
    )
    size = _column(grouped, "item_id_count")
    assert size.min() == 5 and size.max() == 10
    assert (_column(grouped, "item_id_count_distinct") == size).all()
    assert (_column(grouped, "position_max") == size).all() and set(_column(grouped, "position_min")) == {1}
    assert (
        set(_column(grouped, "user_id_count_distinct"))
        == set(_column(grouped, "event_timestamp_count_distinct"))
        == {1}
    )
    ids, positions = simulation.events["request_id"].to_pylist(), simulation.events["position"].to_pylist()
    assert all(
        after == before + 1 for (one, before), (two, after) in pairwise(zip(ids, positions, strict=True)) if one == two
    )


def test_only_clicked_items_have_dwell_and_some_a_rating(simulation):
    clicked = _column(simulation.events, "clicked")
    rating = simulation.events["rating"].to_numpy()
    assert (np.isnan(simulation.events["dwell_seconds"].to_numpy()) == ~clicked).all()
    rated = ~np.isnan(rating)
    assert clicked[rated].all()
    assert 0.15 < rated.sum() / clicked.sum() < 0.45
    assert set(rating[rated]) <= {1.0, 2.0, 3.0, 4.0, 5.0} and len(set(rating[rated])) >= 4


def test_a_click_comes_seconds_after_its_impression_and_within_the_attribution_window(simulation):
    events = simulation.events
    clicked = events["clicked"].to_numpy()
    assert (events["click_timestamp"].is_null().to_numpy() == ~clicked).all()
    events = events.filter(events["clicked"])
    delays = (_column(events, "click_timestamp") - _column(events, "event_timestamp")) / np.timedelta64(1, "s")
    assert delays.min() > 0 and delays.max() < Mapping.load("simulated").split.attribution_window.total_seconds()
    people = ~_column(simulation.truth, "is_bot")[clicked]
    assert 4 < np.median(delays[people]) < 9
    assert np.log(delays[people]).std() == pytest.approx(1.0, abs=0.15)


def test_bots_are_there_and_only_the_truth_tells(simulation):
    world = World(simulation.config)
    users, clicked = simulation.events["user_id"].to_numpy(), _column(simulation.events, "clicked")
    crawler = users == world.users.ids[world.users.of_kind(CRAWLER)[0]]
    silent = users == world.users.ids[world.users.of_kind(SILENT_BOT)[0]]
    assert crawler.sum() >= 40 and clicked[crawler].mean() > 0.9
    assert silent.sum() >= 900 and clicked[silent].sum() == 0
    assert ((crawler | silent) == _column(simulation.truth, "is_bot")).all()
    kinds = np.where(crawler, "crawler", np.where(silent, "silent_bot", "person"))
    assert kinds.tolist() == simulation.truth["user_kind"].to_pylist()


def test_unknown_attributes_are_null_for_a_few(simulation):
    for name in ("user_segment", "user_country", "price"):
        assert 0 < simulation.events[name].null_count / simulation.events.num_rows < 0.2


def test_most_of_what_can_be_known_is_interaction(simulation):
    """Log loss of the oracle, and of one that knows all main effects exactly but no interaction."""
    world = World(simulation.config)
    index = {name: {key: n for n, key in enumerate(ids)} for name, ids in _ids(world).items()}
    columns = {name: np.array([index[name][key] for key in simulation.events[name].to_pylist()]) for name in index}
    times = _column(simulation.events, "event_timestamp").astype("datetime64[us]")
    main, interaction = np.empty(len(times)), np.empty(len(times))
    for day in range(simulation.config.num_days):
        if day:
            world.advance()
        rows = times.astype("datetime64[D]") == world.midnight.astype("datetime64[D]")
        utility = world.utility(
            *(columns[name][rows] for name in ("user_id", "item_id")), times[rows], columns["device"][rows]
        )
        main[rows], interaction[rows] = utility.main, utility.interaction
    people = ~_column(simulation.truth, "is_bot")
    assert interaction[people].std() > main[people].std()

    truth, position = _column(simulation.truth, "click_probability")[people], _column(simulation.truth, "position")
    examined = position[people] ** -simulation.config.position_bias_exponent
    without = examined / (1 + np.exp(-main[people]))
    without *= truth.mean() / without.mean()
    base = _cross_entropy(truth, np.full_like(truth, truth.mean()))
    assert _cross_entropy(truth, truth) / base < 0.85
    assert _cross_entropy(truth, without) / base > 0.92


def _ids(world):
    return {"user_id": world.users.ids, "item_id": world.items.ids, "device": DEVICES}


def _cross_entropy(truth, predicted):
    return -(truth * np.log(predicted) + (1 - truth) * np.log1p(-predicted)).mean()


def test_earlier_simulation_is_replaced_whole(tmp_path):
    simulate_log(SMALL, tmp_path / "log")
    simulate_log(SMALL.model_copy(update={"num_days": 1}), tmp_path / "log")
    assert len(list((tmp_path / "log" / "events").iterdir())) == 1
    assert SimulatorConfig.read(tmp_path / "log" / "config.json").num_days == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("thesis.txt", "years of work", "thesis.txt is not ours"),
        ("config.json", '{"learning_rate": 0.1}', "config.json is not that of a simulated log"),
        ("events/part-0.parquet", "somebody's", "config.json is missing"),
    ],
)
def test_folder_with_other_things_is_left_alone(tmp_path, name, content, told):
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(InputError, match=told):
        simulate_log(SMALL, tmp_path / "mine")
    assert _files(tmp_path / "mine") == {name: content.encode()}


def test_file_in_place_of_the_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("years of work")
    with pytest.raises(InputError, match="is a file"):
        simulate_log(SMALL, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "years of work"


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "log").mkdir()
    simulate_log(SMALL, tmp_path / "log")
    assert (tmp_path / "log" / "config.json").is_file()
