"""Embedding tables with their optimizer fused into the backward pass: one interface, four engines.

`RowTables` (tml.row_tables) are float32 tables in one process on a processor; `FbgemmTables` hold
whole tables in one process elsewhere, by FBGEMM's table-batched embedding; `ShardedTables` lets
TorchRec cut the rows over the processes; `PlainTables` are torch tensors in one process with
updates written out here, for what the others cannot do: Adam, bfloat16 rows, tables looked up as a
whole. All look up `ids` (a tensor a table) and give rows (a tensor a table); the backward pass of
those rows updates the tables, no optimizer step follows. A lookup without gradients updates
nothing.

Initial rows depend on (seed, table, row) alone, so tables are the same however many processes hold
them. Saved names are a promise: `tables.<name>.weight` (rows, D), and `tables.<name>.accumulator`:
(rows,) for row-wise Adagrad, (rows, D) for Adagrad; `tables.<name>.m`, `.v` (rows, D) and `.step`
(1,) for Adam.
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
from tml.optimizers import Adagrad, Adam, OptimizerConfig, Sgd

logger = logging.getLogger(__name__)

INIT_BLOCK_ROWS = 1 << 16
UPDATE_BLOCK_NUMBERS = 1 << 20
"""Numbers of a whole table that are updated at a time."""

Ids = dict[str, Tensor]
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class TableSpec:
    """One table."""

    name: str
    num_rows: int
    dim: int
    data_type: str
    """fp32, fp16 or bf16."""
    optimizer: OptimizerConfig
    init_scale: float
    """Standard deviation of the initial rows."""

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of the stored rows."""
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[
            self.data_type
        ]


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

    def cut(self, name: str, rows: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
        """The rows (n, D) that were looked up last of a table, as nothing has changed them, in
        pieces of `lengths` rows: faster than split, and no hook of theirs is called.
        """
        return tuple(rows.split(list(lengths)))

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of one table (n, D) float32, where whole tables are given out too."""
        raise NotImplementedError(f"{type(self).__name__} looks up all tables at once")

    def whole(self, name: str) -> Tensor:
        """All rows of a table (rows, D) float32; their gradient updates it, together with that of
        rows looked up before the same backward pass.
        """
        raise NotImplementedError(f"{type(self).__name__} gives out no whole table")

    def whole_and_rows(self, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """All rows of a table (rows, D), and those at ids (n, D); one gradient for both."""
        raise NotImplementedError(f"{type(self).__name__} gives out no whole table")

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
        together = torch.from_numpy(blocks[0] if len(blocks) == 1 else np.concatenate(blocks))
        return together[start - offset : stop - offset].mul_(self._spec.init_scale)


class ArrayRows(RowSource):
    """Rows of an array that exists, such as one loaded from a file."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __call__(self, start: int, stop: int) -> Tensor:
        return self._rows[start:stop].float()


def build_tables(
    specs: Sequence[TableSpec], job: Job, seed: int, *, as_a_whole: bool = False
) -> Tables:
    """Tables for this job, filled with initial rows: whole ones for a single process, else sharded.
    as_a_whole: `Tables.whole` will be called.
    """
    for spec in specs:
        if spec.optimizer.settings.weight_decay:
            raise ConfigError(
                f"table {spec.name!r}: weight_decay "
                f"{spec.optimizer.settings.weight_decay} would be ignored: "
                "FBGEMM's update on a CPU has none; leave it out"
            )
    tables: Tables
    if (reason := _why_plain(specs, as_a_whole=as_a_whole)) is None:
        alone = job.world_size == 1
        tables = _whole_tables(specs, job.device) if alone else ShardedTables(specs, job)
    elif job.world_size > 1:
        raise ConfigError(
            f"{reason}, which works in one process alone, not in {job.world_size}; "
            "start one, or change it"
        )
    else:
        tables = PlainTables(specs, job.device)
    for index, spec in enumerate(specs):
        tables.fill(spec.name, NormalRows(seed, index, spec))
    return tables


def _whole_tables(specs: Sequence[TableSpec], device: torch.device) -> Tables:
    """Tables of one process that are looked up by rows."""
    from tml import row_tables

    if all(row_tables.can_hold(spec, device) for spec in specs):
        return row_tables.RowTables(specs)
    return FbgemmTables(specs, device)


def _why_plain(specs: Sequence[TableSpec], *, as_a_whole: bool) -> str | None:
    """What asks for PlainTables; None where nothing does."""
    for spec in specs:
        if spec.optimizer.kind == "adam":
            return f"table {spec.name!r} has the optimizer adam"
        if spec.data_type == "bf16":
            return f"table {spec.name!r} has the data type bf16"
    return "all rows of a table are looked up (all negatives)" if as_a_whole else None


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
        copy_rows(weight, rows, 0)

    def _engine(self, name: str) -> Any:
        return self._engines[self._number[name]]


class PlainTables(Tables):
    """Whole tables in one process as torch tensors."""

    def __init__(self, specs: Sequence[TableSpec], device: torch.device) -> None:
        super().__init__(specs)
        self._tables = {spec.name: _PlainTable(spec, device) for spec in self.specs}

    def forward(self, ids: Ids) -> Rows:
        """Look up; see Tables."""
        return {spec.name: self._tables[spec.name].look_up(ids[spec.name]) for spec in self.specs}

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """See Tables."""
        return self._tables[name].look_up(ids)

    def whole(self, name: str) -> Tensor:
        """See Tables."""
        return self._tables[name].look_up(None)

    def whole_and_rows(self, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See Tables."""
        return self._tables[name].whole_and_rows(ids)

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """See Tables."""
        for table in self._tables.values():
            table.learning_rate = table.spec.optimizer.learning_rate_at(step)
        return {name: table.learning_rate for name, table in self._tables.items()}

    def state(self) -> dict[str, Any]:
        """See Tables."""
        return {
            f"tables.{name}.{key}": tensor
            for name, table in self._tables.items()
            for key, tensor in {"weight": table.weight, **table.state}.items()
        }

    def fill(self, name: str, rows: RowSource) -> None:
        """See Tables."""
        copy_rows(self._tables[name].weight, rows, 0)


class _PlainTable:
    """One table and its optimizer, which changes the rows that have a gradient, and their state,
    alone.
    """

    def __init__(self, spec: TableSpec, device: torch.device) -> None:
        self.spec = spec
        self.learning_rate = spec.optimizer.learning_rate_at(0)
        shape = (spec.num_rows, spec.dim)
        self.weight = torch.zeros(shape, dtype=spec.dtype, device=device)
        sizes: dict[str, dict[str, tuple[int, ...]]] = {
            "sgd": {},
            "adagrad": {"accumulator": shape},
            "rowwise_adagrad": {"accumulator": shape[:1]},
            "adam": {"m": shape, "v": shape, "step": (1,)},
        }
        self.state = {
            name: torch.zeros(size, device=device)
            for name, size in sizes[spec.optimizer.kind].items()
        }
        # What autograd sees in place of the weight: a leaf of its shape that takes no memory, and
        # whose gradient is float32 whatever the rows are stored as. All gradients of one backward
        # pass come together in it, then the update runs, once.
        self._leaf = torch.zeros(1, device=device).expand(shape).requires_grad_()
        self._leaf.register_post_accumulate_grad_hook(self._update)

    def look_up(self, ids: Tensor | None) -> Tensor:
        """Rows (n, D) float32, all of them where ids is None."""
        rows = _PlainRows.apply(self._leaf, self.weight, ids)  # type: ignore[no-untyped-call]
        assert isinstance(rows, Tensor)
        return rows

    def whole_and_rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """All rows, and those at ids (n, D) float32."""
        whole, rows = _PlainWhole.apply(self._leaf, self.weight, ids)  # type: ignore[no-untyped-call]
        return whole, rows

    @torch.no_grad()
    def _update(self, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if not gradient.is_sparse:
            self._update_rows(None, gradient)
            return
        gradient = gradient.coalesce()
        if len(rows := gradient.indices()[0]):
            self._update_rows(rows, gradient.values())

    def _update_rows(self, rows: Tensor | None, gradient: Tensor) -> None:
        """Change `rows` (n,), all where None, by their gradient (n, D)."""
        if rows is None and self.weight.dtype == torch.float32:
            self._update_whole(gradient)
            return
        step = self._step(rows, gradient)
        if rows is None:
            self.weight.copy_(self.weight.float() - step)
        else:
            self.weight[rows] = (self.weight[rows].float() - step).to(self.weight.dtype)

    def _update_whole(self, gradient: Tensor) -> None:
        """Change all rows in place, a block at a time: what is made on the way stays in the
        processor's cache.
        """
        settings = self.spec.optimizer.settings
        if isinstance(settings, Adam):
            self.weight.sub_(self._step(None, gradient))
            return
        rate = self.learning_rate
        if isinstance(settings, Sgd):
            self.weight.add_(gradient, alpha=-rate)
            return
        size = max(1, UPDATE_BLOCK_NUMBERS // self.spec.dim)
        blocks = (self.weight.split(size), self.state["accumulator"].split(size))
        for weight, squares, change in zip(*blocks, gradient.split(size), strict=True):
            if squares.dim() == 1:  # row-wise
                squares += change.square().mean(dim=1)
                weight.addcdiv_(change, (squares.sqrt() + settings.eps).unsqueeze(1), value=-rate)
            else:
                squares.addcmul_(change, change)
                weight.addcdiv_(change, squares.sqrt().add_(settings.eps), value=-rate)

    def _step(self, rows: Tensor | None, gradient: Tensor) -> Tensor:
        """What is subtracted from the rows."""
        settings = self.spec.optimizer.settings
        if isinstance(settings, Sgd):
            return gradient * self.learning_rate
        if isinstance(settings, Adagrad):
            square = gradient.square()
            if self.spec.optimizer.kind == "rowwise_adagrad":
                square = square.mean(dim=1)
            root = self._state_plus(rows, "accumulator", square, 1.0, 1.0).sqrt() + settings.eps
            root = root.unsqueeze(1) if root.dim() == 1 else root
            return gradient / root * self.learning_rate
        assert isinstance(settings, Adam)
        self.state["step"] += 1
        beta_1, beta_2 = settings.beta_1, settings.beta_2
        updates = int(self.state["step"])
        m = self._state_plus(rows, "m", gradient, beta_1, 1 - beta_1) / (1 - beta_1**updates)
        v = self._state_plus(rows, "v", gradient.square(), beta_2, 1 - beta_2)
        root = (v / (1 - beta_2**updates)).sqrt() + settings.epsilon
        return m / root * self.learning_rate

    def _state_plus(
        self, rows: Tensor | None, name: str, change: Tensor, keep: float, share: float
    ) -> Tensor:
        """Make the rows of a state keep · state + share · change; returns them."""
        state = self.state[name]
        if rows is None:
            state *= keep
            return state.add_(change, alpha=share)
        changed: Tensor = state[rows] * keep + change * share
        state[rows] = changed
        return changed


class _PlainRows(torch.autograd.Function):
    """Rows of a weight as float32; their gradient goes to `leaf`, sparse, or dense for all rows."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
        ctx.shape = weight.shape
        ctx.ids = ids
        if ids is None:
            return weight.detach() if weight.dtype == torch.float32 else weight.float()
        return weight.index_select(0, ids).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.ids is None:
            return gradient, None, None
        sparse = torch.sparse_coo_tensor(
            ctx.ids.unsqueeze(0), gradient, ctx.shape, check_invariants=False
        )
        return sparse, None, None


class _PlainWhole(torch.autograd.Function):
    """All rows of a weight and some of them again; one dense gradient goes to `leaf`."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.ids = ids
        whole = weight.detach() if weight.dtype == torch.float32 else weight.float()
        return whole, weight.index_select(0, ids).float()

    @staticmethod
    def backward(ctx: Any, whole: Tensor, rows: Tensor) -> tuple[Tensor, None, None]:
        # The gradient is nobody else's; on a GPU index_add_ adds in an order that changes.
        if whole.is_cuda:
            whole.index_put_((ctx.ids,), rows, accumulate=True)
        else:
            whole.index_add_(0, ctx.ids, rows)
        return whole, None, None


class ShardedTables(Tables):
    """Tables cut by rows over the processes, by TorchRec, whose collections hold tables of one
    dimension and data type each: vectors in one, their biases in another.

    Collections are looked up one behind the other. Autograd goes back through what was made later
    first, so the backward pass meets them in the opposite order in every process, whatever its
    batch holds, and their all-to-alls find each other.
    """

    def __init__(self, specs: Sequence[TableSpec], job: Job) -> None:
        super().__init__(specs)
        kinds = dict.fromkeys((spec.dim, spec.data_type) for spec in specs)
        self._collections = nn.ModuleList(
            _ShardedCollection([spec for spec in specs if (spec.dim, spec.data_type) == kind], job)
            for kind in kinds
        )

    def forward(self, ids: Ids) -> Rows:
        """Look up; see Tables."""
        return {name: rows for one in self._all() for name, rows in one(ids).items()}

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """See Tables."""
        rates = [one.set_learning_rates(step) for one in self._all()]
        return {name: rate for found in rates for name, rate in found.items()}

    def state(self) -> dict[str, Any]:
        """See Tables."""
        return {name: tensor for one in self._all() for name, tensor in one.state().items()}

    def fill(self, name: str, rows: RowSource) -> None:
        """See Tables."""
        for one in self._all():
            if name in [spec.name for spec in one.specs]:
                one.fill(name, rows)

    def _all(self) -> list["_ShardedCollection"]:
        return [one for one in self._collections if isinstance(one, _ShardedCollection)]


class _ShardedCollection(Tables):
    """Tables of one dimension and data type; ids and rows travel by all-to-all.

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
            copy_rows(shard.tensor, rows, shard.metadata.shard_offsets[0])


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
def copy_rows(weight: Tensor, rows: RowSource, first_row: int) -> None:
    """Fill `weight`, whose first row is the table's row `first_row`, block by block."""
    for start in range(0, len(weight), INIT_BLOCK_ROWS):
        stop = min(start + INIT_BLOCK_ROWS, len(weight))
        block = rows(first_row + start, first_row + stop)
        weight[start:stop].copy_(block)
        if weight.dtype == torch.float16:
            _refuse_overflow(block, first_row + start)
        del block  # before the next one is made


def _refuse_overflow(rows: Tensor, first_row: int) -> None:
    largest = torch.finfo(torch.float16).max
    outside = rows.abs() > largest
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ConfigError(
            f"row {first_row + row} holds {rows[row, column]:g}, and fp16 ends at {largest:,.0f}; "
            "set data_type to fp32 or bf16"
        )
