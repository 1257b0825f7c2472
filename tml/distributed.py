"""The processes of a job: which one this is, its device, and the few things they do together.

`join` reads what torchrun put into the environment. A single process makes no process group: the
functions below then return what they were given.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tml.machines import container, environment

ORPHANED = 3
"""Exit code of a process that stopped because another one, which has said why, is gone."""


@dataclass(frozen=True)
class Job:
    """One process among `world_size`; rank 0 is the chief."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_chief(self) -> bool:
        """Whether this process owns logs, checkpoints and the exit code."""
        return self.rank == 0


@contextmanager
def join(timeout_s: float) -> Iterator[Job]:
    """Join the job that torchrun describes; a collective that takes longer than `timeout_s` seconds
    fails.

    Each process takes the GPU of its local rank where there is one, else its share of the
    processors.
    """
    local_rank, local_world_size = environment.local_rank(), environment.local_world_size()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # torchrun gives several processes one thread each, however many processors there are.
        torch.set_num_threads(container.threads_of_process(local_world_size))
    job = Job(environment.rank(), environment.world_size(), local_world_size, device)
    if job.world_size == 1:
        yield job
        return
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield job
    finally:
        dist.destroy_process_group()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_process(flag: bool) -> bool:
    """Whether `flag` holds in at least one process; every process gets the same answer."""
    if not dist.is_initialized():
        return flag
    found = torch.tensor([float(flag)])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients of replicated parameters by their mean over the processes."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def average_buffers(module: torch.nn.Module) -> None:
    """Replace the floating-point buffers of a replicated module, such as running statistics, by
    their mean over the processes.
    """
    if not dist.is_initialized():
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def gather(value: Any) -> list[Any]:
    """The value of each process, by rank; every process gets all of them."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
