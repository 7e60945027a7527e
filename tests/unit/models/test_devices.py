"""A server computes on the GPU if it can, and on the CPU if it cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import torch

from evergreen.models.devices import choose_device, prepare_on
from evergreen.models.package import ModelPackage
from evergreen.models.registry import MODEL_NAMES
from evergreen.models.split.scorer import SplitScorer
from tests.unit.models.small_package import Request, make_package

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _nothing_told_yet() -> Iterator[None]:
    choose_device.cache_clear()
    yield
    choose_device.cache_clear()


@needs_no_gpu
def test_absent_gpu_is_told_once_to_who_wants_one(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_device("auto") == choose_device("cpu") == CPU
    assert not caplog.records
    assert choose_device("cuda") == choose_device("cuda") == CPU
    assert ["torch finds no GPU" in record.message for record in caplog.records] == [True]


@needs_no_gpu
def test_gpu_that_fails_leaves_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    request = Request.make(0)
    package = make_package("deepfm")
    scorer = prepare_on(GPU, SplitScorer.prepare, package, request.items)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "the GPU fails, so the CPU scores" in caplog.text
    scores = scorer.score(request.user, request.pairs, request.rows)
    np.testing.assert_allclose(scores, package.predict(request.whole), atol=1e-5)


def test_error_on_the_cpu_is_not_taken_for_a_gpus() -> None:
    def prepare(package: ModelPackage, items: pa.Table) -> None:
        raise RuntimeError("of the CPU")

    with pytest.raises(RuntimeError, match="of the CPU"):
        prepare_on(CPU, prepare, make_package("popularity"), Request.make(0).items)


@needs_gpu
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_gpu_scores_like_the_cpu(name: str) -> None:
    package = make_package(name)
    requests = [Request.make(seed, num_pairs=30 + seed) for seed in range(4)]
    items = requests[0].items
    assert choose_device("auto") == choose_device("cuda") == GPU
    scorer = prepare_on(choose_device("cuda"), SplitScorer.prepare, package, items)
    assert all(tensor.device.type == "cuda" for tensor in scorer.item_half)
    assert package.model.bias.device == CPU, "the package stays where it is"
    many = scorer.score_many([request.arguments for request in requests])
    for request, scores in zip(requests, many, strict=True):
        whole = package.predict(request.whole)
        np.testing.assert_allclose(scores, whole, atol=1e-5)
        np.testing.assert_allclose(scorer.score(*request.arguments), whole, atol=1e-5)


@needs_gpu
def test_items_are_updated_on_the_gpu() -> None:
    request = Request.make(7)
    package = make_package("dcn_v2")
    rows, newer = np.array([2, 9]), request.items.slice(4, 2)
    expected = SplitScorer.prepare(package, request.items).updated(rows, newer).score(*request.arguments)
    scorer = prepare_on(GPU, SplitScorer.prepare, package, request.items).updated(rows, newer)
    np.testing.assert_allclose(scorer.score(*request.arguments), expected, atol=1e-5)


@needs_gpu
def test_gpu_without_room_leaves_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    request = Request.make(0)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1) / total)
    try:
        scorer = prepare_on(GPU, SplitScorer.prepare, make_package("deepfm", embedding_dim=512), request.items)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in caplog.text
    assert scorer.item_half[0].device == CPU
