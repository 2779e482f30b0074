"""Query vectors on disk: whole or not believed, bounded, shared, and done without where the disk says no."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from svb.retrieve.model.query_embedder import MAX_ENTRIES, QueryCache


def embedding_of(seed: int, size: int = 24) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


@pytest.fixture
def cache(tmp_path: Path) -> QueryCache:
    return QueryCache(tmp_path / "cache", "model a")


def test_what_was_put_is_got_to_the_bit(cache: QueryCache, tmp_path: Path) -> None:
    assert cache.get("a dog") is None
    cache.put("a dog", embedding_of(0))
    for reader in (cache, QueryCache(tmp_path / "cache", "model a")):
        held = reader.get("a dog")
        assert held is not None and held.dtype == np.float32 and held.flags.writeable
        np.testing.assert_array_equal(held, embedding_of(0))
    for fingerprint, text in (("model a", "a dog "), ("model b", "a dog"), ("model ", "aa dog")):
        assert QueryCache(tmp_path / "cache", fingerprint).get(text) is None
    cache.put("\udcff", embedding_of(2))  # text that is no Unicode has a name too
    np.testing.assert_array_equal(cache.get("\udcff"), embedding_of(2))  # type: ignore[arg-type]
    cache.put("a dog", embedding_of(1))
    np.testing.assert_array_equal(cache.get("a dog"), embedding_of(1))  # type: ignore[arg-type]
    for path in (tmp_path / "cache" / "queries").iterdir():
        assert path.stat().st_size == 32 + 4 * 24 and b"dog" not in path.read_bytes()
        assert len(path.name) == 32 and set(path.name) <= set("0123456789abcdef")  # no query can be read


def test_what_is_torn_or_changed_is_not_believed(cache: QueryCache, tmp_path: Path) -> None:
    cache.put("a dog", embedding_of(0))
    (path,) = (tmp_path / "cache" / "queries").iterdir()
    content = path.read_bytes()
    flipped = [bytearray(content) for _ in range(2)]
    flipped[0][3] ^= 1  # in the checksum
    flipped[1][-1] ^= 1  # in the embedding
    torn = [content[:length] for length in (0, 1, 31, 32, 36, len(content) - 4, len(content) - 1)]
    for damaged in [*torn, *map(bytes, flipped), content + b"\0\0\0\0", bytes(len(content))]:
        path.write_bytes(damaged)
        assert cache.get("a dog") is None, damaged
    cache.put("a dog", embedding_of(1))
    np.testing.assert_array_equal(cache.get("a dog"), embedding_of(1))  # type: ignore[arg-type]
    cache.put("a cat", embedding_of(1))
    (of_cat,) = {*path.parent.iterdir()} - {path}
    of_cat.write_bytes(path.read_bytes())  # under another text's name
    assert cache.get("a cat") is None


def test_the_oldest_go(tmp_path: Path) -> None:
    assert MAX_ENTRIES == 10_000
    cache = QueryCache(tmp_path / "cache", "model", max_entries=20)
    folder, now, before = tmp_path / "cache" / "queries", time.time(), set[Path]()
    for number in range(20):
        cache.put(f"query {number}", embedding_of(number))
        (path,) = {*folder.iterdir()} - before
        os.utime(path, (now, now - 1000 + number))
        before.add(path)
    left_over, being_written = folder / ".aside-old", folder / ".aside-new"
    left_over.write_bytes(b"of a process that was killed")
    os.utime(left_over, (now, now - 7200))
    being_written.write_bytes(b"of a process at work")
    cache.put("query 20", embedding_of(20))
    held = [number for number in range(21) if cache.get(f"query {number}") is not None]
    assert held == list(range(3, 21))  # 18: two are removed at once
    assert not left_over.exists() and being_written.exists()


def test_many_writers_at_once(tmp_path: Path) -> None:
    write = """
import sys
import numpy as np
from pathlib import Path
from svb.retrieve.model.query_embedder import QueryCache
cache = QueryCache(Path(sys.argv[1]), "model", max_entries=15)
for turn in range(300):
    number = turn * int(sys.argv[2]) % 40
    cache.put(f"query {number}", np.full(64, number, np.float32))
    held = cache.get(f"query {(turn * 3) % 40}")
    assert held is None or (held == (turn * 3) % 40).all()
assert "torch" not in sys.modules and "onnxruntime" not in sys.modules
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", write, str(tmp_path / "cache"), str(step)], stderr=subprocess.PIPE)
        for step in (1, 7, 11)
    ]
    for writer in writers:
        _, errors = writer.communicate()
        assert (writer.returncode, errors) == (0, b"")
    names = [path.name for path in (tmp_path / "cache" / "queries").iterdir()]
    assert 0 < len(names) <= 16 + 2  # as many as two more processes may just have written
    assert not [name for name in names if name.startswith(".aside-")]


def test_a_disk_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = QueryCache(tmp_path / "cache", "model")
    cache.put("a dog", embedding_of(0))
    assert cache.get("a dog") is None

    cache = QueryCache(tmp_path / "full", "model")
    cache.put("a cat", embedding_of(1))

    def half_written(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:40])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half_written)
    cache.put("a dog", embedding_of(0))
    assert cache.get("a dog") is None
    np.testing.assert_array_equal(cache.get("a cat"), embedding_of(1))  # type: ignore[arg-type]
    assert len(list((tmp_path / "full" / "queries").iterdir())) == 1
