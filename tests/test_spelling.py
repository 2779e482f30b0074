"""A name is one name whether its accents are composed (NFC) or taken apart (NFD), as some file systems do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import synthetic

from svb.data.caption_features import read_caption_features
from svb.data.feature_store import FeatureStore
from svb.data.importing.import_features import import_features
from svb.data.text import spelled_as
from svb.retrieve.searching.catalog import Catalog, _below
from svb.retrieve.stored.metadata import Metadata
from svb.retrieve.stored.segment import StringColumn

COMPOSED, APART = "caf\u00e9/\u00fcber", "cafe\u0301/u\u0308ber"
BOTH_WAYS = pytest.mark.parametrize(("here", "there"), [(COMPOSED, APART), (APART, COMPOSED)])


@BOTH_WAYS
def test_captions_find_their_video(here: str, there: str, tmp_path: Path) -> None:
    store = FeatureStore(synthetic.make_store(tmp_path / "features", {here: np.ones((2, 3)), "b": np.ones((1, 3))}))
    rows = [(there, "a dog", "train"), ("b", "a cat", "train"), ("nowhere\u00e9", "a bird", "train")]
    path = synthetic.make_captions(tmp_path / "c.h5", rows, np.eye(3))
    assert read_caption_features(path, store.records).table.video_ids == [here, "b", "nowhere\u00e9"]
    assert read_caption_features(path).table.video_ids[0] == there


def test_a_spelling_that_is_stored_or_two_that_are_is_left_alone() -> None:
    assert spelled_as([COMPOSED], [COMPOSED, APART]) == {}
    assert spelled_as(["\u1e69"], ["s\u0323\u0307", "s\u0307\u0323"]) == {}


@BOTH_WAYS
def test_features_are_not_imported_twice(here: str, there: str, tmp_path: Path) -> None:
    for number, name in enumerate((here, there)):
        path = tmp_path / f"source{number}" / f"{name}.npy"
        path.parent.mkdir(parents=True)
        np.save(path, np.ones((2, 3)))
        import_features(tmp_path / f"source{number}", tmp_path / "features", backbone="x")
    assert list(FeatureStore(tmp_path / "features").records) == [here]


@BOTH_WAYS
def test_folders_and_metadata_match(here: str, there: str) -> None:
    catalog: Any = SimpleNamespace(video_ids=[here, "b"], source_paths=[f"/v/{here}.mp4", "/v/b.mp4"], num_videos=2)
    for folder in (there, there.split("/", maxsplit=1)[0], f"/v/{there.split('/', maxsplit=1)[0]}"):
        assert _below(catalog, [folder]).tolist() == [True, False]
    catalog.live_rows = {here: 0, "b": 1}
    assert [Catalog.row_of(catalog, name) for name in (there, here, "b", "\u00e9")] == [0, 0, 1, None]
    metadata = Metadata({"n": "number"}, StringColumn.of([there]), [np.array([1.0])])
    assert metadata.matches(["n=1"], [here, "b"]).tolist() == [True, False]
