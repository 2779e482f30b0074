"""Which engine computes a backbone, and how: graphs in ONNX Runtime, and batch norms folded into convolutions."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from extraction import CLIPS, FRAMES, assert_same_bytes, features, run
from messages import heard
from torch import nn

from svb.data.feature_store import FeatureStore
from svb.errors import MismatchError, SvbError, UsageError
from svb.extract.backbones import engine, graph, load_backbone
from svb.extract.backbones.backbone import Backbone
from svb.extract.backbones.fold import FOLDABLE, fold_batch_norms
from svb.extract.backbones.graph import backbone_key, graphs_folder
from svb.extract.backbones.transform import Transform
from svb.extract.compute.packing import Packer
from svb.extract.config import ExtractConfig

CPU = torch.device("cpu")
LITE0 = "offline:efficientnet-lite0"
pytestmark = pytest.mark.usefixtures("toy_backbones")


def load(name: str = FRAMES, chosen: str = "auto", **options: Any) -> Backbone:
    settings: dict[str, Any] = {"precision": "float32", "compile": False, "batch_size": 4, **options}
    return engine.load_backbones([name], CPU, engine=chosen, **settings)[0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of graphs of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "svb" / "graphs"


EXPORTED: dict[str, dict[str, bytes]] = {}


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of each backbone that is exported, or copied from an export of before."""
    names, real = list[str](), engine._export

    def export(backbone: Backbone, folder: Path) -> None:
        names.append(backbone.name)
        if (key := f"{backbone.name} {backbone.weights_hash}") not in EXPORTED:
            real(backbone, folder)
            EXPORTED[key] = {path.name: path.read_bytes() for path in folder.iterdir()}
        for name, content in EXPORTED[key].items():
            (folder / name).write_bytes(content)

    monkeypatch.setattr(engine, "_export", export)
    return names


def test_auto_takes_the_faster_one_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    table: list[tuple[dict[str, Any], tuple[float, float], str, str]] = [
        ({}, (0.4, 1.0), "onnx", "engine: ONNX Runtime in float32; ONNX Runtime takes 0.40 of the CPU time that"),
        ({}, (0.97, 1.0), "torch", "engine: PyTorch in float32; ONNX Runtime takes 0.97 of the CPU time"),
        ({"precision": "bfloat16"}, (0.4, 1.0), "torch", ""),  # ONNX Runtime has none
        ({"chosen": "onnx"}, (2.0, 1.0), "onnx", ""),
        ({"chosen": "torch"}, (0.4, 1.0), "torch", ""),
    ]
    load(chosen="onnx")  # is exported
    for options, (onnx_seconds, torch_seconds), expected, sentence in table:
        taken = {"onnx": onnx_seconds, "torch": torch_seconds}
        monkeypatch.setattr(engine, "_measured", lambda *arguments, taken=taken: taken)
        said = heard()
        assert load(**options).settings().get("engine", "torch") == expected
        assert [line[: len(sentence)] for line in said] == [sentence][: bool(sentence)], options
    # bfloat16 competes where it is what auto takes.
    asked: list[torch.dtype] = []

    def measured(backbone: Backbone, graph: object, dtype: torch.dtype, batch_size: int) -> dict[str, float]:
        asked.append(dtype)
        return {"onnx": 1.2, "torch": 1.0}

    monkeypatch.setattr("svb.device._cpu_has_amx", lambda: True)
    monkeypatch.setattr(engine, "_measured", measured)
    assert load(precision="auto").settings()["precision"] == "bfloat16" and asked == [torch.bfloat16]


@pytest.mark.parametrize("name", [FRAMES, CLIPS, pytest.param(LITE0, marks=pytest.mark.slow)])
def test_a_graph_does_what_torch_does(name: str) -> None:
    ours, theirs = load(name, "onnx"), load_backbone(name, CPU, torch.float32)
    images = engine._pictures(theirs, 3)
    found, expected = ours(images), theirs(images)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(found[[2, 0]], ours(images[[2, 0]]))  # whatever stands beside a row, and how many do
    without = {key: value for key, value in ours.settings().items() if key != "engine"}
    assert without == theirs.settings()


def test_a_graph_is_exported_and_measured_once(
    cache: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        load(), load(chosen="onnx")
    assert exports == [FRAMES]
    (folder,) = cache.iterdir()
    kinds = sorted(path.name.partition("-")[0] for path in folder.iterdir())
    assert kinds == ["float32.bin", "float32.onnx", "graph.json", "measured"]
    # Another svb or library may export another graph.
    monkeypatch.setattr(graph, "PACKAGES", graph.PACKAGES[:-1])
    load(chosen="onnx")
    assert exports == [FRAMES] * 2
    # A cache that cannot be written to costs only time.
    cache.parents[1].rename(cache.parents[1].with_name("moved"))
    cache.parents[1].write_text("no folder")
    for number in (3, 4):
        assert load(chosen="onnx").settings()["engine"] == "onnx" and len(exports) == number


def test_a_damaged_graph_is_made_again(cache: Path, exports: list[str]) -> None:
    load(chosen="onnx")
    (folder,) = cache.iterdir()
    weights = folder / "float32.onnx"
    whole = weights.read_bytes()
    damages = [
        lambda: weights.write_bytes(whole[:-5]),
        lambda: weights.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]),
        (folder / "float32.bin").unlink,
        lambda: (folder / "graph.json").write_text('{"files"'),
        (folder / "graph.json").unlink,  # killed half-way, as an older svb might have been
    ]
    for number, damage in enumerate(damages, start=2):
        damage()
        assert load(chosen="onnx").settings()["engine"] == "onnx" and len(exports) == number
    assert [path.name for path in cache.iterdir()] == [folder.name]  # nothing stays aside


def test_an_export_that_is_killed_leaves_nothing_that_counts(
    cache: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(graph, "_publish", lambda *arguments: sys.exit(1))
        patch.setattr(graph.shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(SystemExit):
            load(chosen="onnx")
    (left,) = cache.iterdir()
    assert left.name.startswith(".aside-")
    load(chosen="onnx")
    assert exports == [FRAMES] * 2 and len(list(cache.iterdir())) == 2


class _Unexportable(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean(dim=(2, 3))
        return 2 * means if means.sum() > 0 else means


def test_what_has_no_graph_runs_in_torch(cache: Path, monkeypatch: pytest.MonkeyPatch, exports: list[str]) -> None:
    import toy_backbone

    transform = Transform(16, (0.5,) * 3, (0.5,) * 3)
    with monkeypatch.context() as patch:
        patch.setattr(toy_backbone, "load", lambda name, *rest: Backbone(name, _Unexportable(), transform, 3))
        for _ in range(2):
            said = heard()
            assert "engine" not in load().settings()
            assert said[-1].startswith(
                "engine: PyTorch in float32, as toy:frames has no graph: torch cannot export"
            )
            with pytest.raises(SvbError, match=r"has no graph.* - leave out --engine onnx"):
                load(chosen="onnx")
    assert exports == [FRAMES]  # the reason is kept
    monkeypatch.setattr(engine, "MAX_DIFFERENCE", 0.0)
    with pytest.raises(SvbError, match=r"differs from PyTorch by .* of its range - leave out --engine onnx"):
        load(CLIPS, "onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "openvino"}, "engine is 'openvino' - expected one of auto, torch, onnx"),
        ({"engine": "onnx", "compile": True}, "got --engine onnx and --compile"),
        ({"engine": "onnx", "precision": "bfloat16"}, "precision 'bfloat16' and --engine onnx"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExtractConfig((FRAMES,), **options)
    with pytest.raises(UsageError, match="engine onnx on meta - expected a CPU"):
        engine.load_backbones(
            [FRAMES], torch.device("meta"), precision="float32", engine="onnx", compile=False, batch_size=4
        )


def test_the_engine_is_part_of_a_store(folder: Path, out: Path, tmp_path: Path) -> None:
    """`out` was made by PyTorch, and says nothing of it, as stores of before do."""
    assert "engine" not in FeatureStore(out).settings["backbones"][FRAMES]
    with pytest.raises(MismatchError, match=r"engine: stored 'torch', wanted 'onnx'.* Leave out --engine\."):
        run(folder, out, engine="onnx")
    (folder / "new.mp4").write_bytes((folder / "a.mp4").read_bytes() + b"more")
    run(folder, out, engine="auto")
    assert "new" in FeatureStore(out).video_ids
    made = tmp_path / "made"
    run(folder, made, FRAMES, CLIPS, engine="onnx")
    settings = FeatureStore(made).settings["backbones"]
    assert {name: held["engine"] for name, held in settings.items()} == {FRAMES: "onnx", CLIPS: "onnx"}
    with pytest.raises(MismatchError, match="engine: stored 'onnx', wanted 'torch'"):
        run(folder, made, FRAMES, CLIPS, engine="torch")
    for video_id, rows in features(out).items():
        np.testing.assert_allclose(features(made)[video_id], rows, atol=2e-3)


def test_a_resumed_run_repeats_to_the_byte(folder: Path, tmp_path: Path) -> None:
    """Its videos stand in other batches, and beside other videos, and the last batch is padded."""
    at_once, in_parts = tmp_path / "at-once", tmp_path / "in-parts"
    run(folder, at_once, FRAMES, CLIPS, engine="onnx", fps=3)
    for name in ("deep/d.avi", "b.mkv", "c.webm", "a.mp4"):
        run([folder / name], in_parts, FRAMES, CLIPS, engine="onnx", fps=3)
    ids = {video_id: rows.tobytes() for video_id, rows in features(in_parts).items()}
    assert {video_id.rpartition("/")[2]: rows.tobytes() for video_id, rows in features(at_once).items()} == ids
    assert len(ids) == 4
    again = tmp_path / "again"
    run(folder, again, FRAMES, CLIPS, engine="onnx", fps=3)
    assert_same_bytes(at_once, again, FRAMES, CLIPS)


def test_out_of_memory_halves_the_batch() -> None:
    backbone = load(chosen="onnx")
    expected = backbone(images := engine._pictures(backbone, 4))
    real = backbone._graph

    def small(inputs: np.ndarray) -> Any:
        if len(inputs) > 2:
            raise MemoryError("Failed to allocate memory for requested buffer of size 8")
        assert real is not None
        return real(inputs)

    backbone._graph = small  # type: ignore[assignment]
    packer, said = Packer(backbone, 4), heard()
    packer.add(0, images, np.arange(4.0))
    packer.flush()
    assert (packer.take(0)[0] == expected.numpy()).all()
    assert "out of memory on cpu, going on with 2 inputs at a time instead of 4" in said[0]


def test_a_heartbeat_does_not_wait_for_a_batch() -> None:
    """Decoders send one a second: cores would stand idle until each batch that runs has ended."""
    backbone, may_end = load_backbone(FRAMES, CPU, torch.float32), threading.Event()
    forward = backbone.module.forward

    def held_up(images: torch.Tensor) -> Any:
        assert may_end.wait(600)
        return forward(images)

    backbone.module.forward = held_up  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as executor:
        packer = Packer(backbone, 2, executor=executor, ahead=2)
        packer.add(0, engine._pictures(backbone, 2), np.arange(2.0))
        packer.fetch_done()  # as a heartbeat does
        assert not packer.is_complete(0)
        may_end.set()
        packer.fetch()
        assert packer.is_complete(0)


def test_a_graph_of_the_cache_needs_no_torch() -> None:
    backbone = load(chosen="onnx")
    images = engine._pictures(backbone, 2)
    key = backbone_key(FRAMES, json.loads(json.dumps(backbone.settings())))
    program = f"""
import json, sys
import numpy as np
from svb.extract.backbones.graph import read_graph
features = read_graph({key!r})(np.array({images.tolist()!r}, np.uint8))
print(json.dumps([features.tolist(), "torch" in sys.modules]))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    found, has_torch = json.loads(ran.stdout or "[[], null]")
    assert has_torch is False, ran.stderr
    assert np.array(found, np.float32).tolist() == backbone(images).tolist()
    assert (graphs_folder() / key).is_dir()


def settle(module: nn.Module) -> nn.Module:
    """Give the batch norms statistics such as training leaves: fresh ones change nothing."""
    generator = torch.Generator().manual_seed(1)
    for norm in batch_norms(module):
        norm.running_mean.normal_(0, 0.2, generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.normal_(0, 0.1, generator=generator)
    return module.eval().requires_grad_(False)


def batch_norms(module: nn.Module) -> list[nn.BatchNorm2d | nn.BatchNorm3d]:
    return [part for part in module.modules() if isinstance(part, FOLDABLE)]


@pytest.mark.parametrize(
    ("make", "model", "shape", "left"),
    [
        (torchvision.models.get_model, "resnet18", (3, 64, 64), 0),
        (torchvision.models.get_model, "densenet121", (3, 64, 64), 62),  # norms before a convolution, after a sum
        (torchvision.models.get_model, "r2plus1d_18", (3, 4, 32, 32), 0),
        (timm.create_model, "mobilenetv3_small_100", (3, 64, 64), 0),
        (timm.create_model, "tf_efficientnet_lite0", (3, 64, 64), 0),  # convolutions that pad by themselves
        (timm.create_model, "vit_tiny_patch16_224", (3, 224, 224), 0),
    ],
)
def test_folding_changes_no_more_than_rounding(
    make: Callable[[str], nn.Module], model: str, shape: tuple[int, ...], left: int
) -> None:
    module = settle(make(model))
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    expected, num_norms = module(images), len(batch_norms(module))
    assert fold_batch_norms(module, shape) == num_norms - left
    assert len(batch_norms(module)) == left
    torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Shared(nn.Module):
    """A convolution whose output is read beside its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        read = self.convolution(images)
        return torch.as_tensor(self.norm(read) + read)


class Twice(Shared):
    """A batch norm that two convolutions go through."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.norm(self.convolution(images)) - self.norm(self.convolution(images.flip(-1))))


@pytest.mark.parametrize("make", [Shared, Twice])
def test_what_is_read_elsewhere_is_left_alone(make: type[nn.Module]) -> None:
    module = settle(make())
    before = copy.deepcopy(module)
    images = torch.randn(2, 3, 8, 8)
    assert fold_batch_norms(module, (3, 8, 8)) == 0
    assert len(batch_norms(module)) == 1
    assert torch.equal(module(images), before(images))
