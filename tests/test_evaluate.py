from __future__ import annotations

import json
import shutil
from pathlib import Path

import naive
import numpy as np
import pytest
import synthetic
import torch
from conftest import RunSvb
from messages import heard
from runs import without_features

from svb.data.caption_features import read_caption_features
from svb.data.feature_store import FeatureStore
from svb.errors import InputError, MismatchError, StoreError, UsageError
from svb.retrieve.evaluate import Missing, evaluate
from svb.retrieve.model.embedder import run_embedder
from svb.train.config import TrainConfig
from svb.train.model import split_metrics
from svb.train.retrieval_metrics import V2T_CONVENTIONS
from svb.train.run import build_model, read_run, train
from svb.train.training_data import SplitData, load_split

SIZES = {"embedding_size": 16, "decoder_size": 16, "decoder_layers": 1, "batch_size": 16}
CONFIG = TrainConfig(**SIZES, epochs=6, evaluate_every=6, learning_rate=2e-3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train(*synthetic.make_task(folder), folder / "run", CONFIG)


def split_data(run_folder: Path, split: str) -> SplitData:
    captions = read_caption_features(run_folder.parent / "captions.h5")
    positions = [row for row, name in enumerate(captions.table.splits) if name == split]
    store = FeatureStore(run_folder.parent / "features")
    return load_split(store, synthetic.BACKBONE, captions, positions, max_frames=32, device=CPU)


@pytest.mark.parametrize("max_similarities", [10**9, 0])
@pytest.mark.parametrize("convention", ["set", "best"])
def test_metrics_and_ranks_are_those_of_slow_sorting(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convention: str, max_similarities: int
) -> None:
    """Whether all similarities are computed at once, or in chunks as on a GPU."""
    monkeypatch.setattr("svb.retrieve.evaluate.MAX_SIMILARITIES", max_similarities)
    evaluation = evaluate(trained, v2t_convention=convention, ranks=tmp_path / "ranks.v1.npz")
    data, embedder = split_data(trained, "val"), run_embedder(trained, "best", CPU)
    similarity = (embedder.embed_captions(data.caption_features) @ embedder.embed_videos(data.frames).T).tolist()
    owners = data.caption_video.tolist()
    v2t = {"set": naive.v2t_ranks_set, "best": naive.v2t_ranks_best}[convention](similarity, owners)
    expected = {"t2v": naive.t2v_ranks(similarity, owners), "v2t": v2t}
    with np.load(tmp_path / "ranks.v1.npz") as stored:
        for direction, ranks in expected.items():
            np.testing.assert_array_equal(stored[direction], ranks)
            assert evaluation.metrics[f"{direction}/MeanR"] == pytest.approx(sum(ranks) / len(ranks))
            recall = 100 * sum(rank <= 5 for rank in ranks) / len(ranks)
            assert evaluation.metrics[f"{direction}/R@5"] == pytest.approx(recall)
        assert len(stored["caption_ids"]) == len(stored["t2v"]) == 40
        assert stored["video_ids"].tolist() == [f"clip{video:03}" for video in range(60, 80)]
        assert stored["caption_video_ids"].tolist() == [f"clip{video:03}" for video in range(60, 80) for _ in "ab"]
        assert (stored["split"], stored["v2t_convention"]) == ("val", convention)
        assert stored["model"] == embedder.fingerprint
    assert evaluation.v2t_convention == f"{convention}: {V2T_CONVENTIONS[convention]}"


def files_of(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "ranks.npz"}


def test_a_run_says_what_was_measured_and_stays_as_it_is(trained: Path) -> None:
    before, evaluation = files_of(trained), evaluate(trained)
    assert (evaluation.model, evaluation.checkpoint, evaluation.epoch) == ("run", "best", 6)
    assert (evaluation.num_captions, evaluation.num_videos) == (40, 20)
    assert evaluation.missing == Missing(captions=0, of_captions=40, videos=0, of_videos=20)
    last_line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {name.removeprefix("val/"): value for name, value in last_line.items() if name.startswith("val/")}
    assert evaluation.metrics == pytest.approx(expected)
    assert (trained / "ranks.npz").is_file()
    assert evaluation.selected_on_split
    assert not evaluate(trained, split="train").selected_on_split
    assert not evaluate(trained, checkpoint="last").selected_on_split
    assert files_of(trained) == before


def test_the_command_names_the_conventions_and_json_holds_all(trained: Path, run_svb: RunSvb) -> None:
    for convention, meaning in V2T_CONVENTIONS.items():
        shown = run_svb("evaluate", trained, "--v2t", convention).stdout
        assert f"ties averaged; v2t by {convention}: {meaning}" in shown
        assert "val: 40 captions against 20 videos\n" in shown and "this split chose the checkpoint" in shown
        names = next(line for line in shown.splitlines() if "MedR" in line).split()
        assert names == ["R@1", "R@5", "R@10", "R@50", "MedR", "MeanR"]
    held = json.loads(run_svb("evaluate", trained, "--json").stdout)
    assert held == evaluate(trained).as_json()
    assert set(held) == {
        *("source", "model", "model_fingerprint", "checkpoint", "epoch", "split", "num_captions", "num_videos"),
        *("missing", "tie_rule", "v2t_convention", "selected_on_split", "selected_on", "metrics", "normalised"),
    }
    assert set(held["metrics"]) == {f"{way}/{name}" for way in ("t2v", "v2t") for name in names}


def test_missing_videos_are_refused_or_counted(trained: Path, tmp_path: Path, run_svb: RunSvb) -> None:
    store = without_features(trained.parent / "features", tmp_path / "features", "clip060", "clip070")
    ran = run_svb("evaluate", trained, "--store", store)
    assert ran.exit_code == 1 and "2 of 20 videos of the val split have no features, first 'clip060'" in ran.stderr
    assert "--allow-missing" in ran.stderr
    evaluation = evaluate(trained, store=store, allow_missing=True)
    assert (evaluation.num_captions, evaluation.num_videos) == (36, 18)
    assert evaluation.missing == Missing(captions=4, of_captions=40, videos=2, of_videos=20)
    command = ("evaluate", trained, "--store", store, "--allow-missing")
    printed = run_svb(*command).stdout
    assert "val: 36 captions against 18 videos\n" in printed
    assert "left out: 4 of 40 captions and 2 of 20 videos have no features, so this is not the whole" in printed
    held = json.loads(run_svb(*command, "--json").stdout)["missing"]
    assert held == {"captions": 4, "of_captions": 40, "videos": 2, "of_videos": 20}
    none = without_features(store, tmp_path / "none", *(f"clip{video:03}" for video in range(60, 80)))
    with pytest.raises(InputError, match="20 of 20 videos of the val split have no features"):
        evaluate(trained, store=none)
    with pytest.raises(InputError, match="no caption belongs to a video in"):
        evaluate(trained, store=none, allow_missing=True)


def test_a_model_that_gives_no_number_for_a_video_is_refused_naming_it(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_damaged(*positional: object, **named: object) -> SplitData:
        data = load_split(*positional, **named)
        row = data.frames.video_ids.index("clip063")
        data.frames.features[data.frames.begins[row]] = torch.nan
        return data

    monkeypatch.setattr("svb.retrieve.evaluate.load_split", load_damaged)
    (trained / "ranks.npz").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"'clip063' and caption '120' is nan, .* 1 of 20 videos .* 40 of 40"):
        evaluate(trained)
    assert not (trained / "ranks.npz").exists()
    data, model = split_data(trained, "val"), build_model(read_run(trained))  # and so in training
    data.frames.features[data.frames.begins[7]] = torch.inf
    with pytest.raises(InputError, match=r"video 'clip067' and caption '120' is nan"):
        split_metrics(model, data)


def test_normalised_metrics_stand_beside_the_plain_ones(trained: Path, tmp_path: Path) -> None:
    plain = evaluate(trained, ranks=tmp_path / "plain.npz")
    evaluation = evaluate(trained, normalise_by=["qb-norm", "dual-softmax"], ranks=tmp_path / "all.npz")
    assert evaluation.metrics == plain.metrics
    assert not plain.normalised
    qb_norm, dual = evaluation.normalised["qb-norm"], evaluation.normalised["dual-softmax"]
    assert (qb_norm.scale, qb_norm.scale_source) == (20.0, "as its authors published")
    assert (qb_norm.bank_split, qb_norm.bank_captions, qb_norm.bank_videos) == ("train", 120, 60)
    assert (dual.bank_split, dual.bank_captions, dual.bank_videos) == ("", 0, 0)
    assert dual.needs_all_queries and not qb_norm.needs_all_queries
    last_line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert (dual.scale, dual.scale_source) == (pytest.approx(last_line["logit_scale"]), "the run's own logit_scale")
    embedder = run_embedder(trained, "best", CPU)
    train_split, val = (split_data(trained, split) for split in ("train", "val"))
    videos = embedder.embed_videos(val.frames)
    queries, bank = (embedder.embed_captions(each.caption_features) @ videos.T for each in (val, train_split))
    expected = {
        "t2v_qb-norm": naive.qb_norm(queries.tolist(), bank.tolist(), 20.0),
        "t2v_dual-softmax": naive.dual_softmax(queries.tolist(), dual.scale),
    }
    with np.load(tmp_path / "all.npz") as stored, np.load(tmp_path / "plain.npz") as plain_stored:
        for key in plain_stored.files:
            np.testing.assert_array_equal(stored[key], plain_stored[key])
        assert {*stored.files} - {*plain_stored.files} == {*expected, "v2t_qb-norm", "v2t_dual-softmax"}
        for key, scores in expected.items():
            ranks = naive.t2v_ranks(scores, val.caption_video.tolist())
            np.testing.assert_array_equal(stored[key], ranks)
            metrics = evaluation.normalised[key.removeprefix("t2v_")].metrics
            assert metrics["t2v/MeanR"] == pytest.approx(sum(ranks) / len(ranks))


def test_the_command_prints_normalised_rows_after_the_plain_ones(trained: Path, run_svb: RunSvb) -> None:
    command = ("evaluate", trained, "--normalise", "dual-softmax", "--normalise", "qb-norm")
    printed = run_svb(*command).stdout
    rows = [line.split()[:-6] for line in printed.splitlines() if line.startswith(("t2v", "v2t"))]
    assert rows == [["t2v"], ["v2t"], *([way, method] for method in command[3::2] for way in ("t2v", "v2t"))]
    assert "qb-norm: QB-Norm, dynamic inverted softmax (Bogolin et al. 2022); bank: 120 captions and 60 " in printed
    assert "; needs all queries of the split at once, which a search never has; scale " in printed
    held = json.loads(run_svb(*command, "--json").stdout)
    assert list(held["normalised"]) == ["dual-softmax", "qb-norm"]
    assert held["normalised"]["dual-softmax"]["needs_all_queries"] is True


def test_a_bank_must_be_another_split_and_there(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot measure train itself - measure another split"):
        evaluate(trained, split="train", normalise_by=["qb-norm"])
    assert evaluate(trained, split="train", normalise_by=["dual-softmax"]).normalised["dual-softmax"].metrics
    with pytest.raises(UsageError, match="'qbnorm' to normalise by - expected qb-norm or dual-softmax"):
        evaluate(trained, normalise_by=["qbnorm"])
    rows = [("clip060", "a dog", "val"), ("clip061", "a cat", "val")]
    captions = synthetic.make_captions(tmp_path / "captions.h5", rows, np.ones((2, 20)))
    with pytest.raises(InputError, match="no train split, which is the query bank of qb-norm"):
        evaluate(trained, captions=captions, normalise_by=["qb-norm"])


def test_a_carved_val_split_is_the_one_training_put_aside(tmp_path: Path) -> None:
    store, captions = synthetic.make_task(tmp_path, num_train=30, num_val=0, has_split=False)
    folder = train(store, captions, tmp_path / "run", CONFIG)
    messages = heard()
    evaluation = evaluate(folder)
    assert evaluation.num_videos == 3
    assert messages == ["the captions have no val split: holding out 3 of 30 training videos as val"]
    last_line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluation.metrics["t2v/MeanR"] == pytest.approx(last_line["val/t2v/MeanR"])
    with pytest.raises(InputError, match="the captions have no test split"):
        evaluate(folder, split="test")


def test_other_features_are_refused(trained: Path, tmp_path: Path) -> None:
    videos = {f"clip{video:03}": np.ones((2, 24)) for video in range(80)}
    store = synthetic.make_store(tmp_path / "features", videos, seconds_between_frames=0.5)
    with pytest.raises(MismatchError, match=r"sampling\.fps: stored 2\.0, wanted 1\.0.*--store"):
        evaluate(trained, store=store)
    rows, given = [("clip060", "a dog", "val")], {"text_encoder": "synthetic:other"}
    captions = synthetic.make_captions(tmp_path / "captions.h5", rows, np.ones((1, 20)), **given)
    with pytest.raises(MismatchError, match=r"name: stored 'synthetic:other', wanted 'synthetic:words'.*--capt"):
        evaluate(trained, captions=captions)


def test_a_store_needs_captions_and_a_known_kind_of_backbone(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = synthetic.make_text_encoder()
    monkeypatch.setattr("svb.retrieve.model.source.load_matching_text_encoder", lambda settings, device: encoder)
    monkeypatch.setattr("svb.retrieve.model.source.load_text_encoder", lambda name, device: encoder)
    monkeypatch.setattr("svb.retrieve.model.embedder.load_classifier", lambda name: None)
    with pytest.raises(InputError, match="cannot be searched without training"):
        evaluate(trained.parent / "features", captions=trained.parent / "captions.h5")
    with pytest.raises(InputError, match=r"neither a run .* nor a feature store"):
        evaluate(trained.parent)


def test_a_damaged_run_is_refused(trained: Path, tmp_path: Path, run_svb: RunSvb) -> None:
    for name in ("model.safetensors", "checkpoint.json"):
        folder = Path(shutil.copytree(trained, tmp_path / name))
        path = folder / "best" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"not what was written|not a whole checkpoint|damaged"):
            evaluate(folder)
        assert run_svb("evaluate", folder).exit_code == run_svb("verify", folder).exit_code == 1
