"""`--devices`: which GPUs a process sees, and a process on each of them; all without a GPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import shares
from extraction import assert_same_bytes, run, statuses
from messages import heard

from svb.data.feature_store import verify_store
from svb.errors import Interrupted, UsageError
from svb.extract import run as run_module
from svb.extract.config import ExtractConfig
from svb.extract.progress import ExtractProgress
from svb.extract.together import devices as devices_module
from svb.extract.together.devices import chosen_devices, visible_gpus

A, B = "GPU-aaaa", "MIG-bbbb"


def let_see(listed: str | None, monkeypatch: pytest.MonkeyPatch, there: int = 0) -> None:
    """Have a machine of so many GPUs, of which CUDA_VISIBLE_DEVICES lists these."""
    monkeypatch.setattr(devices_module, "_count_gpus", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)


@pytest.mark.parametrize(
    ("listed", "there", "gpus"),
    [
        (None, 3, ["0", "1", "2"]),
        (None, 0, []),
        ("2, 5,7", 8, ["2", "5", "7"]),
        (f"{A},{B}", 8, [A, B]),
        ("1,-1,2", 8, ["1"]),
        *[(none, 8, []) for none in ("", "-1", "NoDevFiles")],
    ],
)
def test_the_gpus_that_are_visible(
    listed: str | None, there: int, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_see(listed, monkeypatch, there)
    assert visible_gpus() == gpus


@pytest.mark.parametrize(
    ("asked", "listed", "chosen"),
    [
        ("all", None, ["0", "1"]),
        ("1", None, ["1"]),
        ("1,0", f"{A},{B}", [B, A]),
        ("all", "6,3", ["6", "3"]),
        (A, None, [A]),
        ("cpu,cpu", None, ["cpu", "cpu"]),
    ],
)
def test_the_devices_that_are_chosen(
    asked: str, listed: str | None, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_see(listed, monkeypatch, 2)
    assert chosen_devices(asked) == chosen


@pytest.mark.parametrize(
    ("asked", "listed", "there", "words"),
    [
        ("all", None, 0, r"--devices all: found 0 GPUs \(NVIDIA's driver tells of them\) - leave out --devices"),
        ("0,1", "", 8, r"found 0 GPUs \(CUDA_VISIBLE_DEVICES is ''\) - leave out --devices"),
        ("0,2", None, 2, "found 2 GPUs .* - expected all, or numbers from 0 to 1"),
        ("0,cpu", None, 2, "found 2 GPUs .* - expected all, or numbers from 0 to 1"),
        ("1,1", None, 2, "--devices 1,1 names a GPU twice"),
    ],
)
def test_devices_that_are_not_there(
    asked: str, listed: str | None, there: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_see(listed, monkeypatch, there)
    with pytest.raises(UsageError, match=words):
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
    died = [message for message in messages if "died with exit code -9" in message]
    assert len(died) == (share is shares.first_dies)


@pytest.mark.slow
@pytest.mark.usefixtures("toy_backbones")
def test_the_engine_is_chosen_once_for_all(
    clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = extract_by(shares.of_two_minds, clips_folder, tmp_path / "out", monkeypatch, engine="auto")
    assert set(statuses(tmp_path / "out").values()) == {"ok"}
    assert not [message for message in messages if "ended (" in message]
    assert len([message for message in messages if message.startswith("engine: ")]) == 1
