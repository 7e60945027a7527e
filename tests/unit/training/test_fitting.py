"""The training loop: which rows it reads and how, when it stops, what it keeps, and how it goes on after a kill."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evergreen.contracts.errors import ArtifactError, TrainingError
from evergreen.contracts.mapping import LogKind
from evergreen.contracts.training_set import Side
from evergreen.models.base import RankingModel, score_rows
from evergreen.models.calibration import sigmoid
from evergreen.models.deepfm import DeepFM, DeepFMConfig
from evergreen.models.inputs import CategoricalInput, EncodedRows, InputSpec, ModelInputs, NumericInput
from evergreen.training.checkpoint import Checkpoint
from evergreen.training.config import TrainingConfig
from evergreen.training.distributed import Workers
from evergreen.training.fitting import Fit, fit_by_gradient, thin, torch_device
from evergreen.training.task import Examples

NUM_USERS, NUM_ITEMS, SHARED = 20, 10, 3
ITEM_START = 1 + NUM_USERS
SPEC = InputSpec(
    categorical=(
        CategoricalInput(name="user_id", side=Side.USER, start=1, num_rows=NUM_USERS),
        CategoricalInput(name="item_id", side=Side.ITEM, start=ITEM_START, num_rows=NUM_ITEMS, num_shared=SHARED),
        CategoricalInput(name="device", side=Side.USER, start=ITEM_START + NUM_ITEMS, num_rows=5),
    ),
    second_rows=(1,),
    numeric=(NumericInput(name="row", side=Side.ITEM, missing=None, zero=0.0, boundaries=(0.0,)),),
    num_indicators=0,
    bags=(),
    num_embeddings=ITEM_START + NUM_ITEMS + 5,
    untrained_rows=(0,),
)


def made_examples(num_rows: int = 600, seed: int = 0, click_rate: float = 0.3) -> Examples:
    """Clicks that depend on the item; the number is the row's own, so that a row can be told from others."""
    rng = np.random.default_rng(seed)
    user, item = 4 + rng.integers(NUM_USERS - 3, size=num_rows), rng.integers(NUM_ITEMS - 4, size=num_rows)
    device = ITEM_START + NUM_ITEMS + 2 + rng.integers(3, size=num_rows)
    categorical = np.stack([user, ITEM_START + 4 + item, device, np.zeros(num_rows, int)], axis=1).astype(np.int32)
    labels = (rng.random(num_rows) < click_rate * np.linspace(0.2, 1.8, NUM_ITEMS - 4)[item]).astype(np.float32)
    numeric = np.arange(num_rows, dtype=np.float32)[:, None] / 1e6
    positions = 1 + rng.integers(4, size=num_rows).astype(np.int32)
    return Examples(EncodedRows(SPEC, categorical, numeric, ()), labels, positions=positions)


def deepfm(seed: int = 0, dropout: float = 0.2) -> DeepFM:
    torch.manual_seed(seed)
    model = DeepFM(DeepFMConfig(embedding_dim=4, hidden=(8,), dropout=dropout), SPEC)
    model.set_output(bias=-1.0, scale=1.0)
    return model


def config(**settings: object) -> TrainingConfig:
    return TrainingConfig(**{"batch_size": 64, "min_steps_per_epoch": 1, "max_epochs": 2, "patience": 50, **settings})


def fit(model: RankingModel, settings: TrainingConfig, *, num_rows: int = 600, **more: object) -> Fit:
    return fit_by_gradient(
        model, made_examples(num_rows), made_examples(200, seed=1), settings, kind=LogKind.IMPRESSIONS, **more
    )


class Recorder(RankingModel):
    """Remembers the batches that it was trained on."""

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[ModelInputs] = []

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        if self.training:
            self.batches.append(ModelInputs(categorical.clone(), numeric.clone(), bags))
        return self.weight * numeric[:, 0]

    def rows(self, first: int = 0, last: int | None = None) -> list[int]:
        """Numbers of the rows of some batches."""
        return [round(float(x) * 1e6) for batch in self.batches[first:last] for x in batch.numeric[:, 0]]


def test_each_epoch_reads_every_row_once_in_an_order_of_its_own() -> None:
    model = Recorder()
    fit(model, config())
    steps = len(model.batches) // 2
    first, second = model.rows(0, steps), model.rows(steps)
    assert sorted(first) == sorted(second) == list(range(600))
    assert first != second
    assert [len(batch.numeric) for batch in model.batches[:steps]] == [60] * 10  # at most 64


def test_no_batch_is_a_left_over_row_which_batch_norm_could_not_read() -> None:
    model = Recorder()
    fit(model, config(batch_size=599, max_epochs=1))
    assert [len(batch.numeric) for batch in model.batches] == [300, 300]
    torch.manual_seed(0)
    normalised = DeepFM(DeepFMConfig(embedding_dim=4, hidden=(8,), batch_norm=True), SPEC)
    found = fit(normalised, config(batch_size=599))
    assert found.best.validation_loss < found.curve[0].validation_loss


def test_seed_decides_the_order_whatever_the_global_generator_says() -> None:
    orders = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(state)
        model = Recorder()
        fit(model, config(seed=seed, max_epochs=1))
        orders.append(model.rows())
    assert orders[0] == orders[1] != orders[2]


def test_small_sets_are_cut_into_enough_steps() -> None:
    model = Recorder()
    fit(model, config(max_epochs=1, min_steps_per_epoch=20))
    assert len(model.batches) == 20


def test_thinned_epochs_read_all_clicks_and_other_negatives_each() -> None:
    model, labels = Recorder(), made_examples().labels
    fit(model, config(negative_rate=0.2))
    steps = len(model.batches) // 2
    first, second = set(model.rows(0, steps)), set(model.rows(steps))
    clicked = set(np.flatnonzero(labels))
    assert clicked <= first & second
    assert len(first) == len(second) == len(clicked) + np.ceil(0.2 * (600 - len(clicked)))
    assert first != second


def test_ratings_are_never_thinned() -> None:
    model = Recorder()
    examples = made_examples()
    fit_by_gradient(model, examples, examples, config(negative_rate=0.2, max_epochs=1), kind=LogKind.RATINGS)
    assert len(model.rows()) == 600


def test_dropped_ids_are_read_as_rows_that_unseen_values_share() -> None:
    model, examples = Recorder(), made_examples()
    fit(model, config(id_dropout=0.3, max_epochs=10))
    read = torch.cat([batch.categorical for batch in model.batches]).numpy()
    given = examples.rows.categorical[model.rows()]
    dropped = read != given
    assert dropped[:, :2].mean(axis=0) == pytest.approx([0.3, 0.3], abs=0.03)
    assert not dropped[:, 2].any()  # no id
    assert set(read[dropped[:, 0], 0]) == {2}
    unseen = {ITEM_START + 1 + place for place in range(SHARED)}
    assert set(read[dropped[:, 1], 1]) == set(read[dropped[:, 1], 3]) == unseen  # both rows of a value
    assert (read[~dropped[:, 1], 3] == 0).all()
    np.testing.assert_array_equal(examples.rows.categorical, made_examples().rows.categorical)  # not in place


def test_best_weights_are_kept_and_training_stops_after_patience() -> None:
    model, validation = deepfm(), made_examples(200, seed=1)
    found = fit(model, config(embedding_learning_rate=0.5, max_epochs=40, patience=3, position="ignore"))
    losses = [point.validation_loss for point in found.curve]
    best = int(np.argmin(losses[1:])) + 1
    assert len(losses) <= best + 3 + 3  # tiny improvements still count as waiting, and are still kept
    assert len(losses) < 40 * 4
    assert found.position is not None
    scores = score_rows(model, validation.rows).astype(np.float64) + found.position(
        torch.from_numpy(validation.positions)
    ).detach().numpy().astype(np.float64)
    p = sigmoid(scores)
    loss = -(validation.labels * np.log(p) + (1 - validation.labels) * np.log1p(-p)).mean()
    assert loss == pytest.approx(losses[best], rel=1e-5)


def test_curve_starts_with_the_model_as_given() -> None:
    found = fit(deepfm(), config())
    validation = made_examples(200, seed=1)
    p = sigmoid(score_rows(deepfm(), validation.rows).astype(np.float64))
    loss = -(validation.labels * np.log(p) + (1 - validation.labels) * np.log1p(-p)).mean()
    assert found.curve[0].validation_loss == pytest.approx(loss, rel=1e-5)
    assert (found.curve[0].step, found.curve[0].train_loss) == (0, None)
    assert [point.epoch for point in found.curve[1:]] == pytest.approx([p.step / 10 for p in found.curve[1:]])


def test_plateau_shortens_the_steps() -> None:
    settings = {"learning_rate": 0.02, "min_improvement": 1e9, "max_epochs": 4, "position": "ignore"}
    moved = []
    for factor in (1.0, 0.01):  # no improvement is ever large enough
        model = deepfm(dropout=0.0)
        before = model.deep[0].weight.detach().clone()
        found = fit(model, config(plateau_factor=factor, **settings))
        assert found.curve[-1].validation_loss <= found.curve[0].validation_loss + 1
        moved.append(float((model.deep[0].weight - before).abs().max()))
    assert moved[1] < moved[0]


class Secluded(Workers):
    """The first of two processes, which hears nothing of the other."""

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        pass

    def sum_values(self, *values: float, device: torch.device) -> tuple[float, ...]:
        return values


def test_process_without_a_row_of_a_batch_adds_nothing_to_the_step() -> None:
    """Of one row, two processes get none and one; a mean of no rows would be nan for both."""
    model, before = deepfm(), deepfm()
    found = fit(model, config(batch_size=1, max_epochs=1), num_rows=20, workers=Secluded(rank=0, count=2))
    assert all(point.train_loss == 0 for point in found.curve[1:])
    for name, value in before.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("weighting", [{"negative_rate": 0.1}, {"positive_weight": 8.0}], ids=str)
def test_thinning_and_class_weights_leave_the_click_rate_right(weighting: dict[str, float]) -> None:
    train, validation = made_examples(6000, click_rate=0.1), made_examples(3000, seed=1, click_rate=0.1)
    model = deepfm(dropout=0.0)
    settings = config(batch_size=128, max_epochs=4, id_dropout=0.0, **weighting)
    train, validation = (Examples(part.rows, part.labels) for part in (train, validation))
    found = fit_by_gradient(model, train, validation, settings, kind=LogKind.IMPRESSIONS)
    predicted = sigmoid(score_rows(model, validation.rows).astype(np.float64)).mean()
    assert predicted == pytest.approx(validation.labels.mean(), rel=0.1)
    best = min(point.validation_loss for point in found.curve)
    assert best < found.curve[0].validation_loss
    assert best < 0.36  # in the unit of all rows, of which a tenth have a click


class Killed(BaseException):
    """As a kill is: no handler of errors sees it."""


class Mortal(DeepFM):
    """A DeepFM whose process dies in a training step."""

    steps_to_live = 10**9

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        if self.training:
            self.steps_to_live -= 1
            if self.steps_to_live < 0:
                raise Killed
        return super().response(categorical, numeric, bags)


def mortal(steps_to_live: int = 10**9) -> Mortal:
    torch.manual_seed(0)
    model = Mortal(DeepFMConfig(embedding_dim=4, hidden=(8,), dropout=0.2), SPEC)
    model.set_output(bias=-1.0, scale=1.0)
    model.steps_to_live = steps_to_live
    return model


@pytest.mark.parametrize("killed_after", [1, 7, 13, 38])
@pytest.mark.parametrize(
    "settings",
    [{}, {"negative_rate": 0.3}, {"plateau_factor": 0.5, "min_improvement": 0.5}, {"patience": 3, "max_epochs": 30}],
    ids=str,
)
def test_run_killed_in_a_step_goes_on_to_the_same_weights(
    killed_after: int, settings: dict[str, float], tmp_path: Path
) -> None:
    chosen = config(**{"max_epochs": 5, "embedding_learning_rate": 0.3, **settings})
    through, resumed = mortal(), mortal()
    expected = fit(through, chosen)
    checkpoint = Checkpoint(tmp_path / "run.ckpt", "r", interval_seconds=0.0)
    with pytest.raises(Killed):
        fit(mortal(killed_after), chosen, checkpoint=checkpoint)
        raise Killed  # a run that stops early is over before its last step: killed before it could write its package
    found = fit(resumed, chosen, checkpoint=checkpoint)
    assert found.curve == expected.curve
    for name, value in through.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert torch.equal(found.position.bin_table, expected.position.bin_table)


def test_run_killed_again_and_again_arrives_at_the_same_weights(tmp_path: Path) -> None:
    chosen, through = config(), mortal()
    expected = fit(through, chosen)
    checkpoint = Checkpoint(tmp_path / "run.ckpt", "r", interval_seconds=0.0)
    found, kills = None, 0
    while found is None:
        resumed = mortal(5)
        try:
            found = fit(resumed, chosen, checkpoint=checkpoint)
        except Killed:
            kills += 1
        assert kills < 10
    assert kills > 2
    assert found.curve == expected.curve
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in through.state_dict().items())


def test_checkpoints_are_as_far_apart_as_asked(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run.ckpt", "r", interval_seconds=3600.0)
    fit(deepfm(), config(), checkpoint=checkpoint)
    assert checkpoint.load() is None


def test_checkpoint_of_another_run_stops_before_the_first_step(tmp_path: Path) -> None:
    fit(deepfm(), config(), checkpoint=Checkpoint(tmp_path / "run.ckpt", "r", interval_seconds=0.0))
    model = Recorder()
    with pytest.raises(ArtifactError, match="of another run"):
        fit(model, config(), checkpoint=Checkpoint(tmp_path / "run.ckpt", "another", interval_seconds=0.0))
    assert not model.batches


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("settings", [{"learning_rate": 1e12}, {"embedding_learning_rate": 1e12}], ids=str)
def test_diverging_loss_names_the_rates_and_the_step(settings: dict[str, float]) -> None:
    with pytest.raises(TrainingError, match=r"deepfm diverges: .* at step \d+, from .*: lower learning_rate \("):
        fit(deepfm(), config(**settings))


class Nan(RankingModel):
    """A model that breaks in its third step."""

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.count = 0

    def response(self, categorical: Tensor, numeric: Tensor, bags: Tensor) -> Tensor:
        self.count += self.training
        return self.weight * numeric[:, 0] + (torch.nan if self.training and self.count == 3 else 0.0)


def test_nan_in_one_step_stops_training() -> None:
    with pytest.raises(TrainingError, match="the loss is nan in training"):
        fit(Nan(), config())


def test_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=r'device="cuda": torch finds no GPU; use device="auto"'):
        torch_device(TrainingConfig(device="cuda"))
    assert torch_device(TrainingConfig(device="auto")) == torch.device("cpu")


def test_gpu_is_taken_where_there_is_one_unless_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device(TrainingConfig(device="auto")).type == "cuda"
    assert torch_device(TrainingConfig(device="cpu")).type == "cpu"


def test_bfloat16_stays_near_float32() -> None:
    model, rounded = deepfm(dropout=0.0), deepfm(dropout=0.0)
    exact = fit(model, config(precision="float32"))
    found = fit(rounded, config(precision="bfloat16"))
    losses, near = ([point.validation_loss for point in curve] for curve in (exact.curve, found.curve))
    assert near != losses
    assert near == pytest.approx(losses, rel=0.01)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}


def test_thin_spreads_rows_over_the_split() -> None:
    examples = made_examples(1000)
    assert thin(examples, 1000) is examples
    numbers = np.round(thin(examples, 300).rows.numeric[:, 0] * 1e6).astype(int)
    assert numbers.tolist() == list(range(0, 1000, 4))
