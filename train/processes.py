"""The processes that train one model together when torchrun starts them; otherwise just this one.

Every process holds the whole model and all of the data. It takes its share of each batch, compares it with the
embeddings of all processes, and the gradients are averaged. The result equals that of one process with the whole
batch, which a loss over each process's own share would not.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from svb.device import is_device_failure, is_out_of_memory
from svb.errors import SvbError, UsageError

# The others wait while the first process evaluates and saves, which takes longer than the ten minutes after which
# NCCL gives up. A process that dies is noticed at once: torchrun ends the others.
WAIT = timedelta(hours=24)


@dataclass(frozen=True)
class Processes:
    """Which process this is, and how many there are.

    Attributes:
        rank: The number of this process, from 0.
        world: The number of processes.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and the messages."""
        return self.rank == 0

    @contextlib.contextmanager
    def only_the_first_speaks(self) -> Iterator[None]:
        """Silence the other processes, whose messages would all be the same."""
        trainer = logging.getLogger("svb.train")
        level = trainer.level
        if not self.is_first:
            trainer.setLevel(logging.ERROR)
        try:
            yield
        finally:
            trainer.setLevel(level)

    def share(self, total: int) -> slice:
        """Return this process's rows of a batch of `total`; shares differ by at most one row."""
        bounds = _bounds(total, self.world)
        return slice(bounds[self.rank], bounds[self.rank + 1])

    def gather(self, mine: torch.Tensor, total: int) -> torch.Tensor:
        """Return the rows of all processes in order, with gradients: `(b, ...)` -> `(B, ...)`, B is `total`."""
        if self.world == 1:
            return mine
        gathered: torch.Tensor = _Gather.apply(mine, _bounds(total, self.world), self.rank)
        return gathered

    def mean(self, values: torch.Tensor, total: int) -> torch.Tensor:
        """Return this process's part of the mean of `total` values, of which it holds `(n,)`.

        `average` over all processes makes the mean of the parts.
        """
        return values.sum() * (self.world / total)

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace tensors by their means over processes, in one message."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _the_others():
            dist.all_reduce(flat)
        flat /= self.world
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            with _the_others():
                dist.barrier()


@contextlib.contextmanager
def joined_processes(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that torchrun started, if it did; yield them and the device of this one.

    Args:
        device: The device that the user named; with `auto` or `cuda` every process takes the GPU of its own number
            among those that it sees: a launcher may show each process only its own.

    Raises:
        UsageError: One GPU is named for several processes, or WORLD_SIZE is set without the variables it needs.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        yield Processes(), device
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} not set - start several processes with torchrun, or "
            "unset WORLD_SIZE to start one"
        )
    if device.startswith("cuda:"):
        raise UsageError(f"--device {device} with {world} processes - leave it out: each takes its own GPU")
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=WAIT, device_id=torch.device(device))
    else:
        dist.init_process_group("gloo", timeout=WAIT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """All-gather of shares that may differ by a row; its backward pass sums the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, bounds: list[int], rank: int) -> torch.Tensor:
        ctx.bounds, ctx.rank = bounds, rank
        sizes = np.diff(bounds)
        # A collective needs equal shapes, so shorter shares get a row that is dropped afterwards.
        padded = mine.new_zeros(int(sizes.max()), *mine.shape[1:])
        padded[: len(mine)] = mine
        shares = [torch.empty_like(padded) for _ in sizes]
        with _the_others():
            dist.all_gather(shares, padded)
        return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may give it to others too
        with _the_others():
            dist.all_reduce(gradient)
        return gradient[ctx.bounds[ctx.rank] : ctx.bounds[ctx.rank + 1]], None, None


@contextlib.contextmanager
def _the_others() -> Iterator[None]:
    """Turn a failed exchange into the error that another process has ended, which itself said why."""
    try:
        yield
    except RuntimeError as error:
        if is_device_failure(error) or is_out_of_memory(error):
            raise
        if "Duplicate GPU" in str(error):
            raise UsageError(
                f"two processes of this training have the same GPU, and this machine shows "
                f"{torch.cuda.device_count()} - start no more processes than GPUs, or add --device cpu"
            ) from error
        raise SvbError(
            f"another process of this training has ended ({str(error).splitlines()[0]}) - fix it, then run "
            "the same command again to continue"
        ) from error


def _bounds(total: int, world: int) -> list[int]:
    sizes: NDArray[np.int64] = np.full(world, total // world)
    sizes[: total % world] += 1
    return [0, *np.cumsum(sizes).tolist()]
