"""Caption pools: what they are made of, what is made again, and what an image or a video is answered with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import synthetic
import torch
from messages import heard
from numpy.typing import NDArray

from svb.data.caption_features import read_caption_features
from svb.errors import InputError, StoreError
from svb.retrieve.indexing.make_pools import caption_embedder, file_pool, sidecar_pool, training_pool
from svb.retrieve.model.embedder import Embedder
from svb.retrieve.searching.vectors import CaptionPools
from svb.retrieve.stored.pools import Pool, open_pool, publish_pool

SRT = "1\n00:00:01,000 --> 00:00:02,000\na dog\n\n2\n00:00:04,000 --> 00:00:05,500\na cat\n"

EMBEDDER = Embedder({}, None, lambda batch: torch.nn.functional.normalize(batch, dim=-1), {})  # type: ignore[arg-type]


class Words:
    """Embeds captions by their letters and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, captions: Sequence[str]) -> NDArray[np.float32]:
        self.asked += captions
        return embed(captions)


def embed(captions: Sequence[str]) -> NDArray[np.float32]:
    counts = np.array([[1 + caption.casefold().count(letter) for letter in "acdgotxyz"] for caption in captions])
    return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def words() -> Words:
    return Words()


def rows_of(pool: Pool) -> list[tuple[str, str, float, float]]:
    return [
        (caption, video_id, *seconds)
        for caption, video_id, seconds in zip(pool.captions, pool.video_ids, pool.seconds.tolist(), strict=True)
    ]


def sidecars(videos: Sequence[tuple[str, str]], *rest: Any, **options: Any) -> Pool:
    pool = sidecar_pool(videos, *rest, **options)
    assert pool is not None
    return pool


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def published(folder: Path, *pools: Pool) -> tuple[Path, dict[str, Any]]:
    return folder, {"captions": [publish_pool(folder, pool) for pool in pools]}


class TestFilePools:
    def test_a_caption_a_line(self, tmp_path: Path, words: Words) -> None:
        pool = file_pool(put(tmp_path / "own.txt", "a dog\n\na cat\na dog\n"), words)
        assert (pool.name, pool.kind, list(pool.video_ids)) == ("own.txt", "file", ["", ""])
        assert list(pool.captions) == ["a dog", "a cat"]
        assert words.asked == ["a dog", "a cat"] and pool.embeddings.dtype == np.float16
        np.testing.assert_array_equal(pool.embeddings, embed(["a dog", "a cat"]).astype(np.float16))
        assert len(file_pool(put(tmp_path / "own.srt", SRT), words)) == 2

    def test_a_table(self, tmp_path: Path, words: Words) -> None:
        messages = heard()
        pool = file_pool(put(tmp_path / "t.csv", "caption,video_id\na dog,v0\na cat,\n,v1\na dog,v2\n"), words)
        assert list(pool.captions) == ["a dog", "a cat", "a dog"] and list(pool.video_ids) == ["v0", "", "v2"]
        assert messages == [f"{tmp_path}/t.csv: 1 rows have no caption and were left out"]

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.txt", "\n \n", "holds no captions - expected one per line"),
            ("a.csv", "caption\n", "holds no captions"),
            ("a.csv", "video_id,text\nv,a\n", "no column caption, only video_id, text - expected the header"),
            ("a.csv", "caption,video_id\na dog, a cat,v\n", "line 2: 3 fields where the header has 2 - quote"),
            ("a.jsonl", '{"caption": "\\ud800"}', "line 1: caption holds a NUL or half a character"),
            ("a.pdf", "no", "cannot tell the format from '.pdf'"),
            ("gone.csv", None, "no caption pool at"),
            ("gone.txt", None, "no caption pool at"),
        ],
    )
    def test_bad_files(self, name: str, text: str | None, message: str, tmp_path: Path, words: Words) -> None:
        if text is not None:
            put(tmp_path / name, text)
        with pytest.raises(InputError, match=message):
            file_pool(tmp_path / name, words)


class TestSidecarPools:
    def videos(self, folder: Path) -> list[tuple[str, str]]:
        return [("v/a", str(folder / "v/a.mp4")), ("v/b", str(folder / "v/b.mp4")), ("x", "/gone/x.mp4")]

    def test_captions_have_their_video_and_times(self, tmp_path: Path, words: Words) -> None:
        put(tmp_path / "v/a.en.srt", SRT)
        put(tmp_path / "v/b.txt", "a dog\n")
        pool = sidecars(self.videos(tmp_path), words)
        assert words.asked == ["a dog", "a cat"]
        np.testing.assert_equal(
            rows_of(pool),
            [("a dog", "v/a", 1.0, 2.0), ("a cat", "v/a", 4.0, 5.5), ("a dog", "v/b", np.nan, np.nan)],
        )
        assert sidecar_pool([("x", "/gone/x.mp4")], words) is None

    def test_only_what_is_new_is_embedded(self, tmp_path: Path, words: Words) -> None:
        put(tmp_path / "v/a.srt", SRT)
        bad, messages = put(tmp_path / "v/b.txt", "x\0"), heard()
        first = sidecars(self.videos(tmp_path), words)
        assert [message.partition(": ")[0] for message in messages] == [f"{bad} is not text"]
        previous = open_pool(tmp_path, publish_pool(tmp_path, first))
        assert sidecar_pool(self.videos(tmp_path)[::-1], words, previous) is previous and len(messages) == 1

        bad.write_text("a cat\nan ox\n")
        words.asked.clear()
        second = sidecars(self.videos(tmp_path), words, previous)
        assert words.asked == ["an ox"] and rows_of(second)[:2] == rows_of(first)
        fresh = sidecars(self.videos(tmp_path), words)
        np.testing.assert_equal(rows_of(second), rows_of(fresh))
        np.testing.assert_array_equal(second.embeddings, fresh.embeddings)

        (tmp_path / "v/a.srt").unlink()
        words.asked.clear()
        third = sidecars(self.videos(tmp_path), words, second)
        assert list(third.captions) == ["a cat", "an ox"] and words.asked == []
        bad.write_text("a dog\nan ox\n")  # as large as before
        os.utime(bad, ns=(1, 1))
        assert list(sidecars(self.videos(tmp_path), words, third).captions) == ["a dog", "an ox"]

    def test_long_work_is_done_in_portions(self, tmp_path: Path, words: Words) -> None:
        for number in range(7):
            put(tmp_path / f"v/a{number}.txt", f"a dog {number}\na cat {number}")
        videos = [(f"a{number}", str(tmp_path / f"v/a{number}.mp4")) for number in range(7)]
        previous, sizes = None, []
        while (pool := sidecar_pool(videos, words, previous, max_captions=3)) is not previous:
            previous = pool
            sizes.append(len(words.asked))
        assert sizes == [4, 8, 12, 14]
        whole = sidecars(videos, words)
        assert previous is not None and whole.source == previous.source
        np.testing.assert_equal(rows_of(previous), rows_of(whole))


def test_training_captions_are_distinct_and_keep_their_first_video(tmp_path: Path) -> None:
    rows = [("v0", "a dog", "train"), ("v1", "a cat", "train"), ("v1", "a dog", "train"), ("v2", "an ox", "train")]
    features = np.random.default_rng(0).normal(size=(4, 8))
    captions = read_caption_features(synthetic.make_captions(tmp_path / "c.h5", rows, features))
    pool = training_pool(captions, EMBEDDER)
    assert list(pool.captions) == ["a dog", "a cat", "an ox"] and list(pool.video_ids) == ["v0", "v1", "v2"]
    expected = features[[0, 1, 3]] / np.linalg.norm(features[[0, 1, 3]], axis=1, keepdims=True)
    np.testing.assert_allclose(pool.embeddings, expected, atol=2e-3)


def test_captions_too_long_for_the_encoder_are_said() -> None:
    load, messages = Mock(side_effect=synthetic.make_text_encoder), heard()
    embed_captions = caption_embedder(EMBEDDER, load)
    assert not load.called
    assert embed_captions(["a dog", " ".join("abcdefghijk")]).shape == (2, 20)
    assert messages == [
        "1 captions are longer than the 12 tokens that synthetic:words reads and were cut, "
        "first 'a b c d e f g h i j k'"
    ]


class TestNearest:
    def made(self, name: str, captions: Sequence[str], folder: Path) -> Pool:
        return replace(file_pool(put(folder / "own.txt", "\n".join(captions)), embed), name=name)

    @pytest.mark.parametrize("k", [1, 4, 1000])
    def test_the_best_of_all_pools(self, k: int, tmp_path: Path) -> None:
        random = np.random.default_rng(1)
        captions = ["".join(random.choice(list("acdgot"), 12)) for _ in range(60)]
        parts = [self.made("one", captions[:20], tmp_path), self.made("two", captions[20:], tmp_path)]
        results = CaptionPools(*published(tmp_path / "index", *parts)).nearest(embed(["a dog"])[0], k)
        similarity = embed(captions).astype(np.float16).astype(np.float32) @ embed(["a dog"])[0]
        scores = -np.sort(-similarity)[:k]
        assert [result.rank for result in results] == list(range(1, len(scores) + 1))
        np.testing.assert_allclose([result.score for result in results], scores, atol=1e-5)
        for result in results:
            row = captions.index(result.caption)
            assert result.score == pytest.approx(similarity[row], abs=1e-5)
            assert result.pool == ("one" if row < 20 else "two")
            assert (result.video_id, result.begin_seconds, result.end_seconds) == ("", None, None)

    def test_the_same_words_come_once(self, tmp_path: Path) -> None:
        texts = ["A dog" if number % 2 else " a  DOG" for number in range(50)]
        pool = self.made("one", texts, tmp_path)
        others = self.made("others", ["a  dog", "a cat", "ox"], tmp_path)
        results = CaptionPools(*published(tmp_path / "index", pool, others)).nearest(embed(["a dog"])[0], 3)
        assert [" ".join(result.caption.casefold().split()) for result in results] == ["a dog", "ox", "a cat"]

    def test_times_and_video_are_answered_to_all_threads(self, tmp_path: Path) -> None:
        put(tmp_path / "v/a.srt", SRT)
        pool = sidecars([("v/a", str(tmp_path / "v/a.mp4"))], embed)
        pools = CaptionPools(*published(tmp_path / "index", pool))
        best = pools.nearest(embed(["a cat"])[0], 1)[0]
        assert (best.caption, best.pool, best.video_id) == ("a cat", "sidecars", "v/a")
        assert (best.begin_seconds, best.end_seconds) == (4.0, 5.5)
        assert pools.nearest(embed(["a"])[0], 0) == [] and len(pools) == 2
        assert CaptionPools(tmp_path, {"captions": []}).nearest(embed(["a"])[0], 3) == []
        captions = ["a dog", "a cat", "an ox"]
        pools = CaptionPools(*published(tmp_path / "other", self.made("one", captions, tmp_path)))
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda query: pools.nearest(embed([query])[0], 1)[0].caption, captions * 8))
        assert found == captions * 8


def test_files_that_are_not_whole_or_of_other_pools(tmp_path: Path) -> None:
    put(tmp_path / "v/a.srt", SRT)
    pool = sidecars([("v/a", str(tmp_path / "v/a.mp4"))], embed)
    folder, manifest = published(tmp_path / "index", pool)
    entry = manifest["captions"][0]
    for path in sorted((folder / "captions" / entry["key"]).glob("*.npy")):
        content = path.read_bytes()
        for damaged in (content[:-1], content[:20], b"", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            words = "is damaged" if damaged is None else f"damaged .{path.name} has"
            with pytest.raises(StoreError, match=words):
                CaptionPools(folder, manifest).nearest(embed(["a"])[0], 1)
        path.write_bytes(content)
    with pytest.raises(StoreError, match=r"files of .2. captions, expected 3"):
        open_pool(folder, {**entry, "captions": 3})
    np.save(folder / "captions" / entry["key"] / "sidecar_offsets.npy", np.array([0, 1]))
    with pytest.raises(StoreError, match="its sidecars do not cover its captions"):
        open_pool(folder, entry)


def test_embeddings_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    pool = file_pool(put(tmp_path / "own.txt", "a dog\na cat\n"), lambda texts: embed(texts) * [[1], [np.nan]])
    with pytest.raises(StoreError, match=r"caption 'a cat' of own\.txt has an embedding that is not finite"):
        publish_pool(tmp_path / "index", pool)
    assert not (tmp_path / "index").exists()
