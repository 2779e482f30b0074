"""The options of a training, which a run stores in its config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from svb.config import option
from svb.errors import UsageError

LOSSES = ("info_nce", "info_loob", "max_margin")
VARIANTS = ("none", "identity", "full", "hybrid", "cross")
NEGATIVES = ("hardest", "semi_hard", "mean")
REBUILD = ("tokens", "embedding")
SUPPORT_VALUES = ("frames", "pooled")
CAPTION_SAMPLING = ("one", "all")
POOLING = ("mean", "attention")
SELECT_ON = ("val", "test")
SELECT_BY = ("recalls", "words", "group")
CAPTION_RELEVANCE = ("words", "verbs-nouns")
MAX_LOGIT_SCALE = 100.0
_ABOVE_ZERO = ("support_temperature", "soft_label_temperature", "logit_scale", "learning_rate")
_MAY_BE_ZERO = {"convolution", "layers", "seed", "memory_bank", "captions_per_video"}


@dataclass(frozen=True)
class TrainConfig:
    """Options of heads, losses, support set and training loop.

    Attributes:
        embedding_size: Embedding size D; ignored where backbone and text encoder share a space.
        convolution: Width in frames of a temporal convolution, an odd number; 0 omits it.
        layers: Number of transformer layers over a video's frames; 0 omits them.
        pooling: Pool a video's frames by their `mean`, or by `attention` with a learned query.
        dropout: Dropout probability in heads and decoder; a T5 keeps its own.
        max_frames: Thin longer videos evenly to this many frames.
        loss: Contrastive loss to minimise; `info_loob`, InfoNCE without the positive in the denominator, needs a
            fixed logit scale.
        margin: Margin of the `max_margin` loss.
        relevance_margin: Multiply each negative's margin by one minus the relevance of its caption.
        negatives: Negatives that `max_margin` counts: the `hardest`, the hardest farther than the positive
            (`semi_hard`), or the `mean` of all.
        negatives_warmup: Share of all steps that start with `mean` negatives; starting on the hardest collapses.
        intra_modal_weight: Weight of the same loss among captions and among videos; 0 omits it.
        relevant_from: Take pairs of this relevance or more out of the negatives, and pull the farthest as a second
            positive (RANP); 0 omits it.
        caption_relevance: Relevance of captions to each other: IoU of content `words`, or of `verbs-nouns`, which
            needs spaCy.
        soft_label_weight: Weight of soft labels, which the frozen features of the captions give; 0 omits them. The
            default is 3 where `info_nce` rebuilds embeddings, where it was tuned, else 0.
        soft_label_temperature: Temperature of the softmax over caption features that makes soft labels.
        retrieval_scale: Before the contrastive loss, replace embeddings by what they retrieve from the batch at
            this scale of similarities (CLOOB); 0 omits it.
        logit_scale: Scale of the similarities that softmax losses start with.
        learn_logit_scale: Learn the logit scale, or keep it fixed.
        variant: Videos to rebuild a caption from: `cross` the others of the batch, `identity` its own, `full` both,
            `hybrid` the mean of identity and full; `none` turns cross-captioning off.
        cross_captioning_weight: Weight of the cross-captioning loss beside the contrastive loss. The default is 2
            where `info_nce` rebuilds embeddings, else 0.1.
        support_temperature: Temperature of the softmax over the support set.
        learn_support_temperature: Learn the support temperature, or keep it fixed.
        support_values: Average the support set's `frames` time step by time step, or `pooled` videos. The default
            is pooled, or frames where tokens are rebuilt.
        memory_bank: Number of earlier batches' videos to keep in the support set; 0 keeps none.
        rebuild: Rebuild a caption's `tokens`, or its frozen `embedding`, which costs much less.
        caption_decoder: Decoder that rebuilds tokens: `transformer`, a small one that knows the training words, or
            `t5:MODEL`, a pretrained T5 from a model hub or a folder.
        decoder_size: Width of the small transformer decoder.
        decoder_layers: Number of layers in the small transformer decoder.
        decode_fraction: Share of a batch's captions to rebuild, drawn again at each step.
        min_word_count: Leave words rarer than this in training out of the vocabulary.
        captions_per_video: Train on this many captions per video, drawn once; 0 takes all.
        caption_sampling: Draw `one` caption per video in each epoch, or take `all`.
        batch_size: Number of captions in a batch (B).
        epochs: Number of passes over the training videos, or over captions with `all`.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW, applied to matrices only.
        warmup: Share of all steps that raise the learning rate; a cosine lowers it afterwards.
        evaluate_every: Number of epochs between evaluations on val.
        val_fraction: Share of training videos to hold out where captions name no val split.
        select_on: Split that chooses the best checkpoint; `test` repeats numbers published that way, and every
            output says so.
        select_by: Measure that chooses the best checkpoint: the sum of the `recalls` at 1, 5 and 10, or nDCG@10 of
            others by the relevance `words` or `group`.
        seed: Seed of all random numbers.

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
    relevance_margin: bool = False
    negatives: str = option("hardest", choices=NEGATIVES)
    negatives_warmup: float = 0.3
    intra_modal_weight: float = 0.0
    relevant_from: float = 0.0
    caption_relevance: str = option("words", choices=CAPTION_RELEVANCE)
    soft_label_weight: float = option(None)
    soft_label_temperature: float = 0.5
    retrieval_scale: float = 0.0
    logit_scale: float = 20.0
    learn_logit_scale: bool = True
    variant: str = option("cross", choices=VARIANTS)
    cross_captioning_weight: float = option(None)
    support_temperature: float = 0.1
    learn_support_temperature: bool = option(False, both=True)
    support_values: str = option(None, choices=SUPPORT_VALUES)
    memory_bank: int = 0
    rebuild: str = option("embedding", choices=REBUILD)
    caption_decoder: str = "transformer"
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
    select_by: str = option("recalls", choices=SELECT_BY)
    seed: int = 0

    @property
    def put_aside(self) -> float:
        """The share of training videos to hold out as val where the caption table names no val split."""
        return self.val_fraction if self.select_on == "val" else 0.0

    def __post_init__(self) -> None:
        left_open = {
            name: value
            for name, value in _defaults_of(self.loss, self.rebuild).items()
            if getattr(self, name) is None
        }
        vars(self).update(left_open)
        floats = [field.name for field in fields(self) if field.type == "float"]
        vars(self).update({name: float(getattr(self, name)) for name in floats})  # 0 is 0.0
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
        _require_decoder(self.caption_decoder, self.rebuild)
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
        _require_losses_that_fit(self)
        if not 0 < self.decode_fraction <= 1:
            raise UsageError(f"decode_fraction is {self.decode_fraction} - expected more than 0 and at most 1")
        if self.seed >= 2**32:
            raise UsageError(f"seed is {self.seed} - expected less than {2**32}")


def _defaults_of(loss: str, rebuild: str) -> dict[str, Any]:
    """Return the defaults that depend on other options; docs/results.md says how they were chosen."""
    is_tuned = loss == "info_nce" and rebuild == "embedding"
    return {
        "soft_label_weight": 3.0 if is_tuned else 0.0,
        "cross_captioning_weight": 2.0 if is_tuned else 0.1,
        "support_values": "pooled" if rebuild == "embedding" else "frames",
    }


def stored_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run's config.json; a run that was made before soft labels names none and had none."""
    return {"soft_label_weight": 0.0, **renamed_options(config)}


def renamed_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under the names that they have today."""
    return {"caption_decoder" if name == "decoder" else name: value for name, value in config.items()}


def selection_note(select_on: str) -> str:
    """Return the line for every output of a run whose best checkpoint test chose; else an empty string."""
    if select_on != "test":
        return ""
    return "SELECTED ON TEST: the test split chose the best checkpoint, so its numbers there are too good"


def _require_learnable(is_learned: bool, support_temperature: float) -> None:
    lowest = 1 / MAX_LOGIT_SCALE
    if is_learned and support_temperature < lowest:
        raise UsageError(
            f"support_temperature is {support_temperature} - expected at least {lowest:g} where it is learned"
        )


def _require_losses_that_fit(config: TrainConfig) -> None:
    if config.loss == "info_loob" and config.learn_logit_scale:
        raise UsageError(
            "loss is info_loob with a learned logit scale, which would only grow - add --no-learn-logit-scale"
        )
    if config.relevance_margin and config.loss != "max_margin":
        raise UsageError(f"relevance_margin is on, but {config.loss} has no margin - add --loss max_margin")
    if config.relevant_from > 1:
        raise UsageError(f"relevant_from is {config.relevant_from} - expected at most 1, the relevance of equals")
    if config.retrieval_scale and config.intra_modal_weight:
        raise UsageError(
            f"retrieval_scale is {config.retrieval_scale} with intra_modal_weight {config.intra_modal_weight} - "
            "expected one of them: retrieved captions and videos are compared within one modality already"
        )


def _require_odd_or_zero(name: str, value: int) -> None:
    if value and value % 2 == 0:
        raise UsageError(f"{name} is {value} - expected an odd number of frames, or 0 for none")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r} - expected one of {', '.join(choices)}")


def _require_decoder(decoder: str, rebuild: str) -> None:
    if decoder == "transformer":
        return
    if not re.fullmatch("t5:.+", decoder):
        raise UsageError(f"caption_decoder is {decoder!r} - expected transformer, t5:MODEL or t5:FOLDER")
    if rebuild != "tokens":
        raise UsageError(
            f"caption_decoder is {decoder}, which rebuilds tokens, but rebuild is {rebuild} - add --rebuild tokens"
        )
