"""A request scored in halves gets the scores of whole rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import Feature, FeatureOrigin, Side
from evergreen.models.dcn_v2 import DCNv2
from evergreen.models.deepfm import DeepFM
from evergreen.models.encoding import Encoder, EncoderConfig
from evergreen.models.layers import FirstOrder, hidden_layers
from evergreen.models.registry import MODEL_NAMES
from evergreen.models.split.halves import (
    FoldedLayers,
    Half,
    Halves,
    PartialFirstOrder,
    PlainModel,
    SplitModel,
    half_of,
)
from evergreen.models.split.networks import split_model
from evergreen.models.split.request import PairColumns, PairEncoder, UserEncoder
from evergreen.models.split.scorer import SplitScorer
from tests.unit.models.small_package import (
    CATEGORICAL,
    FEATURES,
    NUM_ITEMS,
    NUM_PAIRS,
    NUMERIC,
    Request,
    make_package,
    some_table,
)
from tests.unit.models.small_spec import SPEC, some_rows

VARIANTS: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in MODEL_NAMES),
    ("deepfm", {"batch_norm": True}),
    ("deepfm", {"hidden": (), "numeric_interactions": True}),
    ("factorization_machine", {"numeric_interactions": False}),
    ("two_tower", {"hidden": ()}),
    ("dlrm", {"bottom": (), "top": ()}),
    ("dcn_v2", {"batch_norm": True, "cross_layers": 3, "rank": 5}),
    ("dcn_v2", {"hidden": (), "cross_layers": 1}),
    ("dcn_v2", {"structure": "stacked", "cross_layers": 3, "rank": 4}),
    ("dcn_v2", {"structure": "stacked", "hidden": ()}),
    ("dcn_v2", {"rank": None}),
    ("transformer", {"layers": 2, "numeric_interactions": True}),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=lambda value: str(value))
def test_scores_are_those_of_whole_rows(name: str, settings: dict[str, object]) -> None:
    package = make_package(name, **settings)
    scorer = SplitScorer.prepare(package, Request.make(0).items)
    for seed in range(6):
        request = Request.make(seed)
        probability = scorer.score(request.user, request.pairs, request.rows)
        assert probability.std() > 1e-3
        np.testing.assert_allclose(probability, package.predict(request.whole), rtol=0, atol=1e-5)
        logits = scorer.logits(request.user, request.pairs, request.rows)
        np.testing.assert_allclose(logits, package.scores(request.whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=lambda value: str(value))
def test_many_requests_at_once_score_as_one_by_one(name: str, settings: dict[str, object]) -> None:
    scorer = SplitScorer.prepare(make_package(name, **settings), Request.make(0).items)
    sizes = (30, 17, 31, 0, 1, 5, 16, 1, 30)  # of like size and not, some filled up, one alone
    requests = [Request.make(seed, num_pairs=size).arguments for seed, size in enumerate(sizes)]
    many = scorer.score_many(requests)
    assert [len(scores) for scores in many] == list(sizes)
    for request, scores in zip(requests, many, strict=True):
        np.testing.assert_allclose(scores, scorer.score(*request), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [(0, 0), (0, 6), (3, 6)], ids=str)
def test_many_histories_of_unlike_length_score_as_one_by_one(lengths: tuple[int, ...]) -> None:
    scorer = SplitScorer.prepare(make_package("transformer"), Request.make(0).items)
    requests = []
    for seed, length in enumerate(lengths):
        user, pairs, rows = Request.make(seed).arguments
        values = user.to_pylist()[0] | {"user_history": [f"i{number}" for number in range(1, 1 + length)]}
        requests.append((values, pairs, rows))
        without = scorer.score(values | {"user_history": []}, pairs, rows)
        assert np.array_equal(scorer.score(values, pairs, rows), without) is (length == 0)
    for request, scores in zip(requests, scorer.score_many(requests), strict=True):
        np.testing.assert_allclose(scores, scorer.score(*request), rtol=0, atol=1e-6)


def test_many_requests_may_bring_pairs_in_unlike_parts() -> None:
    scorer = SplitScorer.prepare(make_package("dcn_v2"), Request.make(0).items)
    names = ("user_category_rate_1d", "user_category_events_1d")
    requests: list[Any] = []
    for seed in range(6):
        user, pairs, rows = Request.make(seed).arguments
        if seed % 3:  # the same parts, whose values candidates share in some requests and not in others
            shared = np.column_stack([pairs[name].to_numpy() for name in names])
            of = np.random.default_rng(seed).integers(-1, len(shared), NUM_PAIRS) if seed % 2 else None
            ages = PairColumns(("item_age_seconds",), pairs["item_age_seconds"].to_numpy()[:, None])
            pairs = [PairColumns(names, shared, of), ages]
        requests.append((user, pairs, rows))
    for chosen in (requests, [requests[place] for place in (1, 2, 4, 5)]):
        for request, scores in zip(chosen, scorer.score_many(chosen), strict=True):
            np.testing.assert_allclose(scores, scorer.score(*request), rtol=0, atol=1e-6)


def test_rows_too_many_of_one_request_do_not_make_up_for_those_of_another() -> None:
    scorer = SplitScorer.prepare(make_package("deepfm"), Request.make(0).items)
    first, second = Request.make(0), Request.make(1)
    requests = [(first.user, first.pairs, first.rows[:-1]), (second.user, second.pairs.slice(1), second.rows)]
    with pytest.raises(ValueError, match="30 rows for 29 candidates"):
        scorer.score_many(requests)


def test_many_requests_are_scored_in_chunks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = SplitScorer.prepare(make_package("deepfm"), Request.make(0).items)
    requests = [Request.make(seed).arguments for seed in range(5)]
    whole = scorer.score_many(requests)
    sizes = []
    join_each = SplitModel.join_each

    def spy(model: SplitModel, users: Half, items: Half, pairs: torch.Tensor) -> torch.Tensor:
        sizes.append(pairs.shape[:2])
        return join_each(model, users, items, pairs)

    monkeypatch.setattr(SplitModel, "join_each", spy)
    monkeypatch.setattr("evergreen.models.split.scorer._MOST_PAIRS", {"cpu": 70})
    np.testing.assert_allclose(np.stack(scorer.score_many(requests)), np.stack(whole), atol=1e-6)
    assert sizes == [(2, NUM_PAIRS), (2, NUM_PAIRS)]  # and one alone


@pytest.mark.parametrize("name", ["popularity", "dlrm", "dcn_v2", "transformer"])
def test_request_of_a_whole_catalogue_is_scored_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, request = SplitScorer.prepare(make_package(name), Request.make(0).items), Request.make(3)
    whole = scorer.score(*request.arguments)
    monkeypatch.setattr("evergreen.models.split.scorer._MOST_PAIRS", {"cpu": 7})
    np.testing.assert_allclose(scorer.score(*request.arguments), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_ratings_stay_within_their_range(name: str) -> None:
    package = make_package(name, kind=LogKind.RATINGS)
    request = Request.make(3)
    ratings = SplitScorer.prepare(package, request.items).score(request.user, request.pairs, request.rows)
    np.testing.assert_allclose(ratings, package.predict(request.whole), rtol=0, atol=1e-5)
    assert ratings.min() >= -2.0
    assert ratings.max() <= -1.0


@pytest.mark.parametrize("name", ["logistic_regression", "dlrm", "transformer"])
@pytest.mark.parametrize(
    "config",
    [EncoderConfig(max_categories=3, oov_buckets=4, num_hashes=2), EncoderConfig(max_categories=0, oov_buckets=50)],
)
def test_hashed_values_are_found_again(name: str, config: EncoderConfig) -> None:
    package = make_package(name, config=config)
    for seed in range(4):
        request = Request.make(seed)
        scorer = SplitScorer.prepare(package, request.items)
        scores = scorer.score(request.user, request.pairs, request.rows)
        np.testing.assert_allclose(scores, package.predict(request.whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_of_the_registry_is_cut(name: str) -> None:
    package = make_package(name)
    assert not isinstance(split_model(package.model, Halves(package.encoder.spec, FEATURES)), PlainModel)


def test_model_that_nobody_has_cut_is_computed_whole() -> None:
    class Other(DeepFM):
        def response(self, *inputs: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().response(*inputs)

    package = make_package("deepfm")
    package.model.__class__ = Other
    request = Request.make(2)
    scorer = SplitScorer.prepare(package, request.items)
    scores = scorer.score(request.user, request.pairs, request.rows)
    np.testing.assert_allclose(scores, package.predict(request.whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "lacking",
    [
        {FeatureOrigin.USER_CATEGORY, FeatureOrigin.ON_DEMAND},
        {FeatureOrigin.ITEM},
        {FeatureOrigin.USER, FeatureOrigin.CONTEXT, FeatureOrigin.ON_DEMAND},
    ],
    ids=["pairs", "items", "users"],
)
@pytest.mark.parametrize("name", ["logistic_regression", "factorization_machine", "deepfm", "dlrm", "dcn_v2"])
def test_a_half_may_be_empty(name: str, lacking: set[FeatureOrigin]) -> None:
    features = tuple(feature for feature in FEATURES if feature.origin not in lacking)
    package = make_package(name, features=features)
    request = Request.make(4, features=features)
    scorer = SplitScorer.prepare(package, request.items)
    user = {} if request.user.num_columns == 0 else request.user
    scores = scorer.score(user, request.pairs, request.rows)
    np.testing.assert_allclose(scores, package.predict(request.whole), rtol=0, atol=1e-5)


def test_two_towers_without_moments_keep_finished_item_vectors() -> None:
    features = tuple(feature for feature in FEATURES if feature.name != "item_age_seconds")
    package = make_package("two_tower", features=features)
    request = Request.make(5, features=features)
    scorer = SplitScorer.prepare(package, request.items)
    assert scorer.item_half[0].shape == (NUM_ITEMS + 1, package.model.config.output_dim)
    scores = scorer.score(request.user, request.pairs, request.rows)
    np.testing.assert_allclose(scores, package.predict(request.whole), rtol=0, atol=1e-5)


def test_rows_before_minus_one_or_past_the_end_are_refused() -> None:
    request = Request.make(0)
    scorer = SplitScorer.prepare(make_package("deepfm"), request.items)
    for row in (-2, NUM_ITEMS):
        request.rows[0] = row
        with pytest.raises(ValueError, match=rf"must be in \[-1, {NUM_ITEMS}\)"):
            scorer.score(request.user, request.pairs, request.rows)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_catalogue_may_be_empty(name: str) -> None:
    package = make_package(name)
    request = Request.make(0)
    scorer = SplitScorer.prepare(package, request.items.slice(0, 0))
    assert scorer.num_items == 0
    items = pa.table({f.name: pa.nulls(1) for f in FEATURES})
    whole = pa.table(
        {f.name: (items if half_of(f) is Side.ITEM else request.whole)[f.name].slice(0, 1) for f in FEATURES}
    )
    scores = scorer.score(request.user, request.pairs.slice(0, 1), np.array([-1]))
    np.testing.assert_allclose(scores, package.predict(whole), rtol=0, atol=1e-5)


def test_no_candidates_have_no_scores() -> None:
    request = Request.make(0)
    scorer = SplitScorer.prepare(make_package("deepfm"), request.items)
    assert scorer.score(request.user, request.pairs.slice(0, 0), request.rows[:0]).shape == (0,)


def test_pairs_may_come_in_parts_that_candidates_share() -> None:
    package = make_package("dcn_v2")
    request = Request.make(6)
    scorer = SplitScorer.prepare(package, request.items)
    of = np.random.default_rng(0).integers(-1, 3, size=NUM_PAIRS)
    shared = request.pairs.select(["user_category_rate_1d", "price", "user_category_events_1d"]).slice(0, 3)
    names = ("user_category_rate_1d", "price", "user_category_events_1d")
    parts = [
        PairColumns(names, np.column_stack([shared[name].to_numpy() for name in names]), of),
        PairColumns(("item_age_seconds",), request.pairs["item_age_seconds"].to_numpy()[:, None]),
    ]
    spread = shared.take(pa.array(of, mask=of < 0))
    columns = {name: request.pairs[name] for name in request.pairs.column_names}
    table = pa.table(columns | {name: spread[name] for name in names})
    apart, together = (scorer.score(request.user, pairs, request.rows) for pairs in (parts, table))
    np.testing.assert_allclose(apart, together, atol=1e-6)


def test_refresh_changes_the_named_items_and_not_the_scorer_in_use() -> None:
    package = make_package("dlrm")
    request = Request.make(7)
    scorer = SplitScorer.prepare(package, request.items)
    before = scorer.score(request.user, request.pairs, request.rows)
    rows, newer = np.array([2, 9]), some_table(2, seed=33)
    columns = {n: request.items[n].to_pylist() for n in request.items.column_names}
    for place, row in enumerate(rows):
        for name in columns:
            columns[name][row] = newer[name][place].as_py()
    fresh = SplitScorer.prepare(package, pa.table(columns, schema=request.items.schema))
    updated = scorer.updated(rows, newer)
    np.testing.assert_allclose(
        updated.score(request.user, request.pairs, request.rows),
        fresh.score(request.user, request.pairs, request.rows),
        atol=1e-6,
    )
    np.testing.assert_array_equal(scorer.score(request.user, request.pairs, request.rows), before)
    assert updated.package is scorer.package


@pytest.mark.parametrize("rows", [[0], [0, NUM_ITEMS], [-1, 0]])
def test_refresh_of_rows_that_do_not_exist_is_refused(rows: list[int]) -> None:
    scorer = SplitScorer.prepare(make_package("popularity"), Request.make(0).items)
    with pytest.raises(ValueError, match="rows"):
        scorer.updated(np.array(rows), some_table(2))


def encoders() -> tuple[Encoder, Halves]:
    config = EncoderConfig(history_length=4, multi_length=3, max_categories=20, oov_buckets=3, num_hashes=2)
    encoder = Encoder.fit(some_table(400, seed=9), FEATURES, config)
    return encoder, Halves(encoder.spec, FEATURES)


def test_user_is_encoded_to_the_bit_as_a_row_is() -> None:
    encoder, halves = encoders()
    users = UserEncoder(encoder, halves, None)
    strange = {
        "user_id": ["never seen", "u1", "\N{SNOWMAN}", ""],
        "user_events_1d": [float("inf"), -5.0, float("nan"), 1e300],
        "user_history": [["i1"] * 100, ["never", "i2", None], [], None],
        "user_age_seconds": [0.0, 7.0, None, -1e9],
        "hour": ["h1", "h99", None, "h2"],
        "device": [None, "d1", "d2", "d3"],
        "languages": [["l1", "l2", "l3", "l4", "l5"], [None], ["l1", "l1"], ["never"]],
    }
    schema = some_table(1).schema
    known = some_table(60, seed=4)
    odd = pa.table({n: pa.array(strange.get(n, [None] * 4), schema.field(n).type) for n in schema.names})
    for table in (known, odd):
        for row in range(table.num_rows):
            expected = halves.only(Side.USER, encoder.transform(table.slice(row, 1)).inputs())
            inputs, _ = users.encode(table.slice(row, 1).to_pylist()[0])
            for ours, theirs in zip(inputs, expected, strict=True):
                np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_text_that_is_no_unicode_is_unseen() -> None:
    encoder, halves = encoders()
    users = UserEncoder(encoder, halves, None)
    user = some_table(1).to_pylist()[0]
    inputs, _ = users.encode(user | {"device": "\ud800", "user_history": ["\udfff"], "languages": []})
    place = next(p for p, field in enumerate(encoder.categorical_fields) if field.state.name == "device")
    device = encoder.spec.categorical[place]
    assert device.unseen <= int(inputs.categorical[0, place]) < device.unseen + device.num_shared
    assert not inputs.bags.any()


@pytest.mark.parametrize("value", [7, 1.5, True, -3])
def test_category_that_is_no_string_is_read_as_in_training(value: float) -> None:
    encoder, halves = encoders()
    user = some_table(1).to_pylist()[0] | {"device": value}
    table = some_table(1).drop_columns(["device"]).append_column("device", pa.array([value]))
    expected = halves.only(Side.USER, encoder.transform(table).inputs())
    inputs, _ = UserEncoder(encoder, halves, None).encode(user)
    np.testing.assert_array_equal(inputs.categorical.numpy(), expected.categorical.numpy())


def test_pairs_are_encoded_to_the_bit_as_rows_are() -> None:
    encoder, halves = encoders()
    table = some_table(200, seed=8)
    values = table["item_age_seconds"].to_numpy().copy()
    values[:6] = [np.inf, -np.inf, np.nan, -5.0, 0.0, 1e300]
    table = table.set_column(table.column_names.index("item_age_seconds"), "item_age_seconds", pa.array(values))
    numeric, _ = PairEncoder(encoder, halves, None).encode(table, 200)
    np.testing.assert_array_equal(numeric, encoder.transform(table).numeric[:, halves.numbers(Side.PAIR)])


def test_first_order_of_all_halves_is_that_of_the_row() -> None:
    encoder, halves = encoders()
    whole = FirstOrder(encoder.spec)
    with torch.no_grad():
        whole.weight.normal_()
        whole.bin_table.normal_()
    numeric = encoder.transform(some_table(300, seed=5)).numeric
    # Values that lie on a boundary belong to the bin above it.
    for place, column in enumerate(encoder.spec.numeric):
        numeric[: len(column.boundaries), place] = column.boundaries
    parts = [PartialFirstOrder(whole, n)(numeric[:, n]) for n in (halves.numbers(side) for side in Side)]
    with torch.no_grad():
        expected = whole(torch.from_numpy(numeric)).numpy()
    np.testing.assert_allclose(sum(parts), expected, atol=1e-5)


def test_folded_layers_give_what_the_network_gives() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*hidden_layers(7, (6, 5), dropout=0.5, batch_norm=True), nn.Linear(5, 2)).eval()
    for module in network:
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    folded, x = FoldedLayers(network), torch.randn(9, 7)
    torch.testing.assert_close(folded.rest(x @ folded.weight.T + folded.bias), network(x))


def test_layer_without_a_folded_form_is_named() -> None:
    with pytest.raises(TypeError, match="GELU among the layers"):
        FoldedLayers([nn.Linear(2, 2), nn.GELU()])


def test_halves_hold_every_input_once() -> None:
    halves = Halves(SPEC, [Feature(name=n, kind=NUMERIC, origin=FeatureOrigin.USER) for n in ("a", "x", "h")]
                    + [Feature(name=n, kind=NUMERIC, origin=FeatureOrigin.ITEM) for n in ("b", "y")])  # fmt: skip
    rows = some_rows(20)
    parts = [halves.only(side, rows) for side in Side]
    for tensors in zip(rows, *parts, strict=True):
        torch.testing.assert_close(tensors[0], sum(tensors[1:]))
    assert sorted(halves.numbers(Side.USER) + halves.numbers(Side.ITEM)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_events_1d": "many"}, "'user_events_1d': is 'many', the model reads a number"),
        ({"user_history": "i1"}, "'user_history': is 'i1', the model reads lists of strings"),
        ({"languages": [3]}, r"'languages': is \[3\], the model reads lists of strings"),
        ({"device": {"a": 1}}, "'device': is {'a': 1}, the model reads strings"),
    ],
)
def test_value_of_a_wrong_type_is_named(change: dict[str, object], message: str) -> None:
    request = Request.make(0)
    scorer = SplitScorer.prepare(make_package("deepfm"), request.items)
    with pytest.raises(ArtifactError, match=message):
        scorer.score(request.user.to_pylist()[0] | change, request.pairs, request.rows)


def test_absent_feature_is_named() -> None:
    request = Request.make(0)
    package = make_package("deepfm")
    with pytest.raises(ArtifactError, match=r"lack 1 of .* price"):
        SplitScorer.prepare(package, request.items.drop_columns(["price"]))
    scorer = SplitScorer.prepare(package, request.items)
    with pytest.raises(ArtifactError, match=r"lack 1 of .* device"):
        scorer.score(request.user.drop_columns(["device"]), request.pairs, request.rows)
    without = request.pairs.drop_columns(["item_age_seconds"])
    with pytest.raises(ArtifactError, match="item_age_seconds"):
        scorer.score(request.user, without, request.rows)
    with pytest.raises(ArtifactError, match="user_category_events_1d, user_category_rate_1d"):
        scorer.score(request.user, [PairColumns(("item_age_seconds",), np.zeros((NUM_PAIRS, 1)))], request.rows)


def test_other_numbers_of_rows_are_refused() -> None:
    request = Request.make(0)
    scorer = SplitScorer.prepare(make_package("deepfm"), request.items)
    with pytest.raises(ValueError, match="29 rows for 30 candidates"):
        scorer.score(request.user, request.pairs.slice(1), request.rows)
    with pytest.raises(ValueError, match="2 rows of user features"):
        scorer.score(some_table(2), request.pairs, request.rows)


def test_category_of_pairs_is_refused() -> None:
    odd = Feature(name="user_category_top", kind=CATEGORICAL, origin=FeatureOrigin.USER_CATEGORY)
    package = make_package("deepfm", features=(*FEATURES, odd))
    with pytest.raises(ArtifactError, match=r"user_category_top.*ModelPackage\.predict"):
        SplitScorer.prepare(package, some_table(3, features=(*FEATURES, odd)))


def test_cross_layers_of_full_rank_are_computed_whole() -> None:
    package = make_package("dcn_v2", rank=None)
    assert isinstance(package.model, DCNv2)
    assert isinstance(split_model(package.model, Halves(package.encoder.spec, FEATURES)), PlainModel)
