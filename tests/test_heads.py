from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from svb.errors import UsageError
from svb.train.config import MAX_LOGIT_SCALE, TrainConfig
from svb.train.heads import TextHead, VideoHead, mean_of_frames, sinusoids
from svb.train.losses import cross_captioning, info_nce
from svb.train.metrics import t2v_ranks
from svb.train.model import RetrievalModel
from svb.train.support_set import mix, own_mask, support_weights

FEATURE_SIZE, EMBEDDING_SIZE = 12, 128
LENGTHS = (1, 3, 5, 2)


def make_frames(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    frame_mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    features = torch.randn(len(LENGTHS), max(LENGTHS), FEATURE_SIZE, generator=torch.Generator().manual_seed(seed))
    return features * frame_mask[..., None], frame_mask


def make_video_head(layers: int = 1, *, residual: bool = False, dropout: float = 0.3) -> VideoHead:
    torch.manual_seed(0)
    size = FEATURE_SIZE if residual else EMBEDDING_SIZE
    return VideoHead(FEATURE_SIZE, size, layers=layers, dropout=dropout, residual=residual).eval()


def stir(head: torch.nn.Module) -> None:
    """Move every parameter off its start, so that residual heads are no longer zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_padding_and_neighbours_change_no_embedding(layers: int, residual: bool) -> None:
    head = make_video_head(layers, residual=residual)
    stir(head)
    frames, frame_mask = make_frames()
    together = head(frames, frame_mask)
    for row, length in enumerate(LENGTHS):
        alone = head(frames[row : row + 1, :length], frame_mask[row : row + 1, :length])
        torch.testing.assert_close(together.video_embeddings[row], alone.video_embeddings[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(
            together.frame_sequences[row, :length], alone.frame_sequences[0], rtol=1e-5, atol=1e-5
        )
    garbage = torch.where(frame_mask[..., None], frames, 1e4)
    torch.testing.assert_close(
        head(garbage, frame_mask).video_embeddings, together.video_embeddings, rtol=0, atol=0
    )
    padded, padded_mask = F.pad(frames, (0, 0, 0, 4)), F.pad(frame_mask, (0, 4))
    torch.testing.assert_close(
        head(padded, padded_mask).video_embeddings, together.video_embeddings, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("layers", [0, 1])
def test_residual_heads_start_as_the_zero_shot_model(layers: int) -> None:
    video_head = make_video_head(layers, residual=True)
    torch.manual_seed(0)
    text_head = TextHead(FEATURE_SIZE, FEATURE_SIZE, dropout=0.3, residual=True).eval()
    frames, frame_mask = make_frames()
    captions = torch.randn(4, FEATURE_SIZE, generator=torch.Generator().manual_seed(5))
    videos, zero_shot_videos = video_head(frames, frame_mask).video_embeddings, mean_of_frames(frames, frame_mask)
    # Normalising what is normalised already may move the last bit of a float32, and nothing more.
    torch.testing.assert_close(videos, zero_shot_videos, rtol=0, atol=2e-7)
    torch.testing.assert_close(text_head(captions), F.normalize(captions, dim=-1), rtol=0, atol=2e-7)
    own = np.arange(4)
    np.testing.assert_array_equal(
        t2v_ranks((text_head(captions) @ videos.T).detach().numpy(), own),
        t2v_ranks((F.normalize(captions, dim=-1) @ zero_shot_videos.T).numpy(), own),
    )


def test_zero_shot_is_the_mean_of_normalised_frames() -> None:
    frames, frame_mask = make_frames()
    for row, length in enumerate(LENGTHS):
        total = sum(frame / frame.norm() for frame in frames[row, :length])
        assert isinstance(total, torch.Tensor)
        torch.testing.assert_close(mean_of_frames(frames, frame_mask)[row], total / total.norm())


@pytest.mark.parametrize("residual", [False, True])
def test_embeddings_are_of_unit_length(residual: bool) -> None:
    video_head = make_video_head(residual=residual)
    size = FEATURE_SIZE if residual else EMBEDDING_SIZE
    text_head = TextHead(FEATURE_SIZE, size, dropout=0.0, residual=residual)
    for head in (video_head, text_head):
        stir(head)
    for scale in (1e-3, 1.0, 1e3):
        frames, frame_mask = make_frames()
        for embeddings in (
            video_head(scale * frames, frame_mask).video_embeddings,
            text_head(scale * frames[:, 0]),
        ):
            torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4))


def test_the_length_of_caption_features_means_nothing() -> None:
    text_head = TextHead(FEATURE_SIZE, EMBEDDING_SIZE, dropout=0.0, residual=False)
    captions = torch.randn(4, FEATURE_SIZE)
    torch.testing.assert_close(text_head(captions), text_head(7 * captions))


@pytest.mark.parametrize(("layers", "matters"), [(0, False), (1, True)])
def test_the_order_of_frames_matters_to_the_transformer_alone(layers: int, matters: bool) -> None:
    head = make_video_head(layers)
    frames, frame_mask = make_frames()
    turned = frames.clone()
    turned[2] = frames[2].flip(0)
    difference = (head(frames, frame_mask).video_embeddings - head(turned, frame_mask).video_embeddings).abs()
    assert (difference[2].max() > 1e-3) == matters
    assert difference[[0, 1, 3]].max() < 1e-6


@pytest.mark.parametrize("shared_space", [False, True])
@pytest.mark.parametrize("variant", ["none", "cross"])
def test_gradients_reach_every_parameter(variant: str, shared_space: bool) -> None:
    torch.manual_seed(0)
    size = EMBEDDING_SIZE
    config = TrainConfig(embedding_size=size, decoder_size=16, variant=variant, layers=2)
    text_size = size if shared_space else 7
    model = RetrievalModel(
        config, size, text_size, shared_space=shared_space, vocabulary_size=9 if variant == "cross" else None
    )
    if shared_space:  # at a residual of zero only the last layers move in the first step
        stir(model)
    frame_mask = torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]
    video_embeddings, sequences = model.video_head(torch.randn(4, 5, size), frame_mask)
    caption_embeddings = model.text_head(torch.randn(4, text_size))
    own = own_mask(torch.arange(4), torch.arange(4))
    loss = info_nce(caption_embeddings @ video_embeddings.T, own, model.logit_scale)
    if model.decoder is not None:
        weights = support_weights(caption_embeddings, video_embeddings, own, variant="cross", temperature=0.1)
        tokens = torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0], [1, 7, 2, 0], [1, 8, 4, 2]])
        is_word = tokens[:, 1:] != 0
        logits = model.decoder(tokens[:, :-1], *mix(weights, sequences, frame_mask), is_word)
        loss = loss + cross_captioning(logits, tokens[:, 1:][is_word])
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_the_logit_scale_stays_within_its_limit() -> None:
    model = RetrievalModel(TrainConfig(logit_scale=20.0), 4, 4, shared_space=False, vocabulary_size=None)
    assert model.logit_scale.item() == pytest.approx(20.0)
    with torch.no_grad():
        model.log_logit_scale += 50
    model.limit_logit_scale()
    assert model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)
    model.logit_scale.backward()
    assert model.log_logit_scale.grad is not None and model.log_logit_scale.grad.item() > 0


@pytest.mark.parametrize("size", [1, 2, 7, 128])
def test_positions_have_encodings_of_their_own(size: int) -> None:
    encodings = sinusoids(20, size, torch.device("cpu"))
    assert encodings.shape == (20, size) and encodings.isfinite().all()
    if size > 1:
        assert len({tuple(row) for row in encodings.tolist()}) == 20


def test_an_embedding_size_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="embedding size 129 - expected a multiple of 64"):
        VideoHead(8, 129, layers=1, dropout=0.0, residual=False)
