"""The decoder's vocabulary: the words of the training captions and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from svb.errors import InputError

PADDING, START, END, UNKNOWN = range(4)
SPECIAL = ("<padding>", "<start>", "<end>", "<unknown>")
# Longer captions are rare, and the longest of a batch sets its cost.
MAX_WORDS = 24
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


class Vocabulary:
    """Words to tokens.

    Args:
        words: In token order, without the special ones.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*SPECIAL, *words]
        self._token = {word: token for token, word in enumerate(self.words)}

    @classmethod
    def of(cls, captions: Iterable[str], min_count: int) -> Vocabulary:
        """Build the vocabulary of captions: words that stand in them at least `min_count` times.

        Raises:
            InputError: No word does.
        """
        counts = Counter(word for caption in captions for word in split_words(caption))
        words = sorted(word for word, count in counts.items() if count >= min_count)
        if not words:
            raise InputError(
                f"no word stands {min_count} times in the training captions - lower --min-word-count, or train "
                "with --variant none"
            )
        return cls(words)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str) -> list[int]:
        """Return a caption's tokens from start to end; words beyond the 24th are left out."""
        words = split_words(caption)[:MAX_WORDS]
        return [START, *(self._token.get(word, UNKNOWN) for word in words), END]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the words of a caption's tokens, the special ones left out."""
        return " ".join(self.words[token] for token in tokens if token >= len(SPECIAL))


def split_words(caption: str) -> list[str]:
    """Return the words of a caption in lower case, without punctuation."""
    return _WORD.findall(caption.lower())
