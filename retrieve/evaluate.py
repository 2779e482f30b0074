"""`svb evaluate`: the metrics of a run, or of a store without any training, on one split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svb.data.publish import published_file
from svb.device import choose_device
from svb.errors import InputError, UsageError
from svb.retrieve.measure.evaluation import Evaluation, Missing, Normalised
from svb.retrieve.measure.normalise import (
    CLIP_LOGIT_SCALE,
    METHODS,
    NEEDS_ALL_QUERIES,
    NEEDS_BANK,
    QB_NORM_SCALE,
    Embeddings,
    normalise,
)
from svb.retrieve.model.embedder import Embedder
from svb.retrieve.model.source import OpenedSource, open_source
from svb.train.metrics import TIE_RULE, V2T_CONVENTIONS, ranks_metrics, t2v_ranks, v2t_ranks
from svb.train.run import split_contents
from svb.train.training_data import SplitData, load_split, positions_of_splits


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
    allow_missing: bool = False,
    ranks: Path | None = None,
    device: str = "auto",
) -> Evaluation:
    """Measure t2v and v2t retrieval of a split.

    Args:
        source: A run, or a feature store for zero-shot.
        store: The feature store, where it is not where the run found it.
        captions: The caption features file; the run's own where not given.
        backbone: Whose features, for a store that holds several.
        split: `train`, `val` or `test`.
        checkpoint: `best` or `last` of a run; best where not given.
        v2t_convention: `set` or `best`; see `svb.train.metrics.V2T_CONVENTIONS`.
        normalise_by: Also measure similarities normalised by these `svb.retrieve.measure.normalise.METHODS`.
        allow_missing: Leave out captions whose videos have no features rather than refuse.
        ranks: Where to write each query's rank (.npz); `ranks.npz` in a run where not given.
        device: `auto`, `cpu`, `cuda:0`, ...

    Returns:
        The metrics and how they came about.

    Raises:
        InputError: The split has no captions, videos are missing, or the model gives something that is no
            number for one, which is named.
        MismatchError: Store or captions were made with other settings than the run's.
        UsageError: A method is unknown, or its query bank would be the queries themselves.
    """
    _check_methods(normalise_by, split)
    torch_device = choose_device(device)
    inputs = open_source(
        Path(source),
        device=torch_device,
        store=store,
        captions=captions,
        backbone=backbone,
        checkpoint=checkpoint,
    )
    embedder, caption_features = inputs.embedder, inputs.captions
    if caption_features is None:
        raise InputError(f"{source} is a feature store - name its caption features with --captions captions.h5")
    positions = positions_of_splits(
        caption_features,
        val_fraction=inputs.config.put_aside,
    )
    if not positions[split]:
        raise InputError(f"the captions have no {split} split - choose another with --split")
    if NEEDS_BANK & {*normalise_by} and not positions["train"]:
        raise InputError(
            "the captions have no train split, which is the query bank of qb-norm - name captions that have one "
            "with --captions, or leave out --normalise qb-norm"
        )
    missing = _missing(inputs, positions[split], split, allow_missing)
    data = _load(inputs, positions[split], torch_device)
    _require_unseen(inputs, split, data, source)
    embeddings = _embed(embedder, data)
    similarity, caption_video = embeddings.similarity(), data.caption_video.cpu().numpy()
    plain = t2v_ranks(similarity, caption_video), v2t_ranks(similarity, caption_video, v2t_convention)
    bank = None
    if NEEDS_BANK & {*normalise_by}:
        bank = _embed(embedder, _load(inputs, positions["train"], torch_device))
    normalised: dict[str, Normalised] = {}
    ranks_by = {"": plain}
    for method in dict.fromkeys(normalise_by):
        scale, scale_source = _scale(method, embedder)
        t2v, v2t = normalise(method, embeddings, bank, scale)
        ranks_by[method] = t2v_ranks(t2v, caption_video), v2t_ranks(v2t, caption_video, v2t_convention)
        normalised[method] = _describe(method, scale, scale_source, bank, ranks_metrics(*ranks_by[method]))
    selected_on = inputs.config.select_on if embedder.model["kind"] == "run" else ""
    ranks = ranks or (Path(source) / "ranks.npz" if embedder.model["kind"] == "run" else None)
    if ranks is not None:
        if ranks.is_dir():
            raise UsageError(
                f"{ranks} is a folder - expected the name of a file for --ranks, such as {ranks}/ranks.npz"
            )
        how = {"split": split, "model": embedder.fingerprint, "tie_rule": TIE_RULE, "selected_on": selected_on}
        _write_ranks(ranks, ranks_by, data, {**how, "v2t_convention": v2t_convention})
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
        metrics=ranks_metrics(*plain),
        normalised=normalised,
    )


def _check_methods(methods: Sequence[str], split: str) -> None:
    for method in methods:
        if method not in METHODS:
            raise UsageError(f"unknown method {method!r} to normalise by - expected {' or '.join(METHODS)}")
        if method in NEEDS_BANK and split == "train":
            raise UsageError(
                f"{method} normalises with the train split, which would be measured with itself - measure another "
                "split, or leave out --normalise"
            )


def _scale(method: str, embedder: Embedder) -> tuple[float, str]:
    """Return a method's inverse temperature and where it comes from."""
    if method == "qb-norm":
        return QB_NORM_SCALE, "as its authors published"
    if "log_logit_scale" in embedder.weights:
        return math.exp(float(embedder.weights["log_logit_scale"])), "the run's own logit_scale"
    return CLIP_LOGIT_SCALE, "CLIP's logit_scale"


def _describe(
    method: str, scale: float, scale_source: str, bank: Embeddings | None, metrics: dict[str, float]
) -> Normalised:
    bank = bank if method in NEEDS_BANK else None
    return Normalised(
        description=METHODS[method],
        needs_all_queries=method in NEEDS_ALL_QUERIES,
        scale=scale,
        scale_source=scale_source,
        bank_split="train" if bank else "",
        bank_captions=len(bank.captions) if bank else 0,
        bank_videos=len(bank.videos) if bank else 0,
        metrics=metrics,
    )


def _missing(inputs: OpenedSource, positions: Sequence[int], split: str, allow_missing: bool) -> Missing:
    """Count the split's captions and videos, and those without features; refuse these unless allowed."""
    assert inputs.captions is not None
    of_split, usable = [inputs.captions.table.video_ids[p] for p in positions], {*inputs.store.video_ids}
    without = [video_id for video_id in of_split if video_id not in usable]
    missing = Missing(len(without), len(of_split), len({*without}), len({*of_split}))
    if without and not allow_missing:
        raise InputError(
            f"{missing.videos} of {missing.of_videos} videos of the {split} split have no features, first "
            f"{min(without)!r} - extract them, or leave out their captions with --allow-missing: the result then "
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


def _embed(embedder: Embedder, data: SplitData) -> Embeddings:
    return Embeddings(
        embedder.embed_captions(data.caption_features),
        data.caption_ids,
        embedder.embed_videos(data.frames),
        data.frames.video_ids,
    )


def _write_ranks(
    path: Path,
    found: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    data: SplitData,
    how: dict[str, str],
) -> None:
    arrays = {
        f"{direction}_{method}" if method else direction: values
        for method, pair in found.items()
        for direction, values in zip(("t2v", "v2t"), pair, strict=True)
    }
    ids = {
        "caption_ids": data.caption_ids,
        "caption_video_ids": [data.frames.video_ids[row] for row in data.caption_video.tolist()],
        "video_ids": data.frames.video_ids,
    }
    held: dict[str, Any] = {**arrays, **ids, **how}
    with published_file(path) as aside, aside.open("wb") as file:
        np.savez(file, **held)


def _require_unseen(inputs: OpenedSource, split: str, data: SplitData, source: Path | str) -> None:
    """Refuse a val split that was carved now and is not the one that training put aside."""
    assert inputs.captions is not None
    if inputs.data is None or split != "val" or "val" in inputs.captions.table.splits:
        return
    put_aside = (inputs.data["val"] or {}).get("ids")
    if split_contents(data)["ids"] != put_aside:
        raise InputError(
            f"these captions name no val split, and what is carved from them is not what {source} put aside: it "
            "was trained on some of it - name the captions it was trained on, or captions with a split"
        )
