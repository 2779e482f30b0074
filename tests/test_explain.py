"""What `svb explain` shows is what the run computes, and its page holds whatever a caption holds."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import clips
import naive
import numpy as np
import pytest
import synthetic
import torch
from conftest import RunSvb
from messages import heard
from numpy.typing import NDArray
from PIL import Image
from runs import as_of_an_older_svb, change_config, tiny

from svb.data.caption_features import read_caption_features
from svb.data.feature_store import FeatureStore
from svb.errors import InputError
from svb.extract.backbones import FAMILIES as BACKBONES
from svb.extract.config import ExtractConfig
from svb.extract.run import extract
from svb.retrieve import explain as explain_module
from svb.retrieve.explain import explain
from svb.retrieve.measure.explain_page import Explanation, summary
from svb.retrieve.model.embedder import run_embedder
from svb.train.checkpoint import load_checkpoint
from svb.train.run import build_model, read_run, read_vocabulary, train
from svb.train.training_data import FrameTable

CPU = torch.device("cpu")
COLOURS = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20), (250, 20, 250), (20, 250, 250)]
TRAIN = {**{f"v{number}": colour for number, colour in enumerate(COLOURS)}, "gone": (120, 120, 120)}
VAL = {"w0": (250, 120, 20), "w1": (120, 20, 250), "w2": (20, 120, 120)}
ODD = """<script>alert("1")</script> & 100% 'sure' {of} $\\nothing{$ 50%"""
ODD_ON_VAL = "$a$ <b>bold</b> $\\frac"
KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"epochs": 30, "learning_rate": 2e-2},
    "embedding": {"rebuild": "embedding", "support_values": "pooled"},
    "none": {"variant": "none"},
    "bank": {"memory_bank": 9, "learn_support_temperature": True, "support_values": "pooled", "epochs": 8},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class World:
    """Clips of one colour each, their store and captions, and a run of each kind."""

    def __init__(self, folder: Path) -> None:
        self.videos, self._runs = folder / "videos", folder
        self.videos.mkdir()
        for video_id, colour in {**TRAIN, **VAL}.items():
            source = f"color=c=0x{bytes(colour).hex()}"
            clips.make_clip(self.videos / f"{video_id}.mp4", seconds=3, fps=4, source=source)
        config = ExtractConfig(backbones=("toy:frames",), workers=1)
        self.store = extract([self.videos], folder / "features", config)
        (self.videos / "gone.mp4").unlink()
        rows = [(v, f"only {v} has this", "train") for v in TRAIN if v != "v0"] + [("v0", ODD, "train")]
        rows += [(v, "a colour", "train") for v in TRAIN] + [(v, f"{v} of val", "val") for v in VAL if v != "w0"]
        rows += [("w0", ODD_ON_VAL, "val")]
        features = synthetic.make_text_encoder().encode([caption for _, caption, _ in rows])
        self.captions = synthetic.make_captions(folder / "captions.h5", rows, features)

    def run(self, kind: str) -> Path:
        if not (self._runs / kind).exists():
            options = {"min_word_count": 1, "caption_sampling": "all", **KINDS[kind]}
            train(self.store, self.captions, self._runs / kind, tiny(**options))
        return self._runs / kind


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    encoder = synthetic.make_text_encoder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "toy", "toy_backbone")
        patch.setattr(explain_module, "load_matching_text_encoder", lambda settings, device: encoder)
        yield World(tmp_path_factory.mktemp("world"))


def explained(*arguments: Any, **options: Any) -> Explanation:
    """Return what `explain` would write, without decoding and drawing it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain_module, "write_page", write := Mock())
        explain(*arguments, **options)
    (explanation, *_), _ = write.call_args
    assert isinstance(explanation, Explanation)
    return explanation


def video_embeddings(world: World, run: Path, video_ids: list[str]) -> list[list[float]]:
    frames = FrameTable.of(FeatureStore(world.store).load("toy:frames", video_ids), 32, CPU)
    embeddings: list[list[float]] = run_embedder(run, "best", CPU).embed_videos(frames).tolist()
    return embeddings


def caption_embedding(run: Path, caption: str) -> list[float]:
    features = torch.from_numpy(synthetic.make_text_encoder().encode([caption]))
    embedding: list[float] = run_embedder(run, "best", CPU).embed_captions(features)[0].tolist()
    return embedding


def expected_weights(world: World, run: Path, query: list[float], video_ids: list[str]) -> dict[str, float]:
    videos, own = video_embeddings(world, run, video_ids), [[False] * len(video_ids)]
    (weights,) = naive.support_weights([query], videos, own, "cross", temperature_of(run))
    return dict(zip(video_ids, weights, strict=True))


def temperature_of(run: Path) -> float:
    return math.exp(float(load_checkpoint(run / "best").model["log_support_temperature"]))


def shown_weights(explanation: Explanation) -> dict[str, float]:
    return {video.video_id: video.weight for video in explanation.videos}


@every_kind
def test_the_weights_are_those_of_cross_on_this_query(kind: str, world: World) -> None:
    run = world.run(kind)
    shown = explained(run, "a red dog", support_size=0, k=99)
    expected = expected_weights(world, run, caption_embedding(run, "a red dog"), sorted(TRAIN))
    assert shown_weights(shown) == pytest.approx(expected, rel=1e-4)
    assert sum(video.weight for video in shown.videos) == pytest.approx(1)
    assert shown.videos == sorted(shown.videos, key=lambda video: -video.weight)
    assert shown.entropy == pytest.approx(-sum(w * math.log(w) for w in expected.values()), rel=1e-4)
    assert shown.temperature == pytest.approx(temperature_of(run))
    assert (shown.support_size, shown.own_video) == (len(TRAIN), None)
    assert (shown.variant, shown.epoch) == (tiny(**KINDS[kind]).variant, load_checkpoint(run / "best").epoch)
    records = FeatureStore(world.store).records
    assert {video.video_id: str(video.file) for video in shown.videos} == {v: records[v].source_path for v in TRAIN}


@pytest.mark.parametrize("query", [{"caption": ODD}, {"video": "v0"}, {"video": "videos/v0.mp4"}])
def test_the_querys_own_video_takes_no_part(
    query: dict[str, str], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.videos.parent)
    run, others = world.run("tokens"), sorted(set(TRAIN) - {"v0"})
    shown = explained(run, **query, support_size=0, k=99)
    embedding = caption_embedding(run, ODD) if "caption" in query else video_embeddings(world, run, ["v0"])[0]
    assert shown_weights(shown) == pytest.approx(expected_weights(world, run, embedding, others), rel=1e-3)
    assert sum(video.weight for video in shown.videos) == pytest.approx(1)
    assert (shown.own_video, shown.support_size) == ("v0", 6)
    assert "support set of 6 training videos without its own, v0," in summary(shown)


def test_what_belongs_to_no_one_training_video_is_rebuilt_from_all(world: World, tmp_path: Path) -> None:
    run = world.run("tokens")
    assert explained(run, "a colour", support_size=0).support_size == 7
    assert explained(run, video="w1", support_size=0).support_size == 7
    orange = clips.make_clip(tmp_path / "other.mp4", seconds=3, fps=4, source="color=c=0xff8000")
    shown = explained(run, video=str(orange), support_size=0, k=99)
    assert (shown.query, shown.own_video, shown.support_size) == (str(orange), None, 7)
    # Encoding the same colour again gives nearly the features of the clip in the store.
    near = clips.make_clip(tmp_path / "again.mkv", seconds=3, fps=4, source="color=c=0xfa1414")
    again = explained(run, video=str(near), support_size=0, k=99)
    expected = expected_weights(world, run, video_embeddings(world, run, ["v0"])[0], sorted(TRAIN))
    assert shown_weights(again) == pytest.approx(expected, abs=0.02)


def test_support_size(world: World) -> None:
    for size, expected in ((None, 4), (1, 1), (3, 3), (0, 7), (1000, 7)):
        shown = explained(world.run("tokens"), "a dog", support_size=size, k=99)
        assert shown.support_size == len(shown.videos) == expected
        assert sum(video.weight for video in shown.videos) == pytest.approx(1)
        again = explained(world.run("tokens"), "a dog", support_size=size, k=2)
        assert again.videos == shown.videos[:2]


def mixture_of(
    world: World, run: Path, weights: dict[str, float], pooled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the slow twins mix: `(1, T, D)` and `(1, T)`."""
    video_ids = list(weights)
    frames = FrameTable.of(FeatureStore(world.store).load("toy:frames", video_ids), 32, CPU)
    with torch.inference_mode():
        features, mask = frames.gather(torch.arange(len(video_ids)))
        sequences = model_of(run).video_head(features, mask).frame_sequences.tolist()
    present: list[list[bool]] = mask.tolist()
    if pooled:
        sequences = [[mean] for mean in naive.masked_mean(sequences, present)]
        present = [[True] for _ in video_ids]
    (steps,) = naive.mix([list(weights.values())], sequences, present)
    held = [step or [0.0] * len(sequences[0][0]) for step in steps]
    return torch.tensor([held]), torch.tensor([[step is not None for step in steps]])


def model_of(run: Path) -> Any:
    model = build_model(read_run(run), with_decoder=True, vocabulary=read_vocabulary(run))
    model.load_state_dict(load_checkpoint(run / "best").model)
    return model.eval()


@every_kind
def test_what_became_of_the_mixture_is_shown(kind: str, world: World, tmp_path: Path) -> None:
    run = world.run(kind)
    shown = explained(run, video="v1", support_size=0, k=99)
    page = explain(run, video="v1", support_size=0, out=tmp_path, k=1)
    text = text_of(page)
    pictures_of(page)
    assert f"epoch {shown.epoch}, variant {shown.variant}" in text
    if kind == "none":
        assert "trained without cross-captioning, so there is no decoder to rebuild anything" in text
        return
    decoder = model_of(run).decoder
    mixture = mixture_of(world, run, shown_weights(shown), pooled=kind != "tokens")
    if kind != "embedding":
        with torch.inference_mode():
            assert [shown.written] == decoder.write(*mixture) and shown.nearest == []
        assert f"the decoder wrote: {shown.written or '(nothing)'}" in text
        assert shown.written or kind == "bank"
        return
    with torch.inference_mode():
        rebuilt = decoder(*mixture)[0].tolist()
    table = read_caption_features(world.captions)
    cosines: dict[str, float] = {}
    rows = zip(table.table.captions, table.table.splits, table.features.astype(float).tolist(), strict=True)
    for caption, split, features in rows:
        if split == "train":
            size = math.sqrt(naive.dot(features, features) * naive.dot(rebuilt, rebuilt))
            cosines[caption] = naive.dot(features, rebuilt) / size
    best = sorted(cosines, key=lambda caption: -cosines[caption])[:5]
    assert [caption for caption, _ in shown.nearest] == best and shown.written is None
    assert [cosine for _, cosine in shown.nearest] == pytest.approx([cosines[each] for each in best], abs=1e-3)
    assert "the training captions nearest to the rebuilt embedding:" in text
    assert all(f"{cosine:.2f}  {caption}" in text for caption, cosine in shown.nearest)


def test_the_matrices_are_of_one_batch_of_val(world: World) -> None:
    run = world.run("tokens")
    shown = explained(run, "a dog")
    of = {"w1 of val": "w1", "w2 of val": "w2", ODD_ON_VAL: "w0"}
    assert set(shown.matrix_captions) == set(of)
    captions = [caption_embedding(run, caption) for caption in shown.matrix_captions]
    videos = video_embeddings(world, run, sorted(VAL))
    videos = [videos[int(of[caption][1])] for caption in shown.matrix_captions]
    own = [[row == column for column in range(3)] for row in range(3)]
    assert list(shown.matrices) == ["identity", "full", "hybrid", "cross"]
    for variant, matrix in shown.matrices.items():
        expected = naive.support_weights(captions, videos, own, variant, temperature_of(run))
        np.testing.assert_allclose(matrix, expected, rtol=5e-3, atol=1e-4)  # captions are float16 at rest


def make_run(world: World, folder: Path, rows: list[tuple[str, str, str]], **options: Any) -> Path:
    features = synthetic.make_text_encoder().encode([caption for _, caption, _ in rows])
    captions = synthetic.make_captions(folder / "captions.h5", rows, features)
    return train(world.store, captions, folder / "run", tiny(min_word_count=1, **options))


def test_without_a_batch_of_val_the_matrices_are_of_training(world: World, tmp_path: Path) -> None:
    rows = [(video_id, f"only {video_id} has this", "train") for video_id in TRAIN]
    for number, val in enumerate(([], [("nowhere", "gone", "val")], [("w0", "a dog", "val")])):
        (tmp_path / str(number)).mkdir()
        run = make_run(world, tmp_path / str(number), rows + val, val_fraction=0.0)
        assert sorted(explained(run, "a dog").matrix_captions) == sorted(caption for _, caption, _ in rows)


def test_a_run_selected_on_test_says_so(world: World, tmp_path: Path) -> None:
    rows = [(v, f"only {v} has this", "test" if v in ("v0", "v1") else "train") for v in TRAIN]
    run = make_run(world, tmp_path, rows, select_on="test")
    assert "SELECTED ON TEST" in summary(explained(run, "a dog", support_size=0))
    assert "SELECTED" not in summary(explained(world.run("tokens"), "a dog"))


def picture(source: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) as image:
        return np.asarray(image.convert("RGB"))


TAGS = "html meta title style h1 h2 p br figure figcaption b code div img table tr th td"


def tags_of(page: Path) -> set[str]:
    return set(re.findall(r"<(\w+)", page.read_text("utf-8")))


def text_of(page: Path) -> str:
    return html.unescape(re.sub("<[^>]*>", "", page.read_text("utf-8")))


def pictures_of(page: Path) -> list[str]:
    """Return the sources of a page's pictures; it must have no other source."""
    text = page.read_text("utf-8")
    sources = re.findall("""(?:src|href|srcset|data)=["']([^"']*)""", text)
    assert tags_of(page) <= {*TAGS.split()} and all(source.startswith("data:image/") for source in sources)
    text = re.sub("base64,[^'\"]*", "", text)
    assert "http" not in text and "url(" not in text and "@import" not in text
    return sources


def test_a_page_of_odd_captions(world: World, tmp_path: Path) -> None:
    messages = heard()
    query = {"video": "v1", "support_size": 0, "k": 7}
    page = explain(world.run("tokens"), **query, out=tmp_path / "out")
    assert page == tmp_path / "out" / "index.html"
    gone = world.videos / "gone.mp4"
    assert len(messages) == 1 and f"cannot show frames: {gone} cannot be used as a video (missing)" in messages[0]
    text = page.read_text("utf-8")
    assert html.escape(ODD) in text and text.count("no frames: its file can no longer be read") == 1
    shown = re.findall(r"<b>([\d.]+)</b> <code>(\w+)</code>", text)
    assert {video_id for _, video_id in shown} == set(TRAIN) - {"v1"}
    assert [float(weight) for weight, _ in shown] == sorted((float(weight) for weight, _ in shown), reverse=True)
    assert sum(float(weight) for weight, _ in shown) == pytest.approx(1, abs=0.004)
    strips = [picture(source) for source in pictures_of(page)]
    for strip, video_id in zip(strips, [v for _, v in shown if v != "gone"], strict=True):
        assert strip.shape == (96, 6 * 128, 3)
        np.testing.assert_allclose(strip.mean(axis=(0, 1)), TRAIN[video_id], atol=8)
    # The heat maps: a row a caption, all variants side by side, each cell with its weight.
    explanation = explained(world.run("tokens"), **query)
    cells = [float(weight) for weight in re.findall(r"<td style='--w:[\d.]+' title='([\d.]+)'>", text)]
    np.testing.assert_allclose(cells, np.hstack(list(explanation.matrices.values())).ravel(), atol=6e-4)
    assert all(html.escape(caption) in text for caption in explanation.matrix_captions)
    assert re.search(f"{'.*'.join(explanation.matrices)}", text, re.DOTALL)
    again = explain(world.run("tokens"), **query, out=tmp_path / "again")
    assert again.read_bytes() == page.read_bytes()
    assert {path.name for path in page.parent.iterdir()} == {"index.html"}


def test_a_page_of_odd_queries(world: World, tmp_path: Path) -> None:
    for query in ("word " * 200, '{0} {query} %s a\nb\tc $x$"><img src=http://x.y/z>', "弾くギター"):
        page = explain(world.run("none"), query, out=tmp_path, k=1)
        assert f"<h1>&ldquo;{html.escape(query)}&rdquo;</h1>" in page.read_text("utf-8")
        assert page.read_text("utf-8").count("<img ") == 1 and tags_of(page) <= {*TAGS.split()}


def test_too_few_training_videos(world: World, tmp_path: Path) -> None:
    rows = [("v1", "a dog", "train"), ("w1", "a cat", "val")]
    captions = synthetic.make_captions(tmp_path / "one.h5", rows, np.ones((2, 20)))
    with pytest.raises(InputError, match="1 training videos have both features and captions - expected at least 2"):
        explain(world.run("tokens"), "a dog", captions=captions)


def test_the_command(world: World, run_svb: RunSvb, tmp_path: Path) -> None:
    run = world.run("none")
    ran = run_svb("explain", run, "a dog", "-k", 2, "--support-size", 0, "--checkpoint", "last")
    assert ran.exit_code == 0 and ran.stdout == f"{run / 'explain' / 'index.html'}\n"
    change_config(run, as_of_an_older_svb)
    moved = json.loads((run / "config.json").read_text())["paths"]
    options = ("--store", moved["store"], "--captions", moved["captions"], "-o", tmp_path / "out")
    ran = run_svb("explain", run, "--video", "v2", *options)
    assert ran.exit_code == 0 and ran.stdout == f"{tmp_path}/out/index.html\n"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["RUN"], 2, "expected either a caption or --video - give exactly one of them"),
        (["RUN", "a dog", "--video", "v0"], 2, "give exactly one of them"),
        (["RUN", " \n"], 2, "the caption is empty - expected some words"),
        (["RUN", "a dog", "-k", "0"], 2, "k is 0 and support_size None - expected k of at least 1"),
        (["RUN", "a dog", "--support-size", "-1"], 2, "k is 5 and support_size -1"),
        (["STORE", "a dog"], 2, "is a feature store, which has no support set - name a run of `svb train`"),
        (["NOWHERE", "a dog"], 1, "is neither a run (config.json) nor a feature store"),
        (["RUN", "--video", "v99"], 1, "'v99' is neither a video file nor a video_id in"),
        (["RUN", "--video", "CAPTIONS"], 1, "captions.h5 is not a video that can be read"),
        (["RUN", "a dog", "--captions", "NOWHERE"], 1, "no caption features at"),
        (["RUN", "a dog", "--store", "NOWHERE"], 1, "NOWHERE"),
    ],
)
def test_errors(
    arguments: list[str], exit_code: int, says: str, world: World, run_svb: RunSvb, tmp_path: Path
) -> None:
    places = {"RUN": world.run("tokens"), "STORE": world.store, "CAPTIONS": world.captions}
    given = [places.get(a, tmp_path / a if a == "NOWHERE" else a) for a in arguments]
    ran = run_svb("explain", *given, "-o", tmp_path / "out")
    assert ran.exit_code == exit_code, ran
    assert says in ran.stderr.splitlines()[-1] and "Traceback" not in ran.stderr and not ran.stdout
    assert " - " in ran.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
