"""Data-parallel training under `torchrun`: every process reads its share of each batch, all take the same step.

A process holds the whole model and all rows. Gradients are summed exactly: dense ones by all-reduce, those of tables by
gathering what each process touched, so a step costs what the batch touches here, too.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evergreen.contracts.errors import TrainingError


@dataclass(frozen=True)
class Workers:
    """The processes that train one model, and which of them this one is."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have made."""
        return self.rank == 0

    def share(self, num_rows: int) -> slice:
        """This process's part of `num_rows` rows; parts differ by one row at most."""
        return slice(num_rows * self.rank // self.count, num_rows * (self.rank + 1) // self.count)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make every gradient the sum over all processes; a parameter that a share did not touch counts as zero."""
        if self.count == 1:
            return
        dense: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = _gather(parameter.grad, self.count)
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dense.append(parameter.grad)
        if not dense:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in dense])
        dist.all_reduce(flat)
        for gradient, summed in zip(dense, torch.split(flat, [g.numel() for g in dense]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def sum_values(self, *values: float, device: torch.device) -> tuple[float, ...]:
        """Each value summed over all processes, in float64; the same in all of them."""
        if self.count == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            dist.barrier()


def workers(device: torch.device) -> Workers:
    """The processes that `torchrun` started (it sets RANK and WORLD_SIZE), or this one alone.

    They stay connected until they end: connecting again, for a second model, would find addresses of the first time.

    Args:
        device: what this process trains on; decides between NCCL and gloo. Of several GPUs each process gets its own.

    Raises:
        TrainingError: there are fewer GPUs on this machine than processes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Workers()
    if device.type == "cuda":
        _take_own_gpu()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Workers(dist.get_rank(), count)


def _take_own_gpu() -> None:
    """Make "cuda" mean another GPU in each process."""
    place, available = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= available:
        raise TrainingError(
            f"process {place} of this machine finds {available} GPU(s): start torchrun with --nproc-per-node "
            f'{available}, or set device="cpu"'
        )
    torch.cuda.set_device(place)


def _gather(gradient: Tensor, count: int) -> Tensor:
    """A sparse gradient with the rows of all processes, one after the other; not coalesced."""
    rows, values = gradient._indices()[0].contiguous(), gradient._values().contiguous()
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    lengths = [int(size) for size in sizes]
    longest = max(lengths)  # all processes have to send as much
    all_rows = _gather_padded(rows, longest, lengths)
    all_values = _gather_padded(values, longest, lengths)
    return torch.sparse_coo_tensor(
        all_rows.unsqueeze(0), all_values, gradient.shape, check_invariants=False, is_coalesced=False
    )


def _gather_padded(tensor: Tensor, longest: int, lengths: list[int]) -> Tensor:
    padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
