"""Queries of an index that a real, small run made: what is embedded, what is refused, what is loaded for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from indexes import edit_manifest

from svb.errors import InputError, MismatchError, StoreError
from svb.retrieve.answer import SearchRequest
from svb.retrieve.model.embedder import run_embedder
from svb.retrieve.search import Searcher
from svb.retrieve.stored.manifest import read_manifest

TEXT = SearchRequest(text="a dog")
pytestmark = pytest.mark.usefixtures("words_encoder")


@pytest.fixture
def copied(built_index: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built_index, tmp_path / "index", ignore=shutil.ignore_patterns("cache")))


def test_a_text_is_embedded_as_the_run_does_and_once(
    copied: Path, indexed_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = run_embedder(indexed_run, "best", torch.device("cpu"))
    features = torch.from_numpy(synthetic.make_text_encoder().encode(["a dog"]))
    embedding = Searcher(copied).embed_text("a dog")
    np.testing.assert_allclose(embedding, embedder.embed_captions(features)[0], atol=1e-6)
    monkeypatch.setattr(
        "svb.retrieve.model.embedder.load_matching_text_encoder", lambda *given: pytest.fail("loaded")
    )
    assert Searcher(copied).search(TEXT).results == Searcher(copied).search_embedding(embedding, TEXT).results
    with pytest.raises(pytest.fail.Exception, match="loaded"):
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
def test_texts_that_cannot_be_read_are_refused(built_index: Path, fields: dict[str, Any], said: str) -> None:
    for _ in range(2):  # a cache must not let it pass the second time
        with pytest.raises(InputError, match=said):
            Searcher(built_index).search(SearchRequest(**{"text": "a dog", **fields}))


def test_odd_texts_are_answered(built_index: Path) -> None:
    for text in ("猫 🐈 -- 'quoted'", "dog " * 10, "../../etc/passwd", "\x00"):
        assert len(Searcher(built_index).search(SearchRequest(text=text, k=3)).results) == 3


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


def test_what_is_not_a_whole_index_is_refused(copied: Path) -> None:
    path = copied / "manifest.json"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        Searcher(copied)
    path.unlink()
    with pytest.raises(InputError, match=r"is not an index .* make one with `svb index"):
        Searcher(copied)


def test_a_text_search_loads_nothing_heavy(copied: Path) -> None:
    """Neither to open an index nor, where the text was asked before, to answer."""
    Searcher(copied).search(TEXT)
    program = f"""
import sys
from svb.retrieve.search import Searcher
from svb.retrieve.answer import SearchRequest
answer = Searcher({str(copied)!r}).search(SearchRequest(text="a dog", with_curves=True))
assert len(answer.results) == 10
heavy = {{"sqlite3", "torch", "h5py", "pandas", "scipy", "av", "PIL", "onnxruntime", "tokenizers", "matplotlib"}}
print(sorted((heavy | {{"pyarrow"}}) & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.returncode) == ("[]\n", 0), ran.stderr
