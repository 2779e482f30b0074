"""The loss of a batch against a transcription of it in plain loops."""

from __future__ import annotations

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
    uses_relevance = config.relevant_from or config.relevance_margin
    relevance = words_relevance(CAPTIONS, np.array(CAPTION_VIDEO), len(LENGTHS)) if uses_relevance else None
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


def contrastive_slowly(
    objective: Objective, captions: naive.Matrix, seen: Sequence[naive.Seen], batch: Sequence[int], progress: float
) -> float:
    config, size = objective.config, len(batch)
    videos, owners = [one.embedding for one in seen], [one.video for one in seen]
    said = [content_words(CAPTIONS[position]) for position in batch]
    relevance = [[naive.iou(a, b) for b in said] for a in said]

    def cost(i: int, positive: float, similarities: Sequence[float]) -> float:
        others = [j for j in range(size) if owners[j] != owners[i]]
        values, near = [similarities[j] for j in others], [relevance[i][j] for j in others]

        def one(positive: float, negatives: Sequence[float]) -> float:
            if config.loss == "info_nce":
                return naive.info_nce(positive, negatives, config.logit_scale)
            if config.loss == "info_loob":
                return naive.info_loob(positive, negatives, config.logit_scale)
            which = "mean" if progress < config.negatives_warmup else config.negatives
            margins = near if config.relevance_margin else ()
            return naive.max_margin(positive, negatives, config.margin, which, margins)

        if config.relevant_from:
            return naive.relevant_pairs(one, positive, values, [value >= config.relevant_from for value in near])
        return one(positive, values)

    pairs = [(captions, videos, captions, videos, 0.5), (videos, captions, captions, videos, 0.5)]
    for kind in (captions, videos):
        pairs.append((kind, kind, captions, videos, config.intra_modal_weight / 2))
    if config.retrieval_scale:
        scale = config.retrieval_scale
        of_videos = [[naive.retrieved(x, videos, scale) for x in kind] for kind in (videos, captions)]
        of_captions = [[naive.retrieved(x, captions, scale) for x in kind] for kind in (captions, videos)]
        pairs = [(*of_videos, *of_videos, 0.5), (*of_captions, *of_captions, 0.5)]
    total = 0.0
    for anchors, candidates, left, right, share in pairs:
        for i in range(size):
            row = [naive.dot(anchors[i], candidate) for candidate in candidates]
            total += share * cost(i, naive.dot(left[i], right[i]), row) / size
    if config.soft_label_weight:
        features = objective.split.caption_features[torch.tensor(batch)].tolist()
        for anchors, candidates in ((captions, videos), (videos, captions)):
            for i in range(size):
                row = [naive.dot(anchors[i], candidate) for candidate in candidates]
                own = [owner == owners[i] for owner in owners]
                temperature = config.soft_label_temperature
                soft = naive.soft_labels(row, features[i], features, own, config.logit_scale, temperature)
                total += config.soft_label_weight * soft / 2 / size
    return total


def slowly(
    objective: Objective,
    batch: Sequence[int],
    older: Sequence[naive.Seen] = (),
    is_decoded: Sequence[bool] = (),
    progress: float = 0.5,
) -> tuple[float, float, float, float]:
    config, decoder = objective.config, objective.model.decoder

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

    captions, seen = look(objective, batch)
    return naive.objective(
        contrastive_slowly(objective, captions, seen, batch, progress),
        *(captions, seen, older, rebuild),
        variant=config.variant,
        temperature=config.support_temperature,
        weight=config.cross_captioning_weight,
        is_decoded=is_decoded or [True] * len(batch),
    )


def quickly(
    objective: Objective, batch: Sequence[int], is_decoded: Sequence[bool] = (), progress: float = 0.5
) -> list[float]:
    """Return the losses of a batch; every gradient of it must be a number."""
    losses = objective(np.array(batch), np.array(is_decoded or [True] * len(batch)), progress)
    losses.loss.backward()
    gradients = [parameter.grad for parameter in objective.model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    return [float(value) for value in losses.watched()]


def assert_is_transcribed(objective: Objective, progress: float = 0.5) -> None:
    """Compare the losses of three batches; the bank has what came before."""
    older: list[naive.Seen] = []
    for batch in (FIRST, BATCH, BATCH[::-1]):
        expected = slowly(objective, batch, older, progress=progress)
        assert quickly(objective, batch, progress=progress) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        if size := objective.config.memory_bank:
            older = [*older, *look(objective, batch)[1]][-size:]


@pytest.mark.parametrize("memory_bank", [0, 4, 20])
@pytest.mark.parametrize("support_values", SUPPORT_VALUES)
@pytest.mark.parametrize("rebuild", REBUILD)
@pytest.mark.parametrize("variant", WEIGHTED)
def test_it_is_its_transcription(variant: str, rebuild: str, support_values: str, memory_bank: int) -> None:
    options = {"rebuild": rebuild, "support_values": support_values, "memory_bank": memory_bank}
    assert_is_transcribed(make_objective(variant=variant, **options))


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"loss": "max_margin", "negatives": negatives, "intra_modal_weight": weight}
            for negatives in NEGATIVES
            for weight in (0.0, 0.7)
        ),
        {"loss": "info_nce", "intra_modal_weight": 0.7, "cross_captioning_weight": 2.0},
        {"relevant_from": 0.4},
        {"relevant_from": 0.4, "loss": "max_margin", "intra_modal_weight": 0.7},
        {"relevance_margin": True, "loss": "max_margin", "margin": 1.0},
        {"soft_label_weight": 3.0, "soft_label_temperature": 0.3},
        {"retrieval_scale": 8.0},
        {"retrieval_scale": 8.0, "loss": "info_loob", "learn_logit_scale": False},
        {"relevant_from": 0.4, "soft_label_weight": 2.0, "retrieval_scale": 4.0},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
@pytest.mark.parametrize("variant", ["none", "cross"])
def test_every_contrastive_loss_is_its_transcription(options: dict[str, Any], variant: str) -> None:
    options = {"margin": 0.5, "rebuild": "embedding", "memory_bank": 4, "variant": variant, **options}
    assert_is_transcribed(make_objective(**options))


@pytest.mark.parametrize("progress", [0.1, 0.299, 0.3])
def test_while_negatives_warm_up_all_count(progress: float) -> None:
    options = {"loss": "max_margin", "intra_modal_weight": 0.7, "negatives_warmup": 0.3}
    assert_is_transcribed(make_objective(**options), progress)


@pytest.mark.parametrize("rebuild", REBUILD)
@pytest.mark.parametrize("drawn", [[False, True, False, True, False], [False] * 5])
def test_captions_that_are_not_drawn_are_not_rebuilt(rebuild: str, drawn: list[bool]) -> None:
    objective = make_objective(rebuild=rebuild)
    values = quickly(objective, BATCH, drawn)
    assert values == pytest.approx(slowly(objective, BATCH, (), drawn), rel=1e-4, abs=1e-5)
    assert (values[2] > 0) == any(drawn)


@pytest.mark.parametrize("loss", ["info_nce", "max_margin"])
@pytest.mark.parametrize("rebuild", REBUILD)
@pytest.mark.parametrize("variant", WEIGHTED)
def test_a_batch_of_one_video(variant: str, rebuild: str, loss: str) -> None:
    """It has no negative, and cross has nothing to rebuild its captions from."""
    objective = make_objective(variant=variant, rebuild=rebuild, loss=loss, intra_modal_weight=1.0)
    values = quickly(objective, [2, 3])
    assert values == pytest.approx(slowly(objective, [2, 3]), rel=1e-4, abs=1e-5)
    assert values[1] == 0 and (values[2] == 0) == (variant == "cross")


@pytest.mark.parametrize("rebuild", REBUILD)
@pytest.mark.parametrize("support_values", SUPPORT_VALUES)
def test_every_learned_weight_gets_a_gradient_that_is_the_slope(rebuild: str, support_values: str) -> None:
    options = {"rebuild": rebuild, "support_values": support_values, "memory_bank": 6, "intra_modal_weight": 0.5}
    objective = make_objective(**options, learn_support_temperature=True, cross_captioning_weight=1.0)
    assert objective.bank is not None
    quickly(objective, FIRST)
    objective.model.zero_grad()
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
    gradients = {name: parameter.grad for name, parameter in objective.model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    slope = sum(float((gradient * d).sum()) for gradient, d in zip(gradients.values(), directions, strict=True))
    after = loss_at(2e-3).item()
    before = loss_at(-4e-3).item()
    assert slope == pytest.approx((after - before) / 4e-3, rel=2e-2, abs=1e-3)
