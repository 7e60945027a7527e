"""The machine in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def hardware() -> str:
    """For instance "2 cores of an AMD EPYC with bfloat16, 15 GiB, torch 2.15.0"."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = {line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")}
    model = " and ".join(sorted(models)) or platform.machine()
    extra = " with bfloat16" if "avx512_bf16" in text or "amx_bf16" in text else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {model}{extra}, {memory:.0f} GiB, torch {torch.__version__.split('+')[0]}"
