"""Which engine computes backbones, the cache of graphs, and that a graph does what torch does."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extraction import CLIPS, FRAMES, assert_same_bytes, features, run
from messages import heard
from torch import nn

from svb.data.feature_store import FeatureStore
from svb.errors import MismatchError, SvbError, UsageError
from svb.extract.backbones import engine, graph, load_backbone
from svb.extract.backbones.backbone import Backbone
from svb.extract.backbones.graph import backbone_key, graphs_folder
from svb.extract.backbones.transform import Transform, squares_by_pil, stored_transform
from svb.extract.compute.packing import Packer
from svb.extract.compute.transform import to_squares
from svb.extract.config import ExtractConfig

CPU = torch.device("cpu")
LITE0 = "offline:efficientnet-lite0"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
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


def seconds(onnx: float, torch: float) -> Any:
    return lambda *arguments: {"onnx": onnx, "torch": torch}


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
        monkeypatch.setattr(engine, "_measured", seconds(onnx_seconds, torch_seconds))
        said = heard()
        assert load(**options).settings().get("engine", "torch") == expected
        assert [line[: len(sentence)] for line in said] == [sentence][: bool(sentence)], options


def test_bfloat16_competes_where_it_is_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svb.device._cpu_has_amx", lambda: True)
    asked: list[torch.dtype] = []

    def measured(backbone: Backbone, graph: object, dtype: torch.dtype, batch_size: int) -> dict[str, float]:
        asked.append(dtype)
        return {"onnx": 1.2, "torch": 1.0}

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


def test_a_graph_is_exported_and_measured_once(cache: Path, exports: list[str]) -> None:
    for _ in range(2):
        load(), load(chosen="onnx")
    assert exports == [FRAMES]
    (folder,) = cache.iterdir()
    kinds = sorted(path.name.partition("-")[0] for path in folder.iterdir())
    assert kinds == ["float32.bin", "float32.onnx", "graph.json", "measured"]
    # Another svb or library may export another graph.
    before = graph.PACKAGES
    try:
        graph.PACKAGES = before[:-1]
        load(chosen="onnx")
    finally:
        graph.PACKAGES = before
    assert exports == [FRAMES] * 2


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


def test_a_cache_that_cannot_be_written_to_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: list[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for number in (1, 2):
        assert load(chosen="onnx").settings()["engine"] == "onnx" and len(exports) == number


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


def test_a_gpu_has_pytorch_alone() -> None:
    options: dict[str, Any] = {"precision": "float32", "compile": False, "batch_size": 4}
    with pytest.raises(UsageError, match="engine onnx on meta - expected a CPU"):
        engine.load_backbones([FRAMES], torch.device("meta"), engine="onnx", **options)


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


TRANSFORMS = {
    "CLIP": Transform(224, MEAN, STD),
    "SigLIP 2": Transform(256, MEAN, STD, mode="squash", resize_px=(256, 256)),
    "PE-Core": Transform(224, MEAN, STD, mode="squash", resize_px=(224, 224), interpolation="bilinear"),
    "ResNet": Transform(224, MEAN, STD, resize_px=(232, 232), interpolation="bilinear"),
    "padded": Transform(224, MEAN, STD, mode="longest", resize_px=(224, 224), fill=(10, 20, 30)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_squares_of_pil_are_those_of_torch(transform: Transform) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in ((240, 426), (426, 240), (224, 224), (720, 1280), (90, 160)):
        coarse = torch.rand(2, 3, size[0] // 8, size[1] // 8, generator=generator)
        smooth = nn.functional.interpolate(coarse, size, mode="bilinear")
        frames = (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        ours = squares_by_pil(frames.numpy(), stored_transform(json.loads(json.dumps(transform.settings()))))
        theirs = to_squares(frames, transform).numpy()
        assert np.abs(ours.astype(int) - theirs).max() <= 2, size


def test_features_of_pil_are_those_of_torch() -> None:
    backbone = load_backbone(LITE0, CPU, torch.float32)
    frames = torch.randint(0, 256, (2, 30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    frames = frames.repeat_interleave(8, 1).repeat_interleave(8, 2)
    ours = torch.from_numpy(squares_by_pil(frames.numpy(), backbone.transform))
    found, expected = backbone(ours), backbone(to_squares(frames, backbone.transform))
    assert nn.functional.cosine_similarity(found, expected).min() > 0.9999


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
