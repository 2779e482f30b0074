"""`svb verify` and `svb info` of an index."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from conftest import RunSvb
from indexes import edit_manifest, edit_store, frames_of, index, only_segment, open_index, remove
from numpy.typing import NDArray

from svb.cli import run
from svb.data.feature_store import FeatureStore
from svb.data.feature_store_writer import FeatureStoreWriter
from svb.data.rows import VideoRows
from svb.errors import InputError, StoreError, UsageError
from svb.retrieve.indexing import embed_segment
from svb.retrieve.indexing.verify_index import recompute_index, verify_index
from svb.retrieve.stored import manifest as manifest_module
from svb.retrieve.stored.manifest import read_manifest
from svb.retrieve.stored.segment import Segment


class TestVerify:
    """`svb verify` finds what is not as it must be."""

    def test_a_flipped_byte_in_every_file(self, own_index: Path, indexed_run: Path, indexed_store: Path) -> None:
        remove(indexed_store, "clip000")
        index(indexed_run, own_index, store=indexed_store, prune=True)
        assert run(["verify", str(own_index)]) == 0
        paths = [
            path
            for path in sorted(own_index.rglob("*"))
            if path.is_file() and own_index / "cache" not in path.parents
        ]
        assert {"tombstones", "segments", "captions", "heads"} <= {path.parent.parent.name for path in paths}
        for path in paths:
            data = path.read_bytes()
            for position in {0, len(data) // 2, len(data) - 3} if data else ():
                damaged = bytearray(data)
                damaged[position] ^= 1
                path.write_bytes(damaged)
                assert run(["verify", str(own_index)]) == 1, path
            path.write_bytes(data)
        assert run(["verify", str(own_index)]) == 0

    def test_a_damaged_manifest_is_never_believed(self, own_index: Path) -> None:
        path = own_index / "manifest.json"
        data, expected = path.read_bytes(), read_manifest(own_index)
        for position in range(0, len(data) - 1, 13):
            damaged = bytearray(data)
            damaged[position] ^= 2
            path.write_bytes(damaged)
            try:
                assert read_manifest(own_index) == expected
            except StoreError:
                continue
            assert data[position : position + 1].isspace()

    def test_an_index_whose_files_do_not_fit_is_not_opened(self, own_index: Path) -> None:
        for path in sorted((own_index / "segments" / only_segment(own_index).key).glob("*.npy")):
            whole = path.read_bytes()
            np.save(path, np.zeros(3))
            other = path.read_bytes().ljust(len(whole), b"\0")[: len(whole)]
            for damaged in (None, whole[: len(whole) // 2], whole[:-2], whole + b"more", other):
                path.unlink() if damaged is None else path.write_bytes(damaged)
                with pytest.raises(StoreError, match=r"is damaged .* make it again with `svb index`"):
                    open_index(own_index)
                assert verify_index(own_index)[0].startswith(str(path))
            path.write_bytes(whole)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda arrays: arrays["video_embeddings"].__setitem__((3, 0), np.nan), "first in row 3"),
            (lambda arrays: arrays["moment_embeddings"].__setitem__((5, 0), np.inf), "first in row 5"),
            (lambda arrays: arrays["moment_embeddings"].__imul__(np.float16(0.99)), "221 vectors do not have"),
            (lambda arrays: arrays["moment_seconds"].__setitem__((0, 1), -1), "a moment has no length"),
            (lambda arrays: arrays["video_embeddings"].__setitem__((slice(None), 0), 0), "do not have length 1"),
            (lambda arrays: arrays["moment_offsets"].__setitem__(1, 0), "moment_offsets do not ascend"),
            (lambda arrays: arrays["video_id_utf8"].__setitem__(0, 255), "are not UTF-8"),
            (lambda arrays: arrays["video_id_utf8"].__setitem__(6, ord("1")), "'clip001' appears 2 times"),
        ],
    )
    def test_what_was_written_wrong(
        self, own_index: Path, change: Callable[[dict[str, NDArray[Any]]], None], words: str
    ) -> None:
        """Files that have the hashes that the manifest names, but not what an index holds."""
        folder = own_index / "segments" / only_segment(own_index).key
        arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
        change(arrays)
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        entry = read_manifest(own_index)["segments"][0]
        entry["files"] = {path.name: manifest_module.hash_file(path) for path in folder.iterdir()}
        edit_manifest(own_index, segments=[entry])
        assert any(words in problem for problem in verify_index(own_index))

    def test_a_vector_that_is_not_finite_is_never_written(
        self, indexed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        embed = embed_segment.embed_segment

        def poisoned(*arguments: Any) -> Segment:
            segment = embed(*arguments)
            segment.moment_embeddings[segment.moment_offsets[7], 2] = np.nan
            return segment

        monkeypatch.setattr(embed_segment, "embed_segment", poisoned)
        with pytest.raises(StoreError, match=r"video 'clip007' has an embedding that is not finite"):
            index(indexed_run, tmp_path / "index")
        assert not (tmp_path / "index" / "manifest.json").exists()

    def test_wrong_counts(self, own_index: Path) -> None:
        edit_manifest(own_index, videos=79)
        assert verify_index(own_index) == [f"{own_index}: there are 80 videos, but the manifest says 79"]

    def test_recompute_embeds_again(
        self, indexed_run: Path, own_index: Path, said: list[str], run_svb: RunSvb, tmp_path: Path
    ) -> None:
        store = indexed_run.parent / "features"
        assert recompute_index(own_index, 5) == []
        assert said == [f"embedded 5 of 80 videos again from {store}: 5 are the same but for rounding, 0 differ"]
        assert run_svb("verify", own_index, "--recompute", 2).stdout == f"{own_index}: a whole index\n"
        with pytest.raises(UsageError, match="cannot recompute 0 videos"):
            recompute_index(own_index, 0)
        other = synthetic.make_store(tmp_path / "other", {f"clip{v:03}": frames_of(v) for v in range(80)})
        edit_manifest(own_index, store=str(other))
        with pytest.raises(InputError, match="none of the 80 videos of the index is unchanged in"):
            recompute_index(own_index, 5)
        edit_manifest(own_index, store=str(tmp_path / "nowhere"))
        with pytest.raises(InputError, match="no feature store at"):
            recompute_index(own_index, 5)

    def test_recompute_finds_other_vectors(self, indexed_run: Path, indexed_store: Path, own_index: Path) -> None:
        def edit(held: FeatureStore, writer: FeatureStoreWriter) -> None:
            for v, record in enumerate(held.records.values()):  # other rows of the same content
                rows = VideoRows(frames_of(v).astype(np.float16), np.arange(4.0))
                writer.add(dataclasses.replace(record, duration_seconds=4.0), {synthetic.BACKBONE: rows})

        edit_store(indexed_store, edit)
        edit_manifest(own_index, store=str(indexed_store))
        problems = recompute_index(own_index, 10)
        assert len(problems) == 10 and all("differs: " in problem for problem in problems)

    def test_info_tells_what_there_is(self, built_index: Path, run_svb: RunSvb) -> None:
        held = json.loads(run_svb("info", built_index, "--json").stdout)
        assert (held["videos"], held["moments_total"], held["segments"]) == (80, 221, 1)
        assert held["moments"] == {"seconds": 3.0, "stride_seconds": 1.0} and held["generation"] >= 1
        assert held["deleted"] == {"videos": 0, "moments": 0} and held["captions"]["training"] > 0
        assert {"text_tower", "metadata", "model", "model_fingerprint"} <= set(held)
