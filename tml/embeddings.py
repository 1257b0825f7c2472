"""Embedding tables with their optimizer fused into the backward pass: one interface, two engines.

`FbgemmTables` holds whole tables in one process and calls FBGEMM's table-batched embedding
directly; `ShardedTables` lets TorchRec cut the rows over the processes. Both look up `ids` (a
tensor a table) and give rows (a tensor a table); the backward pass of those rows updates the
tables, no optimizer step follows. A lookup without gradients updates nothing.

Initial rows depend on (seed, table, row) alone, so tables are the same however many processes hold
them. Saved names are a promise: `tables.<name>.weight` (rows, D), and `tables.<name>.accumulator`:
(rows,) for row-wise Adagrad, (rows, D) for Adagrad.
"""

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tml.config import ConfigError
from tml.distributed import Job
from tml.optimizers import Adagrad, OptimizerConfig, Sgd

logger = logging.getLogger(__name__)

INIT_BLOCK_ROWS = 1 << 16

Ids = dict[str, Tensor]
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class TableSpec:
    """One table."""

    name: str
    num_rows: int
    dim: int
    data_type: str
    """fp32 or fp16."""
    optimizer: OptimizerConfig
    init_scale: float
    """Standard deviation of the initial rows."""

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of the stored rows."""
        return torch.float16 if self.data_type == "fp16" else torch.float32


class Tables(nn.Module, ABC):
    """Several tables. forward: ids {table: (N_t,) int64} → rows {table: (N_t, D) float32}; all
    tables must be named.
    """

    def __init__(self, specs: Sequence[TableSpec]) -> None:
        super().__init__()
        self.specs = tuple(specs)

    @abstractmethod
    def forward(self, ids: Ids) -> Rows:
        """Look up; the gradient of the rows updates the tables."""

    @abstractmethod
    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Set each table's learning rate of update number `step`; returns {table: rate}."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Saved name → tensor (or this process's shards of one), sharing memory with the tables."""

    @abstractmethod
    def fill(self, name: str, rows: "RowSource") -> None:
        """Overwrite a table with rows(start, stop) → (stop − start, D) float32."""


class RowSource(ABC):
    """Rows of a table by their numbers."""

    @abstractmethod
    def __call__(self, start: int, stop: int) -> Tensor:
        """(stop − start, D) float32."""


class NormalRows(RowSource):
    """Independent normal numbers that depend on (seed, table, row) alone."""

    def __init__(self, seed: int, table: int, spec: TableSpec) -> None:
        self._key = (seed, table)
        self._spec = spec

    def __call__(self, start: int, stop: int) -> Tensor:
        first, last = start // INIT_BLOCK_ROWS, -(-stop // INIT_BLOCK_ROWS)
        blocks = []
        for block in range(first, last):
            generator = np.random.default_rng([*self._key, block])
            num_rows = min(INIT_BLOCK_ROWS, self._spec.num_rows - block * INIT_BLOCK_ROWS)
            rows = generator.standard_normal((num_rows, self._spec.dim), dtype=np.float32)
            blocks.append(rows)
        offset = first * INIT_BLOCK_ROWS
        together = torch.from_numpy(np.concatenate(blocks))
        return together[start - offset : stop - offset] * self._spec.init_scale


class ArrayRows(RowSource):
    """Rows of an array that exists, such as one loaded from a file."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __call__(self, start: int, stop: int) -> Tensor:
        return self._rows[start:stop].float()


def build_tables(specs: Sequence[TableSpec], job: Job, seed: int) -> Tables:
    """Tables for this job, filled with initial rows: whole ones for a single process, else
    sharded.
    """
    for spec in specs:
        if spec.optimizer.kind == "adam":
            raise ConfigError(
                f"table {spec.name!r}: adam keeps no sparse state on a CPU; "
                "use rowwise_adagrad, adagrad or sgd"
            )
        if spec.optimizer.settings.weight_decay:
            raise ConfigError(
                f"table {spec.name!r}: weight_decay "
                f"{spec.optimizer.settings.weight_decay} would be ignored: "
                "FBGEMM's update on a CPU has none; leave it out"
            )
    alone = job.world_size == 1
    tables: Tables = FbgemmTables(specs, job.device) if alone else ShardedTables(specs, job)
    for index, spec in enumerate(specs):
        tables.fill(spec.name, NormalRows(seed, index, spec))
    return tables


class FbgemmTables(Tables):
    """Whole tables in one process: one FBGEMM table-batched embedding for each, since each has its
    own optimizer.
    """

    def __init__(self, specs: Sequence[TableSpec], device: torch.device) -> None:
        super().__init__(specs)
        self._device = device
        # A list: a module may not have any name that a table may have.
        self._engines = nn.ModuleList([self._build(spec) for spec in self.specs])
        self._number = {spec.name: number for number, spec in enumerate(self.specs)}

    def _build(self, spec: TableSpec) -> nn.Module:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            EmbeddingLocation,
            PoolingMode,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        on_gpu = self._device.type == "cuda"
        location = EmbeddingLocation.DEVICE if on_gpu else EmbeddingLocation.HOST
        compute = ComputeDevice.CUDA if on_gpu else ComputeDevice.CPU
        optimizer = {
            "sgd": EmbOptimType.EXACT_SGD,
            "adagrad": EmbOptimType.EXACT_ADAGRAD,
            "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        }[spec.optimizer.kind]
        settings = spec.optimizer.settings
        extra = {"eps": settings.eps} if isinstance(settings, Adagrad) else {}
        # Bags of one: with pooling NONE the CPU update is 30 times slower (98 ms against 3 ms for
        # 40,000 rows).
        module = SplitTableBatchedEmbeddingBagsCodegen(
            [(spec.num_rows, spec.dim, location, compute)],
            optimizer=optimizer,
            learning_rate=spec.optimizer.learning_rate_at(0),
            pooling_mode=PoolingMode.SUM,
            weights_precision=SparseType.FP16 if spec.data_type == "fp16" else SparseType.FP32,
            output_dtype=SparseType.FP32,
            stochastic_rounding=False,
            device=self._device,
            **extra,
        )
        assert isinstance(module, nn.Module)
        return module

    def forward(self, ids: Ids) -> Rows:
        """Look up; see Tables."""
        rows = {}
        for spec in self.specs:
            wanted = ids[spec.name]
            offsets = torch.arange(len(wanted) + 1, device=wanted.device)
            rows[spec.name] = self._engine(spec.name)(wanted, offsets)
        return rows

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """See Tables."""
        rates = {spec.name: spec.optimizer.learning_rate_at(step) for spec in self.specs}
        for name, rate in rates.items():
            self._engine(name).set_learning_rate(rate)
        return rates

    def state(self) -> dict[str, Any]:
        """See Tables."""
        saved: dict[str, Any] = {}
        for spec in self.specs:
            engine = self._engine(spec.name)
            saved[f"tables.{spec.name}.weight"] = engine.split_embedding_weights()[0]
            if spec.optimizer.kind != "sgd":
                saved[f"tables.{spec.name}.accumulator"] = engine.split_optimizer_states()[0][0]
        return saved

    def fill(self, name: str, rows: RowSource) -> None:
        """See Tables."""
        weight = self._engine(name).split_embedding_weights()[0]
        _copy_rows(weight, rows, 0)

    def _engine(self, name: str) -> Any:
        return self._engines[self._number[name]]


class ShardedTables(Tables):
    """Tables cut by rows over the processes, by TorchRec; ids and rows travel by all-to-all.

    Row-wise alone: it balances memory and work for any table, and an accumulator a row stays one
    number a row (column-wise sharding would give row-wise Adagrad one a shard and so make training
    depend on the number of processes).
    """

    def __init__(self, specs: Sequence[TableSpec], job: Job) -> None:
        super().__init__(specs)
        # Both warn of what is meant: a topology made by hand, a module that is not traced.
        for name in ("torchrec", "torch.fx._symbolic_trace"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._sharded = self._shard(job)
        self._groups = dict(self._optimizer_groups())
        # Tables that shared a group would silently train at the rate of the last of them.
        assert len({id(group) for group in self._groups.values()}) == len(self.specs)

    def _shard(self, job: Job) -> Any:
        import torch.distributed as dist
        from torch.distributed.optim import (  # type: ignore[attr-defined]
            _apply_optimizer_in_backward as apply_optimizer_in_backward,
        )
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.model_parallel import DistributedModelParallel
        from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
        from torchrec.distributed.planner.types import ParameterConstraints
        from torchrec.distributed.types import ShardingType
        from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
        from torchrec.modules.embedding_modules import EmbeddingCollection

        collection = EmbeddingCollection(
            device=torch.device("cpu"),
            tables=[
                EmbeddingConfig(
                    name=_key(number),  # a module may not have any name that a table may have
                    embedding_dim=spec.dim,
                    num_embeddings=spec.num_rows,
                    feature_names=[_key(number)],
                    data_type=DataType.FP16 if spec.data_type == "fp16" else DataType.FP32,
                )
                for number, spec in enumerate(self.specs)
            ],
        )
        for number, spec in enumerate(self.specs):
            optimizer, settings = _torch_optimizer(spec.optimizer)
            # TorchRec joins tables of equal settings into one group with one rate. Rates that
            # differ keep them apart; set_learning_rates replaces them before the first update.
            settings["lr"] = float(number + 1)
            weight = collection.embeddings[_key(number)].weight
            apply_optimizer_in_backward(optimizer, [weight], settings)
        sharder = EmbeddingCollectionSharder()
        row_wise = ParameterConstraints(sharding_types=[ShardingType.ROW_WISE.value])
        planner = EmbeddingShardingPlanner(
            topology=Topology(
                world_size=job.world_size,
                local_world_size=job.local_world_size,
                compute_device=job.device.type,
            ),
            constraints={_key(number): row_wise for number in range(len(self.specs))},
        )
        plan = planner.collective_plan(collection, [sharder], dist.group.WORLD)
        sharded = DistributedModelParallel(
            collection, device=job.device, plan=plan, sharders=[sharder]
        )
        if hasattr(sharded.fused_optimizer, "init_state"):
            # Without it there is no accumulator to load a checkpoint into: a silent cold start.
            sharded.fused_optimizer.init_state()
        return sharded

    def _optimizer_groups(self) -> list[tuple[str, Any]]:
        """(table, its param group), so that each table's rate can be set."""
        groups = dict(
            pair
            for optimizer in self._sharded.fused_optimizer.optimizers
            for pair in _keyed_groups(optimizer)
        )
        return [(spec.name, groups[_weight(number)]) for number, spec in enumerate(self.specs)]

    def forward(self, ids: Ids) -> Rows:
        """Look up; see Tables."""
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        wanted = [ids[spec.name] for spec in self.specs]
        features = KeyedJaggedTensor(
            keys=[_key(number) for number in range(len(self.specs))],
            values=torch.cat(wanted),
            lengths=torch.tensor([len(one) for one in wanted], device=wanted[0].device),
        )
        found = self._sharded(features)
        return {
            spec.name: found[_key(number)].values().float()
            for number, spec in enumerate(self.specs)
        }

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """See Tables."""
        rates = {spec.name: spec.optimizer.learning_rate_at(step) for spec in self.specs}
        for name, rate in rates.items():
            self._groups[name]["lr"] = rate
        # TorchRec hands the rates on to FBGEMM here; there are no gradients to clear.
        self._sharded.fused_optimizer.zero_grad()
        return rates

    def state(self) -> dict[str, Any]:
        """See Tables."""
        weights = self._sharded.state_dict()
        optimizer = self._sharded.fused_optimizer.state_dict()["state"]
        saved: dict[str, Any] = {}
        for number, spec in enumerate(self.specs):
            key = _weight(number)
            saved[f"tables.{spec.name}.weight"] = weights[key]
            if spec.optimizer.kind != "sgd":
                (accumulator,) = optimizer[key].values()
                saved[f"tables.{spec.name}.accumulator"] = accumulator
        return saved

    def fill(self, name: str, rows: RowSource) -> None:
        """See Tables."""
        number = [spec.name for spec in self.specs].index(name)
        weight = self._sharded.state_dict()[_weight(number)]
        for shard in weight.local_shards():
            _copy_rows(shard.tensor, rows, shard.metadata.shard_offsets[0])


def _key(number: int) -> str:
    return f"table_{number}"


def _weight(number: int) -> str:
    """Name of a table's weight in the EmbeddingCollection."""
    return f"embeddings.{_key(number)}.weight"


def _keyed_groups(optimizer: Any) -> list[tuple[str, Any]]:
    """(parameter key, param group) of a TorchRec optimizer, which may be a (name, optimizer)
    pair.
    """
    inner = optimizer[1] if isinstance(optimizer, tuple) else optimizer
    if hasattr(inner, "optimizers"):
        return [pair for one in inner.optimizers for pair in _keyed_groups(one)]
    return [(key, group) for key in inner.params for group in inner.param_groups]


def _torch_optimizer(config: OptimizerConfig) -> tuple[type, dict[str, float]]:
    """The optimizer class by which TorchRec picks FBGEMM's fused one, and its settings."""
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    settings = config.settings
    if isinstance(settings, Sgd):
        return torch.optim.SGD, {}
    assert isinstance(settings, Adagrad)
    kind = RowWiseAdagrad if config.rowwise_adagrad is not None else torch.optim.Adagrad
    return kind, {"eps": settings.eps}


@torch.no_grad()
def _copy_rows(weight: Tensor, rows: RowSource, first_row: int) -> None:
    """Fill `weight`, whose first row is the table's row `first_row`, block by block."""
    for start in range(0, len(weight), INIT_BLOCK_ROWS):
        stop = min(start + INIT_BLOCK_ROWS, len(weight))
        weight[start:stop].copy_(rows(first_row + start, first_row + stop))
