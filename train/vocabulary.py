"""The vocabulary of the small caption decoder: the words of the training captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from svb.errors import InputError

PADDING, START, END, UNKNOWN = range(4)
SPECIAL = ("<padding>", "<start>", "<end>", "<unknown>")
# Longer captions are rare, and the longest caption of a batch sets its cost.
MAX_WORDS = 24
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


class Vocabulary:
    """Translates words to tokens.

    Args:
        words: The words in token order, without the special ones.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*SPECIAL, *words]
        self._token = {word: token for token, word in enumerate(self.words)}

    @classmethod
    def of(cls, captions: Iterable[str], min_count: int) -> Vocabulary:
        """Build a vocabulary of the words that occur in captions at least `min_count` times.

        Raises:
            InputError: No word does.
        """
        counts = Counter(word for caption in captions for word in split_words(caption))
        words = sorted(word for word, count in counts.items() if count >= min_count)
        if not words:
            raise InputError(
                f"no word occurs {min_count} times in the training captions - lower --min-word-count, or train "
                "with --variant none"
            )
        return cls(words)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str) -> list[int]:
        """Return a caption's tokens from start to end, without words beyond the 24th."""
        words = split_words(caption)[:MAX_WORDS]
        return [START, *(self._token.get(word, UNKNOWN) for word in words), END]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the words of a caption's tokens, without the special ones."""
        return " ".join(self.words[token] for token in tokens if token >= len(SPECIAL))


def split_words(caption: str) -> list[str]:
    """Return the words of a caption in lower case, without punctuation."""
    return _WORD.findall(caption.lower())
