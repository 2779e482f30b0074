"""Hardware decoders that fail: the file is decoded in software, and the run says so."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import clips
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from decoding import EVERY_FRAME, Decoded, run
from extraction import run as extract
from extraction import statuses

from svb.data.feature_store import FeatureStore
from svb.extract.backbones import load_backbone
from svb.extract.config import ExtractConfig
from svb.extract.decode import ffmpeg_decoder
from svb.extract.decode.options import DecodeOptions

# What ffmpeg 9 says without a driver, and what it says when a card gives up amid a file.
WITHOUT_DEVICE = """[CUDA @ 0x1] [error] Could not dynamically load CUDA
[error] Device creation failed: -1.
[vist#0:0/h264 @ 0x1] [dec:h264 @ 0x2] [error] No device available for decoder: device type cuda needed for h264.
[vist#0:0/h264 @ 0x1] [dec:h264 @ 0x2] [error] Hardware device setup failed for decoder: Operation not permitted
[fatal] Error opening output files: Operation not permitted
"""
GIVES_UP = """[h264 @ 0x1] [error] cuvidDecodePicture(decoder) failed -> CUDA_ERROR_LAUNCH_FAILED: unspecified
[vist#0:0/h264 @ 0x1] [dec:h264 @ 0x2] [error] Error submitting packet to decoder: Unknown error
"""
# Takes the options of hardware out, decodes as many frames as told, and says the words.
FAKE = """#!{python}
import os, subprocess, sys
arguments = sys.argv[1:]
real = {real!r}
if "-hwaccel" not in arguments or "-init_hw_device" in arguments:
    os.execv(real, [real, *arguments])
with open({log!r}, "a") as log:
    log.write(" ".join(arguments[arguments.index("-hwaccel"):][:4]) + "\\n")
if {frames}:
    for option in ("-hwaccel", "-hwaccel_device"):
        if option in arguments:
            at = arguments.index(option)
            del arguments[at : at + 2]
    arguments[-1:] = ["-frames:v", "{frames}", arguments[-1]]
    subprocess.run([real, *arguments], close_fds=False)
sys.stderr.write({words!r})
sys.exit(255)
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that gets a line for each attempt to decode in hardware."""
    monkeypatch.setattr(ffmpeg_decoder, "_hardware_failures", [])
    (tmp_path / "attempts").touch()
    return tmp_path / "attempts"


def play(log: Path, words: str, monkeypatch: pytest.MonkeyPatch, frames: int = 0) -> None:
    real = imageio_ffmpeg.get_ffmpeg_exe()
    fake = log.with_name("ffmpeg")
    fake.write_text(FAKE.format(python=sys.executable, real=real, log=str(log), words=words, frames=frames))
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))


HARDWARE = DecodeOptions(EVERY_FRAME, decoder="ffmpeg", hwaccel="cuda", hwaccel_device="3")


def in_hardware(path: Path) -> Decoded:
    return run(ffmpeg_decoder.decode, path, HARDWARE)


@pytest.mark.parametrize(
    ("words", "frames", "said"),
    [
        (WITHOUT_DEVICE, 0, "Could not dynamically load CUDA"),
        (GIVES_UP, 7, "cuvidDecodePicture(decoder) failed -> CUDA_ERROR_LAUNCH_FAILED: unspecified"),
        ("", 0, "ffmpeg ended without a word"),
    ],
)
def test_a_healthy_file_is_decoded_in_software(
    words: str, frames: int, said: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clips.make_clip(tmp_path / "a.mp4")
    expected = run(ffmpeg_decoder.decode, path, EVERY_FRAME)
    play(log, words, monkeypatch, frames)
    for attempts in (1, 2, 3, 3):  # after three in a row it is not tried again
        decoded = in_hardware(path)
        note = f"decoded in software, because the hardware decoder failed ({said})"
        assert decoded.end == replace(expected.end, error=note, in_software=True)
        np.testing.assert_array_equal(decoded.frames, expected.frames)
        np.testing.assert_array_equal(decoded.times_seconds, expected.times_seconds)
        assert log.read_text().splitlines() == ["-hwaccel cuda -hwaccel_device 3"] * attempts


def test_a_damaged_file_is_not_the_hardwares_fault(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clips.make_rotten_clip(tmp_path / "a.mp4")
    expected = run(ffmpeg_decoder.decode, path, EVERY_FRAME)
    play(log, "", monkeypatch, 1000)
    assert in_hardware(path).end == expected.end
    assert not ffmpeg_decoder._hardware_failures


@pytest.mark.usefixtures("toy_backbones", "spawned_workers")  # whose environment is that of the test
def test_the_run_says_it_once(
    log: Path, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(log, WITHOUT_DEVICE, monkeypatch)
    monkeypatch.setattr("svb.extract.decode.ffmpeg_process.require_hwaccel", lambda name: None)
    messages = extract(clips_folder, tmp_path / "out", decoder="ffmpeg", hwaccel="cuda")
    assert set(statuses(tmp_path / "out").values()) == {"ok"}
    assert sum("--hwaccel cuda fails on this machine: decoded in software" in m for m in messages) == 1
    assert "4 videos were decoded in software: --hwaccel cuda failed" in messages
    assert all("decoded in software" in r.error for r in FeatureStore(tmp_path / "out").records.values())
    assert len(log.read_text().splitlines()) == 3


@pytest.mark.usefixtures("toy_backbones")
def test_each_rank_decodes_on_its_own_device() -> None:
    network = load_backbone("toy:frames", torch.device("cpu"), torch.float32)
    for device, expected in (("cuda:2", "2"), ("cuda", None), ("cpu", None)):
        network.device = torch.device(device)
        config = ExtractConfig(decoder="ffmpeg", hwaccel="cuda")
        assert config.decode_options_for([network]).hwaccel_device == expected
