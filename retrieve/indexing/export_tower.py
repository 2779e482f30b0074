"""The text encoder and text head of an index as one ONNX graph, so that a text search loads no torch.

The graph is compared with torch before it is used.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from svb.extract.backbones.export import one_line, write_graph
from svb.extract.backbones.graph import NoGraphError
from svb.extract.text_encoders.text_encoder import TextEncoder
from svb.retrieve.indexing.token_network import TokenNetwork, take_apart
from svb.retrieve.model.embedder import Embedder, heads_embedder
from svb.retrieve.model.text_tower import FORMAT, INPUT, OUTPUT, TOKENIZER, TextTower

logger = logging.getLogger(__name__)

# The most that float32 may differ from torch, in cosine.
MAX_DISTANCE = 1e-4
# Texts that tokenizers treat differently.
TRICKY = (
    "a dog catches a frisbee",
    "A Dog CATCHES the FRISBEE, doesn't she?",
    "it's they're we've I'm you'll he'd 'quoted' o'clock",
    "  spaces \t and\nlines  ",
    "Zoë's naïve café, Ångström, straße, İstanbul",
    "犬がフリスビーを捕まえる 狗 개",
    "собака ловит фрисби - الكلب",
    "👩‍👩‍👧 a family 🎉🎉 ❤️",
    "rock &amp; roll &lt;b&gt; &quot;live&quot; &#39;",
    "schÃ¶n â€œbrokenâ€\x9d text…",
    "3.14159 is 22/7, 1,000,000 #tags @user snake_case e-mail",
    "(parentheses) [brackets] {braces} !?!? ... --- ***",
    "x",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "a man and a woman are talking about something in a kitchen while the dog looks on " * 40,
)


def export_tower(folder: Path, embedder: Embedder, text_encoder: TextEncoder) -> dict[str, Any] | None:
    """Write the files of a text tower; see `svb.retrieve.model.text_tower`.

    Args:
        folder: Gets the files; it stays empty if the encoder cannot be exported.
        embedder: Has the text head that follows the encoder.
        text_encoder: The encoder.

    Returns:
        The tower's entry in the manifest, or None if it cannot be exported: then text searches load torch.

    Raises:
        OSError: The disk is full.
    """
    with TemporaryDirectory(dir=folder.parent, prefix=".aside-") as aside:
        try:
            entry, files = _export(Path(aside), embedder, text_encoder)
        except NoGraphError as error:
            logger.info(
                f"text searches of this index will load torch: {text_encoder.name} was not exported ({error})"
            )
            return None
        for file in files:
            file.rename(folder / file.name)
    logger.info(f"text tower: {entry['text_encoder']}, searched without torch")
    return entry


def _export(aside: Path, embedder: Embedder, encoder: TextEncoder) -> tuple[dict[str, Any], list[Path]]:
    parts = _take_apart(encoder)
    (aside / TOKENIZER).write_text(parts.tokenizer, "utf-8")
    expected = embedder.embed_captions(torch.from_numpy(encoder.encode(TRICKY)))
    entry: dict[str, Any] = {
        "format": FORMAT,
        "text_encoder": encoder.name,
        "precision": "float32",
        "embedding_size": expected.shape[1],
        "max_tokens": encoder.max_tokens,
        "cleaning": parts.cleaning,
        "padded_to": parts.padded_to,
        "padding": parts.padding,
    }
    _require_same_tokens(TextTower(aside, entry), parts)
    _write_graph(aside / "float32.onnx", parts, embedder, encoder.max_tokens)
    distance = _distance(TextTower(aside, entry), expected)
    if not distance <= MAX_DISTANCE:
        raise NoGraphError(f"its graph differs from torch by a cosine of {distance:.1g}")
    return entry, [aside / name for name in (TOKENIZER, "float32.onnx", "float32.bin")]


def _take_apart(encoder: TextEncoder) -> TokenNetwork:
    try:
        parts = take_apart(encoder)
    except Exception as error:  # models differ in more ways than their families know
        raise NoGraphError(one_line(error)) from error
    if parts is None:
        raise NoGraphError("its family cannot be taken apart")
    return parts


def _require_same_tokens(tower: TextTower, parts: TokenNetwork) -> None:
    for text in TRICKY:
        ours, theirs = tower.token_ids(text), parts.token_ids(text)
        ours_padding, theirs_padding = set(ours[len(theirs) :]), theirs[len(ours) :]
        if ours[: len(theirs)] != theirs or theirs_padding or not ours_padding <= {parts.padding}:
            raise NoGraphError(f"its tokens of {text[:40]!r} differ")


def _write_graph(path: Path, parts: TokenNetwork, embedder: Embedder, max_tokens: int) -> None:
    """Write the encoder's network with the text head after it; its weights go into a `.bin` beside it."""
    network = _NetworkAndHead(_on_cpu(parts.network), _head_on_cpu(embedder)).eval()
    length = parts.padded_to or min(8, max_tokens)
    example = torch.full((1, length), parts.padding)
    of_any_length = {1: torch.export.Dim("length", min=2, max=max_tokens)}
    dynamic = of_any_length if parts.padded_to is None else {}
    write_graph(network, example, path, names=(INPUT, OUTPUT), dynamic=dynamic)


class _NetworkAndHead(nn.Module):
    """Tokens `(1, L)` -> embedding `(1, D)`, L2-normalised."""

    def __init__(self, network: nn.Module, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.head(self.network(tokens))
        return embeddings


def _distance(tower: TextTower, expected: NDArray[np.float32]) -> float:
    """Return how far a tower is from torch where it is farthest, as 1 - cosine."""
    try:
        embeddings = tower.embed(TRICKY)
    except Exception as error:
        raise NoGraphError(f"its graph does not run: {one_line(error)}") from error
    return float((1 - (embeddings * expected).sum(axis=1)).max())


def _head_on_cpu(embedder: Embedder) -> Callable[[torch.Tensor], torch.Tensor]:
    if embedder.model["kind"] != "run":  # the text encoder's own features, on any device
        return embedder.text_head
    return heads_embedder(embedder.model, embedder.weights, Path("heads"), torch.device("cpu")).text_head


def _on_cpu(network: nn.Module) -> nn.Module:
    """Return a network that is on the CPU: itself, or a copy, as the encoder must stay where it is."""
    if all(tensor.device.type == "cpu" for tensor in network.state_dict().values()):
        return network
    return copy.deepcopy(network).cpu()
