"""What one step minimises: the contrastive loss, and the loss of rebuilding captions from the support set.

This is the whole method, from the embeddings of a batch to its loss. Every process takes its share of the batch
(b of B captions, each with its video) and compares it with the shares of all.

Which captions a batch holds, how long they and their videos are and which of them are rebuilt is known on the host
and computed there in numpy: the host never waits for a GPU to tell, and so keeps it busy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from svb.data.relevance import TextRelevance
from svb.device import to_device
from svb.train.config import TrainConfig
from svb.train.decoders import EmbeddingDecoder, pad
from svb.train.losses import (
    cross_captioning,
    embedding_distance,
    info_loob,
    info_nce,
    max_margin,
    relevant_pairs,
    retrieved,
    soft_labels,
)
from svb.train.memory_bank import MemoryBank
from svb.train.model import RetrievalModel
from svb.train.processes import Processes
from svb.train.support_set import entropy, mix, own_mask, support_values, support_weights
from svb.train.training_data import SplitData


@dataclass
class StepLosses:
    """This process's part of the losses of a step; averaged over processes they are the losses of the batch.

    Attributes:
        loss: The sum that is minimised.
        contrastive: The first part of the sum, with the soft labels.
        cross_captioning: The second part of the sum, before it is weighted.
        support_entropy: Entropy of the support weights in nats, which says how widely they spread.
    """

    loss: torch.Tensor
    contrastive: torch.Tensor
    cross_captioning: torch.Tensor
    support_entropy: torch.Tensor

    def watched(self) -> list[torch.Tensor]:
        """Return the four, detached."""
        return [
            value.detach() for value in (self.loss, self.contrastive, self.cross_captioning, self.support_entropy)
        ]


class _Embeddings(NamedTuple):
    """The embeddings of a batch: those of this process's share, `(b, D)`, and those of all processes, `(B, D)`."""

    captions: torch.Tensor
    videos: torch.Tensor
    all_captions: torch.Tensor
    all_videos: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """The loss of a batch.

    Attributes:
        config: Losses, support set and their weights.
        model: Heads, scales and decoder.
        split: The training data.
        tokens: The tokens of every caption; empty unless the decoder rebuilds words.
        bank: Videos of earlier batches; None without a memory bank.
        processes: The processes that share the batch.
        decoder_dtype: The type of the decoder's matrix products.
        relevance: The relevance of the training captions to each other, where a loss asks for it.
    """

    config: TrainConfig
    model: RetrievalModel
    split: SplitData
    tokens: list[list[int]]
    bank: MemoryBank | None
    processes: Processes
    decoder_dtype: torch.dtype
    relevance: TextRelevance | None = None

    def __call__(self, batch: NDArray[np.int64], is_decoded: NDArray[np.bool_], progress: float) -> StepLosses:
        """Return the losses of a step.

        Args:
            batch: `(B,)` positions of the captions of all processes.
            is_decoded: `(B,)` bool, True on captions to rebuild.
            progress: Share of all steps that are done.
        """
        share, total = self.processes.share(len(batch)), len(batch)
        frames, device = self.split.frames, self.split.caption_features.device
        videos = self.split.video_of[batch]  # (B,) on the host, as the batch is
        all_rows = to_device(videos, device)  # (B,)
        rows = all_rows[share]  # (b,)
        # T is that of the longest video in the whole batch, so that processes can exchange frames.
        longest = frames.longest(videos)
        frame_features, frame_mask = frames.gather(rows, longest)  # (b, T, F), (b, T)
        real = to_device(frames.real_places(videos[share], longest), device)  # (N,)
        video_embeddings, frame_sequences = self.model.video_head(frame_features, frame_mask, real)  # and (b, T, D)
        caption_features = self.split.caption_features[to_device(batch[share], device)]
        caption_embeddings = self.model.text_head(caption_features.float())  # (b, D)
        all_videos = self.processes.gather(video_embeddings, total)  # (B, D)
        all_captions = self.processes.gather(caption_embeddings, total)  # (B, D)
        embeddings = _Embeddings(caption_embeddings, video_embeddings, all_captions, all_videos)
        own = own_mask(rows, all_rows)  # (b, B)
        costs = self._contrastive(embeddings, batch, ~own, progress)  # (b,)
        if self.config.soft_label_weight:
            costs = costs + self.config.soft_label_weight * self._soft_labels(embeddings, batch, own)
        contrastive = self.processes.mean(costs, total)
        nothing = torch.zeros_like(contrastive)
        if self.model.decoder is None:
            return StepLosses(contrastive, contrastive, nothing, nothing)
        values, _ = support_values(frame_sequences, frame_mask, self.config.support_values)
        all_sequences = self.processes.gather(values, total)  # (B, T, D), T is 1 for pooled values
        # Every process knows the lengths of all videos, so masks need no exchange.
        all_masks = frames.mask(all_rows, longest)[:, : all_sequences.shape[1]]  # (B, T)
        support = (all_videos, all_sequences, all_masks, videos)
        rebuilding, spread = self._rebuild(caption_embeddings, batch, is_decoded, support)
        if self.bank is not None:
            self.bank.add(all_videos, all_sequences, all_masks, videos)
        return StepLosses(
            contrastive + self.config.cross_captioning_weight * rebuilding, contrastive, rebuilding, spread
        )

    def _contrastive(
        self, embedded: _Embeddings, batch: NDArray[np.int64], is_negative: torch.Tensor, progress: float
    ) -> torch.Tensor:
        config = self.config
        relevance: torch.Tensor | None = None
        if self.relevance is not None:
            mine = self.relevance.among(batch)[self.processes.share(len(batch))]
            relevance = to_device(mine, embedded.captions.device)  # (b, B)

        def loss(positive: torch.Tensor, similarity: torch.Tensor, is_negative: torch.Tensor) -> torch.Tensor:
            if config.loss == "info_nce":
                return info_nce(positive, similarity, is_negative, self.model.logit_scale)
            if config.loss == "info_loob":
                return info_loob(positive, similarity, is_negative, self.model.logit_scale)
            negatives = "mean" if progress < config.negatives_warmup else config.negatives
            margins = relevance if config.relevance_margin else None
            return max_margin(positive, similarity, is_negative, config.margin, negatives, margins)

        def against(positive: torch.Tensor, anchors: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
            similarity = anchors @ candidates.T  # (b, B)
            if relevance is None or not config.relevant_from:
                return loss(positive, similarity, is_negative)
            return relevant_pairs(loss, positive, similarity, is_negative, relevance >= config.relevant_from)

        if config.retrieval_scale:
            return self._after_retrieval(embedded, against)
        positive = (embedded.captions * embedded.videos).sum(dim=1)  # (b,)
        losses = (
            against(positive, embedded.captions, embedded.all_videos)
            + against(positive, embedded.videos, embedded.all_captions)
        ) / 2
        if config.intra_modal_weight:
            among_captions = against(positive, embedded.captions, embedded.all_captions)
            among_videos = against(positive, embedded.videos, embedded.all_videos)
            losses = losses + config.intra_modal_weight * ((among_captions + among_videos) / 2)
        return losses  # (b,)

    def _after_retrieval(
        self, embedded: _Embeddings, against: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return the loss of videos against captions among retrieved videos, and the reverse among captions."""
        scale, total = self.config.retrieval_scale, len(embedded.all_videos)
        losses = []
        ways = (
            (embedded.videos, embedded.captions, embedded.all_videos),
            (embedded.captions, embedded.videos, embedded.all_captions),
        )
        for anchors, others, stored in ways:
            from_anchors = retrieved(anchors, stored, scale)  # (b, D)
            from_others = retrieved(others, stored, scale)  # (b, D)
            positive = (from_anchors * from_others).sum(dim=1)  # (b,)
            losses.append(against(positive, from_anchors, self.processes.gather(from_others, total)))
        return (losses[0] + losses[1]) / 2

    def _soft_labels(self, embedded: _Embeddings, batch: NDArray[np.int64], own: torch.Tensor) -> torch.Tensor:
        # Every process knows the features of all captions, (B, F).
        features = self.split.caption_features[to_device(batch, embedded.captions.device)].float()
        mine = features[self.processes.share(len(batch))]
        scale, temperature = self.model.logit_scale, self.config.soft_label_temperature
        both = (embedded.captions @ embedded.all_videos.T, embedded.videos @ embedded.all_captions.T)  # (b, B) each
        losses = [soft_labels(similarity, mine, features, own, scale, temperature) for similarity in both]
        return (losses[0] + losses[1]) / 2

    def _rebuild(
        self,
        caption_embeddings: torch.Tensor,
        batch: NDArray[np.int64],
        is_decoded: NDArray[np.bool_],
        support: tuple[torch.Tensor, torch.Tensor, torch.Tensor, NDArray[np.int64]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this process's parts of the cross-captioning loss and of the support weights' entropy."""
        embeddings, frame_sequences, frame_mask, videos = support
        rows, older, device = videos, None, caption_embeddings.device
        if self.bank is not None:
            stored = self.bank.read()
            embeddings, videos = torch.cat([embeddings, stored[0]]), np.concatenate([videos, stored[3]])
            longest = frame_mask.shape[1]
            if self.config.support_values == "frames":
                longest = self.split.frames.longest(videos)
            frame_sequences = torch.cat([_lengthen(frame_sequences, longest), stored[1][:, :longest]])
            frame_mask = torch.cat([_lengthen(frame_mask, longest), stored[2][:, :longest]])
        if self.config.variant == "cross":
            # A support set of one video has no other to rebuild its captions from.
            is_decoded = is_decoded & ((rows != videos.min()) | (rows != videos.max()))
        total = int(is_decoded.sum())
        share = self.processes.share(len(batch))
        kept_on_host = np.flatnonzero(is_decoded[share])  # (n,) of this process's captions
        kept, captions = to_device(kept_on_host, device), batch[share][kept_on_host]
        own = own_mask(to_device(rows[share][kept_on_host], device), to_device(videos, device))  # (n, S)
        if self.bank is not None:
            older = own.clone()
            older[:, : len(rows)] = False
        weights = support_weights(
            caption_embeddings[kept],
            embeddings,
            own,
            variant=self.config.variant,
            temperature=self.model.support_temperature,
            older=older,
        )  # (n, S)
        mixtures, mixture_mask = mix(weights, frame_sequences, frame_mask)  # (n, T, D), (n, T)
        spread = self.processes.mean(entropy(weights.detach()), max(1, total))
        decoder = self.model.decoder
        if isinstance(decoder, EmbeddingDecoder):
            predicted = decoder(mixtures, mixture_mask)  # (n, F)
            wanted = self.split.caption_features[to_device(captions, device)].float()
            return self.processes.mean(embedding_distance(predicted, wanted), max(1, total)), spread
        assert decoder is not None
        num_words = sum(len(self.tokens[position]) - 1 for position in batch[is_decoded].tolist())
        if not len(captions):
            # A plain zero would not do: the backward pass of the gathered tensors waits for every process.
            return mixtures.sum(), spread
        tokens = pad([self.tokens[position] for position in captions.tolist()], decoder.padding)  # (n, L)
        is_word = tokens[:, 1:] != decoder.padding  # (n, L - 1)
        with torch.autocast(
            device.type, self.decoder_dtype, enabled=self.decoder_dtype not in (torch.float32, torch.float64)
        ):
            before = to_device(tokens[:, :-1].copy(), device)
            hidden = decoder.hidden(before, mixtures, mixture_mask, is_word)  # (N, H)
        targets = to_device(tokens[:, 1:][is_word], device)  # (N,)
        summed = cross_captioning(hidden, decoder.output_weight, targets, self.decoder_dtype)
        return self.processes.mean(summed, num_words), spread


def _lengthen(values: torch.Tensor, frames: int) -> torch.Tensor:
    """Pad `(S, T, ...)` with zeros, or False, to `frames` time steps."""
    missing = values.new_zeros(len(values), frames - values.shape[1], *values.shape[2:])
    return torch.cat([values, missing], dim=1)
