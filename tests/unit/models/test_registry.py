"""The models by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evergreen.contracts.errors import TrainingError
from evergreen.models.registry import MODEL_NAMES, model_class, model_config


def test_reading_the_names_does_not_import_torch() -> None:
    code = "import sys, evergreen.models.registry; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_has_defaults_and_cites_its_source(name: str) -> None:
    assert model_config(name, {}) == model_class(name).Config()
    module = sys.modules[model_class(name).__module__]
    assert name == "popularity" or "Source: " in (module.__doc__ or "")


def test_value_out_of_range_is_named() -> None:
    with pytest.raises(TrainingError, match="deepfm: hyper-parameter dropout=2"):
        model_config("deepfm", {"dropout": 2})
