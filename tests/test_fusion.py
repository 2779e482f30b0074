"""Two backbones as one: their rows aligned in time, from the store through training to a search by video."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import clips
import naive
import numpy as np
import pytest
import synthetic
import torch
from conftest import RunSvb
from indexes import index
from numpy.typing import NDArray
from runs import Task

from svb.data.description import publish_description
from svb.data.feature_store import FeatureStore
from svb.data.fusion import nearest_rows, parts_of, shared_part, split_name
from svb.data.rows import VideoRows
from svb.errors import InputError, MismatchError, StoreError
from svb.retrieve.answer import SearchRequest
from svb.retrieve.evaluate import evaluate
from svb.retrieve.model.embedder import index_embedder, run_embedder
from svb.retrieve.model.query_media import embed_video
from svb.retrieve.model.torch_media import TorchMedia
from svb.retrieve.search import Searcher
from svb.retrieve.stored.manifest import read_manifest
from svb.retrieve.stored.segment import open_segments
from svb.train.checkpoint import load_checkpoint, save_checkpoint
from svb.train.config import TrainConfig
from svb.train.heads import mean_of_frames
from svb.train.run import build_model, read_run, train
from svb.train.training_data import FrameTable

A, B = synthetic.BACKBONE, "synthetic:clips/with+plus.pth"
FUSED = f"{A}+{B}"
QUICK = TrainConfig(
    embedding_size=16, variant="none", batch_size=16, epochs=10, evaluate_every=10, learning_rate=5e-3, dropout=0.1
)


def make_rows(features: NDArray[np.floating], times_seconds: NDArray[np.floating]) -> VideoRows:
    return VideoRows(features.astype(np.float16), np.asarray(times_seconds, np.float64))


def make_fused_task(folder: Path) -> Task:
    """Write a task whose captions tell of a place and a deed, five of each, and each backbone shows but one.

    All 25 combinations are three times in train and once in val.
    """
    random = np.random.default_rng(0)
    to_a, to_b = random.normal(size=(5, 12)), random.normal(size=(5, 10))
    to_captions = random.normal(size=(2, 5, 14))
    combinations = 4 * [(place, deed) for place in range(5) for deed in range(5)]
    videos, clip_rows, rows, captions = {}, {}, [], []
    for video, (place, deed) in enumerate(combinations):
        video_id = f"v{video:03}"
        num_frames, num_clips = random.integers(1, 9), random.integers(1, 4)
        videos[video_id] = to_a[place] + 0.3 * random.normal(size=(num_frames, 12))
        shown = 50 * (to_b[deed] + 0.3 * random.normal(size=(num_clips, 10)))  # of another scale
        clip_rows[video_id] = make_rows(shown, np.sort(random.uniform(0, num_frames, num_clips)))
        rows.append((video_id, "a dog and a cat", "train" if video < 75 else "val"))
        captions.append(to_captions[0, place] + to_captions[1, deed] + 0.3 * random.normal(size=14))
    return (
        synthetic.make_store(folder / "features", videos, beside={B: clip_rows}),
        synthetic.make_captions(folder / "captions.h5", rows, np.stack(captions)),
    )


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_fused_task(tmp_path_factory.mktemp("fused"))


@pytest.fixture(scope="module")
def fused_run(task: Task) -> Path:
    config = dataclasses.replace(QUICK, convolution=3)
    return train(*task, task[0].parent / "run", config, backbone=FUSED)


def test_the_nearest_row_is_the_slow_twins() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        # Halves of a second, so that ties are frequent and exact.
        times, wanted = (np.unique(random.integers(-9, 40, size=random.integers(1, 30))) / 2 for _ in range(2))
        assert nearest_rows(times, wanted).tolist() == naive.nearest_rows(times.tolist(), wanted.tolist())
    assert nearest_rows(np.array([0.0, 1.0, 2.0]), np.array([-5, 0.5, 0.51, 1.5, 9])).tolist() == [0, 0, 1, 1, 2]


def test_a_name_is_split_into_what_is_held() -> None:
    for name, parts in {
        **{"a": ["a"], "b+a": ["b", "a"], "b+a+c": ["b", "a", "c"]},
        **{"a+b": ["a+b"], "a+b+b": ["a+b", "b"], "b+a+b": ["b", "a+b"]},  # one that is called so is meant
        **{name: [] for name in ("a+a", "a+x", "a+", "+a", "")},
    }.items():
        assert split_name(name, ["a+b", "a", "b", "c"]) == parts


def test_rows_stand_beside_the_nearest_of_the_other_backbone(task: Task) -> None:
    store = FeatureStore(task[0])
    for first, second in ((A, B), (B, A)):
        wanted = store.video_ids[7:2:-1]
        grid, other = store.load(first, wanted), store.load(second, wanted)
        fused = store.load(f"{first}+{second}", wanted)
        assert fused.features.dtype == np.float16 and fused.video_ids == wanted
        np.testing.assert_array_equal(fused.times_seconds, grid.times_seconds)
        np.testing.assert_array_equal(fused.offsets, grid.offsets)
        for video in range(len(wanted)):
            own, others = slice(*grid.offsets[video : video + 2]), slice(*other.offsets[video : video + 2])
            nearest = naive.nearest_rows(other.times_seconds[others].tolist(), grid.times_seconds[own].tolist())
            expected = np.hstack([grid.features[own], other.features[others][nearest]])
            np.testing.assert_array_equal(fused.features[own], expected)


def test_what_is_held_and_what_is_said_where_it_is_not(task: Task) -> None:
    store = FeatureStore(task[0])
    assert store.only_backbone(FUSED) == FUSED
    with pytest.raises(InputError, match=r"choose one with --backbone, or fuse them with --backbone synthetic:fr"):
        store.only_backbone()
    for name in (f"{A}+{A}", f"{A}+timm:x", f"{A}+"):
        with pytest.raises(InputError, match=r"holds no features of .* or several different ones joined by \+"):
            store.only_backbone(name)
    settings = store.video_settings(FUSED)
    assert settings["backbone"] == FUSED and settings["backbone_settings"]["feature_size"] == 22
    assert list(parts_of(settings)) == [A, B] and list(parts_of(store.video_settings(A))) == [A]
    sizes = [part["feature_size"] for part in parts_of(json.loads(json.dumps(settings, sort_keys=True))).values()]
    assert sizes == [12, 10]
    assert [shared_part(settings, {"weights_hash": f"of {name}"}) for name in (A, B, "C")] == [0, 1, None]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.full((1, 2), np.nan), r"features of synthetic:clips/with\+plus.pth hold NaN .* video 'v1'"),
        (np.ones((0, 2)), "video 'v1' has no rows of one of the fused backbones"),
    ],
)
def test_damage_is_named(rows: NDArray[np.floating], words: str, tmp_path: Path) -> None:
    videos = {"v0": np.ones((2, 3)), "v1": np.ones((2, 3))}
    beside = {"v0": make_rows(np.ones((1, 2)), np.zeros(1)), "v1": make_rows(rows, np.zeros(len(rows)))}
    store = FeatureStore(synthetic.make_store(tmp_path / "features", videos, beside={B: beside}))
    with pytest.raises(StoreError, match=words):
        store.load(FUSED)


def test_both_together_find_what_neither_finds_alone(task: Task, tmp_path: Path) -> None:
    found = {}
    for number, name in enumerate((A, B, FUSED)):
        run = train(*task, tmp_path / str(number), QUICK, backbone=name)
        found[name] = evaluate(run, checkpoint="last").metrics["t2v/MeanR"]
    assert found[FUSED] < 1.5  # of 25; five videos share what one backbone shows
    assert min(found[A], found[B]) > 2


def test_a_fused_run_is_evaluated_and_indexed(fused_run: Path, task: Task, tmp_path: Path) -> None:
    metrics = evaluate(fused_run, checkpoint="last").metrics
    last = json.loads((fused_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name: last[f"val/{name}"] for name in ("t2v/R@1", "v2t/R@5")}.items() <= metrics.items()
    built = index(fused_run, tmp_path / "index", moment_seconds=2)
    (segment,) = open_segments(built, read_manifest(built))
    # An embedding is that of the video's fused rows alone; times are the first backbone's.
    model = build_model(read_run(fused_run)).eval()
    weights = load_checkpoint(fused_run / "best").model
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    loaded = FeatureStore(task[0]).load(FUSED)
    for video in (0, 9, 41):
        rows = torch.from_numpy(loaded.features[slice(*loaded.offsets[video : video + 2])]).float()[None]
        with torch.inference_mode():
            expected = model.video_head(rows, torch.ones(1, rows.shape[1], dtype=torch.bool)).video_embeddings[0]
        np.testing.assert_allclose(segment.video_embeddings[video], expected.numpy(), atol=1e-3)
        begins = segment.moment_seconds[slice(*segment.moment_offsets[video : video + 2]), 0]
        assert begins[0] == loaded.times_seconds[loaded.offsets[video]]


def test_a_run_needs_its_backbones_and_a_search_a_run(
    fused_run: Path, task: Task, run_svb: RunSvb, tmp_path: Path
) -> None:
    videos = {video_id: np.ones((1, 12)) for video_id in FeatureStore(task[0]).video_ids}
    alone = synthetic.make_store(tmp_path / "alone", videos)
    with pytest.raises(InputError, match=r"alone holds no features of 'synthetic:frames\+synthetic:clips"):
        evaluate(fused_run, store=alone)
    beside = {B: {video_id: make_rows(np.ones((1, 9)), np.zeros(1)) for video_id in videos}}
    other = synthetic.make_store(tmp_path / "other", videos, beside=beside)
    with pytest.raises(MismatchError, match=r"synthetic:clips/with\+plus\.pth\.feature_size: stored 9, wanted"):
        evaluate(fused_run, store=other)
    for arguments in (("evaluate", task[0], "--captions", task[1]), ("index", task[0], "-o", tmp_path / "index")):
        ran = run_svb(*arguments, "--backbone", FUSED)
        assert ran.exit_code == 1 and "is fused of several backbones and cannot be searched" in ran.stderr


@pytest.mark.parametrize("options", [{}, {"convolution": 3, "layers": 1, "pooling": "attention"}])
def test_a_clip_model_beside_another_starts_as_zero_shot(tmp_path: Path, options: dict[str, int]) -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(12, 64))
    clip = "open_clip:made-up"
    videos = {f"v{v:02}": 30 * random.normal(size=(3, 5)) for v in range(12)}
    times_seconds = np.array([0.4, 1.6])
    of_clip = {v: make_rows(features[n] + random.normal(size=(2, 64)), times_seconds) for n, v in enumerate(videos)}
    store = synthetic.make_store(tmp_path / "features", videos, beside={clip: of_clip})
    rows = [(video_id, "a dog and a dog", "train" if v < 6 else "val") for v, video_id in enumerate(videos)]
    captions = synthetic.make_captions(tmp_path / "captions.h5", rows, features, text_encoder=clip)
    config = dataclasses.replace(QUICK, epochs=1, evaluate_every=1, learning_rate=1e-12, **options)
    run = train(store, captions, tmp_path / "run", config, backbone=f"{A}+{clip}")
    assert read_run(run)["shared_space"] is True
    embedder = run_embedder(run, "last", torch.device("cpu"))
    fused = FrameTable.of(FeatureStore(store).load(f"{A}+{clip}"), 32, torch.device("cpu"))
    frames, frame_mask = fused.gather(torch.arange(12))
    expected = mean_of_frames(frames[..., 5:], frame_mask).numpy()
    np.testing.assert_allclose(embedder.embed_videos(fused), expected, atol=1e-6)


def test_a_run_from_before_there_were_these_options_is_read(task: Task, tmp_path: Path) -> None:
    run = train(*task, tmp_path / "run", dataclasses.replace(QUICK, epochs=1), backbone=A)
    now = evaluate(run).metrics
    description = read_run(run)
    for option in ("convolution", "pooling"):
        del description["config"][option]
    publish_description(run / "config.json", description)
    best = load_checkpoint(run / "best")
    weights = {name: value for name, value in best.model.items() if name != "log_support_temperature"}
    assert len(weights) == len(best.model) - 1
    save_checkpoint(run / "best", dataclasses.replace(best, model=weights))
    assert evaluate(run).metrics == now
    built = index(run, tmp_path / "index")
    request = SearchRequest(text="any", k=80, fold=False)
    assert len(Searcher(built).search_embedding(np.eye(16, dtype=np.float32)[0], request).results) == 80
    # Builds the heads from the manifest, and compares the fingerprint.
    index_embedder(built, read_manifest(built), torch.device("cpu"))


def test_from_videos_to_a_search_by_video(
    run_svb: RunSvb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_backbones: None, decodes: list[int]
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = synthetic.make_text_encoder()
    monkeypatch.setattr("svb.extract.captions.load_text_encoder", lambda name, device: encoder)
    monkeypatch.setattr("svb.retrieve.model.embedder.load_matching_text_encoder", lambda settings, device: encoder)
    (tmp_path / "videos").mkdir()
    rows = ["video_id,caption,split"]
    for number, source in enumerate(("testsrc2", "smptebars", "testsrc", "rgbtestsrc")):
        clips.make_clip(tmp_path / "videos" / f"v{number}.mp4", seconds=number + 1, fps=8, source=source)
        rows.append(f"v{number},a picture of {source},{'train' if number < 2 else 'val'}")
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    name = "toy:frames+toy:clips"
    both = ("--backbone", "toy:frames", "--backbone", "toy:clips", "--fps", "4")
    options = ("--layers", "1", "--convolution", "3", "--pooling", "attention", "--embedding-size", "64")
    small = ("--epochs", "2", "--decoder-size", "16", "--min-word-count", "1")
    for arguments in (
        ("extract", "videos", "-o", "features", *both, "--workers", "1", "--precision", "float32"),
        ("captions", "captions.csv", "-o", "captions.h5", "--text-encoder", synthetic.TEXT_ENCODER),
        ("train", "features", "captions.h5", "-o", "run", "--backbone", name, *options, *small),
        ("evaluate", "run"),
        ("index", "run", "-o", "index", "--moment-seconds", "1"),
    ):
        ran = run_svb(*arguments)
        assert ran.exit_code == 0, ran
    assert decodes == [4]
    # 16 frames in 4 windows of 4: each frame beside the window whose middle is nearest.
    store = FeatureStore(tmp_path / "features")
    frame_rows, clip_rows, fused = (store.load(held, ["v3"]) for held in ("toy:frames", "toy:clips", name))
    assert (len(frame_rows.features), len(clip_rows.features)) == (16, 4)
    np.testing.assert_array_equal(fused.features, np.hstack([frame_rows.features, clip_rows.features.repeat(4, 0)]))
    # A query's features are fused as the store's are.
    embedder = run_embedder(tmp_path / "run", "best", torch.device("cpu"))
    stored = embedder.embed_videos(FrameTable.of(store.load(name), 32, torch.device("cpu")))
    media = TorchMedia(embedder, torch.device("cpu"))
    embedded = embed_video(tmp_path / "videos" / "v3.mp4", None, media)
    np.testing.assert_allclose(embedded, stored[store.video_ids.index("v3")], atol=1e-6)
    model = json.loads(json.dumps(embedder.model))
    model["video"]["backbone_settings"]["parts"]["toy:clips"]["weights_hash"] = "another"
    media = TorchMedia(dataclasses.replace(embedder, model=model), torch.device("cpu"))
    with pytest.raises(MismatchError, match=r"toy:clips has weights .* here, but another when the features were"):
        embed_video(tmp_path / "videos" / "v3.mp4", None, media)
    decodes.clear()
    for number in (0, 3):
        ran = run_svb("search", "--video", f"videos/v{number}.mp4", "--by", "video", "--index", "index", "--json")
        found = json.loads(ran.stdout)["results"]
        assert found[0]["video_id"] == f"v{number}" and found[0]["score"] == pytest.approx(1, abs=2e-3)
        assert found[1]["score"] < found[0]["score"]
    assert decodes == [1, 1]  # one decode of a query, too, for both backbones
    ran = run_svb("search", "a picture", "--index", "index", "--by", "moment", "-k", "20", "--json")
    assert len(json.loads(ran.stdout)["results"]) == 4
    shown = run_svb("info", "run", "--all").stdout
    assert f"video.backbone: {name}\n" in shown and "parts.toy:clips.feature_size: 6\n" in shown
