"""Networks as ONNX graphs, kept in the user's cache: a second run exports nothing, and a graph needs no torch.

graphs/<key>/float32.onnx      the graph
             float32.bin       its weights, mapped into memory
             graph.json        the SHA-256 of both; or why the network cannot be exported
             measured-*.json   CPU-seconds of this graph and of PyTorch on one kind of CPU

The folder is `$XDG_CACHE_HOME/svb/graphs`, or `~/.cache/svb/graphs`. The key is a hash of the network's name and
weights, and of the versions of svb and of what exports and runs it. Losing the folder only costs time.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svb import __version__
from svb.config import fingerprint
from svb.data.publish import ASIDE_PREFIX, hash_file
from svb.errors import SvbError

if TYPE_CHECKING:
    import onnxruntime

GRAPH, WEIGHTS, CONTENTS = "float32.onnx", "float32.bin", "graph.json"
# Another version of one of them may export another graph, or run it otherwise.
PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "onnx", "onnxscript", "onnxruntime")
# The most that the rows of a query may differ from those that PyTorch would compute, as 1 - cosine.
MAX_DISTANCE = 1e-3


class NoGraphError(SvbError):
    """Why a network cannot be run as a graph."""


class Graph:
    """One network in ONNX Runtime, on the thread that calls it; threads may share it, and run at once.

    Python's lock is free while it runs. A row's bits depend neither on its neighbours nor on their number.

    Args:
        folder: Holds `float32.onnx` and `float32.bin`.
    """

    def __init__(self, folder: Path) -> None:
        self._session = open_session(folder / GRAPH)
        (self._input,) = (node.name for node in self._session.get_inputs())

    def __call__(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Return `(B, F)` float32 of a batch: `(B, 3, S, S)` or `(B, 3, clip_frames, S, S)` uint8 for a backbone.

        Raises:
            MemoryError: The machine has too little.
        """
        try:
            outputs: NDArray[np.float32] = self._session.run(None, {self._input: inputs})[0]
        except Exception as error:  # onnxruntime's errors have no common root
            if "allocate memory" in str(error) or "bad_alloc" in str(error):
                raise MemoryError(str(error)) from error
            raise
        return outputs


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Open a graph on one CPU thread: who wants several cores runs several batches at once."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised, and the library prints nothing
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def graph_key(described: Mapping[str, Any]) -> str:
    """Return the key of a network's graph: a hash of what describes it, and of svb's and `PACKAGES`' versions."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return fingerprint({"svb": __version__, "network": dict(described), "versions": versions})


def backbone_key(name: str, settings: Mapping[str, Any]) -> str:
    """Return the key of a backbone's graph, from its settings in a store; its precision does not matter."""
    fields = ("weights_hash", "feature_size", "image_size", "mean", "std", "clip_frames")
    return graph_key({"backbone": name, **{field: settings[field] for field in fields}})


def read_graph(key: str) -> Graph | None:
    """Return a graph of the cache; None if it is not there, or damaged.

    Raises:
        NoGraphError: An earlier export found that the network has none.
    """
    folder = graphs_folder() / key
    try:
        contents = json.loads((folder / CONTENTS).read_text("utf-8"))
        if "error" in contents:
            raise NoGraphError(contents["error"])
        is_whole = {name: hash_file(folder / name) for name in (GRAPH, WEIGHTS)} == contents["files"]
        return Graph(folder) if is_whole else None
    except NoGraphError:
        raise
    except Exception:  # whatever is wrong with it, it is made again
        return None


def graphs_folder() -> Path:
    """Return where graphs are kept; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svb" / "graphs"


def keep_graph(key: str, write: Callable[[Path], None]) -> Graph:
    """Have a graph written, open it, and keep it in the cache if that can be written to.

    Args:
        key: See `graph_key`.
        write: Writes `float32.onnx` and `float32.bin` into a folder.

    Raises:
        NoGraphError: `write` raised it; the cache keeps the reason too.
        OSError: The disk is full.
    """
    aside = _new_folder()
    try:
        try:
            write(aside)
        except NoGraphError as error:
            _publish(aside, key, {"error": str(error)})
            raise
        graph = Graph(aside)
        _publish(aside, key, {"files": {name: hash_file(aside / name) for name in (GRAPH, WEIGHTS)}})
        return graph
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _new_folder() -> Path:
    """Return an empty folder beside the graphs, or among the system's temporary files if that cannot be."""
    kept = graphs_folder()
    try:
        kept.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=ASIDE_PREFIX, dir=kept))
    except OSError:
        return Path(tempfile.mkdtemp())


def _publish(aside: Path, key: str, contents: Mapping[str, Any]) -> None:
    """Move a written folder into the cache; another process may have been faster, and a damaged one is replaced."""
    folder = graphs_folder() / key
    with contextlib.suppress(OSError):
        if aside.parent != folder.parent:  # the cache cannot be written to
            return
        (aside / CONTENTS).write_text(json.dumps(contents), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        _remove_left_over(folder.parent)


def _remove_left_over(kept: Path) -> None:
    """Remove what killed processes left more than a day ago."""
    for left in kept.glob(f"{ASIDE_PREFIX}*"):
        if left.stat().st_mtime < time.time() - 86_400:
            shutil.rmtree(left, ignore_errors=True)


def read_measured(key: str, what: Mapping[str, Any]) -> dict[str, float] | None:
    """Return what `keep_measured` kept for the same `what`, or None."""
    try:
        found: dict[str, float] = json.loads(_measured_path(key, what).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found


def keep_measured(key: str, what: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """Keep CPU-seconds by name beside a graph, if the cache can be written to."""
    path = _measured_path(key, what)
    with contextlib.suppress(OSError):
        aside = path.parent / f"{ASIDE_PREFIX}{uuid.uuid4().hex}"
        aside.write_text(json.dumps(dict(seconds)), "utf-8")
        aside.replace(path)


def resembles(key: str, precision: str) -> bool:
    """Tell whether a graph's features are close enough to those of PyTorch in a precision, as far as is known."""
    if precision == "float32":
        return True  # no other graph is kept
    kept = read_measured(key, {"compared_with": precision})
    return kept is not None and kept["distance"] <= MAX_DISTANCE


def keep_distance(key: str, precision: str, distance: float) -> None:
    """Keep how far a graph's features are from those of PyTorch in a precision, as 1 - cosine."""
    keep_measured(key, {"compared_with": precision}, {"distance": distance})


def _measured_path(key: str, what: Mapping[str, Any]) -> Path:
    return graphs_folder() / key / f"measured-{fingerprint(what)}.json"
