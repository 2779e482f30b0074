"""Slow, obvious twins of the formulas: plain loops over plain floats, to compare the real ones with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

Matrix = Sequence[Sequence[float]]
Mask = Sequence[Sequence[bool]]


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
    """`mixture` of each row of weights; None at the steps that no video goes on to."""
    videos = [
        [frame for frame, is_real in zip(frames, mask, strict=True) if is_real]
        for frames, mask in zip(frame_sequences, frame_mask, strict=True)
    ]
    num_steps = len(frame_mask[0])
    return [[*mixture(row, videos), *[None] * num_steps][:num_steps] for row in weights]


def mixture(weights: Sequence[float], videos: Sequence[Matrix]) -> list[list[float]]:
    """Weighted mean of the support videos at each time step, of those that still go on."""
    steps = []
    for t in range(max(map(len, videos))):
        going_on = [(weight, video[t]) for weight, video in zip(weights, videos, strict=True) if len(video) > t]
        total = sum(weight for weight, _ in going_on)
        if total:
            size = len(videos[0][0])
            steps.append([sum(weight * frame[d] for weight, frame in going_on) / total for d in range(size)])
    return steps


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


def resampled_differences(
    hits_a: Sequence[Sequence[bool]],
    hits_b: Sequence[Sequence[bool]],
    query_video: Sequence[int],
    draws: Sequence[Sequence[int]],
) -> list[float]:
    """For each draw of videos, put all queries of the drawn videos into one list, and take its mean difference."""
    differences = []
    for videos in draws:
        values = []
        for video in videos:
            for of_a, of_b in zip(hits_a, hits_b, strict=True):  # pairs of runs
                values += [b - a for a, b, own in zip(of_a, of_b, query_video, strict=True) if own == video]
        differences.append(sum(values) / len(values))
    return differences


def paired_t_p(differences: Sequence[float]) -> float:
    """Two-sided p of a paired t-test; the tail of Student's density is summed up in small steps."""
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((value - mean) ** 2 for value in differences) / (count - 1)
    t, freedom = abs(mean) / math.sqrt(variance / count), count - 1
    factor = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    steps = 20_000
    width = t / steps
    middle = sum(
        factor * (1 + ((step + 0.5) * width) ** 2 / freedom) ** (-(freedom + 1) / 2) * width
        for step in range(steps)
    )
    return 1 - 2 * middle


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def info_nce(positive: float, negatives: Sequence[float], logit_scale: float) -> float:
    """-log(e^own / (e^own + sum of e^other)) of one anchor."""
    own = math.exp(logit_scale * positive)
    return -math.log(own / (own + sum(math.exp(logit_scale * negative) for negative in negatives)))


def max_margin(
    positive: float, negatives: Sequence[float], margin: float, which: str, relevances: Sequence[float] = ()
) -> float:
    """max(0, margin + negative - own) of one anchor: of the hardest negative, or the mean over all.

    With relevances, the margin to a negative is smaller the more relevant it is.
    """
    hinges = [
        max(0.0, margin * (1 - relevance) + negative - positive)
        for negative, relevance in zip(negatives, relevances or [0.0] * len(negatives), strict=True)
        if which != "semi_hard" or negative < positive
    ]
    if not hinges:
        return 0.0
    return sum(hinges) / len(hinges) if which == "mean" else max(hinges)


def info_loob(positive: float, negatives: Sequence[float], logit_scale: float) -> float:
    """-log(e^own / sum of e^other) of one anchor, 0 without others."""
    if not negatives:
        return 0.0
    return -math.log(math.exp(logit_scale * positive) / sum(math.exp(logit_scale * other) for other in negatives))


def relevant_pairs(
    cost: Callable[[float, Sequence[float]], float],
    positive: float,
    others: Sequence[float],
    is_relevant: Sequence[bool],
) -> float:
    """The cost of one anchor whose relevant others are no negatives; the farthest of them is another positive."""
    negatives = [other for other, relevant in zip(others, is_relevant, strict=True) if not relevant]
    seconds = [other for other, relevant in zip(others, is_relevant, strict=True) if relevant]
    return cost(positive, negatives) + (cost(min(seconds), negatives) if seconds else 0.0)


def retrieved(embedding: Sequence[float], stored: Matrix, scale: float) -> list[float]:
    """The mean of the stored embeddings, weighted by a softmax of their similarities, at length 1."""
    exponentials = [math.exp(scale * dot(embedding, other)) for other in stored]
    mean = [
        sum(e * other[d] for e, other in zip(exponentials, stored, strict=True)) / sum(exponentials)
        for d in range(len(embedding))
    ]
    length = math.sqrt(dot(mean, mean))
    return [value / length for value in mean]


def soft_labels(
    similarities: Sequence[float],
    feature: Sequence[float],
    features: Matrix,
    is_own: Sequence[bool],
    logit_scale: float,
    temperature: float,
) -> float:
    """The cross-entropy from the softmax of one caption's cosines to all others to that of the similarities."""
    cosines = [
        1.0 if own else dot(feature, other) / math.sqrt(dot(feature, feature) * dot(other, other))
        for own, other in zip(is_own, features, strict=True)
    ]
    wanted = [math.exp(cosine / temperature) for cosine in cosines]
    got = [math.exp(logit_scale * similarity) for similarity in similarities]
    return -sum(w / sum(wanted) * math.log(g / sum(got)) for w, g in zip(wanted, got, strict=True))


class Seen(NamedTuple):
    """A video that a caption may be rebuilt from."""

    embedding: Sequence[float]
    frames: Matrix
    video: int


def objective(
    contrastive: float,
    captions: Matrix,
    batch: Sequence[Seen],
    older: Sequence[Seen],
    rebuild: Callable[[int, Matrix], tuple[float, int]],
    *,
    variant: str,
    temperature: float,
    weight: float,
    is_decoded: Sequence[bool],
) -> tuple[float, float, float, float]:
    """The loss of a batch, and its parts: contrastive, cross-captioning, entropy of the support weights.

    `batch` holds the video of every caption; `rebuild` says what rebuilding the caption of that number costs from a
    mixture of frames, and over how many words.
    """
    total, count, entropy, rebuilt = 0.0, 0, 0.0, 0
    for i in range(len(captions)):
        support = [*batch, *(seen for seen in older if seen.video != batch[i].video)]
        own = [seen.video == batch[i].video for seen in support]
        if variant == "none" or not is_decoded[i] or (variant == "cross" and all(own)):
            continue
        row = _support_row([dot(captions[i], seen.embedding) for seen in support], own, variant, temperature)
        loss, words = rebuild(i, mixture(row, [seen.frames for seen in support]))
        total, count, rebuilt = total + loss, count + words, rebuilt + 1
        entropy -= sum(share * math.log(share) for share in row if share)
    cross_captioning = total / count if count else 0.0
    return contrastive + weight * cross_captioning, contrastive, cross_captioning, entropy / max(1, rebuilt)


def graded_measures(similarity: Sequence[float], gains: Sequence[float], right_from: float) -> dict[str, float]:
    """nDCG, nDCG@10, mAP@R and R-Precision of one query, in percent: the mean over all orders of tied candidates.

    Only for a handful of candidates, and a query with something relevant for every measure.
    """
    orders = [
        order
        for order in itertools.permutations(range(len(gains)))
        if all(similarity[a] >= similarity[b] for a, b in itertools.pairwise(order))
    ]
    found = [_graded_of_order([gains[row] for row in order], right_from) for order in orders]
    return {name: 100 * sum(one[name] for one in found) / len(found) for name in found[0]}


def _graded_of_order(gains: Sequence[float], right_from: float) -> dict[str, float]:
    def dcg(ranked: Sequence[float], places: int) -> float:
        return sum(gain / math.log2(place + 1) for place, gain in enumerate(ranked[:places], start=1))

    best, relevant = sorted(gains, reverse=True), sum(gain > 0 for gain in gains)
    right = [gain >= right_from for gain in gains]
    number = sum(right)
    precision = [sum(right[:place]) / place for place in range(1, len(right) + 1)]
    return {
        "nDCG": dcg(gains, relevant) / dcg(best, relevant),
        "nDCG@10": dcg(gains, 10) / dcg(best, 10),
        "mAP@R": sum(precision[r] for r in range(number) if right[r]) / number,
        "R-Precision": precision[number - 1],
    }


def iou(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0
