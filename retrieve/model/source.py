"""A run or a feature store, opened with its embedder and captions: where evaluation and indexing start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svb.config import require_same
from svb.data.caption_features import CaptionFeatures, read_caption_features
from svb.data.feature_store import FeatureStore
from svb.errors import InputError, UsageError
from svb.extract.text_encoders import absolute_name, load_text_encoder, tower_of
from svb.retrieve.model.embedder import (
    Embedder,
    load_matching_text_encoder,
    require_zero_shot,
    run_embedder,
    zero_shot_embedder,
)
from svb.train.config import TrainConfig, stored_options
from svb.train.run import read_run

# The default text encoder for the class names of a classifier.
DEFAULT_CLASS_TEXT_ENCODER = "offline:minilm-l6"


@dataclass(frozen=True)
class OpenedSource:
    """A run or a store, with everything that belongs to it.

    Attributes:
        embedder: The run's heads, or the store's zero-shot model.
        store: The features.
        captions: Captions of its videos; None for a store without.
        config: The run's options; the defaults for a store.
        data: The data that the run was trained on; None for a store.
    """

    embedder: Embedder
    store: FeatureStore
    captions: CaptionFeatures | None
    config: TrainConfig
    data: dict[str, Any] | None


def open_source(
    source: Path,
    *,
    device: torch.device,
    store: Path | str | None = None,
    captions: Path | str | None = None,
    backbone: str | None = None,
    text_encoder: str | None = None,
    checkpoint: str | None = None,
    made_before: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]] = lambda model: {},
) -> OpenedSource:
    """Open a run with its store and captions, or a store for zero-shot.

    Args:
        source: A run's or a store's path.
        device: The device that the embedder uses.
        store: A run's feature store, if it has moved.
        captions: A caption features file; the run's own by default.
        backbone: Backbone whose features are used, if a store holds several.
        text_encoder: Text encoder of a store; by default that of the captions, of CLIP itself, or the embedded one.
        checkpoint: `best` or `last` of a run; best by default.
        made_before: See `zero_shot_embedder`.

    Raises:
        InputError: Something is missing.
        MismatchError: Store or captions were made with other settings than the run's.
    """
    if (source / "config.json").is_file():
        if backbone is not None or text_encoder is not None:
            raise UsageError(
                f"{source} is a run, which has its own backbone and text encoder - leave the option out"
            )
        return _open_run(source, device, store, captions, checkpoint or "best")
    if not (source / "store.json").is_file() and not source.is_file():
        raise InputError(
            f"{source} is neither a run (config.json) nor a feature store (store.json) - make one with `svb train` "
            "or `svb extract`"
        )
    if checkpoint is not None:
        raise UsageError(f"{source} is a feature store, which has no checkpoints - leave out --checkpoint")
    if store is not None:
        raise UsageError(f"{source} is a feature store itself - leave out --store {store}")
    feature_store = FeatureStore(source)
    backbone = feature_store.only_backbone(backbone)
    require_zero_shot(feature_store.video_settings(backbone))
    caption_features = None
    if captions is not None:
        caption_features = read_caption_features(Path(captions), feature_store.records)
    if caption_features is not None and text_encoder not in (None, caption_features.text_encoder):
        raise UsageError(f"{captions} was encoded with {caption_features.text_encoder} - leave out --text-encoder")
    if caption_features is not None:
        encoder = load_matching_text_encoder(caption_features.settings["text_encoder"], device)
    else:
        named = text_encoder or tower_of(backbone) or DEFAULT_CLASS_TEXT_ENCODER
        encoder = load_text_encoder(absolute_name(named), device)
    embedder = zero_shot_embedder(feature_store.video_settings(backbone), encoder, device, made_before)
    return OpenedSource(embedder, feature_store, caption_features, TrainConfig(), None)


def _open_run(
    run: Path, device: torch.device, store: Path | str | None, captions: Path | str | None, checkpoint: str
) -> OpenedSource:
    description = read_run(run)
    embedder = run_embedder(run, checkpoint, device)
    feature_store = FeatureStore(Path(store or description["paths"]["store"]))
    caption_features = read_caption_features(
        Path(captions or description["paths"]["captions"]), feature_store.records
    )
    require_same(
        feature_store.video_settings(feature_store.only_backbone(embedder.backbone)),
        embedder.model["video"],
        what=f"the feature store {feature_store.path}",
        do_next=f"Name the store that {run} was trained on with --store, or extract with its settings.",
    )
    require_same(
        caption_features.settings["text_encoder"],
        embedder.model["text"]["text_encoder"],
        what="the caption features file",
        do_next=f"Name captions encoded as those that {run} was trained on with --captions.",
    )
    return OpenedSource(
        embedder,
        feature_store,
        caption_features,
        TrainConfig(**stored_options(description["config"])),
        description["data"],
    )
