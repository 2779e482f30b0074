from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from svb.errors import InputError, UsageError
from svb.train.decoder import CaptionDecoder
from svb.train.losses import cross_captioning
from svb.train.support_set import mix, own_mask, support_weights
from svb.train.vocabulary import END, MAX_WORDS, PADDING, SPECIAL, START, UNKNOWN, Vocabulary, pad, split_words

# Tensors this small are slower on two threads than on one.
torch.set_num_threads(1)
MEMORY_SIZE = 6


def make_decoder(vocabulary_size: int = 11, *, size: int = 32, layers: int = 2) -> CaptionDecoder:
    torch.manual_seed(0)
    return CaptionDecoder(vocabulary_size, MEMORY_SIZE, size=size, layers=layers, dropout=0.1).eval()


def make_memory() -> tuple[torch.Tensor, torch.Tensor]:
    frames = torch.randn(2, 4, MEMORY_SIZE, generator=torch.Generator().manual_seed(1))
    return frames, torch.tensor([[True, True, False, False], [True, True, True, True]])


def test_a_later_word_changes_no_earlier_prediction() -> None:
    decoder, memory = make_decoder(), make_memory()
    tokens = torch.tensor([[START, 4, 5, 6, 7], [START, 8, 9, 10, 4]])
    logits = decoder(tokens, *memory)
    for position in range(1, 5):
        changed = tokens.clone()
        changed[:, position:] = 10
        other = decoder(changed, *memory)
        torch.testing.assert_close(logits[:, :position], other[:, :position], rtol=1e-5, atol=1e-5)
        assert (logits[:, position] - other[:, position]).abs().max() > 1e-3


def test_padding_in_memory_is_ignored() -> None:
    decoder, (frames, frame_mask) = make_decoder(), make_memory()
    tokens = torch.tensor([[START, 4, 5], [START, 8, 9]])
    logits = decoder(tokens, frames, frame_mask)
    garbage = torch.where(frame_mask[..., None], frames, 1e3)
    torch.testing.assert_close(decoder(tokens, garbage, frame_mask), logits, rtol=1e-5, atol=1e-5)
    alone = decoder(tokens[:1], frames[:1, :2], frame_mask[:1, :2])
    torch.testing.assert_close(alone[0], logits[0], rtol=1e-5, atol=1e-5)
    moved = frames.clone()
    moved[0, 1] += 1
    assert (decoder(tokens, moved, frame_mask)[0] - logits[0]).abs().max() > 1e-4


def test_wanted_positions_get_the_logits_that_all_positions_get() -> None:
    decoder, memory = make_decoder(), make_memory()
    tokens = torch.tensor([[START, 4, PADDING], [START, 8, 9]])
    wanted = torch.tensor([[True, True, False], [False, True, True]])
    everything = decoder(tokens, *memory)
    torch.testing.assert_close(decoder(tokens, *memory, wanted), everything[wanted], rtol=1e-5, atol=1e-5)


def test_padding_of_captions_is_ignored() -> None:
    decoder, memory = make_decoder(), make_memory()
    short = decoder(torch.tensor([[START, 4], [START, 8]]), *memory)
    padded = decoder(torch.tensor([[START, 4, PADDING], [START, 8, PADDING]]), *memory)
    torch.testing.assert_close(padded[:, :2], short, rtol=1e-5, atol=1e-5)
    assert padded.isfinite().all()


def test_overfits_a_handful_of_captions_through_mixtures() -> None:
    captions = ["a dog runs", "a dog sleeps", "two cats play on a bed", "the cat sleeps"]
    vocabulary = Vocabulary.of(captions, 1)
    tokens = pad([vocabulary.encode(caption) for caption in captions])
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(4, MEMORY_SIZE), dim=-1)
    frames, frame_mask = torch.randn(4, 3, MEMORY_SIZE), torch.tensor([[True] * 3, [True] * 2 + [False]] * 2)
    own = own_mask(torch.arange(4), torch.arange(4))
    weights = support_weights(embeddings, embeddings, own, variant="cross", temperature=0.3)
    mixtures, mixture_mask = mix(weights, frames, frame_mask)
    decoder = CaptionDecoder(len(vocabulary), MEMORY_SIZE, size=32, layers=2, dropout=0.0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    real = tokens[:, 1:] != PADDING
    for _ in range(150):
        logits = decoder(tokens[:, :-1], mixtures, mixture_mask, real)
        loss = cross_captioning(logits, tokens[:, 1:][real])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    said = decoder(tokens[:, :-1], mixtures, mixture_mask).argmax(dim=-1)
    assert torch.equal(said[real], tokens[:, 1:][real])


def test_the_vocabulary_is_the_words_of_the_captions_alone() -> None:
    vocabulary = Vocabulary.of(["A dog, a DOG!", "the dog's ball", "a ball"], 2)
    assert vocabulary.words == [*SPECIAL, "a", "ball", "dog"]
    assert len(vocabulary) == 7
    assert vocabulary.encode("a dog catches the ball") == [START, 4, 6, UNKNOWN, UNKNOWN, 5, END]


def test_the_vocabulary_does_not_depend_on_the_order_of_captions() -> None:
    captions = ["one two", "three two one", "four"]
    assert Vocabulary.of(captions, 1).words == Vocabulary.of(captions[::-1], 1).words


def test_a_vocabulary_without_words_is_an_error() -> None:
    with pytest.raises(InputError, match=r"no word stands 3 times .* --min-word-count"):
        Vocabulary.of(["a dog", "a cat"], 3)
    with pytest.raises(InputError, match="no word"):
        Vocabulary.of(["?!", "..."], 1)


def test_words_of_any_language_are_words() -> None:
    assert split_words("L'été, 2 Hunde -- und 猫!") == ["l'été", "2", "hunde", "und", "猫"]
    assert split_words("snake_case don't") == ["snake", "case", "don't"]


def test_a_very_long_caption_is_cut() -> None:
    vocabulary = Vocabulary.of(["dog"], 1)
    assert len(vocabulary.encode("dog " * 500)) == MAX_WORDS + 2


def test_captions_are_padded_to_the_longest() -> None:
    assert pad([[START, 4, END], [START, END]]).tolist() == [[START, 4, END], [START, END, PADDING]]


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="decoder size 129 - expected a multiple of 64"):
        make_decoder(size=129)
