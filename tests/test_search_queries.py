"""Queries of an index that a real, small run made: what is embedded, what is refused, what is loaded for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from indexes import edit_manifest, index

from svb.config import fingerprint
from svb.errors import InputError, MismatchError, StoreError
from svb.retrieve.answer import SearchRequest
from svb.retrieve.model.embedder import run_embedder
from svb.retrieve.search import Searcher
from svb.retrieve.stored.manifest import read_manifest
from svb.train.config import TrainConfig
from svb.train.run import train

# Tensors this small are slower on two threads than on one.
torch.set_num_threads(1)

CONFIG = TrainConfig(embedding_size=16, variant="none", batch_size=16, epochs=2, learning_rate=2e-3)
TEXT = SearchRequest(text="a dog")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train(*synthetic.make_task(folder), folder / "run", CONFIG)


@pytest.fixture(scope="module")
def built(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of all 80 videos; only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        use_encoder(patch)
        return index(trained, tmp_path_factory.mktemp("built") / "index", moment_seconds=3, moment_stride_seconds=1)


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index", ignore=shutil.ignore_patterns("cache")))


@pytest.fixture(autouse=True)
def text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    use_encoder(monkeypatch)


def use_encoder(patch: pytest.MonkeyPatch) -> None:
    encoder = synthetic.make_text_encoder()
    patch.setattr("svb.retrieve.model.embedder.load_matching_text_encoder", lambda settings, device: encoder)


def test_a_text_is_embedded_as_the_run_does(built: Path, trained: Path) -> None:
    embedder = run_embedder(trained, "best", torch.device("cpu"))
    features = torch.from_numpy(synthetic.make_text_encoder().encode(["a dog"]))
    embedding = Searcher(built).embed_text("a dog")
    np.testing.assert_allclose(embedding, embedder.embed_captions(features)[0], atol=1e-6)
    answer = Searcher(built).search(TEXT)
    assert answer.results == Searcher(built).search_embedding(embedding, TEXT).results


def test_a_query_is_embedded_once(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Searcher(copied).search(TEXT).results

    def fail(*arguments: Any) -> Any:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr("svb.retrieve.model.embedder.load_matching_text_encoder", fail)
    assert Searcher(copied).search(TEXT).results == expected
    with pytest.raises(AssertionError, match="was loaded"):
        Searcher(copied).search(SearchRequest(text="a cat"))


def test_the_next_generation_goes_on_with_what_is_loaded(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(settings: Any, device: Any) -> Any:
        loaded.append(settings["name"])
        return synthetic.make_text_encoder()

    monkeypatch.setattr("svb.retrieve.model.embedder.load_matching_text_encoder", load)
    edit_manifest(copied, text=[])
    first = Searcher(copied)
    expected = first.search(TEXT).results
    edit_manifest(copied, generation=7)
    second = Searcher(copied, previous=first)
    assert second.generation == 7 and second.search(SearchRequest(text="a cat")).results
    assert second.search(TEXT).results == expected and loaded == ["synthetic:words"]
    edit_manifest(copied, model_fingerprint="0123456789abcdef")
    with pytest.raises(MismatchError, match="made with model 0123456789abcdef"):
        Searcher(copied, previous=second).search(TEXT)
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": ""}, "the query is empty - expected a text to search for"),
        ({"text": " \n\t"}, "the query is empty"),
        ({"plus": ("",)}, "a text to match as well is empty"),
        ({"without": ("  ",)}, "a text not to match is empty"),
        ({"text": "a dog \udcff"}, r"the query 'a dog \\udcff' is not UTF-8"),
        ({"text": "dog " * 1000}, "the query has 1002 tokens, but synthetic:words reads 12 - make it shorter"),
        ({"plus": ("dog " * 11,)}, "a text to match as well has 13 tokens, but synthetic:words reads 12"),
        ({"without": ("dog " * 11,)}, "a text not to match has 13 tokens"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(built: Path, fields: dict[str, Any], said: str) -> None:
    for _ in range(2):  # a cache must not let it pass the second time
        with pytest.raises(InputError, match=said):
            Searcher(built).search(SearchRequest(**{"text": "a dog", **fields}))


def test_odd_texts_are_answered(built: Path) -> None:
    for text in ("猫 🐈 -- 'quoted'", "dog " * 10, "../../etc/passwd", "\x00"):
        assert len(Searcher(built).search(SearchRequest(text=text, k=3)).results) == 3


def test_another_or_a_damaged_model_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_manifest(copied, text=[])  # so that texts need the heads, too
    (path,) = copied.glob("heads/*/heads.safetensors")
    whole = path.read_bytes()
    flipped = whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]
    for data, said in ((whole[:-4], "make the index again"), (flipped, r"\(its hash is wrong\)")):
        path.write_bytes(data)
        with pytest.raises(StoreError, match=rf"heads\.safetensors is damaged .*{said}"):
            Searcher(copied).search(TEXT)
    path.write_bytes(whole)
    model = read_manifest(copied)["model_fingerprint"]
    edit_manifest(copied, model_fingerprint="0123456789abcdef")
    with pytest.raises(MismatchError, match=rf"made with model 0123456789abcdef, not {model}"):
        Searcher(copied).search(TEXT)
    edit_manifest(copied, model_fingerprint=model)
    monkeypatch.undo()
    encoder = synthetic.make_text_encoder()
    encoder.weights_hash = "others"
    monkeypatch.setattr("svb.retrieve.model.embedder.load_text_encoder", lambda name, device: encoder)
    with pytest.raises(MismatchError, match="synthetic:words has weights others here, but of synthetic:words made"):
        Searcher(copied).search(TEXT)


def test_a_model_that_gives_no_numbers_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_manifest(copied, text=[])
    monkeypatch.setattr(
        "svb.retrieve.model.embedder.TorchTower.embed", lambda self, texts: np.full((1, 16), np.nan)
    )
    with pytest.raises(StoreError, match="the embedding of 'a dog' is not finite"):
        Searcher(copied).search(TEXT)


def test_what_is_not_a_whole_index_of_this_format_is_refused(copied: Path) -> None:
    path = copied / "manifest.json"
    data = path.read_text()
    edit_manifest(copied, format_version=3)
    with pytest.raises(StoreError, match="has format 3 - this svb reads up to 2; upgrade svb"):
        Searcher(copied)
    manifest = {"format_version": 1, "segments": []}
    path.write_text(json.dumps({**manifest, "checksum": fingerprint(manifest)}))
    with pytest.raises(StoreError, match=r"has format 1 .* make the index again with `svb index --rebuild"):
        Searcher(copied)
    path.write_text(data[: len(data) // 2])
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        Searcher(copied)
    path.unlink()
    with pytest.raises(InputError, match=r"is not an index .* make one with `svb index"):
        Searcher(copied)


def test_a_byte_that_flipped_in_the_manifest_is_never_believed(copied: Path) -> None:
    path = copied / "manifest.json"
    data, expected = path.read_bytes(), read_manifest(copied)
    for position in range(0, len(data) - 1, 97):
        damaged = bytearray(data)
        damaged[position] ^= 2
        path.write_bytes(damaged)
        try:
            assert Searcher(copied).manifest == expected
        except StoreError:
            continue
        assert data[position : position + 1].isspace()


def test_a_text_search_loads_nothing_heavy(copied: Path) -> None:
    """Neither to open an index nor, where the text was asked before, to answer."""
    Searcher(copied).search(TEXT)
    program = f"""
import sys
from svb.retrieve.search import Searcher
from svb.retrieve.answer import SearchRequest
answer = Searcher({str(copied)!r}).search(SearchRequest(text="a dog", with_curves=True))
assert len(answer.results) == 10
heavy = {{"torch", "h5py", "pandas", "scipy", "av", "PIL", "onnxruntime", "tokenizers", "matplotlib"}}
print(sorted(heavy & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.returncode) == ("[]\n", 0), ran.stderr
