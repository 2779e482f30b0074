"""`svb evaluate`: the metrics of a run, or of a store without any training, on one split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svb.device import choose_device
from svb.errors import InputError, MismatchError, UsageError
from svb.retrieve.measure.given_similarities import read_similarities
from svb.retrieve.measure.hub_normalisation import (
    NEEDS_BANK,
    Embeddings,
    Normalised,
    check_methods,
    measure_normalised,
)
from svb.retrieve.measure.query_ranks import RANKS_FILE, Graded, graded_measures, write_ranks
from svb.retrieve.model.embedder import Embedder
from svb.retrieve.model.source import OpenedSource, open_source
from svb.train.config import stored_options
from svb.train.retrieval_metrics import (
    TIE_RULE,
    V2T_CONVENTIONS,
    RanksOfBoth,
    embedding_ranks,
    ranks_metrics,
    t2v_ranks,
    v2t_ranks,
)
from svb.train.run import read_run, split_summary
from svb.train.training_data import SplitData, load_split, positions_of_splits

logger = logging.getLogger(__name__)

# The CPU ranks a larger matrix of similarities (2 GB) in chunks, and a GPU every matrix.
MAX_SIMILARITIES = 2**29


@dataclass(frozen=True)
class Missing:
    """How much of a split was left out because videos have no features."""

    captions: int
    of_captions: int
    videos: int
    of_videos: int


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`, with everything that a reader needs to repeat it.

    Attributes:
        source: The run or store.
        model: `run`, or the kind of zero-shot model.
        model_fingerprint: Fingerprint of everything that shapes an embedding, including the weights.
        checkpoint: `best` or `last`; empty for a store.
        epoch: Epoch of the checkpoint; 0 for a store.
        split: The split that was measured.
        num_captions: Number of queries of t2v.
        num_videos: Number of candidates of t2v.
        missing: What was left out of the split.
        tie_rule: How equal similarities count.
        v2t_convention: How a video with several captions counts in v2t.
        selected_on_split: This very split chose the checkpoint, so its numbers are too good.
        selected_on: The split that chose the run's best checkpoint; empty for a store.
        metrics: Metrics of the plain similarities, such as `t2v/R@1`; recalls are in percent.
        normalised: The same for each requested method of `svb.retrieve.measure.hub_normalisation`.
        graded: Graded measures of the plain similarities for each requested relevance.
    """

    source: str
    model: str
    model_fingerprint: str
    checkpoint: str
    epoch: int
    split: str
    num_captions: int
    num_videos: int
    missing: Missing
    tie_rule: str
    v2t_convention: str
    selected_on_split: bool
    selected_on: str
    metrics: dict[str, float]
    normalised: dict[str, Normalised]
    graded: dict[str, Graded] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        held = asdict(self)
        if not self.graded:
            del held["graded"]
        return held


def evaluate(
    source: Path | str,
    *,
    store: Path | str | None = None,
    captions: Path | str | None = None,
    backbone: str | None = None,
    split: str = "val",
    checkpoint: str | None = None,
    v2t_convention: str = "set",
    normalise_by: Sequence[str] = (),
    relevance: Sequence[str] = (),
    allow_missing: bool = False,
    ranks: Path | None = None,
    device: str = "auto",
) -> Evaluation:
    """Measure t2v and v2t retrieval on a split.

    Args:
        source: A run, or a feature store to measure zero-shot.
        store: The run's feature store, if it was moved.
        captions: The caption features file; by default the run's own.
        backbone: The backbone to measure, if a store holds several.
        split: `train`, `val` or `test`.
        checkpoint: `best` or `last` of a run, by default best.
        v2t_convention: `set` or `best`; see `svb.train.retrieval_metrics.V2T_CONVENTIONS`.
        normalise_by: Methods of `svb.retrieve.measure.hub_normalisation.METHODS` to measure too.
        relevance: Relevances of `svb.data.relevance.make_relevance` for graded measures: `words`, `verbs-nouns`,
            `synsets`, `group`, or a file of judgements.
        allow_missing: Leave out captions whose videos have no features instead of refusing them.
        ranks: File for each query's rank (.npz); by default `ranks.npz` in a run, and none for a store.
        device: `auto`, `cpu`, `cuda:0`, ...

    Raises:
        InputError: The split has no captions, videos are missing, or an embedding is not finite; the error names
            the first such video.
        MismatchError: Store or captions were made with other settings than the run's.
        UsageError: A method is unknown, or its query bank would be the queries themselves.
    """
    check_methods(normalise_by, split)
    torch_device = choose_device(device)
    inputs = open_source(
        Path(source),
        device=torch_device,
        store=store,
        captions=captions,
        backbone=backbone,
        checkpoint=checkpoint,
    )
    embedder, is_run = inputs.embedder, inputs.embedder.model["kind"] == "run"
    if inputs.captions is None:
        raise InputError(f"{source} is a feature store - name its caption features with --captions captions.h5")
    ranks = _ranks_file(ranks or (Path(source) / RANKS_FILE if is_run else None))
    positions = positions_of_splits(inputs.captions, val_fraction=inputs.config.put_aside)
    if not positions[split]:
        raise InputError(f"the captions have no {split} split - choose another with --split")
    missing = _missing(inputs, positions[split], split, allow_missing)
    data = _load(inputs, positions[split], torch_device)
    _require_unseen(inputs, split, data, source)
    embeddings = _embed(embedder, data)
    caption_video = data.video_of
    video_ids = data.frames.video_ids
    ranks_by = {"": _plain_ranks(embeddings, caption_video, v2t_convention, torch_device)}
    bank = _bank(inputs, positions["train"], torch_device) if NEEDS_BANK & {*normalise_by} else None
    normalised: dict[str, Normalised] = {}
    for method in dict.fromkeys(normalise_by):
        ranks_by[method], normalised[method] = measure_normalised(
            method, embeddings, bank, embedder.weights, caption_video, v2t_convention
        )
    graded: dict[str, Graded] = {}
    graded_by_query: dict[str, Any] = {}
    if relevance:
        texts = data.captions, data.caption_ids, video_ids
        graded, graded_by_query = graded_measures(
            relevance, embeddings.similarity(), inputs.captions.table, texts, caption_video
        )
    selected_on = inputs.config.select_on if is_run else ""
    if ranks is not None:
        ids = data.caption_ids, [video_ids[row] for row in caption_video.tolist()], video_ids
        how = {"split": split, "model": embedder.fingerprint, "tie_rule": TIE_RULE, "selected_on": selected_on}
        write_ranks(ranks, ranks_by, ids, {**how, "v2t_convention": v2t_convention, **graded_by_query})
    return Evaluation(
        source=str(source),
        model=embedder.model["kind"],
        model_fingerprint=embedder.fingerprint,
        checkpoint=embedder.model.get("checkpoint", ""),
        epoch=embedder.model.get("epoch", 0),
        split=split,
        num_captions=len(data.captions),
        num_videos=data.num_videos,
        missing=missing,
        tie_rule=TIE_RULE,
        v2t_convention=f"{v2t_convention}: {V2T_CONVENTIONS[v2t_convention]}",
        selected_on_split=embedder.model.get("checkpoint") == "best" and split == selected_on,
        selected_on=selected_on,
        metrics=ranks_metrics(*ranks_by[""]),
        normalised=normalised,
        graded=graded,
    )


def evaluate_similarities(
    path: Path | str,
    captions: Path | str,
    *,
    split: str = "val",
    videos: Path | str | None = None,
    v2t_convention: str = "set",
    relevance: Sequence[str] = (),
    ranks: Path | None = None,
) -> Evaluation:
    """Measure anybody's similarities as `evaluate` measures a run's, so that different systems can be compared.

    Args:
        path: A `(C, V)` matrix of a split's captions and videos (.npy). The rows are the split's captions in the
            order of the table.
        captions: A caption table or a caption features file. The split is ignored if the table names none.
        split: `train`, `val` or `test`.
        videos: A text file with the video_id of each column, one a line; by default the columns are the split's
            videos in the order in which the table first names them.
        v2t_convention: See `evaluate`.
        relevance: See `evaluate`.
        ranks: File for each query's rank and values (.npz), for `svb compare`.

    Raises:
        InputError: The matrix has another shape or a value that is not finite, the split is empty, or the columns
            are not the split's videos; or a relevance cannot be used, as in `evaluate`.
    """
    given = read_similarities(Path(path), Path(captions), split, Path(videos) if videos is not None else None)
    similarity, caption_video = given.similarity, given.caption_video
    ranks_of_both = t2v_ranks(similarity, caption_video), v2t_ranks(similarity, caption_video, v2t_convention)
    graded, graded_by_query = graded_measures(
        relevance, similarity, given.table, (given.captions, given.caption_ids, given.video_ids), caption_video
    )
    if ranks is not None:
        ids = given.caption_ids, [given.video_ids[column] for column in caption_video.tolist()], given.video_ids
        how = {"split": given.split, "model": given.content_hash, "tie_rule": TIE_RULE, "selected_on": ""}
        write_ranks(ranks, {"": ranks_of_both}, ids, {**how, "v2t_convention": v2t_convention, **graded_by_query})
    return Evaluation(
        source=str(path),
        model="similarities",
        model_fingerprint=given.content_hash,
        checkpoint="",
        epoch=0,
        split=given.split,
        num_captions=len(given.captions),
        num_videos=len(given.video_ids),
        missing=Missing(0, len(given.captions), 0, len(given.video_ids)),
        tie_rule=TIE_RULE,
        v2t_convention=f"{v2t_convention}: {V2T_CONVENTIONS[v2t_convention]}",
        selected_on_split=False,
        selected_on="",
        metrics=ranks_metrics(*ranks_of_both),
        normalised={},
        graded=graded,
    )


def _ranks_file(ranks: Path | None) -> Path | None:
    if ranks is not None and ranks.is_dir():
        raise UsageError(f"{ranks} is a folder - expected a file name for --ranks, such as {ranks / RANKS_FILE}")
    return ranks


def _plain_ranks(
    embeddings: Embeddings, caption_video: NDArray[np.int64], v2t_convention: str, device: torch.device
) -> RanksOfBoth:
    """Return the ranks of t2v and v2t; the errors are those of `Embeddings.similarity`."""
    captions, videos = embeddings.captions, embeddings.videos
    is_small = device.type == "cpu" and len(captions) * len(videos) <= MAX_SIMILARITIES
    if is_small or not (np.isfinite(captions).all() and np.isfinite(videos).all()):
        similarity = embeddings.similarity()
        return t2v_ranks(similarity, caption_video), v2t_ranks(similarity, caption_video, v2t_convention)
    captions_there, videos_there = torch.from_numpy(captions).to(device), torch.from_numpy(videos).to(device)
    return embedding_ranks(captions_there, videos_there, caption_video, v2t_convention)


def require_only_selection_differs(run: Path, on_test: Path, split: str) -> None:
    """Refuse two runs that are not one training with its best checkpoint chosen on val and on test.

    Where the captions name no val split, the second is also trained on the videos that the first puts aside; the
    log says so.

    Args:
        run: Chosen on val.
        on_test: Chosen on test.
        split: The split to measure.

    Raises:
        UsageError: The split is not test, or a run was chosen on the other split.
        MismatchError: The runs differ in more than that; the error names the option.
    """
    if split != "test":
        raise UsageError(f"a checkpoint chosen on test is too good on test, not on {split} - measure --split test")
    val, test = read_run(run), read_run(on_test)
    for path, held, wanted in ((run, val, "val"), (on_test, test, "test")):
        if held["config"].get("select_on", "val") != wanted:
            raise UsageError(
                f"{path} was not trained with --select-on {wanted} - name the run chosen on val first, and with "
                "--beside the one chosen on test"
            )
    of_val, of_test = (
        {**stored_options(held["config"]), **held["video"], **held["text"], "select_on": ""} for held in (val, test)
    )
    name = next((name for name in (*of_val, *of_test) if of_val.get(name) != of_test.get(name)), None)
    if name is not None:
        raise MismatchError(
            f"{run} and {on_test} differ in more than --select-on ({name}: {of_val.get(name)!r} and "
            f"{of_test.get(name)!r}) - train both with the same options"
        )
    if val["data"]["train"] != test["data"]["train"]:
        counts = [held["data"]["train"]["videos"] for held in (val, test)]
        logger.warning(
            f"{on_test} was trained on {counts[1]} videos, {run} on {counts[0]}: the captions name no val split, "
            "so val was put aside - part of the difference comes from that"
        )


def _missing(inputs: OpenedSource, positions: Sequence[int], split: str, allow_missing: bool) -> Missing:
    """Count captions and videos of the split without features; refuse them unless allowed."""
    assert inputs.captions is not None
    of_split, usable = [inputs.captions.table.video_ids[p] for p in positions], {*inputs.store.video_ids}
    without = [video_id for video_id in of_split if video_id not in usable]
    missing = Missing(len(without), len(of_split), len({*without}), len({*of_split}))
    if without and not allow_missing:
        raise InputError(
            f"{missing.videos} of {missing.of_videos} videos of the {split} split have no features, first "
            f"{min(without)!r} - extract them, or leave out their captions with --allow-missing; the result then "
            "says how many"
        )
    return missing


def _load(inputs: OpenedSource, positions: Sequence[int], device: torch.device) -> SplitData:
    assert inputs.captions is not None
    embedder = inputs.embedder
    return load_split(
        inputs.store,
        embedder.backbone,
        inputs.captions,
        positions,
        max_frames=embedder.max_frames,
        device=device,
    )


def _bank(inputs: OpenedSource, positions: Sequence[int], device: torch.device) -> Embeddings:
    if not positions:
        raise InputError(
            "the captions have no train split, which is the query bank of qb-norm - name captions that have one "
            "with --captions, or leave out --normalise qb-norm"
        )
    return _embed(inputs.embedder, _load(inputs, positions, device))


def _embed(embedder: Embedder, data: SplitData) -> Embeddings:
    return Embeddings(
        embedder.embed_captions(data.caption_features),
        data.caption_ids,
        embedder.embed_videos(data.frames),
        data.frames.video_ids,
    )


def _require_unseen(inputs: OpenedSource, split: str, data: SplitData, source: Path | str) -> None:
    """Refuse a val split that is held out now and is not the one that training held out."""
    assert inputs.captions is not None
    if inputs.data is None or split != "val" or "val" in inputs.captions.table.splits:
        return
    put_aside = (inputs.data["val"] or {}).get("ids")
    if split_summary(data)["ids"] != put_aside:
        raise InputError(
            f"these captions name no val split, and the videos to hold out are not those that {source} held out: "
            "it was trained on some of them - name the captions it was trained on, or captions with a split"
        )
