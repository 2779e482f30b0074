from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from svb.errors import InputError, UsageError
from svb.train.decoders import EmbeddingDecoder, pad
from svb.train.decoders.transformer import (
    END,
    MAX_WORDS,
    PADDING,
    SPECIAL,
    START,
    UNKNOWN,
    CaptionDecoder,
    Vocabulary,
    split_words,
)
from svb.train.losses import cross_captioning, embedding_distance
from svb.train.support_set import mix, own_mask, support_weights

MEMORY_SIZE = 6


def make_decoder(*, size: int = 32, layers: int = 2) -> CaptionDecoder:
    """Return a decoder of 11 tokens, 7 of them words."""
    torch.manual_seed(0)
    vocabulary = Vocabulary(["a", "ball", "cat", "dog", "runs", "sleeps", "the"])
    return CaptionDecoder(vocabulary, MEMORY_SIZE, size=size, layers=layers, dropout=0.1).eval()


def logits_of(decoder: Any, tokens: torch.Tensor, frames: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
    """Return the logits of what follows each token: `(B, L)` -> `(B, L, vocabulary)`."""
    hidden = decoder.hidden(tokens, frames, frame_mask, torch.ones_like(tokens, dtype=torch.bool).numpy())
    return (hidden @ decoder.output_weight.T).view(*tokens.shape, -1)


def make_memory() -> tuple[torch.Tensor, torch.Tensor]:
    frames = torch.randn(2, 4, MEMORY_SIZE, generator=torch.Generator().manual_seed(1))
    return frames, torch.tensor([[True, True, False, False], [True, True, True, True]])


def test_a_later_word_changes_no_earlier_prediction() -> None:
    decoder, memory = make_decoder(), make_memory()
    tokens = torch.tensor([[START, 4, 5, 6, 7], [START, 8, 9, 10, 4]])
    logits = logits_of(decoder, tokens, *memory)
    for position in range(1, 5):
        changed = tokens.clone()
        changed[:, position:] = 10
        other = logits_of(decoder, changed, *memory)
        torch.testing.assert_close(logits[:, :position], other[:, :position], rtol=1e-5, atol=1e-5)
        assert (logits[:, position] - other[:, position]).abs().max() > 1e-3


def test_padding_in_memory_is_ignored() -> None:
    decoder, (frames, frame_mask) = make_decoder(), make_memory()
    tokens = torch.tensor([[START, 4, 5], [START, 8, 9]])
    logits = logits_of(decoder, tokens, frames, frame_mask)
    garbage = torch.where(frame_mask[..., None], frames, 1e3)
    torch.testing.assert_close(logits_of(decoder, tokens, garbage, frame_mask), logits, rtol=1e-5, atol=1e-5)
    alone = logits_of(decoder, tokens[:1], frames[:1, :2], frame_mask[:1, :2])
    torch.testing.assert_close(alone[0], logits[0], rtol=1e-5, atol=1e-5)
    moved = frames.clone()
    moved[0, 1] += 1
    assert (logits_of(decoder, tokens, moved, frame_mask)[0] - logits[0]).abs().max() > 1e-4


def test_wanted_positions_hold_what_all_positions_hold() -> None:
    decoder, memory = make_decoder(), make_memory()
    tokens = torch.tensor([[START, 4, PADDING], [START, 8, 9]])
    wanted = torch.tensor([[True, True, False], [False, True, True]])
    everything = decoder.hidden(tokens, *memory, torch.ones_like(wanted).numpy()).view(2, 3, -1)
    some = decoder.hidden(tokens, *memory, wanted.numpy())
    torch.testing.assert_close(some, everything[wanted], rtol=1e-5, atol=1e-5)


def test_padding_of_captions_is_ignored() -> None:
    decoder, memory = make_decoder(), make_memory()
    short = logits_of(decoder, torch.tensor([[START, 4], [START, 8]]), *memory)
    padded = logits_of(decoder, torch.tensor([[START, 4, PADDING], [START, 8, PADDING]]), *memory)
    torch.testing.assert_close(padded[:, :2], short, rtol=1e-5, atol=1e-5)
    assert padded.isfinite().all()


def test_overfits_a_handful_of_captions_through_mixtures() -> None:
    captions = ["a dog runs", "a dog sleeps", "two cats play on a bed", "the cat sleeps"]
    vocabulary = Vocabulary.of(captions, 1)
    tokens = torch.from_numpy(pad([vocabulary.encode(caption) for caption in captions], PADDING))
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(4, MEMORY_SIZE), dim=-1)
    frames, frame_mask = torch.randn(4, 3, MEMORY_SIZE), torch.tensor([[True] * 3, [True] * 2 + [False]] * 2)
    own = own_mask(torch.arange(4), torch.arange(4))
    weights = support_weights(embeddings, embeddings, own, variant="cross", temperature=0.3)
    mixtures, mixture_mask = mix(weights, frames, frame_mask)
    decoder = CaptionDecoder(vocabulary, MEMORY_SIZE, size=32, layers=2, dropout=0.0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    real = tokens[:, 1:] != PADDING
    for _ in range(150):
        hidden = decoder.hidden(tokens[:, :-1], mixtures, mixture_mask, real.numpy())
        loss = cross_captioning(hidden, decoder.output_weight, tokens[:, 1:][real]) / real.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    said = logits_of(decoder, tokens[:, :-1], mixtures, mixture_mask).argmax(dim=-1)
    assert torch.equal(said[real], tokens[:, 1:][real])
    assert decoder.eval().write(mixtures, mixture_mask) == captions


def test_what_it_writes_is_the_likeliest_word_by_word() -> None:
    decoder, memory = make_decoder(), make_memory()
    captions = decoder.write(*memory)
    assert len(captions) == 2
    for row, caption in enumerate(captions):
        tokens = torch.tensor([decoder.vocabulary.encode(caption)])[:, :-1]
        logits = logits_of(decoder, tokens, *(part[row : row + 1] for part in memory))[0]
        logits[:, [PADDING, START, UNKNOWN]] = float("-inf")
        likeliest = logits.argmax(dim=-1).tolist()
        assert likeliest[:-1] == tokens[0, 1:].tolist()
        assert likeliest[-1] == END or len(caption.split()) == MAX_WORDS
    again = decoder.write(*(torch.cat([part, part]) for part in memory))
    assert again == captions * 2


def test_the_embedding_decoder_overfits_embeddings_and_ignores_padding() -> None:
    torch.manual_seed(0)
    frames, frame_mask = make_memory()
    decoder = EmbeddingDecoder(MEMORY_SIZE, 5, dropout=0.0)
    wanted, optimizer = torch.randn(2, 5), torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(100):
        loss = embedding_distance(decoder(frames, frame_mask), wanted).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
    said = decoder(frames, frame_mask)
    garbage = torch.where(frame_mask[..., None], frames, 1e3)
    torch.testing.assert_close(decoder(garbage, frame_mask), said, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoder(frames[:1, :2], frame_mask[:1, :2]), said[:1], rtol=1e-4, atol=1e-4)
    assert decoder(frames[:0], frame_mask[:0]).shape == (0, 5)


def test_the_vocabulary_is_the_words_of_the_captions_alone() -> None:
    vocabulary = Vocabulary.of(["A dog, a DOG!", "the dog's ball", "a ball"], 2)
    assert vocabulary.words == [*SPECIAL, "a", "ball", "dog"] and len(vocabulary) == 7
    assert vocabulary.encode("a dog catches the ball") == [START, 4, 6, UNKNOWN, UNKNOWN, 5, END]
    assert vocabulary.decode(vocabulary.encode("A dog, a cat")) == "a dog a"
    assert len(vocabulary.encode("dog " * 500)) == MAX_WORDS + 2
    captions = ["one two", "three two one", "four"]  # in any order
    assert Vocabulary.of(captions, 1).words == Vocabulary.of(captions[::-1], 1).words
    assert split_words("L'été, 2 Hunde -- und 猫!") == ["l'été", "2", "hunde", "und", "猫"]
    assert split_words("snake_case don't") == ["snake", "case", "don't"]
    assert pad([[START, 4, END], [START, END]], PADDING).tolist() == [[START, 4, END], [START, END, PADDING]]


def test_what_makes_no_vocabulary_or_decoder_is_refused() -> None:
    with pytest.raises(InputError, match=r"no word occurs 3 times .* --min-word-count"):
        Vocabulary.of(["a dog", "a cat"], 3)
    with pytest.raises(InputError, match="no word"):
        Vocabulary.of(["?!", "..."], 1)
    with pytest.raises(UsageError, match="decoder size 129 - expected a multiple of 64"):
        make_decoder(size=129)
