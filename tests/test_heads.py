from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F

from svb.errors import UsageError
from svb.train.config import MAX_LOGIT_SCALE, TrainConfig
from svb.train.heads import (
    AttentionPooling,
    PartNorm,
    TemporalConvolution,
    TextHead,
    VideoHead,
    mean_of_frames,
    sinusoids,
)
from svb.train.model import RetrievalModel

FEATURE_SIZE = 12
LENGTHS = (1, 3, 5, 2)
PARTS = (5, 7)  # of a row of FEATURE_SIZE, where it is fused of two
Options = dict[str, Any]
OPTIONS = [
    {"convolution": convolution, "layers": layers, "pooling": pooling}
    for convolution in (0, 3)
    for layers in (0, 2)
    for pooling in ("mean", "attention")
]
every_head = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))


def make_frames(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    frame_mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    features = torch.randn(len(LENGTHS), max(LENGTHS), FEATURE_SIZE, generator=torch.Generator().manual_seed(seed))
    return features * frame_mask[..., None], frame_mask


def make_video_head(
    feature_sizes: Sequence[int] = (FEATURE_SIZE,),
    size: int = 128,
    *,
    residual_part: int | None = None,
    **options: Any,
) -> VideoHead:
    torch.manual_seed(0)
    size = size if residual_part is None else feature_sizes[residual_part]
    options = {"convolution": 0, "layers": 0, "pooling": "mean", **options}
    return VideoHead(feature_sizes, size, **options, dropout=0.3, residual_part=residual_part).eval()


def stir(head: torch.nn.Module) -> None:
    """Move every parameter off its start, so that residual heads are no longer zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("residual_part", [None, 0])
@every_head
def test_padding_and_neighbours_change_no_embedding(options: Options, residual_part: int | None) -> None:
    head = make_video_head(residual_part=residual_part, **options)
    stir(head)
    frames, frame_mask = make_frames()
    together = head(frames, frame_mask)
    for row, length in enumerate(LENGTHS):
        alone = head(frames[row : row + 1, :length], frame_mask[row : row + 1, :length])
        torch.testing.assert_close(together.video_embeddings[row], alone.video_embeddings[0], rtol=0, atol=1e-6)
        sequence = together.frame_sequences[row, :length]
        torch.testing.assert_close(sequence, alone.frame_sequences[0], rtol=1e-5, atol=1e-5)
    garbage = head(torch.where(frame_mask[..., None], frames, 1e4), frame_mask)
    torch.testing.assert_close(garbage.video_embeddings, together.video_embeddings, rtol=0, atol=0)
    padded = head(F.pad(frames, (0, 0, 0, 4)), F.pad(frame_mask, (0, 4)))
    torch.testing.assert_close(padded.video_embeddings, together.video_embeddings, rtol=0, atol=1e-6)


@pytest.mark.parametrize("residual_part", [None, 1])
@every_head
def test_gradients_are_the_slopes(options: Options, residual_part: int | None) -> None:
    head = make_video_head(PARTS, 6, residual_part=residual_part, **options).double()
    stir(head)
    frames, frame_mask = make_frames()
    generator = torch.Generator().manual_seed(7)
    leaves = [frames.double().requires_grad_(), *head.parameters()]
    directions = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    weights = torch.randn(len(LENGTHS), head.project_out.out_features, generator=generator, dtype=torch.float64)

    def loss_at(step: float) -> torch.Tensor:
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=step)
        return (head(leaves[0], frame_mask).video_embeddings * weights).sum()

    loss_at(0.0).backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)
    slope = sum((leaf.grad * direction).sum() for leaf, direction in zip(leaves, directions, strict=True))
    assert isinstance(slope, torch.Tensor) and (leaves[0].grad[~frame_mask] == 0).all()
    after = loss_at(1e-6)
    before = loss_at(-2e-6)
    torch.testing.assert_close(slope, (after - before) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("is_residual", [False, True])
def test_gradients_of_captions_are_the_slopes(is_residual: bool) -> None:
    torch.manual_seed(0)
    head = TextHead(6, 6, dropout=0.3, residual=is_residual).double().eval()
    rows = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    if is_residual:
        torch.testing.assert_close(head(rows), F.normalize(rows, dim=-1))  # it starts as the zero-shot model
    stir(head)
    names, parameters = zip(*head.named_parameters(), strict=True)

    def embed(rows: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = torch.func.functional_call(head, dict(zip(names, values, strict=True)), rows)
        return embeddings

    assert torch.autograd.gradcheck(embed, (rows, *parameters))
    (embed(rows, *parameters) * torch.randn(4, 6)).sum().backward()
    assert all(parameter.grad.any() for parameter in parameters)


@pytest.mark.parametrize(("sizes", "part"), [((FEATURE_SIZE,), 0), (PARTS, 0), (PARTS, 1)])
@every_head
def test_a_residual_head_starts_as_the_zero_shot_model_of_its_part(
    options: Options, sizes: tuple[int, ...], part: int
) -> None:
    frames, frame_mask = make_frames()
    head = make_video_head(sizes, residual_part=part, **options)
    expected = mean_of_frames(frames.split(sizes, dim=-1)[part], frame_mask)
    # Normalising what is normalised already may move the last bit of a float32, and nothing more.
    torch.testing.assert_close(head(frames, frame_mask).video_embeddings, expected, rtol=0, atol=2e-7)
    if len(sizes) > 1:  # what it learns takes the other part into account
        stir(head)
        other = frames.clone()
        other.split(sizes, dim=-1)[1 - part].add_(torch.randn(sizes[1 - part]))
        change = head(frames, frame_mask).video_embeddings - head(other, frame_mask).video_embeddings
        assert change.abs().amax(dim=1).min() > 1e-4


def test_zero_shot_is_the_mean_of_normalised_frames() -> None:
    frames, frame_mask = make_frames()
    for row, length in enumerate(LENGTHS):
        total = sum(frame / frame.norm() for frame in frames[row, :length])
        assert isinstance(total, torch.Tensor)
        torch.testing.assert_close(mean_of_frames(frames, frame_mask)[row], total / total.norm())


@pytest.mark.parametrize("residual_part", [None, 0])
def test_embeddings_are_of_unit_length_and_captions_of_any(residual_part: int | None) -> None:
    video_head = make_video_head(residual_part=residual_part, convolution=3, layers=1, pooling="attention")
    size = video_head.project_out.out_features
    text_head = TextHead(FEATURE_SIZE, size, dropout=0.0, residual=residual_part is not None)
    for head in (video_head, text_head):
        stir(head)
    frames, frame_mask = make_frames()
    for scale in (1e-3, 1.0, 1e3):
        captions = text_head(scale * frames[:, 0])
        for embeddings in (video_head(scale * frames, frame_mask).video_embeddings, captions):
            torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4))
        torch.testing.assert_close(captions, text_head(frames[:, 0]))


@every_head
def test_the_order_of_frames_matters_to_what_looks_along_them(options: Options) -> None:
    head = make_video_head(**options)
    stir(head)
    frames, frame_mask = make_frames()
    turned = frames.clone()
    turned[2] = frames[2].flip(0)
    difference = (head(frames, frame_mask).video_embeddings - head(turned, frame_mask).video_embeddings).abs()
    assert (difference[2].max() > 1e-3) == bool(options["convolution"] or options["layers"])
    assert difference[[0, 1, 3]].max() < 1e-6


@pytest.mark.parametrize("width", [1, 3, 7])
def test_the_convolution_is_its_slow_twin(width: int) -> None:
    torch.manual_seed(0)
    convolution = TemporalConvolution(6, width, 0.3).double().eval()
    stir(convolution)
    frame_mask = make_frames()[1]
    flat = torch.randn(int(frame_mask.sum()), 6, dtype=torch.float64)
    real = frame_mask.flatten().nonzero().squeeze(1)
    branch = convolution(flat, real, frame_mask) - flat
    taps = convolution.taps.weight.view(6, 6, width).tolist()  # [to][from][tap]
    for video, branch_of_video in zip(flat.split(LENGTHS), branch.split(LENGTHS), strict=True):
        expected = naive.convolution(convolution.norm(video).tolist(), taps, convolution.taps.bias.tolist())
        torch.testing.assert_close(branch_of_video, F.gelu(torch.tensor(expected, dtype=torch.float64)))


@pytest.mark.parametrize("size", [6, 128])
def test_attention_pooling_is_its_slow_twin_and_starts_as_the_mean(size: int) -> None:
    torch.manual_seed(0)
    pooling = AttentionPooling(size).double()
    frame_mask = make_frames()[1]
    frames = torch.randn(len(LENGTHS), max(LENGTHS), size, dtype=torch.float64) * frame_mask[..., None]
    mean = torch.tensor(naive.masked_mean(frames.tolist(), frame_mask.tolist()), dtype=torch.float64)
    torch.testing.assert_close(pooling(frames, frame_mask), mean)
    torch.nn.init.normal_(pooling.query.weight)
    pooled = pooling(frames, frame_mask)
    for video, length, row in zip(frames, LENGTHS, pooled, strict=True):
        expected = naive.attention_pooling(video[:length].tolist(), pooling.query.weight.tolist())
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert (pooled - mean)[1:].abs().amax(dim=1).min() > 1e-3  # and it does weigh


def test_one_part_is_normalised_as_ever_and_several_each_by_itself() -> None:
    torch.manual_seed(0)
    rows = torch.randn(9, FEATURE_SIZE)
    norm, layer_norm = PartNorm([FEATURE_SIZE]), torch.nn.LayerNorm(FEATURE_SIZE)
    stir(norm)
    layer_norm.load_state_dict(norm.state_dict())
    assert norm(rows).equal(layer_norm(rows))
    fused = PartNorm(PARTS)
    expected = torch.cat([F.layer_norm(part, part.shape[1:]) for part in rows.split(PARTS, dim=1)], dim=1)
    torch.testing.assert_close(fused(rows), expected)
    scaled = rows * torch.tensor([1e3] * 5 + [10.0] * 7)
    torch.testing.assert_close(fused(scaled), fused(rows), rtol=0, atol=1e-3)  # a backbone's scale means nothing
    assert (norm(scaled) - norm(rows)).abs().max() > 0.5


def test_the_default_head_has_the_names_that_its_checkpoints_have() -> None:
    names = ["project_in.0.weight", "project_in.0.bias", "project_in.1.weight", "project_in.1.bias"]
    names += ["project_out.weight", "project_out.bias"]
    assert list(make_video_head().state_dict()) == names


@pytest.mark.parametrize("is_learned", [False, True])
def test_scales_that_are_learned_stay_within_their_limits(is_learned: bool) -> None:
    start = 0.02 if is_learned else 0.001
    config = TrainConfig(logit_scale=20.0, support_temperature=start, learn_support_temperature=is_learned)
    model = RetrievalModel(config, [4], 4, shared_part=None)
    assert model.logit_scale.item() == pytest.approx(20.0)
    with torch.no_grad():
        model.log_logit_scale += 50
        model.log_support_temperature -= 20 * is_learned
    model.limit_scales()
    assert model.support_temperature.item() == pytest.approx(1 / MAX_LOGIT_SCALE if is_learned else 0.001)
    assert model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)
    model.logit_scale.backward()
    assert model.log_logit_scale.grad is not None and model.log_logit_scale.grad.item() > 0


@pytest.mark.parametrize("size", [1, 2, 7, 128])
def test_positions_have_encodings_of_their_own(size: int) -> None:
    encodings = sinusoids(20, size, torch.device("cpu"))
    assert encodings.shape == (20, size) and encodings.isfinite().all()
    if size > 1:
        assert len({tuple(row) for row in encodings.tolist()}) == 20


@pytest.mark.parametrize("options", [{"layers": 1}, {"pooling": "attention"}])
def test_an_embedding_size_that_heads_do_not_divide_is_refused(options: Options) -> None:
    with pytest.raises(UsageError, match="embedding size 129 - expected a multiple of 64"):
        make_video_head(size=129, **options)
