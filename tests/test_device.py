"""The device that computes: chosen, tried, and named where it made something. torch.cuda is mocked."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import RunSvb
from runs import Task, change_config, lines, tiny
from torch import nn

from svb import device as device_module
from svb.cli import cli
from svb.device import choose_device, choose_precision, describe_device, explained_errors, to_device
from svb.errors import DeviceError, MismatchError, UsageError
from svb.extract.backbones.backbone import Backbone
from svb.extract.backbones.transform import Transform
from svb.extract.config import ExtractConfig
from svb.extract.together.devices import own_device
from svb.train import loop
from svb.train.run import read_run, train


@dataclasses.dataclass
class Cards:
    """Stands for the GPUs of a machine: their generation, and what each does when it is to compute."""

    majors: tuple[int, ...] = (7, 9)
    error: str = ""
    current: int = 0
    tried: list[str] = dataclasses.field(default_factory=list)

    def set_device(self, device: torch.device) -> None:
        if device.index >= len(self.majors):
            raise torch.AcceleratorError("CUDA error: invalid device ordinal\nCUDA kernel errors might be ...")
        self.current = device.index

    def properties(self, device: torch.device | None = None) -> SimpleNamespace:
        index = self.current if device is None or device.index is None else device.index
        return SimpleNamespace(major=self.majors[index], minor=0, name=f"card {index}")

    def ones(self, size: int, device: torch.device) -> torch.Tensor:
        self.tried.append(str(device))
        if self.error:
            raise torch.AcceleratorError(self.error)
        return torch.zeros(size) + 1


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cards]:
    cards, ones = Cards(), torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards.majors))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: cards.current)
    monkeypatch.setattr(torch.cuda, "set_device", cards.set_device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cards.properties(device).name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (cards.properties(device).major, 0))
    monkeypatch.setattr(
        torch,
        "ones",
        lambda *size, **options: cards.ones(*size, **options) if "device" in options else ones(*size, **options),
    )
    switches = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    before = [switch.fp32_precision for switch in switches]
    older = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield cards
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = older
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision


def test_a_batch_brings_nothing_but_its_images_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = Transform(2, (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))
    backbone = Backbone("toy:flat", nn.Flatten(), transform, 12)
    backbone.place(torch.device("cpu"), torch.float32)
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    monkeypatch.setattr(torch, "tensor", None)  # a copy that the host would wait for, with every batch
    assert backbone(images).tolist() == [[1.0] * 4 + [1.5] * 4 + [1.0] * 4]


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_made_the_current_one_and_tried(cards: Cards, name: str, index: int) -> None:
    assert choose_device(name) == torch.device("cuda", index)
    assert cards.current == index and cards.tried == [f"cuda:{index}"]


def test_cuda_is_the_gpu_that_the_process_has_chosen(cards: Cards) -> None:
    cards.current = 1
    assert choose_device("cuda") == torch.device("cuda:1")


def test_float32_is_float32_on_a_gpu(cards: Cards) -> None:
    choose_device("cuda")
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32, "can still be read"


def test_the_precision_is_that_of_the_device_named(cards: Cards) -> None:
    assert [choose_precision(torch.device("cuda", index)) for index in (0, 1)] == [torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "error", "kind", "words"),
    [
        ("cuda:2", "", UsageError, r"cannot use device 'cuda:2' \(CUDA error: invalid device ordinal\) - try auto"),
        (
            "cuda:1",
            "CUDA error: no kernel image is available for execution on the device\nmore",
            DeviceError,
            r"cuda:1 \(card 1, compute capability 9.0\) cannot compute \(CUDA error: no kernel .* - .*PyTorch",
        ),
    ],
)
def test_a_gpu_that_cannot_be_used(cards: Cards, name: str, error: str, kind: type[Exception], words: str) -> None:
    cards.error = error
    with pytest.raises(kind, match=words):
        choose_device(name)


def test_a_driver_too_old_is_said(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    def is_available() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found 11040)", stacklevel=1
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert choose_device() == torch.device("cpu")
    assert "computing on the CPU" in said[0] and "driver on your system is too old" in said[0]
    assert "update the driver" in said[0]


@pytest.mark.parametrize(
    ("asked", "own"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu"), ("cuda:0", "cuda:0")]
)
def test_each_rank_of_an_extraction_has_its_gpu(
    cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, own: str
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")  # more ranks than cards: they are taken in turn
    assert own_device(ExtractConfig(device=asked, rank=3, world_size=4), tmp_path / "out") == own


@pytest.mark.parametrize(
    ("held", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build", "580.82.07"),
        (None, "unknown"),
    ],
)
def test_a_gpu_is_named_with_its_driver(
    cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str | None, driver: str
) -> None:
    monkeypatch.setattr(device_module, "DRIVER_FILE", tmp_path / "version")
    if held is not None:
        (tmp_path / "version").write_text(held)
    described = ExtractConfig().provenance(torch.device("cuda:1"))
    assert {name: described[name] for name in ("device", "gpu", "driver")} == {
        "device": "cuda:1",
        "gpu": "card 1",
        "driver": driver,
    }
    assert describe_device(torch.device("cpu")) == {"device": "cpu"}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "too little memory .* go slower"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), "too little memory"),
        (torch.AcceleratorError("CUDA error: an illegal memory access\nmore"), r"failed \(CUDA .* access\) - "),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "failed .* another --device"),
        (RuntimeError("shapes do not fit"), "shapes do not fit"),
    ],
)
def test_errors_of_a_device_say_what_to_do(error: RuntimeError, words: str) -> None:
    expected = RuntimeError if "shapes" in words else DeviceError
    with pytest.raises(expected, match=words), explained_errors(torch.device("cpu"), smaller="go slower"):
        raise error


def test_an_array_becomes_a_tensor() -> None:
    tensor = to_device(np.arange(3), torch.device("cpu"))
    assert tensor.tolist() == [0, 1, 2] and tensor.dtype == torch.int64


@pytest.mark.parametrize("is_older", [False, True])
@pytest.mark.parametrize("rebuild", ["embedding", "tokens"])
def test_a_run_without_a_decoder_of_words_goes_on_on_another_device(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rebuild: str, is_older: bool
) -> None:
    """`rebuild="tokens"` may not: its decoder would compute in another precision from here on."""
    monkeypatch.setattr("svb.train.run._decoder_dtype", lambda device: torch.float32)
    run = train(*task, tmp_path / "run", tiny(epochs=1, rebuild=rebuild))
    assert ("decoder_precision" in read_run(run)) is (rebuild == "tokens")
    monkeypatch.setattr("svb.train.run._decoder_dtype", lambda device: torch.bfloat16)
    if is_older:  # it named a precision whatever it trained, and no device
        change_config(run, lambda held: held.update(decoder_precision="float32") or held.pop("provenance"))
    if rebuild == "tokens":
        with pytest.raises(MismatchError, match="decoder_precision: stored 'float32', wanted 'bfloat16'"):
            train(*task, run, tiny(epochs=1, rebuild=rebuild))
        return
    change_config(run, lambda held: held["config"].update(epochs=2))
    train(*task, run, tiny(epochs=2, rebuild=rebuild))
    assert lines(run)[-1]["epoch"] == 2


def test_a_training_out_of_memory_says_what_to_do(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_svb: RunSvb
) -> None:
    def full(*arguments: Any) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(loop.Loop, "_run_step", full)
    ran = run_svb("train", *task, "-o", tmp_path / "run", "--embedding-size", 8, "--layers", 0, "--device", "cpu")
    assert ran.exit_code == 1
    last = ran.stderr.splitlines()[-1]
    assert "cpu has too little memory (CUDA out of memory. Tried to allocate 2.00 GiB.) - free it" in last
    assert "--batch-size, --memory-bank or --max-frames" in last


def test_info_names_the_device_of_a_run(task: Task, tmp_path: Path) -> None:
    run = train(*task, tmp_path / "run", tiny(epochs=1, rebuild="embedding"), device="cpu")
    change_config(run, lambda held: held["provenance"].update(gpu="NVIDIA H200", driver="580.1"))
    result = CliRunner().invoke(cli, ["info", str(run)])
    assert result.exit_code == 0 and "cpu, NVIDIA H200, driver 580.1" in result.stdout
