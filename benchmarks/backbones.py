"""How fast backbones run on a CPU: frames a CPU-second, on one thread, with random weights.

    python benchmarks/backbones.py

Each takes one batch of 360p frames from memory, after one that warms it up: scaled, normalised and computed as in
`svb extract`. Then its text tower takes one caption, padded, in float32. Sizes are those of weights in float32,
as the hub has them. The table is in docs/extraction.md.
"""

from __future__ import annotations

import argparse
import json
import time

import open_clip
import torch

from svb.extract.backbones import load_backbone
from svb.extract.backbones.backbone import Backbone
from svb.extract.backbones.transform import Transform
from svb.extract.compute.transform import to_squares

OFFLINE = "offline:efficientnet-lite0"
# Each with the weights whose preparation of frames it takes.
MODELS = {
    "ViT-B-32": "laion2b_s34b_b79k",
    "PE-Core-T-16-384": "meta",
    "PE-Core-S-16-384": "meta",
    "ViT-B-16": "openai",
    "PE-Core-B-16": "meta",
    "ViT-B-32-SigLIP2-256": "webli",
    "ViT-B-16-SigLIP2": "webli",
    "ViT-L-14": "openai",
    "PE-Core-L-14-336": "meta",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[OFFLINE, *MODELS], help="which to measure")
    parser.add_argument("--batch-size", type=int, default=8, help="frames in a batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        print(json.dumps(measure(name, options.batch_size)), flush=True)


def measure(name: str, batch_size: int) -> dict[str, object]:
    measured, backbone = (offline if name == OFFLINE else of_open_clip)(name)
    frames = torch.randint(0, 256, (batch_size, 360, 640, 3), dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        backbone.place(torch.device("cpu"), dtype)
        backbone(to_squares(frames[:1], backbone.transform))
        begin = time.process_time()
        backbone(to_squares(frames, backbone.transform))
        measured[str(dtype).removeprefix("torch.")] = round(batch_size / (time.process_time() - begin), 2)
    return {"model": name, "transform": str(backbone.transform), "F": backbone.feature_size, **measured}


def offline(name: str) -> tuple[dict[str, object], Backbone]:
    backbone = load_backbone(name, torch.device("cpu"), torch.float32)
    return {"MB": megabytes(backbone.module)}, backbone


def of_open_clip(name: str) -> tuple[dict[str, object], Backbone]:
    """Return the sizes of a model of random weights and the CPU-seconds of a caption, and its backbone."""
    model = open_clip.create_model(name, pretrained=None).eval().requires_grad_(False)
    config, told = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, MODELS[name])
    tokens = torch.ones(1, config["text_cfg"]["context_length"], dtype=torch.int64)
    with torch.inference_mode():
        model.encode_text(tokens)
        begin = time.process_time()
        model.encode_text(tokens)
        seconds = time.process_time() - begin
    size = model.visual.image_size
    transform = Transform(
        size if isinstance(size, int) else size[0],
        told["mean"],
        told["std"],
        mode=told["resize_mode"],
        interpolation=told["interpolation"],
    )
    measured = {
        "MB": megabytes(model),
        "MB of text": megabytes(model) - megabytes(model.visual),
        "caption s": round(seconds, 3),
    }
    return measured, Backbone(name, model.visual, transform, config["embed_dim"])


def megabytes(module: torch.nn.Module) -> int:
    return round(sum(weight.numel() for weight in module.parameters()) * 4 / 1e6)


if __name__ == "__main__":
    main()
