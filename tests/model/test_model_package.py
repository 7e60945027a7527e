"""A package scores on its own, says what it is, and notices when it was touched."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from evergreen.contracts.artifact import sha256_file
from evergreen.contracts.errors import ArtifactError
from evergreen.contracts.training_set import TrainingSet
from evergreen.models.package import ModelPackage, PackageManifest
from evergreen.training.trainer import TrainingConfig, train_model

MODELS = ("popularity", "logistic_regression", "factorization_machine", "deepfm")


@pytest.fixture(scope="module")
def packages(linear_set: TrainingSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelPackage]:
    out = tmp_path_factory.mktemp("packages")
    return {
        model: train_model(linear_set, out / model, config=TrainingConfig(model=model, max_epochs=1))
        for model in MODELS
    }


@pytest.fixture
def copy(packages: dict[str, ModelPackage], tmp_path: Path) -> Path:
    return shutil.copytree(packages["deepfm"].path, tmp_path / "copy")


def test_copied_package_scores_alike(packages: dict[str, ModelPackage], copy: Path, linear_set: TrainingSet) -> None:
    rows = linear_set.read("test")
    loaded = ModelPackage.load(copy)
    assert loaded.version == packages["deepfm"].version
    assert loaded.version.startswith("deepfm-")
    np.testing.assert_array_equal(loaded.predict(rows), packages["deepfm"].predict(rows))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("num_rows", [1, 500])
def test_exported_program_scores_like_the_module(
    model: str, num_rows: int, packages: dict[str, ModelPackage], linear_set: TrainingSet
) -> None:
    package = packages[model]
    encoded = package.encoder.transform(linear_set.read("test").slice(0, num_rows))
    program = torch.export.load(package.path / "program.pt2").module()  # our own file, made a moment ago
    with torch.inference_mode():
        scores = program(*encoded.inputs()).numpy()
    np.testing.assert_allclose(scores, package.scores_of_encoded(encoded), atol=1e-5)


def test_exported_program_has_the_same_bytes_twice(packages: dict[str, ModelPackage], tmp_path: Path) -> None:
    from evergreen.models.export import export_program

    path = tmp_path / "program.pt2"
    export_program(packages["deepfm"].model, path)
    assert path.read_bytes() == (packages["deepfm"].path / "program.pt2").read_bytes()


@pytest.mark.parametrize("model", MODELS)
def test_unseen_categories_and_nulls_are_scored(
    model: str, packages: dict[str, ModelPackage], linear_set: TrainingSet
) -> None:
    rows = linear_set.read("test").slice(0, 4)
    schema = rows.schema
    strange = {
        "item_id": ["never seen", None, "", "i1"],
        "device": ["d99", None, "\N{SNOWMAN}", "d1"],
        "price": [1e300, None, float("nan"), float("-inf")],
        "age": [-5.0, None, 0.0, 1e12],
        "user_history": [["never"], None, [], [None, "i1"]],
        "tags": [["never"], None, [], ["t0"] * 100],
        "item_positives_1d": [None] * 4,
        "item_positives_7d": [None] * 4,
    }
    table = pa.table({name: pa.array(values, schema.field(name).type) for name, values in strange.items()})
    probability = packages[model].predict(table)
    assert np.isfinite(probability).all()
    all_null = pa.table({name: pa.nulls(2) for name in strange})
    assert np.isfinite(packages[model].predict(all_null)).all()


def test_rows_are_scored_alike_alone_and_together(packages: dict[str, ModelPackage], linear_set: TrainingSet) -> None:
    rows = linear_set.read("test").slice(0, 40)
    together = packages["deepfm"].predict(rows)
    alone = [packages["deepfm"].predict(rows.slice(i, 1))[0] for i in range(40)]
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_no_rows_give_no_scores(packages: dict[str, ModelPackage], linear_set: TrainingSet) -> None:
    assert packages["deepfm"].predict(linear_set.read("test").slice(0, 0)).shape == (0,)


def test_missing_column_is_named(packages: dict[str, ModelPackage], linear_set: TrainingSet) -> None:
    with pytest.raises(ArtifactError, match=r"lack 2 of the 8 features.*device, price"):
        packages["deepfm"].predict(linear_set.read("test").drop_columns(["price", "device"]))


def test_column_of_a_wrong_type_is_named(packages: dict[str, ModelPackage], linear_set: TrainingSet) -> None:
    rows = linear_set.read("test").slice(0, 2)
    place = rows.schema.get_field_index("price")
    with pytest.raises(ArtifactError, match="'price': has type string"):
        packages["deepfm"].predict(rows.set_column(place, "price", pa.array(["cheap", "dear"])))


@pytest.mark.parametrize("name", ["model.json", "encoder.json", "weights.safetensors", "calibration.json"])
def test_altered_file_is_named(name: str, copy: Path) -> None:
    with (copy / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ArtifactError, match=f"{name} was altered"):
        ModelPackage.load(copy)


def test_weights_of_another_model_are_refused(packages: dict[str, ModelPackage], copy: Path) -> None:
    shutil.copy(packages["popularity"].path / "weights.safetensors", copy)
    manifest = PackageManifest.read(copy / "manifest.json")
    digest = sha256_file(copy / "weights.safetensors")
    PackageManifest(files=manifest.files | {"weights.safetensors": digest}).write(copy / "manifest.json")
    with pytest.raises(ArtifactError, match="the weights do not fit model deepfm"):
        ModelPackage.load(copy)


def test_missing_file_is_named(copy: Path) -> None:
    (copy / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is missing"):
        ModelPackage.load(copy)


def test_package_can_be_held_to_a_digest(packages: dict[str, ModelPackage], copy: Path) -> None:
    assert ModelPackage.load(copy, digest=packages["deepfm"].digest).digest == packages["deepfm"].digest
    with pytest.raises(ArtifactError, match="this is another package"):
        ModelPackage.load(copy, digest=packages["popularity"].digest)


def test_directory_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json: no such file"):
        ModelPackage.load(tmp_path)


def test_card_tells_data_metrics_and_limits(packages: dict[str, ModelPackage]) -> None:
    card = (packages["deepfm"].path / "MODEL_CARD.md").read_text()
    for text in ("# deepfm on synthetic", "validation_auc", "`useless`", "## Limits", "Platt", "5" * 64):
        assert text in card


def test_package_holds_no_id_in_clear(packages: dict[str, ModelPackage]) -> None:
    assert b'"i1"' not in (packages["deepfm"].path / "encoder.json").read_bytes()


def test_loading_imports_neither_training_nor_the_heavy_parts() -> None:
    code = (
        "import sys; import evergreen.models.package; "
        "print([m for m in sys.modules if m.split('.')[0] in {'pandas','sklearn','feast','kfp','kserve','evidently',"
        "'matplotlib'} or m.startswith('evergreen.training')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
