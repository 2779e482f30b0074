"""The trained projections: frame features to video embeddings, caption features to caption embeddings.

If backbone and text encoder already share a space, as the two towers of CLIP do, the heads are residuals that start
at zero: before the first step the model is the zero-shot model.

The layers along time take the N real frames of a batch in one tensor, and give each video the same as it would get
alone: neither padding nor other videos change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from svb.errors import UsageError


class VideoOutput(NamedTuple):
    """The output of a video head.

    Attributes:
        video_embeddings: `(B, D)`, L2-normalised.
        frame_sequences: `(B, T, D)`, the input of a caption decoder; rows beyond the mask are meaningless.
    """

    video_embeddings: torch.Tensor
    frame_sequences: torch.Tensor


class VideoHead(nn.Module):
    """Frame features -> projection -> convolution -> temporal transformer -> pooling -> projection.

    Args:
        feature_sizes: F of each fused backbone, usually of one. Each backbone's part of a row is normalised by
            itself, because the one with the larger scale would drown the other.
        embedding_size: D; equals F of the residual part.
        convolution: Width in frames of the temporal convolution; 0 omits it.
        layers: Number of temporal transformer layers; 0 omits them.
        pooling: `mean` of the frames, or `attention`, which weights frames by a learned query.
        dropout: Dropout probability in all of these.
        residual_part: The part that shares a space with the captions. The head adds to the normalised mean of its
            normalised frames, starting from zero. None if no part does.

    Shape:
        frame_features `(B, T, F)`, frame_mask `(B, T)` bool, at least one True a row. real `(N,)`, the places of
        the N real frames in the flattened batch; without it the host waits for the device to count them.
    """

    def __init__(
        self,
        feature_sizes: Sequence[int],
        embedding_size: int,
        *,
        convolution: int,
        layers: int,
        pooling: str,
        dropout: float,
        residual_part: int | None,
    ) -> None:
        super().__init__()
        self.residual = None if residual_part is None else _span(feature_sizes, residual_part)
        self.project_in = nn.Sequential(
            PartNorm(feature_sizes), nn.Linear(sum(feature_sizes), embedding_size), Dropout(dropout)
        )
        self.convolution = TemporalConvolution(embedding_size, convolution, dropout) if convolution else None
        self.layers = nn.ModuleList(TemporalLayer(embedding_size, dropout) for _ in range(layers))
        self.pooling = AttentionPooling(embedding_size) if pooling == "attention" else None
        self.project_out = nn.Linear(embedding_size, embedding_size)
        if self.residual is not None:
            nn.init.zeros_(self.project_out.weight)
            nn.init.zeros_(self.project_out.bias)

    def forward(
        self, frame_features: torch.Tensor, frame_mask: torch.Tensor, real: torch.Tensor | None = None
    ) -> VideoOutput:
        # Clips differ in length, so most of a padded batch is padding. All but attention runs on the N real
        # frames only, 3.6 times fewer on MSR-VTT's clips at one frame per second.
        if real is None:
            real = frame_mask.flatten().nonzero().squeeze(1)
        flat = self.project_in(frame_features.flatten(0, 1).index_select(0, real))  # (N, F) -> (N, D)
        if self.convolution is not None:
            flat = self.convolution(flat, real, frame_mask)
        if self.layers:
            videos, length = frame_mask.shape
            position = torch.arange(length, device=flat.device).repeat(videos)[real]  # not `%`: ONNX has none here
            flat = flat + sinusoids(length, flat.shape[1], flat.device)[position]
        for layer in self.layers:
            flat = layer(flat, real, frame_mask)
        frames = unpack(flat, real, frame_mask)  # (B, T, D)
        pooled = masked_mean(frames, frame_mask) if self.pooling is None else self.pooling(frames, frame_mask)
        pooled = self.project_out(pooled)  # (B, D)
        if self.residual is not None:
            pooled = pooled + mean_of_frames(frame_features[..., self.residual], frame_mask)
        return VideoOutput(F.normalize(pooled, dim=-1), frames)


class PartNorm(nn.Module):
    """Layer normalisation of each part of a row by itself; for one part it equals `nn.LayerNorm`.

    Shape:
        `(N, F)` -> `(N, F)`, F the sum of sizes.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.weight, self.bias = nn.Parameter(torch.ones(sum(sizes))), nn.Parameter(torch.zeros(sum(sizes)))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        parts = zip(*(whole.split(self.sizes, dim=-1) for whole in (rows, self.weight, self.bias)), strict=True)
        return torch.cat([F.layer_norm(part, part.shape[1:], weight, bias) for part, weight, bias in parts], dim=1)


def _span(sizes: Sequence[int], part: int) -> slice:
    begin = sum(sizes[:part])
    return slice(begin, begin + sizes[part])


class TextHead(nn.Module):
    """Caption features -> embedding, through one hidden layer beside a linear path.

    Args:
        feature_size: F of the text encoder.
        embedding_size: D; equals F for a residual head.
        residual: Add to the normalised caption features, starting from zero.

    Shape:
        caption_features `(B, F)` -> `(B, D)`, L2-normalised.
    """

    def __init__(self, feature_size: int, embedding_size: int, *, dropout: float, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.linear = None if residual else nn.Linear(feature_size, embedding_size)
        self.hidden = nn.Sequential(
            nn.Linear(feature_size, 2 * embedding_size),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(2 * embedding_size, embedding_size),
        )
        if residual:
            last = self.hidden[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, caption_features: torch.Tensor) -> torch.Tensor:
        normalised = F.normalize(caption_features, dim=-1)
        base = normalised if self.linear is None else self.linear(normalised)
        return F.normalize(base + self.hidden(normalised), dim=-1)


def masked_mean(frames: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over real frames: `(B, T, D)`, `(B, T)` bool -> `(B, D)`."""
    weights = frame_mask.to(frames.dtype)
    return torch.einsum("btd,bt->bd", frames, weights) / weights.sum(dim=1, keepdim=True)


def mean_of_frames(frame_features: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    """Return a CLIP model's zero-shot video embeddings: frames normalised, averaged and normalised again.

    Shape:
        `(B, T, F)`, `(B, T)` bool -> `(B, F)`.
    """
    return F.normalize(masked_mean(F.normalize(frame_features, dim=-1), frame_mask), dim=-1)


def sinusoids(length: int, size: int, device: torch.device) -> torch.Tensor:
    """Return position encodings, `(length, size)` (Vaswani et al. 2017, section 3.5)."""
    half = size // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half, device=device) / half)
    angles = torch.arange(length, device=device)[:, None] * rates[None]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, size - 2 * half))


class TemporalConvolution(nn.Module):
    """A pre-norm residual branch: one convolution along time, from D to D channels.

    It is residual because clips are short. Beyond a video's ends there are zeros, so all taps but the middle one
    see nothing of a video with one frame, and a plain convolution would keep little of it.

    Args:
        size: D.
        width: Width in frames; odd, so that the convolution is centred.
        dropout: Dropout probability on the branch.

    Shape:
        As `TemporalLayer`.
    """

    def __init__(self, size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(size)
        self.taps = nn.Linear(size * width, size)
        self.dropout = Dropout(dropout)

    def forward(self, flat: torch.Tensor, real: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        # A product with the windows of real frames: conv1d would compute all the padding too.
        reach = self.width // 2
        padded = F.pad(unpack(self.norm(flat), real, frame_mask), (0, 0, reach, reach))  # (B, T + width - 1, D)
        windows = padded.unfold(1, self.width, 1).flatten(0, 1).index_select(0, real)  # (N, D, width)
        flat = flat + self.dropout(F.gelu(self.taps(windows.flatten(1))))
        return flat


class TemporalLayer(nn.Module):
    """One pre-norm transformer layer (Vaswani et al. 2017) over the frames of each video of a batch.

    Shape:
        flat `(N, D)`, the real frames of all videos; real `(N,)`, their places in the flattened batch;
        frame_mask `(B, T)` bool -> `(N, D)`.
    """

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.heads = num_heads(size)
        self.norm_attention, self.norm_hidden = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query_key_value, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.hidden = nn.Sequential(
            nn.Linear(size, 2 * size), nn.GELU(), Dropout(dropout), nn.Linear(2 * size, size)
        )
        self.dropout = Dropout(dropout)

    def forward(self, flat: torch.Tensor, real: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        projected = self.query_key_value(self.norm_attention(flat))  # (N, 3D)
        padded = unpack(projected, real, frame_mask).unflatten(-1, (3, self.heads, -1))
        query, key, value = padded.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=frame_mask[:, None, None, :])
        attended = attended.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, real)  # (N, D)
        flat = flat + self.dropout(self.out(attended))
        flat = flat + self.dropout(self.hidden(self.norm_hidden(flat)))
        return flat


class AttentionPooling(nn.Module):
    """Attention of one learned query per head to a video's frames, which starts as their mean.

    The product of a fixed query with the keys is linear in the frame, so query and keys are one `(heads, D)`
    matrix. It starts at zero, where all frames weigh the same.

    Args:
        size: D; each head pools its own part of it.

    Shape:
        frames `(B, T, D)`, frame_mask `(B, T)` bool -> `(B, D)`.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(size, num_heads(size), bias=False)
        nn.init.zeros_(self.query.weight)

    def forward(self, frames: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        scores = self.query(F.layer_norm(frames, frames.shape[2:]))  # (B, T, heads)
        weights = scores.masked_fill(~frame_mask[..., None], float("-inf")).softmax(dim=1)
        values = frames.unflatten(-1, (scores.shape[-1], -1))  # (B, T, heads, D / heads)
        return torch.einsum("bthd,bth->bhd", values, weights).flatten(1)


def num_heads(size: int, what: str = "embedding size") -> int:
    """Return the number of attention heads of 64 in a size; errors call it `what`.

    Raises:
        UsageError: The size is not a multiple of 64.
    """
    heads = max(1, size // 64)
    if size % heads:
        raise UsageError(f"{what} {size} - expected a multiple of 64, the size of an attention head")
    return heads


def unpack(flat: torch.Tensor, real: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    """Put real frames in their places and zeros elsewhere: `(N, D)`, `(N,)`, `(B, T)` -> `(B, T, D)`."""
    padded = flat.new_zeros(frame_mask.numel(), flat.shape[1]).index_copy(0, real, flat)
    return padded.view(*frame_mask.shape, flat.shape[1])


class Dropout(nn.Module):
    """Zero elements at random and scale up the others, while training (Srivastava et al. 2014).

    It draws one byte per element; on a CPU, drawing floats would take a sixth of a training step.

    Args:
        probability: Probability that an element is zeroed, on the CPU rounded to the nearest 256th.

    Shape:
        Any -> the same.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def extra_repr(self) -> str:
        return f"{self.probability}"

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        dropped = min(255, round(256 * self.probability))
        if not self.training or not dropped:
            return values
        if values.device.type != "cpu":
            return F.dropout(values, self.probability)
        words = torch.empty((values.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        is_kept = words.view(torch.uint8)[: values.numel()].view(values.shape) >= dropped
        return values * is_kept.to(values.dtype).mul_(256 / (256 - dropped))
