"""`svb evaluate`: the metrics of a run, or of a store without any training, on one split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from svb.data.publish import published_file
from svb.device import choose_device
from svb.errors import InputError
from svb.retrieve.inputs import Inputs, open_inputs
from svb.train.metrics import TIE_RULE, V2T_CONVENTIONS, summarise, t2v_ranks, v2t_ranks
from svb.train.run import split_contents
from svb.train.training_data import SplitData, load_split, positions_of_splits


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, with all that a reader must know to repeat it.

    Attributes:
        source: The run or store.
        model: `run` or the kind of zero-shot model.
        checkpoint: `best` or `last`; empty for a store.
        epoch: Of the checkpoint; 0 for a store.
        split: Which captions were queries.
        num_captions: Queries of t2v.
        num_videos: Candidates of t2v.
        num_missing: Captions of the split whose videos have no features and were left out.
        tie_rule: How equal similarities count.
        v2t_convention: How a video with several captions counts in v2t.
        selected_on_split: The checkpoint was chosen by this very split, so its numbers flatter it.
        metrics: `t2v/R@1` and so on, in percent where they are recalls.
    """

    source: str
    model: str
    checkpoint: str
    epoch: int
    split: str
    num_captions: int
    num_videos: int
    num_missing: int
    tie_rule: str
    v2t_convention: str
    selected_on_split: bool
    metrics: dict[str, float]

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def evaluate(
    source: Path | str,
    *,
    store: Path | str | None = None,
    captions: Path | str | None = None,
    backbone: str | None = None,
    split: str = "val",
    checkpoint: str | None = None,
    v2t_convention: str = "set",
    allow_missing: bool = False,
    ranks: Path | None = None,
    device: str = "auto",
    on_message: Callable[[str], None] = lambda message: None,
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
        allow_missing: Leave out captions whose videos have no features rather than refuse.
        ranks: Where to write each query's rank (.npz); `ranks.npz` in a run where not given.
        device: `auto`, `cpu`, `cuda:0`, ...
        on_message: Called with a line that the user should see.

    Returns:
        The metrics and how they came about.

    Raises:
        InputError: The split has no captions, or videos are missing.
        MismatchError: Store or captions were made with other settings than the run's.
    """
    torch_device = choose_device(device)
    inputs = open_inputs(
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
        val_fraction=inputs.config.val_fraction,
        seed=inputs.config.seed,
        on_message=on_message,
    )[split]
    if not positions:
        raise InputError(f"the captions have no {split} split - choose another with --split")
    usable = set(inputs.store.video_ids)
    missing = [p for p in positions if caption_features.table.video_ids[p] not in usable]
    if missing and not allow_missing:
        videos = sorted({caption_features.table.video_ids[p] for p in missing})
        raise InputError(
            f"{len(videos)} videos of the {split} split have no features, first {videos[0]!r} - extract them, or "
            "leave out their captions with --allow-missing: the result then says how many"
        )
    data = load_split(
        inputs.store,
        embedder.backbone,
        caption_features,
        positions,
        max_frames=embedder.max_frames,
        device=torch_device,
    )
    _require_unseen(inputs, split, data, source)
    similarity = embedder.embed_captions(data.caption_features) @ embedder.embed_videos(data.frames).T
    caption_video = data.caption_video.cpu().numpy()
    t2v, v2t = t2v_ranks(similarity, caption_video), v2t_ranks(similarity, caption_video, v2t_convention)
    ranks = ranks or (Path(source) / "ranks.npz" if embedder.model["kind"] == "run" else None)
    if ranks is not None:
        with published_file(ranks) as aside, aside.open("wb") as file:
            np.savez(
                file,
                t2v=t2v,
                v2t=v2t,
                caption_ids=data.caption_ids,
                caption_video_ids=[data.frames.video_ids[row] for row in caption_video],
                video_ids=data.frames.video_ids,
                split=split,
                model=embedder.fingerprint,
                tie_rule=TIE_RULE,
                v2t_convention=v2t_convention,
            )
    return Evaluation(
        source=str(source),
        model=embedder.model["kind"],
        checkpoint=embedder.model.get("checkpoint", ""),
        epoch=embedder.model.get("epoch", 0),
        split=split,
        num_captions=len(data.captions),
        num_videos=data.num_videos,
        num_missing=len(missing),
        tie_rule=TIE_RULE,
        v2t_convention=f"{v2t_convention}: {V2T_CONVENTIONS[v2t_convention]}",
        selected_on_split=embedder.model.get("checkpoint") == "best" and split == "val",
        metrics={
            f"{direction}/{name}": value
            for direction, values in (("t2v", t2v), ("v2t", v2t))
            for name, value in summarise(values).items()
        },
    )


def _require_unseen(inputs: Inputs, split: str, data: SplitData, source: Path | str) -> None:
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
