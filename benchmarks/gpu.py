"""Ten minutes that show whether svb works on a GPU, and how fast: `python benchmarks/gpu.py`. See gpu.md.

Each step is a function below, most important first. It runs in a forked process under a time limit of its own and
prints one line: PASS, FAIL or SKIP with what it found. All numbers end up in one JSON. Without a GPU the same steps
run on the CPU with small sizes, which is the test of this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import timm
import torch
from gpu_material import (
    content,
    listed_waits,
    make_clip,
    make_images,
    make_task,
    milliseconds,
    noise,
    rate,
    rate_of_graph,
    stop,
    tf32,
)

from svb.data.feature_store import FeatureStore, verify_store
from svb.device import choose_device, choose_precision, describe_device, precision_name
from svb.errors import Interrupted, SvbError, UsageError, first_line
from svb.extract.backbones import load_backbone
from svb.extract.backbones.transform import Transform
from svb.extract.compute.transform import Uploader, to_squares
from svb.extract.config import ExtractConfig
from svb.extract.run import extract
from svb.retrieve.searching.vectors import FIRST_QUERIES, GpuScan, cut_into_pieces, scan
from svb.train import loop
from svb.train.config import TrainConfig
from svb.train.retrieval_metrics import embedding_ranks, t2v_ranks, v2t_ranks
from svb.train.run import train

Found = dict[str, Any]


class Skipped(Exception):  # noqa: N818 - it is not an error
    """A step that means nothing here; says why."""


@dataclass(frozen=True)
class Place:
    """Where a step works: the device, whether sizes are small, and a folder that all steps share."""

    device: torch.device
    small: bool
    folder: Path

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def size(self, small: int, large: int) -> int:
        return small if self.small else large

    def made(self, name: str) -> Path:
        """Return what an earlier step has made."""
        if not (self.folder / name).exists():
            raise Skipped(f"{name} was not made by an earlier step")
        return self.folder / name

    def need_gpu(self) -> None:
        if not self.is_gpu:
            raise Skipped("means something on a GPU only")

    @property
    def lite(self) -> str:
        """EfficientNet-lite0, or a tiny network of its kind."""
        return self._random("test_efficientnet") if self.small else "offline:efficientnet-lite0"

    @property
    def vit(self) -> str:
        """A ViT-B/32 of random weights, or a tiny one."""
        return self._random("test_vit" if self.small else "vit_base_patch32_224")

    def _random(self, model: str) -> str:
        path = self.folder / f"{model}.pth"
        if not path.exists():
            torch.manual_seed(0)
            torch.save(timm.create_model(model, pretrained=False).state_dict(), path)
        return f"timm:{model}/{path}"

    def config(self, **options: Any) -> ExtractConfig:
        defaults = {"backbones": (self.lite,), "device": str(self.device), "batch_size": self.size(4, 32)}
        # PyTorch everywhere: several processes take it, and one might find ONNX Runtime faster on a CPU.
        return ExtractConfig(**{**defaults, "engine": "torch", "workers": 1 if self.small else None, **options})

    def training(self, **options: Any) -> TrainConfig:
        sizes = {"embedding_size": self.size(16, 512), "decoder_size": self.size(16, 256)}
        small = TrainConfig(
            **sizes, batch_size=self.size(16, 256), evaluate_every=100, val_fraction=0.0, dropout=0.0
        )
        return replace(small, **options)

    def task(self) -> tuple[Path, Path]:
        return make_task(self.folder, self.size(40, 2000), self.size(16, 512))


# --- the steps, in order


def libraries(place: Place) -> Found:
    """What is installed, and what the device is."""
    packages = ("torch", "torchvision", "timm", "av", "h5py", "numpy")
    versions = {name: metadata.version(name) for name in packages} | {"faiss": faiss.__version__}
    found = {**describe_device(place.device), "versions": versions, "cores": os.cpu_count()}
    if place.is_gpu:
        properties = torch.cuda.get_device_properties(place.device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": properties.total_memory / 1e9,
        }
        found["faiss_gpus"] = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else "no faiss-gpu"
    return found


def clips(place: Place) -> Found:
    """Two sets of clips and a still of 12,000 x 12,000, made by PyAV."""
    sets = {"short": (place.size(6, 64), place.size(2, 15), 320, 240), "large": (place.size(1, 8), 2, 1280, 720)}
    for name, (count, seconds, width, height) in sets.items():
        (place.folder / name).mkdir()
        for number in range(count):
            make_clip(place.folder / name / f"{number:03}.mp4", seconds, width, height, seed=number)
    (place.folder / "still").mkdir()
    side = place.size(1500, 12_000)
    make_clip(place.folder / "still" / "still.mkv", 0, side, side, seed=0, codec="mjpeg", pixels="yuvj420p")
    return {name: {"clips": count, "seconds": seconds} for name, (count, seconds, *_) in sets.items()}


def squares(place: Place) -> Found:
    """Frames scaled on the device are within 2 of 255 of those scaled on the CPU."""
    worst, transform = {}, Transform(224, mean=(0.5,) * 3, std=(0.5,) * 3)
    for height, width in ((240, 426), (720, 1280), (1280, 720), (100, 90), (224, 224)):
        frames = noise(2, height, width)
        on_device = to_squares(Uploader(place.device).upload(frames), transform).cpu()
        expected = to_squares(torch.from_numpy(frames), transform)
        worst[f"{width}x{height}"] = int((on_device.int() - expected).abs().max())
    _check(max(worst.values()) <= 2, f"differs by more than 2 of 255: {worst}")
    return worst


def features(place: Place) -> Found:
    """Features in every precision have the CPU's directions: the lowest cosine with its float32."""
    found, cpu = {}, torch.device("cpu")
    limits = {"float32": 0.99999, "float32 as TF32": 0.999, "bfloat16": 0.98, "float16": 0.999}
    for name in (place.lite, place.vit):
        exact = load_backbone(name, cpu, torch.float32)
        expected = exact(images := make_images(exact, place.size(4, 32)))
        for how, least in limits.items():
            if not place.is_gpu and how not in ("float32", "bfloat16"):
                continue
            with tf32(how.endswith("TF32")):
                backbone = load_backbone(name, place.device, getattr(torch, how.split()[0]))
                cosine = torch.cosine_similarity(backbone(images), expected).min()
            found[f"{_short(name)}, {how}"] = float(cosine)
            _check(float(cosine) >= least, f"{name} in {how}: cosine {float(cosine):.6f}, expected {least}")
    return found


def bits(place: Place) -> Found:
    """A row has the same bits whatever its neighbours and its place in the batch."""
    found = {}
    for name in (place.lite, place.vit):
        for dtype in dict.fromkeys((torch.float32, choose_precision(place.device))):
            backbone = load_backbone(name, place.device, dtype)
            images = make_images(backbone, place.size(4, 32))
            order = torch.randperm(len(images))
            first, again, mixed = backbone(images), backbone(images), backbone(images[order.to(place.device)])
            alone = backbone(torch.cat([images[:1], torch.zeros_like(images[1:])]))
            same = [torch.equal(first, again), torch.equal(first[order], mixed), torch.equal(first[:1], alone[:1])]
            found[f"{_short(name)}, {precision_name(dtype)}"] = dict(
                zip(("again", "permuted", "alone"), same, strict=True)
            )
    wrong = [name for name, same in found.items() if not all(same.values())]
    _check(not wrong, f"not the same bits: {', '.join(wrong)} ({found})")
    return found


def kill_and_resume(place: Place) -> Found:
    """An extraction that a signal ended and one that was not hold the same bytes."""
    videos, whole, parts = place.made("short"), place.folder / "store", place.folder / "resumed"
    extract([videos], whole, place.config())
    stopped: list[int] = []

    def stop(progress: Any) -> None:
        if 0 < progress.videos_done < progress.num_videos and not stopped:
            stopped.append(progress.videos_done)
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(Interrupted):
        extract([videos], parts, place.config(), on_progress=stop)
    held = len(FeatureStore(parts).records) if (parts / "store.json").exists() else 0
    extract([videos], parts, place.config())
    _check(content(parts) == content(whole), "other bytes after the resume")
    _check(verify_store(parts) == [], "the store is not whole")
    return {"videos": len(FeatureStore(whole).records), "held when interrupted": held}


def still(place: Place) -> Found:
    """A frame far larger than others is extracted, not the end of the run."""
    store = FeatureStore(
        extract([place.made("still")], place.folder / "still-store", place.config(max_width=16_384))
    )
    record = store.records["still"]
    _check(record.status == "ok", f"ended as {record.status}: {record.error}")
    return {"width_px": record.width_px}


def two_ranks(place: Place) -> Found:
    """Two processes on one card fill one store with the bytes of one."""
    out, config = place.folder / "ranks", place.config()
    words = ["--backbone", place.lite, "--device", config.device, "--batch-size", config.batch_size]
    words += ["--engine", config.engine, "--workers", 1, "--world-size", 2]
    command = [sys.executable, "-m", "svb", "extract", place.made("short"), "-o", out, *words]
    started = [
        subprocess.Popen(
            [*map(str, command), "--rank", str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    said = [process.communicate()[1].decode().splitlines() for process in started]
    _check(
        [process.returncode for process in started] == [0, 0], f"a rank failed: {[lines[-1:] for lines in said]}"
    )
    _check(content(out) == content(place.made("store")), "other bytes than those of one process")
    return {"ranks": 2}


def out_of_memory(place: Place) -> Found:
    """An extraction that lacks memory halves its batches and comes to its end."""
    place.need_gpu()
    total = torch.cuda.get_device_properties(place.device).total_memory
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("svb").addHandler(handler)
    torch.cuda.set_per_process_memory_fraction(1.5e9 / total, place.device)
    config = place.config(backbones=(place.vit,), batch_size=1024, precision="float32")
    store = FeatureStore(extract([place.made("short")], place.folder / "little-memory", config))
    halved = [line for line in heard if "out of memory" in line]
    _check(halved != [] and set(store.status_counts()) == {"ok"}, f"{halved}, {store.status_counts()}")
    return {"halved": len(halved)}


def waits(place: Place) -> Found:
    """Where the host waits for the GPU in a training step and in a batch of a backbone, listed by torch."""
    place.need_gpu()
    found: dict[str, list[str]] = {"step": [], "batch": []}
    step = loop.Loop._run_step

    def watched(self: loop.Loop, interrupted: Callable[[], int]) -> bool:
        with listed_waits(found["step"]):
            return step(self, interrupted)

    loop.Loop._run_step = watched  # type: ignore[method-assign]
    for name, options in {"embedding": {}, "tokens": {"rebuild": "tokens", "memory_bank": 512}}.items():
        found["step"].clear()
        train(
            *place.task(),
            place.folder / f"waits-{name}",
            place.training(epochs=2, **options),
            device="cuda",
        )
        _check(len(found["step"]) <= 3, f"{name}: a step waits {len(found['step'])} times: {found['step']}")
    backbone = load_backbone(place.lite, place.device, torch.float32)
    backbone(images := make_images(backbone, 32))
    with listed_waits(found["batch"]):
        batch = backbone.start(images)
    batch.fetch()
    return found


def rates(place: Place) -> Found:
    """Frames a second of the backbones alone: at several batch sizes, as they are, compiled and as a CUDA graph."""
    found = {}
    for name in (place.lite, place.vit):
        dtype = choose_precision(place.device)
        for size in (4,) if place.small else (32, 256, 1024):
            backbone = load_backbone(name, place.device, dtype)
            images = make_images(backbone, size)
            key = f"{_short(name)}, {size}"
            found[key] = rate(backbone.start, images, place.size(0, 2))
            if place.is_gpu:
                found[f"{key}, graph"] = rate_of_graph(backbone, images)
            if place.is_gpu and size == 256:  # it takes half a minute
                compiled = load_backbone(name, place.device, dtype, compile=True, batch_size=size)
                found[f"{key}, compiled"] = rate(compiled.start, images, 2)
    return found


def extraction(place: Place) -> Found:
    """Videos and frames a second of `svb extract` on both sets of clips, and what limited it."""
    found: Found = {}
    for clip_set in ("short", "large"):
        for batch_size in (4,) if place.small else (32, 256):
            out, last = place.folder / f"rate-{clip_set}-{batch_size}", []
            config = place.config(batch_size=batch_size)
            extract(
                [place.made(clip_set)], out, config, on_progress=lambda progress, last=last: last.append(progress)
            )
            end = last[-1]
            found[f"{clip_set}, {batch_size}"] = {
                "videos/s": end.videos_done / end.seconds,
                "frames/s": end.frames_done / end.seconds,
                "waited for decoders": end.decode_wait_share,
                "decoders waited": end.device_wait_share,
            }
    return found


def nvdec(place: Place) -> Found:
    """Frames decoded on the GPU have the features of those decoded in software."""
    place.need_gpu()
    found, stores = {}, {}
    for how, hwaccel in (("software", None), ("nvdec", "cuda")):
        began, out = time.monotonic(), place.folder / f"decoded-{how}"
        try:
            extract([place.made("large")], out, place.config(decoder="ffmpeg", hwaccel=hwaccel))
        except UsageError as error:
            raise Skipped(str(error)) from error
        found[f"{how}, s"] = time.monotonic() - began
        stores[how] = FeatureStore(out).load(place.lite).features.astype(np.float32)
    cosine = torch.cosine_similarity(*map(torch.from_numpy, stores.values())).min()
    _check(float(cosine) > 0.99, f"cosine {float(cosine):.4f} with software's")
    return {**found, "lowest cosine": float(cosine)}


def training(place: Place) -> Found:
    """Training on the device learns what the CPU learns, resumes to the same bytes, and takes up a CPU's run."""
    words = place.training(rebuild="tokens", memory_bank=64, epochs=2)
    lines = {}
    for device in dict.fromkeys(("cpu", str(place.device))):
        run = train(*place.task(), place.folder / f"run-{device[:3]}", words, device=device)
        lines[device] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    losses = list(lines.values())
    _check(abs(losses[0] - losses[-1]) <= 0.05 * losses[0], f"the loss differs by more than 5 %: {lines}")
    with contextlib.suppress(KeyboardInterrupt):
        train(*place.task(), place.folder / "stopped", words, device=str(place.device), on_epoch=stop)
    run = train(*place.task(), place.folder / "stopped", words, device=str(place.device))
    weights = [path / "last" / "model.safetensors" for path in (run, place.folder / f"run-{str(place.device)[:3]}")]
    same = weights[0].read_bytes() == weights[1].read_bytes()
    _check(
        same or place.is_gpu, "other bytes after the resume"
    )  # on a GPU, sums over threads may change their order
    half = place.training(epochs=2)
    with contextlib.suppress(KeyboardInterrupt):
        train(*place.task(), place.folder / "moved", half, device="cpu", on_epoch=stop)
    train(*place.task(), place.folder / "moved", half, device=str(place.device))
    return {"loss": lines, "same bytes after a resume": same}


def scan_of_moments(place: Place) -> Found:
    """The nearest of 10 million moments are those that the CPU finds; milliseconds a query of each."""
    rows, size = place.size(20_000, 10_000_000), place.size(64, 512)
    random = np.random.default_rng(0)
    block = random.standard_normal((min(rows, 500_000), size), np.float32).astype(np.float16)
    arrays = [np.roll(block, shift, axis=1) for shift in range(rows // len(block))]
    query = random.standard_normal(size, np.float32)
    pieces, begin = [], 0
    for array in arrays:
        pieces += cut_into_pieces(array, begin)
        begin += len(array)
    expected, found = scan(pieces, query, 10, None)[1].tolist(), {}
    found["CPU"] = milliseconds(lambda: scan(pieces, query, 10, None))
    if place.is_gpu:
        tensors = [torch.from_numpy(array).to(place.device) for array in arrays]
        half = torch.from_numpy(query).to(place.device).half()

        def products() -> list[int]:
            nearest: list[int] = torch.cat([tensor @ half for tensor in tensors]).topk(10).indices.tolist()
            return nearest

        found["torch, float16"] = milliseconds(products)
        del tensors
    gpu_scan = GpuScan(arrays, str(place.device))
    for _ in range(FIRST_QUERIES):
        gpu_scan.nearest(query, 10)
    nearest = gpu_scan.nearest(query, 10)
    if nearest is not None:
        _check(nearest[1].tolist() == expected, f"FAISS on the GPU finds {nearest[1].tolist()}, not {expected}")
        found["FAISS, GPU"] = milliseconds(lambda: gpu_scan.nearest(query, 10))
    return {"rows": rows, **found, "FAISS on the GPU": "used" if nearest is not None else "not used"}


def ranks(place: Place) -> Found:
    """Ranks in chunks on the device are those of the whole matrix; seconds for 200,000 by 10,000."""
    captions, videos = place.size(300, 200_000), place.size(50, 10_000)
    random = torch.Generator().manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(n, 64, generator=random), dim=1) for n in (captions, videos)]
    own, few = np.arange(captions) % videos, 4 * place.size(50, 500)
    similarity = (rows[0][:few] @ rows[1][: few // 4].T).numpy()
    some = rows[0][:few].to(place.device), rows[1][: few // 4].to(place.device)
    for convention in ("set", "best"):
        chunked = embedding_ranks(*some, np.arange(few) // 4, convention)
        whole = t2v_ranks(similarity, np.arange(few) // 4), v2t_ranks(similarity, np.arange(few) // 4, convention)
        differ = sum(int((a != b).sum()) for a, b in zip(chunked, whole, strict=True))
        _check(differ <= few // 500, f"{differ} ranks differ by {convention}")  # the last bits of products may
    began = time.monotonic()
    embedding_ranks(*(part.to(place.device) for part in rows), own)
    return {"captions": captions, "videos": videos, "s": time.monotonic() - began}


# Each step with the seconds that it may take on a GPU; together ten minutes.
STEPS: dict[Callable[[Place], Found], int] = {
    libraries: 15,
    clips: 40,
    squares: 15,
    features: 35,
    bits: 20,
    kill_and_resume: 40,
    still: 25,
    two_ranks: 35,
    out_of_memory: 25,
    waits: 25,
    rates: 110,
    extraction: 50,
    nvdec: 20,
    training: 50,
    scan_of_moments: 70,
    ranks: 20,
}


# --- running them


def _check(is_right: bool, words: str) -> None:
    if not is_right:
        raise AssertionError(words)


def _short(name: str) -> str:
    return name.split("/", maxsplit=1)[0].rpartition(":")[2]


def run_steps(options: argparse.Namespace, folder: Path) -> list[Found]:
    """Run every step that is asked for in a process of its own, and print its line."""
    results = []
    for step, seconds in STEPS.items():
        if options.only and step.__name__ not in options.only:
            continue
        began, path = time.monotonic(), folder / f"{step.__name__}.json"
        # Forked, it has all imports already; this process never touches the GPU, which a fork could not use then.
        process = multiprocessing.get_context("fork").Process(target=_run_step, args=(step, options, folder, path))
        process.start()
        process.join(seconds * options.patience)
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it may not lead a group yet
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()
        result = {
            "status": "FAIL",
            "words": f"ended with {process.exitcode} after {time.monotonic() - began:.0f} s",
        }
        if path.exists():
            result = json.loads(path.read_text())
        results.append({"step": step.__name__, "seconds": time.monotonic() - began, **result})
        print(
            f"{result['status']}  {step.__name__:16} {results[-1]['seconds']:6.1f} s  {result['words']}", flush=True
        )
    return results


def _run_step(step: Callable[[Place], Found], options: argparse.Namespace, folder: Path, path: Path) -> None:
    os.setsid()  # so that all that it starts ends with it
    try:
        device = choose_device(options.device)
        place = Place(device, options.small or device.type == "cpu", folder)
        if place.small:  # on a busy machine two threads wait for each other
            torch.set_num_threads(1)
        found = step(place)
        status, words = "PASS", ", ".join(f"{name} {_told(value)}" for name, value in found.items())
    except Skipped as reason:
        status, words, found = "SKIP", str(reason), {}
    except (SvbError, AssertionError, RuntimeError, OSError, ValueError, TypeError, AttributeError) as error:
        status, words, found = "FAIL", f"{type(error).__name__}: {first_line(error)}", {"error": repr(error)}
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps({"status": status, "words": words, "found": found}))
    aside.replace(path)


def _told(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    parser.add_argument("--small", action="store_true", help="small sizes, as on the CPU")
    parser.add_argument("--only", nargs="+", choices=[step.__name__ for step in STEPS], help="steps to run")
    parser.add_argument("--patience", type=float, default=1.0, help="multiply every time limit by this")
    parser.add_argument("--json", type=Path, help="write the JSON here instead of printing it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run_steps(options, Path(folder))
    text = json.dumps({"steps": results}, indent=1)
    if options.json:
        options.json.write_text(text)
    else:
        print(text)
    return int(any(result["status"] == "FAIL" for result in results))


if __name__ == "__main__":
    sys.exit(main())
