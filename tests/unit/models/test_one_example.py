"""One example can be followed: what every layer made of it, up to its prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evergreen.models.registry import MODEL_NAMES
from tests.unit.models.small_package import make_package, some_table

READ_BY_ROW = {"table", "second_head"}
"""Weights that are looked up, and those of the task that serving leaves out."""


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_row_is_followed_through_every_layer_to_its_prediction(name: str) -> None:
    package, row = make_package(name), some_table(60).slice(7, 1)
    steps: dict[str, torch.Tensor] = {}

    def note(layer: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            steps[layer] = output.detach().clone()

        return hook

    layers = {layer: module for layer, module in package.model.named_modules() if not list(module.children())}
    for layer, module in (layers | {"": package.model}).items():
        module.register_forward_hook(note(layer))
    scores = package.scores(row)
    assert layers.keys() - steps.keys() <= READ_BY_ROW
    assert all(torch.isfinite(value).all() for value in steps.values())
    assert np.array_equal(steps[""].numpy(), scores)
    assert np.array_equal(package.calibrate(scores), package.predict(row))
