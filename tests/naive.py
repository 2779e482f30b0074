"""Slow, obvious twins of the formulas: plain loops over plain floats, to compare the real ones with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
Matrix = Sequence[Sequence[float]]
Mask = Sequence[Sequence[bool]]


def info_nce(similarity: Matrix, same_video: Mask, logit_scale: float) -> float:
    """Mean of both directions of -log(e^own / (e^own + sum of e^other)), others being of other videos only."""
    size = len(similarity)

    def direction(value: Matrix, same: Mask) -> float:
        total = 0.0
        for i in range(size):
            own = math.exp(logit_scale * value[i][i])
            others = sum(math.exp(logit_scale * value[i][j]) for j in range(size) if not same[i][j])
            total -= math.log(own / (own + others))
        return total / size

    return (direction(similarity, same_video) + direction(transpose(similarity), transpose(same_video))) / 2


def max_margin(similarity: Matrix, same_video: Mask, margin: float) -> float:
    """Mean over captions plus mean over videos of max(0, margin + hardest negative - own)."""
    size = len(similarity)

    def direction(value: Matrix, same: Mask) -> float:
        total = 0.0
        for i in range(size):
            negatives = [value[i][j] for j in range(size) if not same[i][j]]
            if negatives:
                total += max(0.0, margin + max(negatives) - value[i][i])
        return total / size

    return direction(similarity, same_video) + direction(transpose(similarity), transpose(same_video))


def support_weights(
    captions: Matrix, videos: Matrix, own: Mask, variant: str, temperature: float
) -> list[list[float]]:
    """What share of each support video every caption is rebuilt from."""
    return [
        _support_row([dot(caption, video) for video in videos], own[i], variant, temperature)
        for i, caption in enumerate(captions)
    ]


def _support_row(cosines: Sequence[float], own: Sequence[bool], variant: str, temperature: float) -> list[float]:
    identity = [1 / sum(own) if is_own else 0.0 for is_own in own] if any(own) else []
    exponentials = [math.exp(cosine / temperature) for cosine in cosines]
    if variant == "identity":
        return identity
    if variant == "cross":
        exponentials = [0.0 if is_own else e for e, is_own in zip(exponentials, own, strict=True)]
    softmax = [e / sum(exponentials) for e in exponentials]
    if variant == "hybrid":
        return [(s + i) / 2 for s, i in zip(softmax, identity, strict=True)]
    return softmax


def mix(weights: Matrix, frame_sequences: Sequence[Matrix], frame_mask: Mask) -> list[list[list[float] | None]]:
    """Weighted mean of the support videos at each time step, of those that still go on; None where none does."""
    num_steps, size = len(frame_mask[0]), len(frame_sequences[0][0])
    mixtures: list[list[list[float] | None]] = []
    for row in weights:
        steps: list[list[float] | None] = []
        for t in range(num_steps):
            present = [s for s in range(len(row)) if frame_mask[s][t]]
            total = sum(row[s] for s in present)
            steps.append(
                [sum(row[s] * frame_sequences[s][t][d] for s in present) / total for d in range(size)]
                if total > 0
                else None
            )
        mixtures.append(steps)
    return mixtures


def masked_mean(frames: Sequence[Matrix], frame_mask: Mask) -> list[list[float]]:
    means = []
    for video, mask in zip(frames, frame_mask, strict=True):
        real = [frame for frame, is_real in zip(video, mask, strict=True) if is_real]
        means.append([sum(frame[d] for frame in real) / len(real) for d in range(len(video[0]))])
    return means


def convolution(frames: Matrix, taps: Sequence[Matrix], bias: Sequence[float]) -> list[list[float]]:
    """Each frame from those around it, zeros beyond the ends; `taps[to][from][tap]`, the middle tap on itself."""
    size, width = len(frames[0]), len(taps[0][0])
    results = []
    for t in range(len(frames)):
        result = list(bias)
        for to in range(size):
            for tap in range(width):
                seen = t + tap - width // 2
                if 0 <= seen < len(frames):
                    result[to] += sum(taps[to][d][tap] * frames[seen][d] for d in range(size))
        results.append(result)
    return results


def attention_pooling(frames: Matrix, queries: Matrix) -> list[float]:
    """A weighted mean of one video's frames, for each query over its own part of them."""
    part = len(frames[0]) // len(queries)
    pooled: list[float] = []
    for head, query in enumerate(queries):
        exponentials = [math.exp(dot(query, standardised(frame))) for frame in frames]
        for d in range(head * part, (head + 1) * part):
            weighted = sum(e * frame[d] for e, frame in zip(exponentials, frames, strict=True))
            pooled.append(weighted / sum(exponentials))
    return pooled


def standardised(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(variance + 1e-5) for value in values]


def nearest_rows(times_seconds: Sequence[float], wanted_seconds: Sequence[float]) -> list[int]:
    """The position of the nearest time to each wanted one; `min` takes the earlier of two."""
    return [
        min(range(len(times_seconds)), key=lambda row: abs(times_seconds[row] - wanted))
        for wanted in wanted_seconds
    ]


def rank_of(own: float, others: Sequence[float]) -> float:
    """The mean of the places that a value may take when it and others are sorted, best first."""
    ordered = sorted([own, *others], reverse=True)
    places = [place for place, value in enumerate(ordered, start=1) if value == own]
    return sum(places) / len(places)


def t2v_ranks(similarity: Matrix, caption_video: Sequence[int]) -> list[float]:
    return [
        rank_of(row[own], [value for video, value in enumerate(row) if video != own])
        for row, own in zip(similarity, caption_video, strict=True)
    ]


def v2t_ranks_set(similarity: Matrix, caption_video: Sequence[int]) -> list[float]:
    """Rank a video's captions, taken as one set, among the sets of all videos."""
    num_videos = len(similarity[0])
    ranks = []
    for video in range(num_videos):
        best = [
            max(row[video] for row, owner in zip(similarity, caption_video, strict=True) if owner == other)
            for other in range(num_videos)
        ]
        ranks.append(rank_of(best[video], [value for other, value in enumerate(best) if other != video]))
    return ranks


def v2t_ranks_best(similarity: Matrix, caption_video: Sequence[int]) -> list[float]:
    """Rank a video's best own caption among all captions of other videos."""
    ranks = []
    for video in range(len(similarity[0])):
        own = [row[video] for row, owner in zip(similarity, caption_video, strict=True) if owner == video]
        others = [row[video] for row, owner in zip(similarity, caption_video, strict=True) if owner != video]
        ranks.append(rank_of(max(own), others))
    return ranks


def qb_norm(similarity: Matrix, bank: Matrix, scale: float) -> list[list[float]]:
    """Each query's e^similarity, over the bank's sum of it where the query's best candidate is a hub."""
    hubs = {candidate for row in bank for candidate, value in enumerate(row) if value == max(row)}
    sums = [sum(math.exp(scale * row[candidate]) for row in bank) for candidate in range(len(bank[0]))]
    scores = []
    for row in similarity:
        finds_hub = any(value == max(row) and candidate in hubs for candidate, value in enumerate(row))
        divisors = sums if finds_hub else [1.0] * len(row)
        scores.append([math.exp(scale * value) / divisor for value, divisor in zip(row, divisors, strict=True)])
    return scores


def dual_softmax(similarity: Matrix, scale: float) -> list[list[float]]:
    """Each similarity times its candidate's softmax over all queries."""
    sums = [sum(math.exp(scale * row[candidate]) for row in similarity) for candidate in range(len(similarity[0]))]
    return [
        [value * math.exp(scale * value) / total for value, total in zip(row, sums, strict=True)]
        for row in similarity
    ]


def thin(num_frames: int, max_frames: int) -> list[int]:
    """Positions of the frames kept of a video: the middle one of each of `max_frames` equal parts."""
    if num_frames <= max_frames:
        return list(range(num_frames))
    return [math.floor((part + 0.5) * num_frames / max_frames) for part in range(max_frames)]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def transpose(matrix: Sequence[Sequence[T]]) -> list[list[T]]:
    return [list(column) for column in zip(*matrix, strict=True)]
