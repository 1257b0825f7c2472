"""How a batch travels from a data set worker: every bit of every part arrives."""

from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from projects.home.recap.data.batch import Bag, Features, RankingBatch, empty_batch
from projects.home.recap.data.dataset_worker import from_arrow, to_arrow

FEATURES = Features(
    tasks=("like", "reply"),
    num_continuous=3,
    num_discrete=2,
    vectors={"user": 4, "none": 0},
    categorical={"language": 10},
    bags={"topics": 9},
    ids=("user_id",),
)


def batch() -> RankingBatch:
    """Three rows, with values that arithmetic would change."""
    floats = np.array([0x7FC00001, 0x80000000, 0x00000001, 0x3F800000], dtype=np.uint32)
    odd = torch.from_numpy(floats.view(np.float32))
    return RankingBatch(
        continuous=odd[:3].repeat(3, 1),
        binary=torch.empty(3, 0),
        discrete=torch.tensor([[2**62 + 1, -1], [0, 1], [2, 3]]),
        labels=torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]),
        weights=torch.full((3, 2), 0.1),
        vectors={"user": odd.repeat(3, 1), "none": torch.empty(3, 0)},
        categorical={"language": torch.tensor([1, 2, 9])},
        bags={"topics": Bag(torch.tensor([5, 6, 7]), torch.tensor([0, 2, 2, 3]))},
        ids={"user_id": torch.tensor([2**63 - 1, -(2**63), 0])},
    )


def bits(value: Tensor | Bag | dict[str, object]) -> object:
    if isinstance(value, dict):
        return {name: bits(item) for name, item in value.items()}  # type: ignore[arg-type]
    if isinstance(value, Bag):
        return bits(value.values), bits(value.offsets)
    return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()


def over_the_wire(rows: pa.RecordBatch) -> pa.RecordBatch:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_batch(rows)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 3), slice(0, 0)])
def test_a_batch_arrives_bit_by_bit(rows: slice) -> None:
    sent = batch().slice(rows.start, rows.stop)
    sent = replace(sent, continuous=sent.continuous.t().contiguous().t())  # not contiguous
    received = from_arrow(over_the_wire(to_arrow(sent)), empty_batch(FEATURES))
    for one in fields(sent):
        assert bits(getattr(received, one.name)) == bits(getattr(sent, one.name)), one.name
    received.labels.add_(1)  # memory of its own
