"""All options of a training, as they are stored in the run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from svb.config import option
from svb.errors import UsageError

LOSSES = ("info_nce", "max_margin")
VARIANTS = ("none", "identity", "full", "hybrid", "cross")
NEGATIVES = ("hardest", "semi_hard", "mean")
REBUILD = ("tokens", "embedding")
SUPPORT_VALUES = ("frames", "pooled")
CAPTION_SAMPLING = ("one", "all")
POOLING = ("mean", "attention")
SELECT_ON = ("val", "test")
MAX_LOGIT_SCALE = 100.0
_ABOVE_ZERO = ("support_temperature", "logit_scale", "learning_rate")
_MAY_BE_ZERO = {"convolution", "layers", "seed", "memory_bank", "captions_per_video"}


@dataclass(frozen=True)
class TrainConfig:
    """Options of heads, losses, support set and loop.

    Attributes:
        embedding_size: D; ignored where backbone and text encoder share a space, whose size it is then.
        convolution: Width in frames, an odd number, of a convolution along a video's frames; 0 leaves it out.
        layers: Transformer layers over a video's frames; 0 leaves them out.
        pooling: How frames become one embedding: by their `mean`, or by `attention`, weighted by a learned query.
        dropout: In heads and decoder; a T5 comes with its own.
        max_frames: A longer video is thinned evenly to this many frames.
        loss: The contrastive loss, `info_nce` or `max_margin`.
        margin: Of `max_margin`.
        negatives: Which ones `max_margin` counts: the `hardest` of the batch, the hardest of those farther than
            the positive (`semi_hard`), or the `mean` of all.
        negatives_warmup: Share of all steps in which the mean is taken whatever `negatives` says; a model that
            starts on the hardest collapses.
        intra_modal_weight: Of the same loss with captions as captions' negatives and videos as videos'; 0 leaves
            it out.
        logit_scale: Of `info_nce` at the start.
        learn_logit_scale: Learn it; otherwise it stays.
        variant: What a caption is rebuilt from: `cross` the other videos of the batch, `identity` its own,
            `full` both, `hybrid` the mean of identity and full; `none` leaves cross-captioning out.
        cross_captioning_weight: Of the cross-captioning loss beside the contrastive one.
        support_temperature: Of the softmax over the support set.
        learn_support_temperature: Learn it, from there on.
        support_values: What is averaged over the support set: `frames`, sequences of frames time step by time
            step, or `pooled`, one vector a video.
        memory_bank: Videos of earlier batches in the support set beside those of the batch; 0 for none.
        rebuild: What a caption is rebuilt as: its `tokens`, or its frozen `embedding` (cosine), at a fraction
            of the cost.
        decoder: Of tokens: `transformer`, a small one that knows the training captions' words alone, or `t5:MODEL`,
            the pretrained decoder of a T5 on a model hub or in a folder, trained on.
        decoder_size: Width of the small transformer.
        decoder_layers: Of the small transformer.
        decode_fraction: Share of a batch's captions that are rebuilt, drawn anew each step.
        min_word_count: Words rarer than this in the training captions are left out of the vocabulary.
        captions_per_video: Train on this many captions a video, drawn once; 0 for all.
        caption_sampling: `one` caption a video an epoch, drawn anew each time, or `all` of them.
        batch_size: B, captions in a batch.
        epochs: Passes over the training videos (or captions, with `all`).
        learning_rate: AdamW's at its peak.
        weight_decay: AdamW's, on matrices alone.
        warmup: Share of all steps in which the learning rate rises; after it a cosine falls to zero.
        evaluate_every: Epochs between evaluations on val.
        val_fraction: Share of videos put aside as val where the caption table has no val split.
        select_on: Which split chooses the best checkpoint: `val`, or `test`, to repeat numbers that were chosen
            so; then no val is put aside, and every output says it.
        seed: Of everything drawn at random.

    Raises:
        UsageError: A value is out of its range.
    """

    embedding_size: int = 512
    convolution: int = 0
    layers: int = 0
    pooling: str = option("mean", choices=POOLING)
    dropout: float = 0.5
    max_frames: int = 32
    loss: str = option("info_nce", choices=LOSSES)
    margin: float = 0.2
    negatives: str = option("hardest", choices=NEGATIVES)
    negatives_warmup: float = 0.3
    intra_modal_weight: float = 0.0
    logit_scale: float = 20.0
    learn_logit_scale: bool = True
    variant: str = option("cross", choices=VARIANTS)
    cross_captioning_weight: float = 0.1
    support_temperature: float = 0.1
    learn_support_temperature: bool = option(False, both=True)
    support_values: str = option("frames", choices=SUPPORT_VALUES)
    memory_bank: int = 0
    rebuild: str = option("embedding", choices=REBUILD)
    decoder: str = "transformer"
    decoder_size: int = 256
    decoder_layers: int = 1
    decode_fraction: float = 1.0
    min_word_count: int = 2
    captions_per_video: int = 0
    caption_sampling: str = option("one", choices=CAPTION_SAMPLING)
    batch_size: int = 128
    epochs: int = 30
    learning_rate: float = 2.5e-4
    weight_decay: float = 0.05
    warmup: float = 0.1
    evaluate_every: int = 5
    val_fraction: float = 0.1
    select_on: str = option("val", choices=SELECT_ON)
    seed: int = 0

    @property
    def put_aside(self) -> float:
        """Share of the training videos that are val where the caption table has none."""
        return self.val_fraction if self.select_on == "val" else 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("choices"):
                _require_choice(field.name, value, field.metadata["choices"])
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                above = "more than" if field.name in _ABOVE_ZERO else "at least"
                raise UsageError(f"{field.name} is {value} - expected a number of {above} 0")
            at_least = 0 if field.name in _MAY_BE_ZERO else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < at_least:
                raise UsageError(f"{field.name} is {value} - expected at least {at_least}")
        _require_odd_or_zero("convolution", self.convolution)
        _require_decoder(self.decoder, self.rebuild)
        if self.batch_size < 2:
            raise UsageError("batch_size is 1 - expected at least 2: a contrastive loss needs negatives")
        for name in ("dropout", "val_fraction", "warmup", "negatives_warmup"):
            if not getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)} - expected less than 1")
        for name in _ABOVE_ZERO:
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)} - expected more than 0")
        if self.logit_scale > MAX_LOGIT_SCALE:
            raise UsageError(f"logit_scale is {self.logit_scale} - expected at most {MAX_LOGIT_SCALE:g}")
        _require_learnable(self.learn_support_temperature, self.support_temperature)
        if not 0 < self.decode_fraction <= 1:
            raise UsageError(f"decode_fraction is {self.decode_fraction} - expected more than 0 and at most 1")
        if self.seed >= 2**32:
            raise UsageError(f"seed is {self.seed} - expected less than {2**32}")


def _require_learnable(is_learned: bool, support_temperature: float) -> None:
    lowest = 1 / MAX_LOGIT_SCALE
    if is_learned and support_temperature < lowest:
        raise UsageError(
            f"support_temperature is {support_temperature} - expected at least {lowest:g} where it is learned"
        )


def _require_odd_or_zero(name: str, value: int) -> None:
    if value and value % 2 == 0:
        raise UsageError(f"{name} is {value} - expected an odd number of frames, or 0 for none")


def selection_note(select_on: str) -> str:
    """Return the line with which every output of a run is stamped that was selected on test; else nothing."""
    if select_on != "test":
        return ""
    return "SELECTED ON TEST: the best checkpoint was chosen by the test split, so its numbers there flatter it"


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r} - expected one of {', '.join(choices)}")


def _require_decoder(decoder: str, rebuild: str) -> None:
    if decoder == "transformer":
        return
    if not re.fullmatch("t5:.+", decoder):
        raise UsageError(f"decoder is {decoder!r} - expected transformer, t5:MODEL or t5:FOLDER")
    if rebuild != "tokens":
        raise UsageError(
            f"decoder is {decoder}, which rebuilds tokens, and rebuild {rebuild} - add --rebuild tokens"
        )
