"""Trains several configs one after the other, in each of several processes, which meet at a file beside the plan.

    RANK=0 WORLD_SIZE=2 python tests/train_together.py plan.json

Starting processes takes far longer than these trainings, so that one start serves many.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from svb.train import loop, objective, run
from svb.train.config import TrainConfig
from svb.train.processes import Processes

Plan = dict[str, Any]


def train_all(plan: Plan, processes: Processes) -> None:
    """Train `plan["configs"]`, by the name of the run that each makes in `plan["out"]`."""
    with as_one_of(processes), exactly(plan["dtype"]):
        for name, options in plan["configs"].items():
            arguments = (plan["store"], plan["captions"], Path(plan["out"]) / name, TrainConfig(**options))
            if name in plan.get("interrupted", []):
                with interrupted_at_step(3, processes), contextlib.suppress(KeyboardInterrupt):
                    run.train(*arguments, device="cpu")
                    raise AssertionError("the interrupt was lost")
            run.train(*arguments, device="cpu")


@contextlib.contextmanager
def as_one_of(processes: Processes) -> Iterator[None]:
    """Let `svb.train.run.train` take part in the processes that were joined already."""

    @contextlib.contextmanager
    def joined(device: str) -> Iterator[tuple[Processes, str]]:
        yield processes, device

    with patch.multiple(run, joined_processes=joined, draw_curves=lambda folder: folder):
        yield


@contextlib.contextmanager
def exactly(dtype_name: str) -> Iterator[None]:
    """Compute in a dtype, the decoder's products too.

    What processes sum up in another order differs in the last digit. Where a gradient is nothing but rounding, as
    that of a bias which a softmax cancels, Adam makes steps of full length of it: only float64 tells that from an
    error.
    """
    dtype = getattr(torch, dtype_name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with (
            patch.object(run, "_decoder_dtype", lambda device: dtype),
            patch.object(torch.Tensor, "float", lambda tensor: tensor.to(dtype)),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def interrupted_at_step(step: int, processes: Processes) -> Iterator[None]:
    """Send SIGTERM to the last process alone, in the middle of a step counted from 1."""
    real, calls = objective.info_nce, 0

    def interrupting(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2 * step - 1 and processes.rank == processes.world - 1:  # two calls a step
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with patch.object(objective, "info_nce", interrupting):
        yield


def gather_and_its_gradient(processes: Processes, total: int) -> dict[str, Any]:
    """Return what `gather` gave, and the gradient of a sum of all processes' losses.

    Process r's loss weighs row i of the gathered rows by (r + 1) * (i + 1).
    """
    share = processes.share(total)
    mine = torch.arange(total, dtype=torch.float64)[share, None].expand(-1, 2).clone().requires_grad_()
    gathered = processes.gather(mine, total)
    weights = (processes.rank + 1) * torch.arange(1, total + 1, dtype=torch.float64)[:, None]
    (gathered * weights).sum().backward()
    assert mine.grad is not None
    return {"gathered": gathered[:, 0].tolist(), "rows": [share.start, share.stop], "gradient": mine.grad.tolist()}


def main() -> None:
    torch.set_num_threads(1)
    loop.CHECKPOINT_SECONDS = 1e9
    plan = json.loads(Path(sys.argv[1]).read_text())
    processes = Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    meeting, timeout = f"file://{plan['out']}/meeting", timedelta(seconds=600)
    dist.init_process_group("gloo", meeting, timeout, processes.world, processes.rank)
    gathered = [gather_and_its_gradient(processes, total) for total in (8, 15)]
    (Path(plan["out"]) / f"gathered-{processes.rank}.json").write_text(json.dumps(gathered))
    train_all(plan, processes)
    dist.destroy_process_group()
    # Now and then torch's threads abort the interpreter while it ends ("terminate called without an active
    # exception"), with all done and written: not what is tested.
    os._exit(0)


if __name__ == "__main__":
    main()
