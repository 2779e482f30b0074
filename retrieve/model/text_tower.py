"""The text tower of an index without torch: a text -> tokens -> one ONNX graph -> its embedding.

tokenizer.json   text to tokens, as the `tokenizers` library reads it
float32.onnx     tokens (1, L) int64 to embeddings (1, D) float32, L2-normalised
float32.bin      its weights; mapped into memory, so only what a text needs is read

`svb.retrieve.indexing.export_tower` writes them; older versions wrote some in int8, which can still be read.
Loading takes a tenth of the CPU time of importing torch.
"""

from __future__ import annotations

import html
import string
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svb.errors import StoreError
from svb.extract.backbones.graph import open_session

if TYPE_CHECKING:
    import onnxruntime
    import tokenizers

FORMAT = "onnx tokens to embedding"
TOKENIZER = "tokenizer.json"
INPUT, OUTPUT = "tokens", "embeddings"
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TextTower:
    """A text encoder with its text head; loaded by `load`, or with the first text. Threads may share it.

    It embeds one text at a time, so an embedding does not depend on the texts beside it.

    Args:
        folder: The part's.
        entry: The tower's entry in the manifest.

    Raises:
        StoreError: A file is missing or has the wrong size, or a newer svb wrote it.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any]) -> None:
        self._folder, self._entry = folder, entry
        self._lock = threading.Lock()
        self._loaded_tokenizer: tokenizers.Tokenizer | None = None
        self._loaded_session: onnxruntime.InferenceSession | None = None
        if entry.get("format") != FORMAT or entry.get("cleaning") not in CLEANINGS:
            raise StoreError(
                f"the text tower in {folder} is {entry.get('format')!r} with cleaning {entry.get('cleaning')!r}, "
                f"which this svb does not read - upgrade svb, or {_DO_NEXT}"
            )
        for name, size in entry.get("sizes", {}).items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
                raise StoreError(f"{path} {found} - expected {size} bytes; restore it, or {_DO_NEXT}")

    def load(self) -> TextTower:
        """Load it now, and return it.

        Raises:
            StoreError: A file of it is damaged.
        """
        self._tokenizer()
        self._session()
        return self

    @property
    def max_tokens(self) -> int:
        """The most tokens that it reads, including those that it adds itself."""
        return int(self._entry["max_tokens"])

    def num_tokens(self, text: str) -> int:
        """Return how many tokens a text has, including those that the tower adds."""
        return len(self._encode(text))

    def token_ids(self, text: str) -> list[int]:
        """Return the tokens that the graph reads: a longer text is cut, and keeps its end token."""
        tokens = self._encode(text)
        if len(tokens) > self.max_tokens:
            tokens = tokens[: self.max_tokens - 1] + tokens[-1:]
        if self._entry["padded_to"] is not None:
            tokens = tokens + [int(self._entry["padding"])] * (int(self._entry["padded_to"]) - len(tokens))
        return tokens

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return `(n, D)` float32, L2-normalised, of n texts."""
        session = self._session()
        embeddings = np.empty((len(texts), int(self._entry["embedding_size"])), np.float32)
        for row, text in enumerate(texts):
            tokens = np.array([self.token_ids(text)], np.int64)
            try:
                (embedding,) = session.run([OUTPUT], {INPUT: tokens})
                embeddings[row] = embedding[0]
            except Exception as error:  # onnxruntime's errors have no common root
                raise self._damaged(error) from error
        return embeddings

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer().encode(CLEANINGS[self._entry["cleaning"]](text)).ids
        return ids

    def _tokenizer(self) -> tokenizers.Tokenizer:
        with self._lock:
            if self._loaded_tokenizer is None:
                import tokenizers

                try:
                    self._loaded_tokenizer = tokenizers.Tokenizer.from_file(str(self._folder / TOKENIZER))
                except Exception as error:  # it raises no other
                    raise self._damaged(error) from error
            return self._loaded_tokenizer

    def _session(self) -> onnxruntime.InferenceSession:
        with self._lock:
            if self._loaded_session is None:
                try:
                    self._loaded_session = open_session(self._folder / f"{self._entry['precision']}.onnx")
                except Exception as error:  # onnxruntime's errors have no common root
                    raise self._damaged(error) from error
            return self._loaded_session

    def _damaged(self, error: Exception) -> StoreError:
        reason = " ".join(str(error).split())[:200]
        return StoreError(f"the text tower in {self._folder} is damaged ({reason}) - restore it, or {_DO_NEXT}")


_DO_NEXT = "make the index again with `svb index --rebuild`"


def _fix(text: str) -> str:
    """Do what open_clip's `basic_clean` does: undo mixed-up encodings and HTML."""
    # Importing ftfy takes as long as a query, and it would not change such a text.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text.strip()


def _whitespace(text: str) -> str:
    return " ".join(_fix(text).split())


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    return " ".join(_fix(text).replace("_", " ").translate(_PUNCTUATION).lower().split())


# Cleans a text before it is cut into tokens, under open_clip's names.
CLEANINGS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "whitespace": _whitespace,
    "lower": _lower,
    "canonicalize": _canonicalize,
}
