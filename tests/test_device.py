"""The device that computes, chosen, tried and named; and a process on each of several. torch.cuda is mocked."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shares
import torch
from conftest import RunSvb
from extraction import assert_same_bytes, run, statuses
from messages import heard
from runs import Task, change_config, lines, tiny
from torch import nn

from svb import device as device_module
from svb.data.feature_store import verify_store
from svb.device import choose_device, choose_precision, describe_device, explained_errors
from svb.errors import DeviceError, Interrupted, MismatchError, UsageError
from svb.extract import run as run_module
from svb.extract.backbones.backbone import Backbone
from svb.extract.backbones.transform import Transform
from svb.extract.config import ExtractConfig
from svb.extract.progress import ExtractProgress
from svb.extract.together import devices as devices_module
from svb.extract.together.devices import chosen_devices, own_device
from svb.retrieve.model.embedder import heads_embedder
from svb.train import loop
from svb.train.config import TrainConfig
from svb.train.run import build_model, read_run, train


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
        torch, "ones", lambda *size, **options: (cards.ones if "device" in options else ones)(*size, **options)
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
    # In float32 that is float32; parts of torch still read the older switches.
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    cards.current = 1  # as the process has chosen
    assert choose_device("cuda") == torch.device("cuda:1")
    # The precision is that of the device named.
    assert [choose_precision(torch.device("cuda", index)) for index in (0, 1)] == [torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "error", "kind", "words"),
    [
        ("cuda:2", "", UsageError, r"cannot use device 'cuda:2' \(CUDA error: invalid device ordinal\) - try auto"),
        ("cuda:1", "CUDA error: no kernel image is available for execution on the device\nmore", DeviceError,
         r"cuda:1 \(card 1, compute capability 9.0\) cannot compute \(CUDA error: no kernel .* - .*PyTorch"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used(cards: Cards, name: str, error: str, kind: type[Exception], words: str) -> None:
    cards.error = error
    with pytest.raises(kind, match=words):
        choose_device(name)


def test_a_driver_too_old_is_said(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found 1)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert choose_device() == torch.device("cpu")
    for words in ("computing on the CPU", "driver on your system is too old", "update the driver"):
        assert words in said[0]


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
    expected = {"device": "cuda:1", "gpu": "card 1", "driver": driver}
    assert expected.items() <= ExtractConfig().provenance(torch.device("cuda:1")).items()
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


def test_info_names_the_device_of_a_run(task: Task, tmp_path: Path, run_svb: RunSvb) -> None:
    run = train(*task, tmp_path / "run", tiny(epochs=1, rebuild="embedding"), device="cpu")
    change_config(run, lambda held: held["provenance"].update(gpu="NVIDIA H200", driver="580.1"))
    assert "cpu, NVIDIA H200, driver 580.1" in run_svb("info", run).stdout


def test_captions_from_a_file_reach_heads_on_another_device() -> None:
    """`meta` stands for a GPU: like one, it refuses tensors that are elsewhere."""
    model = {
        "config": dataclasses.asdict(TrainConfig(embedding_size=8)),
        "video": {"backbone": "a:b", "backbone_settings": {"feature_size": 6, "weights_hash": "of a:b"}},
        "text": {"text_encoder": {"feature_size": 5, "weights_hash": "of words"}},
    }
    embedder = heads_embedder(model, build_model(model).state_dict(), Path("run"), torch.device("meta"))
    embeddings = embedder.text_head(torch.zeros(3, 5))
    assert embeddings.device.type == "meta" and embeddings.shape == (3, 8)


A, B = "GPU-aaaa", "MIG-bbbb"


def let_see(listed: str | None, monkeypatch: pytest.MonkeyPatch, there: int = 0) -> None:
    """Have a machine of so many GPUs, of which CUDA_VISIBLE_DEVICES lists these."""
    monkeypatch.setattr(devices_module, "_count_gpus", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)


@pytest.mark.parametrize(
    ("asked", "listed", "there", "chosen"),
    [
        ("all", None, 3, ["0", "1", "2"]),
        ("all", "2, 5,7", 8, ["2", "5", "7"]),
        ("all", f"{A},{B}", 8, [A, B]),
        ("all", "1,-1,2", 8, ["1"]),
        ("1", None, 2, ["1"]),
        ("1,0", f"{A},{B}", 2, [B, A]),
        (A, None, 2, [A]),
        ("cpu,cpu", None, 2, ["cpu", "cpu"]),
        ("all", None, 0, r"--devices all: found 0 GPUs \(NVIDIA's driver tells of them\) - leave out --devices"),
        *(
            ("0,1", none, 8, f"found 0 GPUs .*'{none}'.* - leave out --devices")
            for none in ("", "-1", "NoDevFiles")
        ),
        ("0,2", None, 2, "found 2 GPUs .* - expected all, or numbers from 0 to 1"),
        ("0,cpu", None, 2, "found 2 GPUs .* - expected all, or numbers from 0 to 1"),
        ("1,1", None, 2, "--devices 1,1 names a GPU twice"),
    ],
)
def test_the_devices_that_are_chosen(
    asked: str, listed: str | None, there: int, chosen: list[str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_see(listed, monkeypatch, there)
    if isinstance(chosen, list):
        assert chosen_devices(asked) == chosen
    else:
        with pytest.raises(UsageError, match=chosen):
            chosen_devices(asked)


def test_other_options_that_choose_devices() -> None:
    for other in ({"device": "cuda:1"}, {"ray": "local"}):
        with pytest.raises(UsageError, match="got --devices all and --"):
            ExtractConfig(devices="all", **other)  # type: ignore[arg-type]


@pytest.mark.parametrize(("listed", "seen"), [(None, ["0", "1", "0"]), (f"{A},{B}", [A, B, A]), ("", ["", "", ""])])
def test_each_rank_sees_its_own_gpu_before_torch_looks(
    listed: str | None, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices_module, "sys", SimpleNamespace(modules={}))
    for rank, expected in enumerate(seen):
        let_see(listed, monkeypatch, 2)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert devices_module.own_device(ExtractConfig(rank=rank, world_size=3), tmp_path) == "auto"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def extract_by(
    share: Callable[..., None],
    videos: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_progress: Callable[[ExtractProgress], None] = lambda progress: None,
    devices: str = "cpu,cpu",
    engine: str = "torch",
) -> list[str]:
    """Extract in two processes that do this in place of their share; returns the messages."""
    monkeypatch.setattr(run_module, "_extract_share", share)
    return run(videos, out, devices=devices, engine=engine, workers=4, on_progress=on_progress)


def test_an_interrupt_reaches_all(clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts: list[int] = []

    def interrupt(progress: ExtractProgress) -> None:
        if len(list(tmp_path.glob("out/began *"))) == 2 and not interrupts:
            interrupts.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="interrupted - 0 videos of this run are in") as caught:
        extract_by(shares.waits, clips_folder, tmp_path / "out", monkeypatch, interrupt)
    assert caught.value.exit_code == 130
    assert len(list(tmp_path.glob("out/saved *"))) == 2
    assert not multiprocessing.active_children()


def test_one_that_fails_leaves_its_videos_to_the_others(
    clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told, said = tmp_path / "out", [], heard()

    def tell(progress: ExtractProgress) -> None:
        told.append((progress.videos_done, progress.frames_done, progress.num_videos, progress.num_workers))
        if any("the disk is full" in message for message in said):
            (out / "told").touch()

    let_see(f"{A},{B}", monkeypatch)
    extract_by(shares.first_fails, clips_folder, out, monkeypatch, tell, devices="all")
    assert f"a process on each of the GPUs {A}, {B}" in said
    assert f"the process on GPU {A} ended (the disk is full): the others take its videos" in said
    assert said[-1].startswith("decoding and backbones kept pace")
    assert told[-1] == (3, 14, 4, 6)
    assert {path.name for path in out.glob("cuda *")} == {f"cuda 2 {A} 0", f"cuda 2 {B} 1"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == f"{A},{B}"


def test_the_error_is_that_of_the_processes_where_all_fail(
    clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_see(f"{A},{B}", monkeypatch)
    with pytest.raises(UsageError, match=f"no such thing on ({A}|{B})"):
        extract_by(shares.all_fail, clips_folder, tmp_path / "out", monkeypatch, devices="0,1")


@pytest.mark.slow
@pytest.mark.usefixtures("toy_backbones")
@pytest.mark.parametrize("share", [shares.toys, shares.first_dies])
def test_two_processes_and_the_bytes_of_one(
    share: Callable[..., None], clips_folder: Path, toy_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = extract_by(share, clips_folder, tmp_path / "out", monkeypatch)
    assert set(statuses(tmp_path / "out").values()) == {"ok"}
    assert_same_bytes(tmp_path / "out", toy_store)
    assert verify_store(tmp_path / "out") == []
    assert sum("died with exit code -9" in message for message in messages) == (share is shares.first_dies)


@pytest.mark.slow
@pytest.mark.usefixtures("toy_backbones")
def test_the_engine_is_chosen_once_for_all(
    clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = extract_by(shares.of_two_minds, clips_folder, tmp_path / "out", monkeypatch, engine="auto")
    assert set(statuses(tmp_path / "out").values()) == {"ok"}
    assert not any("ended (" in message for message in messages)
    assert sum(message.startswith("engine: ") for message in messages) == 1
