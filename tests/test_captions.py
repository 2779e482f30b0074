"""Captions: tables that users give, and their frozen features; a killed run goes on, and nothing is cut unsaid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from messages import heard
from numpy.typing import NDArray
from torch import nn

from svb.data import publish
from svb.data.caption_features import read_caption_features
from svb.data.caption_table import CaptionTable, read_caption_table
from svb.data.tables import TableKind, read_table
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
        return TextEncoder(
            name,
            nn.Identity(),
            5,
            self.encode_batch,
            lambda text: len(text.split()),
            max_tokens=6,
            weights_hash="ab",
        )


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    made = Letters()
    monkeypatch.setattr(stage, "load_text_encoder", made.encoder)
    return made


def table(path: Path, *sentences: str) -> Path:
    rows = [f"v{number // 2},{sentence}" for number, sentence in enumerate(sentences)]
    path.write_text("\n".join(["video_id,caption", *rows, ""]), "utf-8")
    return path


def run(given: Path, out: Path) -> list[str]:
    messages = heard()
    assert captions(given, out, text_encoder=NAME) == out
    return messages


def counts(sentences: Sequence[str]) -> NDArray[np.float16]:
    return np.array([[s.count(letter) for letter in "abcde"] for s in sentences], np.float16)


def test_layout_is_plain_hdf5(letters: Letters, tmp_path: Path) -> None:
    out = tmp_path / "captions.h5"
    (tmp_path / "t.jsonl").write_text(
        '{"video_id": "b/1", "caption": "ein Café 動画", "split": "test", "caption_id": "x"}\n'
        '{"video_id": "a", "caption": "bad", "split": "val"}\n{"video_id": "a", "caption": "bad", "split": "val"}\n'
    )
    run(tmp_path / "t.jsonl", out)
    with h5py.File(out) as file:
        assert set(file) == {"caption_id", "video_id", "caption", "split", NAME}
        assert list(file["caption"].asstr()) == ["ein Café 動画", "bad", "bad"]
        assert list(file["caption_id"].asstr()) == ["x", "a#0", "a#1"]
        assert list(file["video_id"].asstr()) == ["b/1", "a", "a"]
        assert list(file["split"].asstr()) == ["test", "val", "val"] and file.attrs["has_split"]
        features = file[NAME]["features"]
        assert (features.shape, features.dtype, features.chunks) == ((3, 5), np.float16, None)
        settings = json.loads(file.attrs["settings"])
    assert settings["text_encoder"] == {"name": NAME, "weights_hash": "ab", "feature_size": 5, "max_tokens": 6}


def test_every_row_has_its_own_captions_features_and_equal_ones_are_encoded_once(
    letters: Letters, tmp_path: Path
) -> None:
    sentences = [f"{'a' * (n % 7)} {'b' * (n % 3)} cab {n % 11}" for n in range(300)]
    run(table(tmp_path / "t.csv", *sentences, " a cat ", "a cat"), tmp_path / "c.h5")
    read = read_caption_features(tmp_path / "c.h5")
    assert read.table == read_caption_table(tmp_path / "t.csv")
    np.testing.assert_array_equal(read.features, counts([*sentences, "a cat", "a cat"]))
    assert sorted(letters.asked) == sorted({*(sentence.strip() for sentence in sentences), "a cat"})


def test_a_killed_run_keeps_its_blocks(letters: Letters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "BLOCK", 4)
    sentences = [f"cab {'a' * (n + 1)}" for n in range(18)]
    given, out = table(tmp_path / "t.csv", *sentences), tmp_path / "c.h5"
    letters.fail_after = 10
    for path in (out, tmp_path / "other.h5"):
        letters.asked.clear()
        with pytest.raises(KeyboardInterrupt):
            run(given, path)
        assert not path.exists() and letters.asked == sentences[:8]
    letters.fail_after = 10**9
    (tmp_path / ".c.h5.blocks" / ".aside-half.npy").write_bytes(b"half")  # what a SIGKILL leaves
    run(given, out)
    assert letters.asked == sentences  # each once, over both runs
    run(given, tmp_path / "undisturbed.h5")
    assert out.read_bytes() == (tmp_path / "undisturbed.h5").read_bytes()
    # Blocks of another encoder are not taken.
    letters.asked.clear()
    monkeypatch.setattr(stage, "load_text_encoder", lambda *_: replace(letters.encoder(), weights_hash="cd"))
    run(given, tmp_path / "other.h5")
    assert letters.asked == sentences
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.h5", "other.h5", "t.csv", "undisturbed.h5"]


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


def test_the_second_run_does_nothing_and_another_table_or_encoder_is_refused(
    letters: Letters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out = table(tmp_path / "t.csv", "a dog", "a cat"), tmp_path / "c.h5"
    run(given, out)
    before = out.read_bytes(), out.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(stage, "load_text_encoder", None)
        assert run(given, out) == [f"nothing to do: {out} holds these 2 captions"]
    with pytest.raises(MismatchError, match="text_encoder: stored 'toy:letters', wanted 'toy:other'"):
        captions(given, out, text_encoder="toy:other")
    with pytest.raises(MismatchError, match=r"c.h5 was made with other settings \(captions: stored .* with -o"):
        run(table(given, "a dog", "a cow"), out)
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before


def test_captions_that_are_too_long_or_whose_numbers_are_too_large(letters: Letters, tmp_path: Path) -> None:
    given = table(tmp_path / "t.csv", "a dog", "one two three four five six seven", "a b c d e f g h")
    (message,) = run(given, tmp_path / "c.h5")
    assert message.startswith("2 captions are longer than the 6 tokens that toy:letters reads")
    assert "'one two three four five six seven'" in message
    letters.scale = 1e5
    with pytest.raises(InputError, match=r"gave 'bad' a value of 100000 - float16 holds .* another text encoder"):
        run(table(tmp_path / "t.csv", "xyz", "bad"), tmp_path / "large.h5")
    assert not (tmp_path / "large.h5").exists()


def without_rows(file: h5py.File) -> None:
    del file[NAME]["features"]
    file[NAME]["features"] = np.zeros((1, 5), np.float16)


def with_nan(file: h5py.File) -> None:
    file[NAME]["features"][1, 2] = np.nan


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        *((keep, r"is not a whole caption features file .* make it again") for keep in (0.0, 0.5, 0.9)),
        (without_rows, r"features of shape \(1, 5\) for 2 captions"),
        (with_nan, "NaN or infinity, first for caption 'v0#1'"),
        (lambda file: file.attrs.create("format_version", 2), "newer format than this svb reads - upgrade svb"),
    ],
)
def test_damage(damage: float | Callable[[h5py.File], None], words: str, letters: Letters, tmp_path: Path) -> None:
    made = tmp_path / "c.h5"
    with pytest.raises(InputError, match=r"no caption features at .* make them with `svb captions"):
        read_caption_features(made)
    run(table(tmp_path / "t.csv", "a dog", "a cat"), made)
    if isinstance(damage, float):
        made.write_bytes(made.read_bytes()[: int(damage * made.stat().st_size)])
    else:
        with h5py.File(made, "r+") as file:
            damage(file)
    with pytest.raises(StoreError, match=words):
        read_caption_features(made)


KIND = TableKind("caption table", ("video_id", "caption"), "video_id,caption", "quote captions that hold a comma")
ROWS = [{"video_id": "a", "caption": 'a "dog",\nrunning'}, {"video_id": "007", "caption": "nan\t"}]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pd.DataFrame(rows)
    if path.suffix in (".csv", ".tsv"):
        table.to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".CSV"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"t{suffix.lower()}", ROWS).rename(tmp_path / f"t{suffix}")
    assert [dict(row) for _, row in read_table(path, KIND)] == ROWS


def test_what_a_format_alone_can_say(tmp_path: Path) -> None:
    def rows(name: str) -> list[tuple[str, dict[str, Any]]]:
        return [(place.removeprefix(f"{tmp_path}/"), dict(row)) for place, row in read_table(tmp_path / name, KIND)]

    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfvideo_id,caption\r\n1,"x\r\ny"\r\n\r\n2,\r\n')
    first = ("a.csv, line 2", {"video_id": "1", "caption": "x\r\ny"})
    assert rows("a.csv") == [first, ("a.csv, line 5", {"video_id": "2", "caption": ""})]
    (tmp_path / "a.json").write_text('[{"video_id": 7, "caption": null, "more": {}}]')
    assert rows("a.json") == [("a.json, row 1", {"video_id": 7, "caption": None, "more": {}})]
    # A whole number stays one beside a missing one, and a named index is a column.
    table = pd.DataFrame({"video_id": ["a", "b"], "caption": ["x", "y"], "n": pd.array([1, None], "Int64")})
    table.set_index("video_id").to_parquet(tmp_path / "a.parquet")
    assert rows("a.parquet") == [
        ("a.parquet, row 1", {"video_id": "a", "caption": "x", "n": 1}),
        ("a.parquet, row 2", {"video_id": "b", "caption": "y", "n": None}),
    ]
    table.iloc[1:].to_parquet(tmp_path / "a.parquet")
    assert rows("a.parquet") == [("a.parquet, row 1", {"video_id": "b", "caption": "y", "n": None})]


# fmt: off
REFUSED = [
    ("t.csv", b"", "no column video_id and no column caption, only nothing - expected the header video_id,caption"),
    ("t.csv", b"\nvideo_id,caption\n", "line 1 is blank - expected the header"),
    ("t.csv", b"video_id,caption,caption\n1,2,3\n", "column 'caption' appears twice - leave one of them out"),
    ("t.csv", b"video_id,caption\n1\n", "line 2: 1 fields where the header has 2 - quote captions that hold a"),
    ("t.csv", b'video_id,caption\n1,"a\nb"\n1,2,3\n', "line 4: 3 fields where the header has 2"),
    ("t.csv", b'video_id,caption\n1,x\n2,"y\n3,z\n4,z\n', "line 3: not readable (unexpected end of data) - close"),
    ("t.csv", b'video_id,caption\n1,"x\n2,"y"\n', "line 2: not readable (',' expected after '\"') - close every"),
    ("t.csv", b"video_id,caption\n1," + b"x" * 200_000, "line 2: not readable (field larger than field limit"),
    ("t.csv", b"video_id,caption\n" + b"a,b\n" * 30_000 + b"a,\xe9\n", "line 30002: byte 0xe9 is not UTF-8"),
    ("t.tsv", b"video_id,caption\n1,2\n", "no column video_id and no column caption, only video_id,caption"),
    ("t.jsonl", b'{"video_id": "a", "caption": "x"}\n{"video_id": ', "line 2: not JSON ("),
    ("t.jsonl", b'\n[1]', "line 2: not a JSON object - write one object a line"),
    ("t.jsonl", b'{"video_id": "\xff"}', "line 1: byte 0xff is not UTF-8"),
    ("t.json", b'{"video_id": "a"}', "not an array - write an array of objects, or one object a line as .jsonl"),
    ("t.json", b'[{"video_id": "a", "caption": "x"}, 1]', "row 2: not a JSON object"),
    ("t.json", b"[" * 100_000, "not JSON ("),
    ("t.parquet", b"PAR1", "not readable as Parquet ("),
    ("t.xlsx", b"", "cannot tell the format from '.xlsx' - expected .csv, .tsv, .jsonl, .ndjson, .json or"),
    # Rows that are no captions.
    ("t.json", b'[{"video_id": "a", "caption": {"en": "x"}}]', "row 1: caption holds a dict - expected a text or"),
    ("t.json", b'[{"video_id": "a", "caption": [["x"]]}]', "row 1: caption holds a list - expected a text or a"),
    ("t.json", b'[{"video_id": "a", "caption": true}]', "row 1: caption holds a bool"),
    ("t.json", b'[{"video_id": ["a"], "caption": "x"}]', "row 1: video_id holds a list"),
    ("t.json", b'[{"video_id": "a", "caption": "x", "split": 1}]', "row 1: split is '1' - expected one of train"),
    ("t.csv", b"video_id,caption\n,a dog\n", "line 2: video_id is empty"),
    ("t.csv", b"video_id,caption\na,a\0dog\n", " NUL"),  # Python 3.10 refuses it while reading the CSV
    ("t.csv", b"video_id,caption,caption_id\na,x,1\nb,y,1\n", "caption_id '1' appears twice - make every"),
    ("t.csv", b"video_id,caption,split\na,x,train\na,y,test\n", "'a' is in train and in test"),
    ("t.csv", b"video_id,caption\n", "holds no captions - expected rows with video_id, caption"),
    ("t.jsonl", b"\n\n", "holds no captions"),
    ("t.csv", b"video_id,caption\na,\nb,x\nc,  \n", "line 2: the caption is empty (2 such rows) - fill them in"),
]
# fmt: on


@pytest.mark.parametrize(("name", "content", "words"), REFUSED)
def test_what_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_caption_table(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_list_is_several_captions(suffix: str, tmp_path: Path) -> None:
    rows = [
        {"video_id": "a", "caption": ["x", " y "], "caption_id": None},
        {"video_id": "b", "caption": ["z"], "caption_id": "q"},
    ]
    table = read_caption_table(written(tmp_path / f"t{suffix}", rows))
    assert table == CaptionTable(["a#0", "a#1", "q#0"], ["a", "a", "b"], ["x", "y", "z"], ["train"] * 3, False)
    rows[1]["caption"] = ["z", ""]
    with pytest.raises(InputError, match=r"the caption is empty \(1 such rows\)"):
        read_caption_table(written(tmp_path / f"t{suffix}", rows))


def test_outer_spaces_and_other_names_of_splits(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("video_id,caption,caption_id,split\n a ,x,1 , validation\nb,y,,test \n")
    table = read_caption_table(tmp_path / "t.csv")
    assert table == CaptionTable(["1", "b#0"], ["a", "b"], ["x", "y"], ["val", "test"], True)
