"""Which engine computes backbones on a CPU: PyTorch, or ONNX Runtime on their exported graphs."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svb.device import choose_precision, precision_name
from svb.errors import MismatchError, SvbError, UsageError
from svb.extract.backbones import load_backbone
from svb.extract.backbones.backbone import Backbone
from svb.extract.backbones.export import one_line, write_graph
from svb.extract.backbones.graph import (
    GRAPH,
    Graph,
    NoGraphError,
    backbone_key,
    keep_distance,
    keep_graph,
    keep_measured,
    read_graph,
    read_measured,
)
from svb.extract.backbones.transform import stored_transform

logger = logging.getLogger(__name__)

# The most that a graph may differ from PyTorch, of the largest number: rounding differs by 1e-5.
MAX_DIFFERENCE = 1e-3
COMPARED_INPUTS = 8
# How long a batch may take to measure which engine is faster; of a large network it is one input.
SECONDS_TO_MEASURE, ROUNDS = 0.7, 4
# ONNX Runtime is chosen only where it gains something.
WORTH_IT = 0.95


def load_backbones(
    names: Sequence[str], device: torch.device, *, precision: str, engine: str, compile: bool, batch_size: int
) -> list[Backbone]:
    """Load backbones with the engine that computes them, one for all, and say which it is.

    Args:
        names: `family:model[/weights]` of each.
        device: Where they run.
        precision: See `svb.device.choose_precision`; ONNX Runtime computes in float32.
        engine: `torch`, `onnx`, or `auto`: on a CPU, ONNX Runtime where it agrees with PyTorch and is faster than
            it is in the precision asked for; elsewhere PyTorch.
        compile: Compile them, which takes PyTorch.
        batch_size: B of the batches to come.

    Raises:
        SvbError: The engine is `onnx`, and a backbone cannot be exported; or as `load_backbone`.
        UsageError: The engine is `onnx`, and the device is not a CPU.
    """
    dtype = choose_precision(device, precision)
    if engine == "onnx" and device.type != "cpu":
        raise UsageError(f"engine onnx on {device} - expected a CPU: give --device cpu, or leave out --engine")
    is_open = device.type == "cpu" and not compile and precision in ("auto", "float32")
    if engine == "torch" or (engine == "auto" and not is_open):
        return [load_backbone(name, device, dtype, compile=compile, batch_size=batch_size) for name in names]
    backbones = [load_backbone(name, device, torch.float32) for name in names]
    try:
        graphs = [graph_of(backbone) for backbone in backbones]
    except (NoGraphError, OSError) as error:  # the disk may be full
        if engine == "onnx":
            raise SvbError(f"{error} - leave out --engine onnx, and PyTorch computes it") from error
        logger.info(f"engine: PyTorch in {precision_name(dtype)}, as {error}")
        return [_placed(backbone, dtype) for backbone in backbones]
    if engine == "auto" and not _is_worth_it(list(zip(backbones, graphs, strict=True)), dtype, batch_size):
        return [_placed(backbone, dtype) for backbone in backbones]
    for backbone, graph in zip(backbones, graphs, strict=True):
        backbone.use_graph(graph)
    return backbones


def load_matching_backbone(name: str, settings: Mapping[str, Any], device: torch.device) -> Backbone:
    """Load the backbone that made some features, in their precision; `settings` are those in their store.

    Frames are prepared as they were then, even where the model's library wants it otherwise by now.
    On a CPU, the engine that made them computes it too.

    Raises:
        MismatchError: The weights found under its name are others.
        SvbError: ONNX Runtime made them, and cannot run the backbone here.
    """
    backbone = load_backbone(name, device, choose_precision(device, settings["precision"]))
    if backbone.weights_hash != settings["weights_hash"]:
        raise MismatchError(
            f"{name} has weights {backbone.weights_hash} here, but {settings['weights_hash']} when the features "
            "were made - install the package versions that were used then, or extract and index again"
        )
    backbone.transform = stored_transform(settings)
    if settings.get("engine") == "onnx" and device.type == "cpu":
        backbone.use_graph(graph_of(backbone))
    return backbone


def graph_of(backbone: Backbone) -> Graph:
    """Return a backbone's graph from the cache; where it is not there, export it and compare it with PyTorch.

    Args:
        backbone: A backbone in float32 on the CPU.

    Raises:
        NoGraphError: It cannot be exported, or the graph does something else.
        OSError: The disk is full.
    """
    key = backbone_key(backbone.name, backbone.settings())
    kept = read_graph(key)
    if kept is not None:
        return kept
    logger.info(f"{backbone.name}: exporting its graph for ONNX Runtime, once on this machine")
    return keep_graph(key, lambda folder: _export(backbone, folder))


def prepare_graph(name: str, settings: Mapping[str, Any]) -> None:
    """Put the graph of a backbone that made some features into the cache, and how close it comes to them.

    Args:
        name: The backbone's name.
        settings: The backbone's settings in the store of the features.

    Raises:
        NoGraphError: The backbone has no graph.
        MismatchError: The weights found under its name are others.
    """
    key, cpu = backbone_key(name, settings), torch.device("cpu")
    if settings["precision"] == "float32":
        if read_graph(key) is None:
            graph_of(load_matching_backbone(name, {**settings, "engine": "torch"}, cpu))
        return
    if read_measured(key, {"compared_with": settings["precision"]}) is None:
        graph = graph_of(load_matching_backbone(name, {**settings, "precision": "float32"}, cpu))
        _compare(graph, load_matching_backbone(name, settings, cpu))


def _compare(graph: Graph, backbone: Backbone) -> None:
    """Keep how far a graph is from PyTorch in another precision."""
    images = _pictures(backbone, COMPARED_INPUTS)
    similarity = nn.functional.cosine_similarity(torch.from_numpy(graph(images.numpy())), backbone(images))
    key = backbone_key(backbone.name, backbone.settings())
    keep_distance(key, precision_name(backbone.dtype), 1 - float(similarity.min()))


class _Normalised(nn.Module):
    """`(B, 3, ..., S, S)` uint8 -> `(B, F)` float32."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.module = backbone.module
        shape = (3, *[1] * (len(backbone.input_shape) - 1))
        mean, std = (torch.tensor(of).view(shape) for of in (backbone.transform.mean, backbone.transform.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.module(images.float() * self.scale + self.shift)
        return features


def _export(backbone: Backbone, folder: Path) -> None:
    images = _pictures(backbone, COMPARED_INPUTS)
    network = _Normalised(backbone).eval().requires_grad_(False)
    batch = {0: torch.export.Dim("batch")}
    # The exporter would copy the network's layout in memory into the graph, step by step.
    backbone.module.to(memory_format=torch.contiguous_format)
    try:
        try:
            write_graph(network, images[:2], folder / GRAPH, names=("images", "features"), dynamic=batch)
        finally:
            backbone.place(backbone.device, torch.float32)
        ours, theirs = torch.from_numpy(Graph(folder)(images.numpy())), backbone(images)
    except NoGraphError as error:
        raise NoGraphError(f"{backbone.name} has no graph: {error}") from error
    except RuntimeError as error:
        raise NoGraphError(f"{backbone.name} has no graph: it does not run ({one_line(error)})") from error
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
    if ours.shape != theirs.shape or not difference <= MAX_DIFFERENCE:
        raise NoGraphError(
            f"{backbone.name} has no graph: it differs from PyTorch by {difference:.1g} of its range"
        )


def _is_worth_it(pairs: Sequence[tuple[Backbone, Graph]], dtype: torch.dtype, batch_size: int) -> bool:
    """Tell whether graphs are faster than PyTorch on this CPU, and say so; measured once for each backbone."""
    onnx_seconds = torch_seconds = 0.0
    for backbone, graph in pairs:
        seconds = _measured(backbone, graph, dtype, batch_size)
        onnx_seconds += seconds["onnx"]
        torch_seconds += seconds["torch"]
    is_worth_it = onnx_seconds < WORTH_IT * torch_seconds
    chosen = "ONNX Runtime in float32" if is_worth_it else f"PyTorch in {precision_name(dtype)}"
    logger.info(
        f"engine: {chosen}; ONNX Runtime takes {onnx_seconds / torch_seconds:.2f} of the CPU time that PyTorch "
        f"takes in {precision_name(dtype)}"
    )
    return is_worth_it


def _measured(backbone: Backbone, graph: Graph, dtype: torch.dtype, batch_size: int) -> dict[str, float]:
    """Return the CPU-seconds that a batch, or as much of it as takes about a second, takes on one thread."""
    key = backbone_key(backbone.name, backbone.settings())
    what = {"cpu": _cpu_name(), "precision": precision_name(dtype), "batch_size": batch_size}
    kept = read_measured(key, what)
    if kept is not None:
        return kept
    ready = backbone if dtype == torch.float32 else load_backbone(backbone.name, backbone.device, dtype)
    if ready is not backbone:
        _compare(graph, ready)
    with _one_thread():
        one = _pictures(backbone, 1)
        slower = max(_cpu_seconds(lambda: graph(one.numpy())), _cpu_seconds(lambda: ready(one)))
        images = _pictures(backbone, max(1, min(batch_size, int(SECONDS_TO_MEASURE / slower))))
        taken: dict[str, list[float]] = {"onnx": [], "torch": []}
        for _ in range(ROUNDS):  # in turn: other programs slow both down alike
            taken["onnx"].append(_cpu_seconds(lambda: graph(images.numpy())))
            taken["torch"].append(_cpu_seconds(lambda: ready(images)))
    seconds = {name: min(rounds[1:]) for name, rounds in taken.items()}  # the first warms up
    keep_measured(key, what, seconds)
    return seconds


def _cpu_seconds(run: Callable[[], object]) -> float:
    began = time.thread_time()
    run()
    return max(time.thread_time() - began, 1e-6)


def _pictures(backbone: Backbone, num_inputs: int) -> torch.Tensor:
    """Return inputs as coarse as real pictures are: areas of one colour with noise on top."""
    generator = torch.Generator().manual_seed(0)
    size = backbone.input_shape
    coarse = torch.rand(num_inputs, 3, *[max(1, side // 28) for side in size[1:]], generator=generator)
    areas = nn.functional.interpolate(coarse, size[1:])
    noise = torch.rand(num_inputs, *size, generator=generator)
    return (220 * areas + 35 * noise).to(torch.uint8)


def _placed(backbone: Backbone, dtype: torch.dtype) -> Backbone:
    backbone.place(backbone.device, dtype)
    return backbone


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
