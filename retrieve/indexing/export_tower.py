"""The text encoder and text head of an index as one ONNX graph, so that a text search loads no torch.

The graph is checked against torch before it is believed. int8 costs a third of float32 to load and to run; it is
chosen where val captions show that it finds the videos as well.
"""

from __future__ import annotations

import copy
import errno
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from svb.extract.text_encoders.text_encoder import TextEncoder
from svb.retrieve.indexing.token_network import TokenNetwork, take_apart
from svb.retrieve.model.embedder import Embedder, heads_embedder
from svb.retrieve.model.text_tower import FORMAT, INPUT, OUTPUT, TOKENIZER, TextTower
from svb.train.retrieval_metrics import t2v_ranks

logger = logging.getLogger(__name__)

# Points of t2v R@1 that int8 may lose.
MAX_LOSS = 0.3
# Val captions that int8 embeds: 12 s of one core for MiniLM, 30 s for ViT-B/32; the loss is known to 0.2 points.
MAX_CHECKED = 5_000
# Of fewer, a loss says nothing. And an int8 farther than this from float32, in mean cosine, is another model.
MIN_CHECKED = 100
MIN_COSINE = 0.95
# The most that float32 may differ from torch, in cosine.
MAX_DISTANCE = 1e-4
# Smaller weights stay in the graph's own file.
_EXTERNAL_BYTES = 16_384
# Texts on which tokenizers differ.
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


@dataclass(frozen=True)
class ValCheck:
    """What int8 is judged by: val captions, and where they should lead.

    Attributes:
        captions: C texts.
        caption_embeddings: `(C, D)` float32, as evaluation has them: `Embedder.embed_captions` of their features.
        video_embeddings: `(V, D)` float32, of the split's videos.
        caption_video: `(C,)` row of each caption's own video.
    """

    captions: Sequence[str]
    caption_embeddings: NDArray[np.float32]
    video_embeddings: NDArray[np.float32]
    caption_video: NDArray[np.integer]


class _NotExportedError(Exception):
    """Why a text encoder stays with torch."""


def export_tower(
    folder: Path,
    embedder: Embedder,
    text_encoder: TextEncoder,
    check: ValCheck | None,
    *,
    precision: str = "auto",
) -> dict[str, Any] | None:
    """Write the files of a text tower; see `svb.retrieve.model.text_tower`.

    Args:
        folder: Where to; it stays empty where the encoder cannot be exported.
        embedder: Its text head comes after the encoder.
        text_encoder: The encoder.
        check: Val captions; with fewer than `MIN_CHECKED`, `auto` stays with float32.
        precision: `auto`, `float32` or `int8`.

    Returns:
        What its entry in the manifest says of it, or None where it cannot be exported: text search will load torch.

    Raises:
        OSError: The disk is full.
    """
    with TemporaryDirectory(dir=folder.parent, prefix=".aside-") as aside:
        try:
            entry, files = _export(Path(aside), embedder, text_encoder, check, precision)
        except _NotExportedError as error:
            logger.info(
                f"text searches of this index will load torch: {text_encoder.name} was not exported ({error})"
            )
            return None
        for file in files:
            file.rename(folder / file.name)
    logger.info(_described(entry))
    return entry


def _export(
    aside: Path, embedder: Embedder, encoder: TextEncoder, check: ValCheck | None, precision: str
) -> tuple[dict[str, Any], list[Path]]:
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
        "val": None,
    }
    _require_same_tokens(TextTower(aside, entry), parts)
    _write_graph(aside / "float32.onnx", parts, embedder, encoder.max_tokens)
    distance = _distance(TextTower(aside, entry), expected)
    if not distance <= MAX_DISTANCE:
        raise _NotExportedError(f"its graph differs from torch by a cosine of {distance:.1g}")
    if precision == "int8" or (precision == "auto" and check is not None and len(check.captions) >= MIN_CHECKED):
        entry |= judge_int8(aside, entry, check, forced=precision == "int8")
    return entry, [aside / TOKENIZER, *(aside / f"{entry['precision']}.{suffix}" for suffix in ("onnx", "bin"))]


def _take_apart(encoder: TextEncoder) -> TokenNetwork:
    try:
        parts = take_apart(encoder)
    except Exception as error:  # models differ in more ways than their families know
        raise _NotExportedError(_one_line(error)) from error
    if parts is None:
        raise _NotExportedError("its family cannot be taken apart")
    return parts


def _raise_if_disk_is_full(error: BaseException | None) -> None:
    """Let a full disk be one: the network can be exported, in a run with more space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error
        error = error.__cause__ or error.__context__


def _require_same_tokens(tower: TextTower, parts: TokenNetwork) -> None:
    for text in TRICKY:
        ours, theirs = tower.token_ids(text), parts.token_ids(text)
        ours_padding, theirs_padding = set(ours[len(theirs) :]), theirs[len(ours) :]
        if ours[: len(theirs)] != theirs or theirs_padding or not ours_padding <= {parts.padding}:
            raise _NotExportedError(f"its tokens of {text[:40]!r} came out otherwise")


def _write_graph(path: Path, parts: TokenNetwork, embedder: Embedder, max_tokens: int) -> None:
    """Write the encoder's network with the text head after it; its weights lie beside it in a `.bin`."""
    network = _NetworkAndHead(_on_cpu(parts.network), _head_on_cpu(embedder)).eval()
    length = parts.padded_to or min(8, max_tokens)
    example = torch.full((1, length), parts.padding)
    of_any_length = {1: torch.export.Dim("length", min=2, max=max_tokens)}
    try:
        with _silence(), torch.inference_mode():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={"tokens": of_any_length if parts.padded_to is None else {}},
                verbose=False,
            )
            assert program is not None
            _save(program.model_proto, path)
    except Exception as error:  # the exporter's errors have no common root
        _raise_if_disk_is_full(error)
        raise _NotExportedError(f"torch cannot export its network: {_one_line(error)}") from error


class _NetworkAndHead(nn.Module):
    """Tokens `(1, L)` -> embedding `(1, D)`, L2-normalised."""

    def __init__(self, network: nn.Module, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.head(self.network(tokens))
        return embeddings


def _save(model: Any, path: Path) -> None:
    """Write a graph with its weights beside it: mapped into memory, what is not needed of them is never read."""
    import onnx

    # The exporter notes the source line of each node, with the paths of this machine.
    for described in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        described.ClearField("metadata_props")
        described.ClearField("doc_string")
    model.graph.ClearField("value_info")
    weights = path.with_suffix(".bin")
    onnx.save(model, path, save_as_external_data=True, location=weights.name, size_threshold=_EXTERNAL_BYTES)
    weights.touch()  # a small model has none that large
    weights.chmod(path.stat().st_mode)  # onnx makes it its owner's alone


def _quantise(aside: Path) -> None:
    """Write int8.onnx: weights with a scale a row, values with one a text, found as it is embedded."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _silence():
        import onnx

        whole = aside / "quantised.onnx"
        # Products of 7 bits: on processors without VNNI two of 8 bits overflow, and an index moves about.
        quantize_dynamic(
            aside / "float32.onnx",
            whole,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        _save(onnx.load(whole), aside / "int8.onnx")


def judge_int8(folder: Path, entry: dict[str, Any], check: ValCheck | None, *, forced: bool) -> dict[str, Any]:
    """Write int8.onnx beside float32.onnx, and return what changes in the entry: the precision, what val said."""
    try:
        _quantise(folder)
        measured = None if check is None else measure(TextTower(folder, {**entry, "precision": "int8"}), check)
    except Exception as error:  # the quantiser's errors have no common root
        _raise_if_disk_is_full(error)
        if forced:
            raise _NotExportedError(f"its network cannot be had in int8: {_one_line(error)}") from error
        return {"int8_refused": _one_line(error)}
    loses = measured is not None and measured["t2v/R@1"]["float32"] - measured["t2v/R@1"]["int8"] > MAX_LOSS
    differs = measured is not None and measured["cosine"] < MIN_COSINE
    return {"precision": "int8" if forced or not (loses or differs) else "float32", "val": measured}


def measure(tower: TextTower, check: ValCheck) -> dict[str, Any]:
    """Return how an int8 tower ranks val captions, beside what evaluation has of the same captions in float32.

    At most `MAX_CHECKED` captions are embedded, evenly spaced.
    """
    rows = np.unique(np.linspace(0, len(check.captions) - 1, MAX_CHECKED).round().astype(np.int64))
    embeddings = {
        "float32": check.caption_embeddings[rows],
        "int8": tower.embed([check.captions[row] for row in rows]),
    }
    recall = {}
    for name, of_captions in embeddings.items():
        ranks = t2v_ranks(of_captions @ check.video_embeddings.T, check.caption_video[rows])
        recall[name] = round(100 * float((ranks <= 1).mean()), 4)
    cosines = (embeddings["float32"] * embeddings["int8"]).sum(axis=1)
    return {"captions": len(rows), "t2v/R@1": recall, "cosine": round(float(cosines.mean()), 5)}


def _distance(tower: TextTower, expected: NDArray[np.float32]) -> float:
    """Return how far a tower is from torch where it is farthest, as 1 - cosine."""
    try:
        embeddings = tower.embed(TRICKY)
    except Exception as error:
        raise _NotExportedError(f"its graph does not run: {_one_line(error)}") from error
    return float((1 - (embeddings * expected).sum(axis=1)).max())


def _head_on_cpu(embedder: Embedder) -> Callable[[torch.Tensor], torch.Tensor]:
    if embedder.model["kind"] != "run":  # the text encoder's own features, wherever they are
        return embedder.text_head
    return heads_embedder(embedder.model, embedder.weights, Path("heads"), torch.device("cpu")).text_head


def _on_cpu(network: nn.Module) -> nn.Module:
    """Return a network itself where it is on the CPU, or a copy: the encoder is needed where it is."""
    if all(tensor.device.type == "cpu" for tensor in network.state_dict().values()):
        return network
    return copy.deepcopy(network).cpu()


@contextmanager
def _silence() -> Iterator[None]:
    """Keep to itself what the exporter and the quantiser print, log and warn of."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _described(entry: dict[str, Any]) -> str:
    said = f"text tower: {entry['text_encoder']} in {entry['precision']}, without torch"
    if entry["val"] is not None:
        recall = entry["val"]["t2v/R@1"]
        said += f" (val t2v R@1 {recall['int8']:.1f} in int8, {recall['float32']:.1f} in float32)"
    return said
