"""Row-wise Adagrad for tables of embeddings: a step costs what the batch touches, not what the table holds.

Source: Duchi et al. 2011, Adaptive subgradient methods, with one accumulator a row, the mean of the squares over its
columns, as in Mudigere et al. 2022, Software-hardware co-design for training recommendation models, section 4.1.4.
Deviates: the first `split` columns of a row may have an accumulator of their own. Whether that helps depends on the
log. Validation log loss of DeepFM, whose column 0 is a first order weight, by seed, without and with `split=1`, at a
learning rate of 0.1 and an initial accumulator of 1e-5: simulated log 0.08882, 0.08913, 0.08888 and 0.08876, 0.08892,
0.08878; Deskdrop 0.1381, 0.1376 and 0.1382, 0.1394. Of the factorization machine, one seed: 0.08877 and 0.08919.

Duplicate rows of a batch are summed before anything else. Without that each of the thousand occurrences of a frequent
value would take a step of its own, with the accumulator that it found: on Zipf-distributed ids the loss diverges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evergreen.contracts.errors import TrainingError
from evergreen.models.inputs import PAD

_Kernel = Callable[..., None]


class RowWiseAdagrad(torch.optim.Optimizer):
    """Exact row-wise Adagrad, for parameters of shape (num_rows, width).

    With g the summed gradient of a row: accumulator += mean(g²); row -= lr * g / (sqrt(accumulator) + eps). Row PAD
    never changes. Gradients may be sparse (COO, with duplicates) or dense; of a dense gradient, rows that are zero
    throughout count as not touched. On a CPU the step is one compiled loop, elsewhere a few tensor operations.

    The state is one tensor for each parameter: `accumulator`, (num_rows, 1) float32, or (num_rows, 2) with `split`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        split: int = 0,
    ) -> None:
        """Allocate the accumulators.

        Args:
            params: tables, or groups of tables with options of their own.
            lr: learning rate.
            initial_accumulator_value: what a row has before its first step.
            eps: keeps the step finite where the accumulator is zero.
            weight_decay: L2 penalty, on rows that a batch touches only.
            split: number of first columns that share an accumulator apart from the others'; 0: one for the whole row.

        Raises:
            TrainingError: a parameter is not a float32 matrix, or a setting is out of range.
        """
        defaults = {
            "lr": lr,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "weight_decay": weight_decay,
            "split": split,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for name in defaults:
                if not group[name] >= 0:
                    raise TrainingError(f"RowWiseAdagrad: {name}={group[name]}: must be 0 or more")
            for parameter in group["params"]:
                self.state[parameter] = {"accumulator": _accumulator(parameter, group)}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the rows that have a gradient.

        Args:
            closure: evaluates the loss again, as for any torch optimizer; rarely of use.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = _update_compiled if parameter.device.type == "cpu" else update_rows
                    update(
                        parameter.data,
                        self.state[parameter]["accumulator"],
                        *_rows_and_values(parameter.grad),
                        lr=float(group["lr"]),
                        eps=group["eps"],
                        weight_decay=group["weight_decay"],
                        split=_split(parameter, group),
                    )
        return loss


def update_rows(
    weight: Tensor,
    accumulator: Tensor,
    rows: Tensor,
    values: Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    split: int,
) -> None:
    """One step in tensor operations, in place: for GPUs, and what the compiled loop is tested against.

    Args:
        weight: (num_rows, width).
        accumulator: (num_rows, 1), or (num_rows, 2) with `split`.
        rows: (n,) int64 rows of the gradients; any order, with duplicates.
        values: (n, width) gradients.
        lr: learning rate.
        eps: added to the root.
        weight_decay: L2 penalty.
        split: first columns that accumulator 0 is for.
    """
    kept = rows != PAD
    gradient = torch.sparse_coo_tensor(rows[kept][None], values[kept], weight.shape, check_invariants=False).coalesce()
    rows, values = gradient.indices()[0], gradient.values()
    if weight_decay > 0:
        values = values + weight_decay * weight[rows]
    squares = torch.stack([part.square().mean(dim=1) for part in _parts(values, split)], dim=1)
    accumulator.index_add_(0, rows, squares)
    scale = lr / (accumulator[rows].sqrt() + eps)
    steps = [part * scale[:, [place]] for place, part in enumerate(_parts(values, split))]
    weight.index_add_(0, rows, torch.cat(steps, dim=1), alpha=-1)


def _parts(values: Tensor, split: int) -> list[Tensor]:
    return [values[:, :split], values[:, split:]] if split else [values]


def _update_compiled(
    weight: Tensor,
    accumulator: Tensor,
    rows: Tensor,
    values: Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    split: int,
) -> None:
    """`update_rows` on a CPU, compiled."""
    _compiled_kernel()(
        weight.numpy(),
        accumulator.numpy(),
        rows.numpy(),
        values.contiguous().numpy(),
        np.float32(lr),
        np.float32(eps),
        np.float32(weight_decay),
        split,
    )


def _update_loop(
    weight: NDArray[np.float32],
    accumulator: NDArray[np.float32],
    rows: NDArray[np.int64],
    values: NDArray[np.float32],
    lr: np.float32,
    eps: np.float32,
    weight_decay: np.float32,
    split: int,
) -> None:
    """`update_rows`, one row after the other; made to be compiled.

    A hash table finds the duplicates, and sums of gradients are kept for as many rows as the batch has.
    All indices are unsigned: of others numba tests whether they are negative, and uses no vector instructions then.
    """
    num_gradients, width, num_parts = (
        np.uint64(len(values)),
        np.uint64(values.shape[1]),
        np.uint64(accumulator.shape[1]),
    )
    bits = 4
    while (1 << bits) < 2 * num_gradients:
        bits += 1
    shift, mask = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
    slots = np.zeros(1 << bits, np.uint32)  # 0: free; else 1 + the place among the distinct rows
    distinct = np.empty(num_gradients, np.int64)
    sums = np.empty((num_gradients, width), np.float32)
    num_distinct = np.uint64(0)
    for number in range(num_gradients):
        row = rows[number]
        if row == PAD:
            continue
        # Fibonacci hashing: rows that lie side by side are spread over the table.
        slot = (np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)) >> shift
        place = np.uint64(slots[slot])
        while place > 0 and distinct[place - np.uint64(1)] != row:
            slot = (slot + np.uint64(1)) & mask
            place = np.uint64(slots[slot])
        if place == 0:
            distinct[num_distinct] = row
            for column in range(width):
                sums[num_distinct, column] = values[number, column]
            num_distinct += np.uint64(1)
            slots[slot] = num_distinct
        else:
            place -= np.uint64(1)
            for column in range(width):
                sums[place, column] += values[number, column]

    for number in range(num_distinct):
        index = np.uint64(distinct[number])
        if weight_decay > 0:
            for column in range(width):
                sums[number, column] += weight_decay * weight[index, column]
        start = np.uint64(0)
        for part in range(num_parts):
            end = width if part + np.uint64(1) == num_parts else np.uint64(split)
            squares = np.float32(0)
            for column in range(start, end):
                squares += sums[number, column] * sums[number, column]
            total = accumulator[index, part] + squares / np.float32(end - start)
            accumulator[index, part] = total
            scale = lr / (np.sqrt(total) + eps)
            for column in range(start, end):
                weight[index, column] -= scale * sums[number, column]
            start = end


@cache
def _compiled_kernel() -> _Kernel:
    """The loop as machine code; compiled at the first step, so that what only serves models never imports numba."""
    from numba import njit

    # Sums of squares may be added up in any order: what it takes to use vector instructions.
    options = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True, "boundscheck": False}
    try:
        kernel: _Kernel = njit(cache=True, **options)(_update_loop)
    except RuntimeError:  # no directory that numba may write its cache to: some seconds more in every process
        kernel = njit(**options)(_update_loop)
    return kernel


def _rows_and_values(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) rows and (n, width) gradients of a sparse or dense gradient."""
    if gradient.is_sparse:
        return gradient._indices()[0], gradient._values()
    rows = gradient.any(dim=1).nonzero()[:, 0]
    return rows, gradient[rows]


def _split(parameter: nn.Parameter, group: dict[str, Any]) -> int:
    """A split that leaves no columns for the second accumulator is none."""
    return group["split"] if group["split"] < parameter.shape[1] else 0


def _accumulator(parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
    if parameter.ndim != 2 or parameter.dtype != torch.float32 or not parameter.is_contiguous():
        raise TrainingError(
            f"RowWiseAdagrad: a parameter of shape {tuple(parameter.shape)} and type {parameter.dtype}: "
            "it updates contiguous float32 tables of shape (rows, width); give other parameters to Adam"
        )
    shape = (len(parameter), 2 if _split(parameter, group) else 1)
    return torch.full(shape, group["initial_accumulator_value"], dtype=torch.float32, device=parameter.device)
