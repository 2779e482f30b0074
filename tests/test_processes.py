"""Several processes train as one does with the same batches."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import synthetic
import torch
import torch.distributed as dist
import train_together
from runs import Task, contents, lines, tiny
from safetensors.torch import load_file

from svb.errors import SvbError, UsageError
from svb.train import loop
from svb.train.checkpoint import load_checkpoint
from svb.train.processes import Processes, joined_processes
from svb.train.run import train

DRIVER = Path(__file__).with_name("train_together.py")
# 2 epochs of 2 steps of 15 captions, which neither 2 nor 4 processes share evenly.
COMMON = {"batch_size": 15, "dropout": 0.0}
WORDS_AND_MARGINS = {"loss": "max_margin", "intra_modal_weight": 0.5, "negatives_warmup": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "tokens": {"learn_support_temperature": True},
    "embedding": {"rebuild": "embedding", "learn_support_temperature": True},
    "none": {"variant": "none"},
    "margins and tokens": {**WORDS_AND_MARGINS, "variant": "hybrid"},
    "margins and embedding": {**WORDS_AND_MARGINS, "rebuild": "embedding", "negatives": "mean"},
    "memory bank of tokens": {"memory_bank": 20, "caption_sampling": "all", "learn_logit_scale": False},
    "memory bank of embeddings": {
        **{"memory_bank": 7, "rebuild": "embedding", "support_values": "pooled"},
        **{"variant": "full", "loss": "max_margin"},
    },
    # Of 15 captions 1 is rebuilt, so that all processes but one have none.
    "one caption of tokens": {"decode_fraction": 0.05},
    "one caption of embedding": {"decode_fraction": 0.05, "rebuild": "embedding", "variant": "identity"},
    "half of the captions": {"decode_fraction": 0.5, "memory_bank": 5},
    "all of the head": {"layers": 1, "convolution": 3, "pooling": "attention"},
    "relevant pairs and soft labels": {"relevant_from": 0.3, "soft_label_weight": 1.0, "variant": "none"},
    "margins by relevance": {**WORDS_AND_MARGINS, "relevance_margin": True, "relevant_from": 0.5},
    "retrieval": {"retrieval_scale": 8.0, "loss": "info_loob", "learn_logit_scale": False, "rebuild": "embedding"},
    # Each step's loss is interrupted in one process, between forward and backward.
    "interrupted": {"learn_support_temperature": True, "memory_bank": 9},
}
MEETING = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
# What a softmax cancels has a gradient of rounding alone, and Adam makes steps of it as long as any other.
CANCELLED = ("in_proj_bias", "query_key_value.bias")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("task")
    return synthetic.make_task(folder, num_train=30, num_val=6, feature_size=10, text_size=8)


@pytest.fixture(scope="module")
def together(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    """Return the folder of the runs of all configs that so many processes made with a dtype."""

    @functools.cache
    def runs_of(world: int, dtype: str) -> Path:
        out = tmp_path_factory.mktemp(f"{world}-{dtype}")
        configs = {name: dataclasses.asdict(tiny(**COMMON, **options)) for name, options in CONFIGS.items()}
        plan: dict[str, Any] = {"store": str(task[0]), "captions": str(task[1]), "out": str(out)}
        plan |= {"configs": configs, "dtype": dtype}
        if world == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "CHECKPOINT_SECONDS", 1e9)
                train_together.train_all(plan, Processes())
            return out
        (out / "plan.json").write_text(json.dumps({**plan, "interrupted": ["interrupted"]}))
        command, place = [sys.executable, DRIVER, out / "plan.json"], {**os.environ, "WORLD_SIZE": str(world)}
        started = [subprocess.Popen(command, env={**place, "RANK": str(rank)}) for rank in range(world)]
        try:
            assert [process.wait(600) for process in started] == [0] * world
        finally:
            for process in started:
                process.kill()
        return out

    return runs_of


def assert_same(one: Path, many: Path, *, parameters: float, metrics: float, but: tuple[str, ...] = ()) -> None:
    """Assert that no parameter differs by more, `but` those so named, and no metric."""
    weights = [load_file(run / "last" / "model.safetensors") for run in (one, many)]
    assert weights[0].keys() == weights[1].keys()
    assert {"log_logit_scale", "log_support_temperature"} <= weights[0].keys()
    compared = [name for name in weights[0] if not any(name.endswith(ending) for ending in but)]
    differences = {name: float((weights[1][name] - weights[0][name]).abs().max()) for name in compared}
    assert {name: difference for name, difference in differences.items() if difference > parameters} == {}
    for line, expected_line in zip(lines(many), lines(one), strict=True):
        assert line == pytest.approx(expected_line, rel=metrics, abs=metrics)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_are_exactly_one(world: int, config: str, together: Callable[[int, str], Path]) -> None:
    one, many = together(1, "float64") / config, together(world, "float64") / config
    assert_same(one, many, parameters=1e-11, metrics=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("world", [2, 4])
def test_in_float32_nothing_but_rounding_differs(
    world: int, config: str, together: Callable[[int, str], Path]
) -> None:
    one, many = together(1, "float32") / config, together(world, "float32") / config
    assert_same(one, many, parameters=1e-6, metrics=1e-5, but=CANCELLED)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_gather_carries_the_gradients_of_all_processes(world: int, together: Callable[[int, str], Path]) -> None:
    """Of the loss of its own process alone, row i would have (rank + 1) * (i + 1)."""
    out, all_ranks = together(world, "float64"), sum(range(1, world + 1))
    for number, total in enumerate((8, 15)):
        covered = []
        for rank in range(world):
            found = json.loads((out / f"gathered-{rank}.json").read_text())[number]
            rows = range(*found["rows"])
            assert found["gathered"] == list(range(total))
            assert found["gradient"] == [[all_ranks * (row + 1.0)] * 2 for row in rows]
            covered += rows
        assert covered == list(range(total))


@pytest.mark.parametrize(
    ("missing", "device", "words"),
    [
        *((name, "cpu", f"WORLD_SIZE is 2, but {name} not set") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")),
        ("", "cuda:0", "--device cuda:0 with 2 processes - leave it out"),
    ],
)
def test_processes_that_cannot_be_joined(
    monkeypatch: pytest.MonkeyPatch, missing: str, device: str, words: str
) -> None:
    for name, value in MEETING.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing, raising=False)
    with pytest.raises(UsageError, match=words), joined_processes(device):
        pass


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_takes_the_gpu_of_its_number_among_those_it_sees(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Four processes a machine of which each is shown two GPUs; torch.cuda and NCCL are mocked."""
    for name, value in {**MEETING, "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    for name, answer in {"is_available": True, "device_count": 2, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, mock.Mock(return_value=answer))
    answers = {"get_rank": 3, "get_world_size": 4, "init_process_group": None, "destroy_process_group": None}
    for name, answer in answers.items():
        monkeypatch.setattr(dist, name, mock.Mock(return_value=answer))
    with joined_processes(device) as (joined, own):
        assert (joined, own) == (Processes(3, 4), "cuda:1")
    torch.cuda.set_device.assert_called_once_with("cuda:1")
    # Evaluating and saving, for which the others wait, may take longer than NCCL's ten minutes.
    options = {"timeout": timedelta(hours=24), "device_id": torch.device("cuda:1")}
    dist.init_process_group.assert_called_once_with("nccl", **options)


def test_the_gradient_that_autograd_gives_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_gather", lambda shares, mine: [share.copy_(mine) for share in shares])
    monkeypatch.setattr(dist, "all_reduce", lambda gradient: gradient.mul_(2))
    mine = torch.ones(2, 3, requires_grad=True)
    given = torch.ones(4, 3)
    Processes(1, 2).gather(mine, 4).backward(given)
    assert given.tolist() == torch.ones(4, 3).tolist()
    assert mine.grad is not None and mine.grad.tolist() == (2 * torch.ones(2, 3)).tolist()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("NCCL: Duplicate GPU detected : rank 1 and rank 0"), UsageError, "have the same GPU"),
        (torch.AcceleratorError("CUDA error: an illegal access"), torch.AcceleratorError, "illegal access"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "out of memory"),
        (RuntimeError("Connection closed by peer"), SvbError, "another process of this training has ended"),
    ],
)
def test_a_failed_exchange_is_not_always_the_others_fault(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr(dist, "barrier", mock.Mock(side_effect=error))
    with pytest.raises(kind, match=words):
        Processes(0, 2).wait()


def test_a_batch_smaller_than_the_processes_is_refused(task: Task, tmp_path: Path) -> None:
    with (
        train_together.as_one_of(Processes(0, 16)),
        pytest.raises(UsageError, match=r"batches of 15 captions for 16 processes - .* start fewer processes"),
    ):
        train(*task, tmp_path / "run", tiny(**COMMON))
    assert not (tmp_path / "run").exists()


def svb_train(task: Task, out: Path, *options: object) -> list[str]:
    sizes = {"embedding-size": 8, "decoder-size": 8, "batch-size": 15, "evaluate-every": 1000}
    small = ["--rebuild", "tokens", *(part for name, size in sizes.items() for part in (f"--{name}", size))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m"]
    return [
        str(part) for part in (*launcher, "svb", "train", *task, "-o", out, "--device", "cpu", *small, *options)
    ]


def run_to_its_end(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_a_command_that_torchrun_starts_is_interrupted_and_goes_on(task: Task, tmp_path: Path) -> None:
    """With dropout, so that every process's own random numbers count."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert run_to_its_end(svb_train(task, whole, "--epochs", 150)).returncode == 0
    process = subprocess.Popen(svb_train(task, out, "--epochs", 150), stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=600)
    assert stderr.count("svb: interrupted - ") == 2, stderr
    last = load_checkpoint(out / "last")
    assert 0 < last.epoch < 150
    done = run_to_its_end(svb_train(task, out, "--epochs", 150))
    assert done.returncode == 0, done.stderr
    # One process alone speaks.
    assert done.stdout.split() == [str(out)]
    assert done.stderr.count(f"resuming {out} after epoch {last.epoch} of 150") == 1
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_an_error_ends_all_processes_with_its_message(task: Task, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_to_its_end(svb_train(task, out, "--epochs", 1)).returncode == 0
    assert len(list((out / "tensorboard").iterdir())) == 1, "the first process alone writes"
    before = contents(out)
    done = run_to_its_end(svb_train(task, out, "--epochs", 1, "--seed", 5))
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("svb: ")]
    assert sum("config.seed: stored 0, wanted 5" in line for line in said) == 1, done.stderr
    assert sum("another process of this training has ended" in line for line in said) <= 1
    # torchrun itself prints a traceback of its own; ours do not.
    assert not re.search(r"^\[rank\d\]: Traceback", done.stderr, re.MULTILINE), done.stderr
    assert contents(out) == before
