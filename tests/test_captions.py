"""Captions to frozen features: each sentence once, a killed run goes on, and nothing is silently cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from messages import heard
from numpy.typing import NDArray
from torch import nn

from svb.data import publish
from svb.data.caption_features import read_caption_features
from svb.data.caption_table import read_caption_table
from svb.errors import InputError, MismatchError, StoreError
from svb.extract import captions as stage
from svb.extract.captions import captions
from svb.extract.text_encoders.text_encoder import TextEncoder

NAME = "toy:letters"


class Letters:
    """A text encoder that counts letters and remembers what it was asked; it reads 6 words."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fail_after = 10**9
        self.scale = 1.0

    def encode_batch(self, batch: Sequence[str]) -> torch.Tensor:
        if len(self.asked) + len(batch) > self.fail_after:
            raise KeyboardInterrupt
        self.asked += batch
        return self.scale * torch.tensor([[sentence.count(letter) for letter in "abcde"] for sentence in batch])

    def encoder(self, name: str = NAME, device: torch.device | None = None) -> TextEncoder:
        return TextEncoder(name, nn.Identity(), 5, self.encode_batch, count_words, max_tokens=6, weights_hash="ab")


def count_words(sentence: str) -> int:
    return len(sentence.split())


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    made = Letters()
    monkeypatch.setattr(stage, "load_text_encoder", made.encoder)
    return made


def table(path: Path, *sentences: str, header: str = "video_id,caption") -> Path:
    rows = [f"v{number // 2},{sentence}" for number, sentence in enumerate(sentences)]
    path.write_text("\n".join([header, *rows, ""]), "utf-8")
    return path


def run(given: Path, out: Path) -> list[str]:
    messages = heard()
    assert captions(given, out, text_encoder=NAME) == out
    return messages


def counts(sentences: Sequence[str]) -> NDArray[np.float16]:
    return np.array([[s.count(letter) for letter in "abcde"] for s in sentences], np.float16)


def test_layout_is_plain_hdf5(letters: Letters, tmp_path: Path) -> None:
    out = tmp_path / "captions.h5"
    given = table(tmp_path / "t.csv", "ein Café 動画", "bad", "bad", header="video_id,caption")
    run(given, out)
    with h5py.File(out) as file:
        assert set(file) == {"caption_id", "video_id", "caption", "split", NAME}
        assert list(file["caption"].asstr()) == ["ein Café 動画", "bad", "bad"]
        assert list(file["caption_id"].asstr()) == ["v0#0", "v0#1", "v1#0"]
        assert list(file["split"].asstr()) == ["train"] * 3 and not file.attrs["has_split"]
        features = file[NAME]["features"]
        assert (features.shape, features.dtype, features.chunks) == ((3, 5), np.float16, None)
        settings = json.loads(file.attrs["settings"])
    assert settings["text_encoder"] == {"name": NAME, "weights_hash": "ab", "feature_size": 5, "max_tokens": 6}


def test_every_row_has_its_own_captions_features(letters: Letters, tmp_path: Path) -> None:
    sentences = [f"{'a' * (n % 7)} {'b' * (n % 3)} cab {n % 11}" for n in range(300)]
    run(table(tmp_path / "t.csv", *sentences), tmp_path / "c.h5")
    read = read_caption_features(tmp_path / "c.h5")
    assert read.table == read_caption_table(tmp_path / "t.csv")
    np.testing.assert_array_equal(read.features, counts(sentences))


def test_a_sentence_that_appears_twice_is_encoded_once(letters: Letters, tmp_path: Path) -> None:
    run(table(tmp_path / "t.csv", "a dog", "a cat", "a dog", "a dog", " a cat "), tmp_path / "c.h5")
    assert sorted(letters.asked) == ["a cat", "a dog"]
    np.testing.assert_array_equal(
        read_caption_features(tmp_path / "c.h5").features, counts(["a dog", "a cat", "a dog", "a dog", "a cat"])
    )


def test_a_killed_run_keeps_its_blocks(letters: Letters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "BLOCK", 4)
    sentences = [f"cab {'a' * (n + 1)}" for n in range(18)]
    given, out = table(tmp_path / "t.csv", *sentences), tmp_path / "c.h5"
    letters.fail_after = 10
    with pytest.raises(KeyboardInterrupt):
        run(given, out)
    assert not out.exists() and letters.asked == sentences[:8]
    letters.fail_after = 10**9
    (tmp_path / ".c.h5.blocks" / ".aside-half.npy").write_bytes(b"half")  # what a SIGKILL leaves
    run(given, out)
    assert letters.asked == sentences  # each once, over both runs
    run(given, tmp_path / "undisturbed.h5")
    assert out.read_bytes() == (tmp_path / "undisturbed.h5").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.h5", "t.csv", "undisturbed.h5"]


def test_blocks_of_another_encoder_are_not_taken(
    letters: Letters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "BLOCK", 2)
    given, out = table(tmp_path / "t.csv", "a", "b", "c", "d"), tmp_path / "c.h5"
    letters.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        run(given, out)
    letters.fail_after = 10**9
    other = replace(letters.encoder(), weights_hash="cd")
    monkeypatch.setattr(stage, "load_text_encoder", lambda *_: other)
    run(given, out)
    assert letters.asked == ["a", "b", "a", "b", "c", "d"]


def test_two_at_once_into_one_file(letters: Letters, tmp_path: Path) -> None:
    given, out = table(tmp_path / "t.csv", "a dog", "a cat"), tmp_path / "c.h5"
    encode, refusals = letters.encode_batch, []

    def encode_beside_another(batch: Sequence[str]) -> torch.Tensor:
        with pytest.raises(StoreError, match=rf"cannot lock {out} .* another process is writing to it") as caught:
            run(given, out)
        refusals.append(caught.value)
        return encode(batch)

    letters.encode_batch = encode_beside_another  # type: ignore[method-assign]
    run(given, out)
    assert len(refusals) == 1
    np.testing.assert_array_equal(read_caption_features(out).features, counts(["a dog", "a cat"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.h5", "t.csv"]


def test_another_removes_its_blocks_at_that_instant(
    letters: Letters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out = table(tmp_path / "t.csv", "a dog", "a cat"), tmp_path / "c.h5"
    lock_folder, locks = publish.lock_folder, []

    def lock_what_vanishes(folder: Path, written: Path) -> int:
        locks.append(lock_folder(folder, written))
        if len(locks) == 1:
            shutil.rmtree(folder)
        return locks[-1]

    monkeypatch.setattr(publish, "lock_folder", lock_what_vanishes)
    run(given, out)
    assert len(locks) == 2 and out.exists()


def test_the_second_run_does_nothing(letters: Letters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, out = table(tmp_path / "t.csv", "a dog", "a cat"), tmp_path / "c.h5"
    run(given, out)
    before = out.read_bytes(), out.stat().st_mtime_ns
    monkeypatch.setattr(stage, "load_text_encoder", None)
    assert run(given, out) == [f"nothing to do: {out} holds these 2 captions"]
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before


def test_another_table_or_encoder_is_refused(letters: Letters, tmp_path: Path) -> None:
    out = tmp_path / "c.h5"
    run(table(tmp_path / "t.csv", "a dog", "a cat"), out)
    before = out.read_bytes()
    with pytest.raises(MismatchError, match=r"c.h5 was made with other settings \(captions: stored .* with -o"):
        run(table(tmp_path / "t.csv", "a dog", "a cow"), out)
    table(tmp_path / "t.csv", "a dog", "a cat")
    with pytest.raises(MismatchError, match="text_encoder: stored 'toy:letters', wanted 'toy:other'"):
        captions(tmp_path / "t.csv", out, text_encoder="toy:other")
    assert out.read_bytes() == before


def test_captions_that_are_too_long_are_told(letters: Letters, tmp_path: Path) -> None:
    given = table(tmp_path / "t.csv", "a dog", "one two three four five six seven", "a b c d e f g h")
    (message,) = run(given, tmp_path / "c.h5")
    assert message.startswith("2 captions are longer than the 6 tokens that toy:letters reads")
    assert "'one two three four five six seven'" in message


def test_values_beyond_float16_are_an_error(letters: Letters, tmp_path: Path) -> None:
    letters.scale = 1e5
    with pytest.raises(InputError, match=r"gave 'bad' a value of 100000 - float16 holds .* another text encoder"):
        run(table(tmp_path / "t.csv", "xyz", "bad"), tmp_path / "c.h5")
    assert not (tmp_path / "c.h5").exists()


def test_splits_ids_and_order_are_kept(letters: Letters, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"video_id": "b/1", "caption": "bad", "split": "test", "caption_id": "x"}\n'
        '{"video_id": "a", "caption": "cab", "split": "val"}\n'
    )
    run(tmp_path / "t.jsonl", tmp_path / "c.h5")
    kept = read_caption_features(tmp_path / "c.h5").table
    assert (kept.caption_ids, kept.video_ids, kept.splits) == (["x", "a#0"], ["b/1", "a"], ["test", "val"])
    assert kept.has_split


def without_rows(file: h5py.File) -> None:
    del file[NAME]["features"]
    file[NAME]["features"] = np.zeros((1, 5), np.float16)


def with_nan(file: h5py.File) -> None:
    file[NAME]["features"][1, 2] = np.nan


def of_a_newer_format(file: h5py.File) -> None:
    file.attrs["format_version"] = 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        *((keep, r"is not a whole caption features file .* make it again") for keep in (0.0, 0.5, 0.9)),
        (without_rows, r"features of shape \(1, 5\) for 2 captions"),
        (with_nan, "NaN or infinity, first for caption 'v0#1'"),
        (of_a_newer_format, "newer format than this svb reads - upgrade svb"),
    ],
)
def test_damage(damage: float | Callable[[h5py.File], None], words: str, letters: Letters, tmp_path: Path) -> None:
    made = tmp_path / "c.h5"
    run(table(tmp_path / "t.csv", "a dog", "a cat"), made)
    if isinstance(damage, float):
        made.write_bytes(made.read_bytes()[: int(damage * made.stat().st_size)])
    else:
        with h5py.File(made, "r+") as file:
            damage(file)
    with pytest.raises(StoreError, match=words):
        read_caption_features(made)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no caption features at .* make them with `svb captions"):
        read_caption_features(tmp_path / "c.h5")


def test_the_offline_encoder_end_to_end(tmp_path: Path) -> None:
    given = table(tmp_path / "t.csv", "a dog runs", "a cat sleeps", "a dog runs")
    captions(given, tmp_path / "c.h5", text_encoder="offline:minilm-l6", device="cpu")
    read = read_caption_features(tmp_path / "c.h5")
    assert read.text_encoder == "offline:minilm-l6" and read.features.shape == (3, 384)
    np.testing.assert_array_equal(read.features[0], read.features[2])
    assert read.features.any(axis=1).all()
