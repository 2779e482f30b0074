"""Writes a network as an ONNX graph. Imports torch; `svb.extract.backbones.graph` runs graphs without it."""

from __future__ import annotations

import errno
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svb.extract.backbones.graph import NoGraphError

# Smaller weights stay in the graph's own file.
_EXTERNAL_BYTES = 16_384


def write_graph(
    network: nn.Module, example: torch.Tensor, path: Path, *, names: tuple[str, str], dynamic: dict[int, Any]
) -> None:
    """Write a network of one input and one output; its weights lie beside it in a `.bin`.

    Args:
        network: A network in float32 on the CPU, in evaluation mode.
        example: An input.
        path: The graph's file, which ends in `.onnx`.
        names: The names of the input and the output.
        dynamic: Dimensions of the input that may have other sizes than the example's, as `torch.export.Dim`.

    Raises:
        NoGraphError: torch cannot export it.
        OSError: The disk is full.
    """
    try:
        with _quietly(), torch.inference_mode():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                input_names=[names[0]],
                output_names=[names[1]],
                dynamic_shapes=(dynamic,),
                verbose=False,
            )
            assert program is not None
            _save(program.model_proto, path)
    except Exception as error:  # the exporter's errors have no common root
        _raise_if_disk_is_full(error)
        raise NoGraphError(f"torch cannot export its network: {one_line(error.__cause__ or error)}") from error


def one_line(error: BaseException) -> str:
    """Return the beginning of an error's words; the exporter's fill pages."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _save(model: Any, path: Path) -> None:
    """Write a graph with its weights beside it: they are mapped into memory, and unused ones are never read."""
    import onnx

    # The exporter notes the source line of each node, with paths of this machine.
    for described in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        described.ClearField("metadata_props")
        described.ClearField("doc_string")
    model.graph.ClearField("value_info")
    weights = path.with_suffix(".bin")
    onnx.save(model, path, save_as_external_data=True, location=weights.name, size_threshold=_EXTERNAL_BYTES)
    weights.touch()  # a small model has no weights that large
    weights.chmod(path.stat().st_mode)  # onnx lets only its owner read it


def _raise_if_disk_is_full(error: BaseException | None) -> None:
    """Pass a full disk on: the network could be exported in a run with more space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error
        error = error.__cause__ or error.__context__


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide what the exporter prints, logs and warns about."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
