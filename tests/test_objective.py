"""The loss of a batch against a transcription of it in plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import naive
import numpy as np
import pytest
import torch

from svb.data.caption_words import content_words
from svb.data.relevance import words_relevance
from svb.train.config import NEGATIVES, REBUILD, SUPPORT_VALUES, VARIANTS, TrainConfig
from svb.train.decoders import EmbeddingDecoder
from svb.train.decoders.transformer import CaptionDecoder, Vocabulary
from svb.train.memory_bank import MemoryBank
from svb.train.model import RetrievalModel
from svb.train.objective import Objective
from svb.train.processes import Processes
from svb.train.training_data import FrameTable, SplitData

FEATURE_SIZE, TEXT_SIZE = 6, 5
LENGTHS = (1, 4, 2, 3, 1, 6)
CAPTIONS = ["a dog", "a cat runs", "the dog", "?", "a boat", "a dog runs", "boat", "cat", "the cat runs", "dog"]
CAPTION_VIDEO = [0, 0, 1, 1, 2, 2, 3, 4, 4, 5]
# Two captions of one video, videos shorter and longer than those stored before, one caption without a word.
FIRST, BATCH = [0, 4, 9], [5, 0, 1, 3, 6]
WEIGHTED = [variant for variant in VARIANTS if variant != "none"]


def make_split() -> SplitData:
    random = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    features = torch.randn(int(lengths.sum()), FEATURE_SIZE, generator=random).half()
    frames = FrameTable([f"v{v}" for v in range(len(LENGTHS))], features, lengths.cumsum(0) - lengths, lengths, 5)
    caption_features = torch.randn(len(CAPTIONS), TEXT_SIZE, generator=random).half()
    ids = [str(position) for position in range(len(CAPTIONS))]
    return SplitData(frames, caption_features, torch.tensor(CAPTION_VIDEO), CAPTIONS, ids)


def make_objective(**options: Any) -> Objective:
    defaults: dict[str, Any] = {"embedding_size": 4, "decoder_size": 8, "rebuild": "tokens", "dropout": 0.0}
    defaults |= {"support_temperature": 0.4, "logit_scale": 5.0, "soft_label_weight": 0.0}
    config, split = TrainConfig(**{**defaults, **options}), make_split()
    torch.manual_seed(1)
    vocabulary = Vocabulary.of(CAPTIONS, 2)
    model = RetrievalModel(
        config, [FEATURE_SIZE], TEXT_SIZE, shared_part=None, with_decoder=True, vocabulary=vocabulary
    )
    tokens = model.decoder.encode(CAPTIONS) if isinstance(model.decoder, CaptionDecoder) else []
    bank = None
    if config.memory_bank:
        bank = MemoryBank(config.memory_bank, 5 if config.support_values == "frames" else 1, 4)
    relevance = None
    if config.relevant_from or config.relevance_margin:
        relevance = words_relevance(CAPTIONS, np.array(CAPTION_VIDEO), len(LENGTHS))
    return Objective(config, model, split, tokens, bank, Processes(), torch.float32, relevance)


def look(objective: Objective, batch: Sequence[int]) -> tuple[list[list[float]], list[naive.Seen]]:
    """Return the caption embeddings of a batch, and its videos, each embedded by itself."""
    seen = []
    for position in batch:
        row = torch.tensor([CAPTION_VIDEO[position]])
        embedding, frames = objective.model.video_head(*objective.split.frames.gather(row))
        frames = frames[0].tolist()
        if objective.config.support_values == "pooled":
            frames = naive.masked_mean([frames], [[True] * len(frames)])
        seen.append(naive.Seen(embedding[0].tolist(), frames, int(row)))
    features = objective.split.caption_features[torch.tensor(batch)].float()
    return objective.model.text_head(features).tolist(), seen


def slowly(
    objective: Objective,
    batch: Sequence[int],
    older: Sequence[naive.Seen],
    is_decoded: Sequence[bool],
    progress: float,
) -> tuple[float, float, float, float]:
    config, decoder = objective.config, objective.model.decoder

    def cost(positive: float, negatives: Sequence[float]) -> float:
        if config.loss == "info_nce":
            return naive.info_nce(positive, negatives, config.logit_scale)
        which = "mean" if progress < config.negatives_warmup else config.negatives
        return naive.max_margin(positive, negatives, config.margin, which)

    def rebuild(number: int, mixture: naive.Matrix) -> tuple[float, int]:
        frames, mask = torch.tensor([mixture]), torch.ones(1, len(mixture), dtype=torch.bool)
        if isinstance(decoder, EmbeddingDecoder):
            said = decoder(frames, mask)[0].tolist()
            wanted = objective.split.caption_features[batch[number]].tolist()
            lengths = math.sqrt(naive.dot(said, said) * naive.dot(wanted, wanted))
            return 1 - naive.dot(said, wanted) / lengths, 1
        assert isinstance(decoder, CaptionDecoder)
        tokens = torch.tensor([objective.tokens[batch[number]]])
        every_word = torch.ones(1, tokens.shape[1] - 1, dtype=torch.bool)
        hidden = decoder.hidden(tokens[:, :-1], frames, mask, every_word.numpy()).tolist()
        total = 0.0
        for place, word in zip(hidden, tokens[0, 1:].tolist(), strict=True):
            exponentials = [math.exp(naive.dot(place, row)) for row in decoder.output_weight.tolist()]
            total -= math.log(exponentials[word] / sum(exponentials))
        return total, len(hidden)

    return naive.objective(
        *look(objective, batch),
        older,
        cost,
        rebuild,
        variant=config.variant,
        temperature=config.support_temperature,
        weight=config.cross_captioning_weight,
        intra_modal_weight=config.intra_modal_weight,
        is_decoded=is_decoded,
    )


def quickly(
    objective: Objective, batch: Sequence[int], is_decoded: Sequence[bool] | None = None, progress: float = 0.5
) -> list[float]:
    drawn = np.array(is_decoded or [True] * len(batch))
    return [float(value) for value in objective(np.array(batch), drawn, progress).watched()]


@pytest.mark.parametrize("memory_bank", [0, 4, 20])
@pytest.mark.parametrize("support_values", SUPPORT_VALUES)
@pytest.mark.parametrize("rebuild", REBUILD)
@pytest.mark.parametrize("variant", WEIGHTED)
def test_it_is_its_transcription(variant: str, rebuild: str, support_values: str, memory_bank: int) -> None:
    objective = make_objective(
        variant=variant, rebuild=rebuild, support_values=support_values, memory_bank=memory_bank
    )
    older: list[naive.Seen] = []
    for batch in (FIRST, BATCH, BATCH[::-1]):
        expected = slowly(objective, batch, older, [True] * len(batch), 0.5)
        assert quickly(objective, batch) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        if memory_bank:
            older = [*older, *look(objective, batch)[1]][-memory_bank:]


@pytest.mark.parametrize(
    ("loss", "negatives", "intra_modal_weight", "progress"),
    [
        *itertools.product(["max_margin"], NEGATIVES, [0.0, 0.7], [0.5]),
        # While it warms up, all count.
        *(("max_margin", "hardest", 0.7, progress) for progress in (0.1, 0.299, 0.3)),
        ("info_nce", "hardest", 0.7, 0.1),
    ],
)
def test_every_contrastive_loss_is_its_transcription(
    loss: str, negatives: str, intra_modal_weight: float, progress: float
) -> None:
    options: dict[str, Any] = {"loss": loss, "negatives": negatives, "intra_modal_weight": intra_modal_weight}
    options |= {"margin": 0.5, "negatives_warmup": 0.3}
    objective = make_objective(**options, rebuild="embedding", cross_captioning_weight=2.0)
    expected = slowly(objective, BATCH, [], [True] * 5, progress)
    assert quickly(objective, BATCH, progress=progress) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    only = slowly(make_objective(**options, variant="none"), BATCH, [], [False] * 5, progress)
    assert quickly(make_objective(**options, variant="none"), BATCH, progress=progress) == pytest.approx(
        only, rel=1e-4, abs=1e-5
    )


RIVALS: dict[str, dict[str, Any]] = {
    "relevant pairs": {"relevant_from": 0.4},
    "relevant pairs, triplets": {"relevant_from": 0.4, "loss": "max_margin", "intra_modal_weight": 0.7},
    "margins": {"relevance_margin": True, "loss": "max_margin", "margin": 1.0},
    "soft labels": {"soft_label_weight": 3.0, "soft_label_temperature": 0.3},
    "retrieval": {"retrieval_scale": 8.0},
    "CLOOB": {"retrieval_scale": 8.0, "loss": "info_loob", "learn_logit_scale": False},
    "all": {"relevant_from": 0.4, "soft_label_weight": 2.0, "retrieval_scale": 4.0},
}


@pytest.mark.parametrize("variant", ["none", "cross"])
@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_is_its_transcription(name: str, variant: str) -> None:
    objective = make_objective(**RIVALS[name], variant=variant, rebuild="embedding", memory_bank=4)
    plain = make_objective(variant=variant, rebuild="embedding", memory_bank=4)
    for batch in (FIRST, BATCH, BATCH[::-1]):
        loss, contrastive, rebuilding, _ = quickly(objective, batch)
        assert contrastive == pytest.approx(rival_slowly(objective, batch), rel=1e-4, abs=1e-5)
        # What is rebuilt is rebuilt as without a rival.
        assert rebuilding == quickly(plain, batch)[2]
        assert loss == pytest.approx(contrastive + objective.config.cross_captioning_weight * rebuilding)
    objective(np.array(BATCH), np.array([True] * 5), 0.5).loss.backward()
    gradients = [parameter.grad for parameter in objective.model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def rival_slowly(objective: Objective, batch: Sequence[int]) -> float:
    config, size = objective.config, len(batch)
    captions, seen = look(objective, batch)
    videos, owners = [one.embedding for one in seen], [one.video for one in seen]
    said = [content_words(CAPTIONS[position]) for position in batch]
    relevance = [[naive.iou(a, b) for b in said] for a in said]
    features = objective.split.caption_features[torch.tensor(batch)].tolist()

    def cost(i: int, positive: float, similarities: Sequence[float]) -> float:
        others = [j for j in range(size) if owners[j] != owners[i]]
        values, near = [similarities[j] for j in others], [relevance[i][j] for j in others]

        def one(positive: float, negatives: Sequence[float]) -> float:
            if config.loss == "info_nce":
                return naive.info_nce(positive, negatives, config.logit_scale)
            if config.loss == "info_loob":
                return naive.info_loob(positive, negatives, config.logit_scale)
            if config.relevance_margin:
                return naive.relevance_margin(positive, negatives, near, config.margin, config.negatives)
            return naive.max_margin(positive, negatives, config.margin, config.negatives)

        if config.relevant_from:
            return naive.relevant_pairs(one, positive, values, [value >= config.relevant_from for value in near])
        return one(positive, values)

    total = 0.0
    pairs = [(captions, videos, captions, videos, 0.5), (videos, captions, captions, videos, 0.5)]
    for kind in (captions, videos):
        pairs.append((kind, kind, captions, videos, config.intra_modal_weight / 2))
    if config.retrieval_scale:
        scale = config.retrieval_scale
        of_videos = [[naive.retrieved(x, videos, scale) for x in kind] for kind in (videos, captions)]
        of_captions = [[naive.retrieved(x, captions, scale) for x in kind] for kind in (captions, videos)]
        pairs = [(*of_videos, *of_videos, 0.5), (*of_captions, *of_captions, 0.5)]
    for anchors, candidates, left, right, share in pairs:
        for i in range(size):
            row = [naive.dot(anchors[i], candidate) for candidate in candidates]
            total += share * cost(i, naive.dot(left[i], right[i]), row) / size
    for anchors, candidates in ((captions, videos), (videos, captions)):
        for i in range(size):
            row = [naive.dot(anchors[i], candidate) for candidate in candidates]
            own = [owner == owners[i] for owner in owners]
            soft = naive.soft_labels(
                row, features[i], features, own, config.logit_scale, config.soft_label_temperature
            )
            total += config.soft_label_weight * soft / 2 / size
    return total


@pytest.mark.parametrize("rebuild", REBUILD)
@pytest.mark.parametrize("drawn", [[False, True, False, True, False], [False] * 5])
def test_captions_that_are_not_drawn_are_not_rebuilt(rebuild: str, drawn: list[bool]) -> None:
    objective = make_objective(rebuild=rebuild)
    expected = slowly(objective, BATCH, [], drawn, 0.5)
    values = quickly(objective, BATCH, drawn)
    assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert (values[2] > 0) == any(drawn)
    losses = objective(np.array(BATCH), np.array(drawn), 0.5)
    losses.loss.backward()
    gradients = [parameter.grad for parameter in objective.model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("rebuild", REBUILD)
@pytest.mark.parametrize("variant", WEIGHTED)
def test_a_batch_of_one_video(variant: str, rebuild: str) -> None:
    objective = make_objective(variant=variant, rebuild=rebuild, intra_modal_weight=1.0)
    values = quickly(objective, [2, 3])
    assert values == pytest.approx(slowly(objective, [2, 3], [], [True] * 2, 0.5), rel=1e-4, abs=1e-5)
    assert values[1] == 0 and (values[2] == 0) == (variant == "cross")
    objective(np.array([2, 3]), np.array([True, True]), 0.5).loss.backward()
    gradients = [parameter.grad for parameter in objective.model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("memory_bank", [3, 100])
def test_an_empty_bank_changes_nothing(memory_bank: int) -> None:
    assert quickly(make_objective(memory_bank=memory_bank), BATCH) == quickly(make_objective(), BATCH)


@pytest.mark.parametrize("rebuild", REBUILD)
@pytest.mark.parametrize("support_values", SUPPORT_VALUES)
def test_every_learned_weight_gets_a_gradient_that_is_the_slope(rebuild: str, support_values: str) -> None:
    options = {"rebuild": rebuild, "support_values": support_values, "memory_bank": 6, "intra_modal_weight": 0.5}
    objective = make_objective(**options, learn_support_temperature=True, cross_captioning_weight=1.0)
    assert objective.bank is not None
    quickly(objective, FIRST)
    bank = {name: tensor.clone() for name, tensor in objective.bank.state_dict().items()}
    parameters = list(objective.model.parameters())
    random = torch.Generator().manual_seed(3)
    directions = [torch.randn(parameter.shape, generator=random) for parameter in parameters]

    def loss_at(step: float) -> torch.Tensor:
        objective.bank.load_state_dict(bank)
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
        return objective(np.array(BATCH), np.array([True] * 5), 0.5).loss

    loss_at(0.0).backward()
    assert all(parameter.grad is not None for parameter in parameters)
    slope = sum(
        float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True) if p.grad is not None
    )
    after = loss_at(2e-3).item()
    before = loss_at(-4e-3).item()
    assert slope == pytest.approx((after - before) / 4e-3, rel=2e-2, abs=1e-3)
