"""Processes that train together: fair shares, and gradients that are summed exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evergreen.contracts.errors import TrainingError
from evergreen.training import distributed
from evergreen.training.distributed import Workers, workers

CPU = torch.device("cpu")

SCRIPT = """
import sys
import torch
from torch import nn
from torch.nn import functional
from evergreen.training.distributed import workers

for attempt in range(2):  # a second model finds the same processes
    team = workers(torch.device("cpu"))
    assert (team.count, team.is_first) == (2, team.rank == 0)
    dense, unused, table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(5, 2))
    rows = torch.tensor([[1, 4, 4], [4]][team.rank])  # shares may touch rows of different number, and the same ones
    if team.is_first:
        unused.sum().backward()
    ((team.rank + 1) * (dense.sum() + functional.embedding(rows, table, sparse=True).sum())).backward()
    team.sum_gradients([table, dense, unused])
    assert dense.grad.tolist() == [3, 3, 3]
    assert unused.grad.tolist() == [[1, 1], [1, 1]]
    assert table.grad.is_sparse and table.grad._nnz() == 4  # and not the whole table
    assert table.grad.to_dense()[:, 0].tolist() == [0, 1, 0, 0, 1 + 1 + 2]
    assert team.sum_values(0.5, float(team.rank), device=torch.device("cpu")) == (1.0, 1.0)
    team.wait()
sys.stdout.write(f"ok {team.rank}\\n")  # in one piece, as both write to the same pipe
"""


@given(num_rows=st.integers(0, 1000), count=st.integers(1, 9))
def test_shares_cover_all_rows_once_and_differ_by_one_at_most(num_rows: int, count: int) -> None:
    shares = [range(num_rows)[Workers(rank, count).share(num_rows)] for rank in range(count)]
    assert [row for share in shares for row in share] == list(range(num_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_alone_sums_nothing_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = workers(CPU)
    assert team == Workers(0, 1)
    assert team.is_first
    parameter = nn.Parameter(torch.ones(2))
    team.sum_gradients([parameter])
    assert parameter.grad is None
    assert team.sum_values(0.1, 7.0, device=CPU) == (0.1, 7.0)
    team.wait()
    assert not dist.is_initialized()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo: processes cannot talk on a CPU")
def test_two_processes_sum_dense_and_sparse_gradients(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["ok 0", "ok 1"]


def test_more_processes_than_gpus_is_an_error_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(TrainingError, match=r"process 1 of this machine finds 1 GPU.*--nproc-per-node 1"):
        workers(torch.device("cuda"))


def test_each_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    distributed._take_own_gpu()
    assert taken == [3]
