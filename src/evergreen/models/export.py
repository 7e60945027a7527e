"""The network as a torch.export program with a free batch dimension: for runtimes that do not have Evergreen.

Inputs are those of `ModelInputs`, the output is the (N,) score before calibration. Our own server runs the module from
weights.safetensors instead: 500 rows on one thread take 1.5 ms in the module and 1.7 ms in the program (DeepFM,
torch 2.15), a program takes 0.1 s more to load, and loading one from elsewhere may run code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from evergreen.models.inputs import ModelInputs

if TYPE_CHECKING:
    from evergreen.models.base import RankingModel

_EXAMPLE_ROWS = 3
_TRACE_KEYS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def export_program(model: RankingModel, path: Path) -> None:
    """Write the model as a .pt2 archive. Equal weights give equal bytes on the same machine.

    Args:
        model: trained; it is put in evaluation mode.
        path: where to write; the name ends in .pt2.
    """
    spec = model.spec
    example = ModelInputs(
        torch.zeros(_EXAMPLE_ROWS, spec.categorical_width, dtype=torch.int64),
        torch.zeros(_EXAMPLE_ROWS, spec.numeric_width),
        torch.zeros(_EXAMPLE_ROWS, spec.bag_width, dtype=torch.int64),
    )
    rows = torch.export.Dim("rows", min=1)
    module: nn.Module = model.eval()
    program = torch.export.export(module, tuple(example), dynamic_shapes=({0: rows}, {0: rows}, {0: rows}))
    for node in program.graph.nodes:
        for key in _TRACE_KEYS:  # where in which source file each operation came from: differs between machines
            node.meta.pop(key, None)
    torch.export.save(program, path)
