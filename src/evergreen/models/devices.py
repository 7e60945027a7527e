"""Where a served model computes: on a GPU if there is one that works, else on the CPU, but never not at all."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Literal, TypeAlias, TypeVar

import pyarrow as pa
import torch

from evergreen.models.package import ModelPackage

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
Prepared = TypeVar("Prepared")

logger = logging.getLogger(__name__)


@cache
def choose_device(wanted: Device) -> torch.device:
    """The device to serve on: a GPU where there is one, unless "cpu" is wanted. That "cuda" is not had is told once."""
    if wanted != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    if wanted == "cuda":
        logger.warning('device "cuda": torch finds no GPU, so the CPU scores; install torch for CUDA, or ask for "cpu"')
    return torch.device("cpu")


def prepare_on(
    device: torch.device,
    prepare: Callable[[ModelPackage, pa.Table], Prepared],
    package: ModelPackage,
    items: pa.Table,
) -> Prepared:
    """Compute the items' part of a model on a device, or on the CPU where the GPU fails, for want of memory or else.

    Args:
        device: as of `choose_device`.
        prepare: `SplitScorer.prepare`, say.
        package: on the CPU, where it stays: a copy of its network goes to the GPU.
        items: what `prepare` reads.

    Returns:
        What `prepare` gives of the package and the items.
    """
    if device.type == "cpu":
        return prepare(package, items)
    try:
        return prepare(replace(package, model=copy.deepcopy(package.model).to(device)), items)
    except RuntimeError as error:  # what all of CUDA's errors are
        logger.warning("%s: the GPU fails, so the CPU scores: %s", package.path, error)
    return prepare(package, items)  # out here, because the error holds on to what is on the GPU
