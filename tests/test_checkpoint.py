from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import TINY, Task

from svb.errors import InputError, StoreError
from svb.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from svb.train.run import read_run, train

FILES = ("model.safetensors", "training.pt", "checkpoint.json")


@pytest.fixture(scope="module")
def whole_run(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `TINY`; only to be read."""
    return train(*task, tmp_path_factory.mktemp("run") / "run", TINY)


@pytest.fixture
def last(whole_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run's last/ that the test may damage."""
    return Path(shutil.copytree(whole_run / "last", tmp_path / "last"))


def flipped(data: bytes, position: int, flip: int) -> bytes:
    return data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_never_loaded(last: Path, name: str) -> None:
    path, expected = last / name, load_checkpoint(last)
    data = path.read_bytes()
    for kept in (0.0, 0.001, 0.3, 0.9, 0.9999):
        path.write_bytes(data[: min(int(len(data) * kept), len(data) - 2)])
        with pytest.raises(StoreError, match=r"last.*(restore|train again)"):
            load_checkpoint(last)
    positions = np.linspace(0, len(data) - 2, 60).astype(int) if name != "checkpoint.json" else range(len(data) - 1)
    for position, flip in itertools.product(positions, (0x01, 0x80)):
        path.write_bytes(flipped(data, position, flip))
        try:
            loaded = load_checkpoint(last)
        except StoreError as error:
            assert "restore" in str(error) or "train again" in str(error)
        else:  # white space of the JSON text
            assert name == "checkpoint.json" and data[position : position + 1].isspace()
            assert loaded.epoch == expected.epoch and loaded.metrics == expected.metrics
    path.unlink()
    with pytest.raises(StoreError, match="not a whole checkpoint"):
        load_checkpoint(last)


@pytest.mark.parametrize("flip", [0x01, 0x02])
def test_a_flipped_byte_in_config_json_is_noticed(whole_run: Path, tmp_path: Path, flip: int) -> None:
    path = tmp_path / "config.json"
    data = (whole_run / "config.json").read_bytes()
    expected = read_run(whole_run)
    for position in range(0, len(data) - 1, 3):
        path.write_bytes(flipped(data, position, flip))
        try:
            assert read_run(tmp_path) == expected
        except StoreError:
            continue
        assert data[position : position + 1].isspace()


def test_reading_leaves_a_checkpoint_that_is_being_replaced_alone(last: Path) -> None:
    shutil.copytree(last, last.parent / ".last.new")
    assert load_checkpoint(last).epoch == 2
    assert (last.parent / ".last.new").is_dir()
    with pytest.raises(InputError, match=r"no checkpoint at .* train first"):
        load_checkpoint(last.parent / "best")


def test_the_one_before_is_kept_and_a_full_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, previous = tmp_path / "last", tmp_path / "previous"

    def save(epoch: int, kept: Path | None = previous) -> tuple[int, int]:
        checkpoint = Checkpoint(epoch, {}, {"weight": torch.full((2,), float(epoch))}, {"best": 0.0})
        save_checkpoint(last, checkpoint, kept)
        return load_checkpoint(last).epoch, load_checkpoint(previous).epoch if epoch > 1 else 0

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    assert [save(1), save(2), save(3), save(4, None)] == [(1, 0), (2, 1), (3, 2), (4, 2)]
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(5)
    assert (load_checkpoint(last).epoch, load_checkpoint(previous).epoch) == (4, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"last", "previous"}
