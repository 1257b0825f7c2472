"""What is saved is finite: tables and parameters are looked through before each checkpoint.

A loss is computed before its update, so the last update before a checkpoint can have made numbers
that no loss has seen; and a row of fp16 that goes beyond 65,504 is infinite from then on.
"""

from typing import Any

import torch
from torch import Tensor

from tml import distributed
from tml.embeddings import Tables
from tml.train import DivergedError


def refuse_infinite(tables: Tables, state: dict[str, Any], step: int) -> None:
    """Raise DivergedError, in every process, where any of them holds a number that is not finite.

    state: saved name → tensor, or this process's shards of one.
    """
    found = next((text for name in state if (text := _find(name, state[name], tables))), None)
    if distributed.any_process(found is not None):
        raise DivergedError(
            f"by step {step:,} {found or 'a row in another process is not finite'}; nothing of it "
            "is saved: start again, from the last complete checkpoint, or anew with "
            "--overwrite_save_dir"
        )


def _find(name: str, value: Any, tables: Tables) -> str | None:
    """What is not finite and what helps; None where all is well."""
    parts = [(value, 0)]
    if hasattr(value, "local_shards"):
        parts = [(s.tensor, s.metadata.shard_offsets[0]) for s in value.local_shards()]
    for tensor, first in parts:
        if not isinstance(tensor, Tensor) or (row := _bad_row(tensor)) is None:
            continue
        return _explain(name, tensor, first + row, tables)
    return None


def _bad_row(tensor: Tensor) -> int | None:
    """The first row with a number that is not finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    # A sum is one pass through memory, and is finite where all its numbers are, but for sums that
    # overflow themselves.
    if bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32))):
        return None
    bad = ~torch.isfinite(tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.view(1, 1))
    rows = bad.any(dim=1)
    return int(rows.to(torch.uint8).argmax()) if bool(rows.any()) else None


def _explain(name: str, tensor: Tensor, row: int, tables: Tables) -> str:
    for spec in tables.specs:
        if name == f"tables.{spec.name}.weight":
            number = tensor.flatten()[~torch.isfinite(tensor.flatten())][0].item()
            told = f"row {row:,} of table {spec.name!r} holds {number}"
            if spec.data_type == "fp16":
                return (
                    f"{told}: fp16 ends at 65,504; set data_type to fp32 or bf16, or lower the "
                    "learning rates"
                )
            return f"{told}: training has diverged; lower the learning rates"
    return f"row {row:,} of {name} is not finite: training has diverged; lower the learning rates"
