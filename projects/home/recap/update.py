"""One update of the ranker: forward and backward passes of micro-batches, then Adam.

The loss is the mean over tasks of Σ weight · cross-entropy / rows, over the rows of the whole
update on all processes. Statistics of the inputs are taken over all these rows at once and large
tables are looked up and updated once, so neither the number of micro-batches nor that of processes
changes the result; only batch norm in towers, where a config has it, sees a micro-batch.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from projects.home.recap.config import RecapConfig
from projects.home.recap.data.batch import RankingBatch
from projects.home.recap.model.model import RankingModel
from projects.home.recap.optimizer import RecapOptimizer
from tml import distributed
from tml.distributed import Job
from tml.embeddings import Tables
from tml.train import StepResult


class Update:
    """Called with this process's rows of an update and its number from 0; changes the model."""

    def __init__(
        self,
        config: RecapConfig,
        model: RankingModel,
        tables: Tables | None,
        optimizer: RecapOptimizer,
        job: Job,
        *,
        compiles: bool = False,
    ) -> None:
        self._model = model
        self._tables = tables
        self._optimizer = optimizer
        self._job = job
        self._micro_batches = config.training.gradient_accumulation or 1
        self._seed = config.training.seed
        self._amp = config.runtime.enable_amp
        self._network = replicate(model, job, compiles=compiles)

    def __call__(self, batch: RankingBatch, step: int) -> StepResult:
        """See the class. The loss told is the sum over rows of the mean over tasks."""
        model, job = self._model, self._job
        model.train()
        # Dropout of an update depends on its number alone: a run that is taken up draws the same.
        key = np.random.SeedSequence([self._seed, step, job.rank])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        batch = batch.to(job.device)
        rows_all = int(distributed.all_reduce_sum(torch.tensor(len(batch))))
        rates = {}
        if self._tables is not None:
            rates = {f"table {k}": v for k, v in self._tables.set_learning_rates(step).items()}
        large_rows = model.lookup(batch)
        # Leaves: tables are updated once, by the gradient of the whole update.
        leaves = {name: rows.detach().requires_grad_() for name, rows in large_rows.items()}
        statistics = model.input_statistics(batch)
        losses = torch.zeros((), device=job.device)
        parts = list(_split(batch, leaves, self._micro_batches))
        for number, (part, part_rows) in enumerate(parts):
            with self._synchronised(number == len(parts) - 1):
                with torch.autocast(job.device.type, torch.bfloat16, enabled=self._amp):
                    logits = self._network(part, part_rows, statistics)
                loss = model.losses(logits, part).mean()
                # The mean over all processes' rows: DDP averages over the processes.
                (loss * (job.world_size / rows_all)).backward()
            losses += loss.detach()
        if large_rows:
            gradients = [leaf.grad for leaf in leaves.values()]
            torch.autograd.backward(list(large_rows.values()), gradients)
        rates |= self._optimizer.step(step)
        return StepResult(losses, rows_all, rates)

    def _synchronised(self, is_last: bool) -> Any:
        """Gradients travel between processes with the last micro-batch alone."""
        if is_last or not dist.is_initialized():
            return nullcontext()
        return self._network.no_sync()


def replicate(model: RankingModel, job: Job, *, compiles: bool) -> Any:
    """The model as it is called in training: compiled, and under DDP where there are several
    processes.
    """
    network: Any = torch.compile(model) if compiles else model
    if job.world_size == 1:
        return network
    # Running statistics are equal on all processes, or averaged when they are saved.
    return nn.parallel.DistributedDataParallel(
        network, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def _split(
    batch: RankingBatch, rows: dict[str, Tensor], parts: int
) -> Iterator[tuple[RankingBatch, dict[str, Tensor]]]:
    """The update's micro-batches, each with its rows of the large tables; fewer than `parts` where
    they would have a single row, as at the end of an epoch, which batch norm in towers refuses.
    """
    start = 0
    for part in batch.split(min(parts, max(1, len(batch) // 2))):
        stop = start + len(part)
        yield part, {name: values[start:stop] for name, values in rows.items()}
        start = stop
