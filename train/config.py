"""All options of a training, as they are stored in the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from svb.errors import UsageError

LOSSES = ("info_nce", "max_margin")
VARIANTS = ("none", "identity", "full", "hybrid", "cross")
CAPTION_SAMPLING = ("one", "all")
MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class TrainConfig:
    """Options of heads, losses, support set and loop.

    Attributes:
        embedding_size: D; ignored where backbone and text encoder share a space, whose size it is then.
        layers: Transformer layers over a video's frames; 0 pools the frames directly.
        dropout: In heads and decoder.
        max_frames: A longer video is thinned evenly to this many frames.
        loss: The contrastive loss, `info_nce` or `max_margin`.
        margin: Of `max_margin`.
        logit_scale: Of `info_nce` at the start; learned.
        variant: What a caption is rebuilt from: `cross` the other videos of the batch, `identity` its own,
            `full` both, `hybrid` the mean of identity and full; `none` leaves cross-captioning out.
        cross_captioning_weight: Of the cross-captioning loss beside the contrastive one.
        support_temperature: Of the softmax over the support set.
        decoder_size: Width of the caption decoder.
        decoder_layers: Of the caption decoder.
        min_word_count: Words rarer than this in the training captions are left out of the vocabulary.
        caption_sampling: `one` caption a video an epoch, drawn anew each time, or `all` of them.
        batch_size: B, captions in a batch.
        epochs: Passes over the training videos (or captions, with `all`).
        learning_rate: AdamW's at its peak.
        weight_decay: AdamW's, on matrices alone.
        warmup: Share of all steps in which the learning rate rises; after it a cosine falls to zero.
        evaluate_every: Epochs between evaluations on val.
        val_fraction: Share of videos put aside as val where the caption table has no val split.
        seed: Of everything drawn at random.

    Raises:
        UsageError: A value is out of its range.
    """

    embedding_size: int = 512
    layers: int = 0
    dropout: float = 0.5
    max_frames: int = 32
    loss: str = "info_nce"
    margin: float = 0.2
    logit_scale: float = 20.0
    variant: str = "cross"
    cross_captioning_weight: float = 0.1
    support_temperature: float = 0.1
    decoder_size: int = 256
    decoder_layers: int = 1
    min_word_count: int = 2
    caption_sampling: str = "one"
    batch_size: int = 128
    epochs: int = 30
    learning_rate: float = 2.5e-4
    weight_decay: float = 0.05
    warmup: float = 0.1
    evaluate_every: int = 5
    val_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        _require_choice("loss", self.loss, LOSSES)
        _require_choice("variant", self.variant, VARIANTS)
        _require_choice("caption_sampling", self.caption_sampling, CAPTION_SAMPLING)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{field.name} is {value} - expected a number of at least 0")
            at_least = 0 if field.name in {"layers", "seed"} else 1
            if isinstance(value, int) and value < at_least:
                raise UsageError(f"{field.name} is {value} - expected at least {at_least}")
        if self.batch_size < 2:
            raise UsageError("batch_size is 1 - expected at least 2: a contrastive loss needs negatives")
        for name in ("dropout", "val_fraction", "warmup"):
            if not getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)} - expected less than 1")
        for name in ("support_temperature", "logit_scale", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)} - expected more than 0")
        if self.logit_scale > MAX_LOGIT_SCALE:
            raise UsageError(f"logit_scale is {self.logit_scale} - expected at most {MAX_LOGIT_SCALE:g}")
        if self.seed >= 2**32:
            raise UsageError(f"seed is {self.seed} - expected less than {2**32}")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r} - expected one of {', '.join(choices)}")
