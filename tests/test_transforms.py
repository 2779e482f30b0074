"""Each backbone sees the picture that its library would have made: pixel by pixel, and in its features."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
import toy_backbone
from extraction import features, run
from messages import heard
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from test_backbones import MEAN, STD, TINY_CLIP, cosine, load, picture
from torch import nn
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor
from torchvision.transforms.functional import InterpolationMode

from svb.config import fingerprint
from svb.data.feature_store import FeatureStore
from svb.errors import MismatchError, UsageError
from svb.extract.backbones.backbone import Backbone
from svb.extract.backbones.engine import load_matching_backbone
from svb.extract.backbones.transform import PLAIN, Transform, squares_by_pil, stored_transform
from svb.extract.compute.transform import to_squares
from svb.extract.decode.options import stored_decode_options
from svb.extract.one_file import OneFile

CPU = torch.device("cpu")
# Wide, upright, smaller than any network's square, and strips that are cropped or padded nearly to nothing.
SHAPES = ((360, 640), (640, 360), (45, 80), (20, 300), (224, 224))

# What a library itself makes of a frame, as its network takes it; and its whole network without svb's code.
Preprocess = Callable[[NDArray[np.uint8]], torch.Tensor]
Made = tuple[str, Preprocess, nn.Module]


def of_open_clip(folder: Path, **preprocess: Any) -> Made:
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY_CLIP).eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": {"mean": MEAN, "std": STD, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    on_pil = image_transform_v2(
        PreprocessCfg(**{"size": 32, "mean": MEAN, "std": STD, **preprocess}), is_train=False
    )
    return f"open_clip:local-dir:{folder}", lambda frame: on_pil(Image.fromarray(frame)), model.visual


def of_timm(folder: Path, patch: pytest.MonkeyPatch, model: str = "test_resnet", **config: Any) -> Made:
    torch.manual_seed(0)
    module: Any = timm.create_model(model, pretrained=False).eval()
    save_file(module.state_dict(), folder / "w.safetensors")
    create = timm.create_model

    def configured(name: str, pretrained_cfg_overlay: dict[str, Any], pretrained: bool) -> nn.Module:
        return create(name, pretrained=pretrained, pretrained_cfg_overlay={**pretrained_cfg_overlay, **config})

    patch.setattr(timm, "create_model", configured)
    resolved = timm.data.resolve_data_config(pretrained_cfg={**module.pretrained_cfg, **config})
    on_pil = timm.data.create_transform(**resolved)
    module.reset_classifier(0)
    return f"timm:{model}/{folder / 'w.safetensors'}", lambda frame: on_pil(Image.fromarray(frame)), module


def of_torchvision(folder: Path, model: str) -> Made:
    torch.manual_seed(0)
    module = torchvision.models.get_model(model, weights=None).eval()
    torch.save(module.state_dict(), folder / "w.pth")
    preset = torchvision.models.get_model_weights(model).DEFAULT.transforms()
    module.fc = nn.Identity()
    is_video = hasattr(torchvision.models.video, model)

    def prepare(frame: NDArray[np.uint8]) -> torch.Tensor:
        if is_video:  # its preset takes tensors alone: (T, 3, H, W), and returns (3, T, S, S)
            return preset(torch.from_numpy(frame).permute(2, 0, 1)[None])[:, 0]  # type: ignore[no-any-return]
        return preset(Image.fromarray(frame))  # type: ignore[no-any-return]

    return f"torchvision:{model}/{folder / 'w.pth'}", prepare, module


def of_offline() -> Made:
    backbone = load("offline:efficientnet-lite0")
    steps = [Resize(224, InterpolationMode.BICUBIC), CenterCrop(224), ToTensor()]
    on_pil = Compose([*steps, Normalize((127 / 255,) * 3, (128 / 255,) * 3)])
    return backbone.name, lambda frame: on_pil(Image.fromarray(frame)), backbone.module


CASES: dict[str, Callable[[Path, pytest.MonkeyPatch], Made]] = {
    "open_clip, shortest": lambda folder, _: of_open_clip(folder),
    "open_clip, shortest, bilinear": lambda folder, _: of_open_clip(folder, interpolation="bilinear"),
    "open_clip, squash (SigLIP)": lambda folder, _: of_open_clip(folder, resize_mode="squash"),
    "open_clip, squash, bilinear (PE-Core)": lambda folder, _: of_open_clip(
        folder, resize_mode="squash", interpolation="bilinear"
    ),
    "open_clip, longest": lambda folder, _: of_open_clip(folder, resize_mode="longest", fill_color=127),
    "timm, centre": lambda folder, patch: of_timm(folder, patch, crop_pct=0.875, interpolation="bicubic"),
    "timm, bilinear": lambda folder, patch: of_timm(folder, patch, crop_pct=0.95, interpolation="bilinear"),
    "timm, whole": lambda folder, patch: of_timm(folder, patch, crop_pct=1.0, interpolation="bicubic"),
    "timm, squash": lambda folder, patch: of_timm(folder, patch, crop_pct=0.9, crop_mode="squash"),
    "timm, border": lambda folder, patch: of_timm(folder, patch, crop_pct=0.9, crop_mode="border"),
    "torchvision, 256": lambda folder, _: of_torchvision(folder, "resnet18"),
    "torchvision, 232": lambda folder, _: of_torchvision(folder, "regnet_y_400mf"),
    "torchvision, video": lambda folder, _: of_torchvision(folder, "r3d_18"),
    "offline": lambda *_: of_offline(),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case == "torchvision, video" else case for case in CASES]
)
def test_frames_are_prepared_as_the_library_does(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both by torch, as an extraction does, and by PIL, as a search without torch does from what a store says."""
    name, prepare, module = CASES[case](tmp_path, monkeypatch)
    backbone = load(name)
    stored = stored_transform(json.loads(json.dumps(backbone.transform.settings())))
    assert stored.settings() == backbone.transform.settings()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (stored.mean, stored.std))

    def repeated(images: torch.Tensor) -> torch.Tensor:
        frames = backbone.clip_frames
        return images.unsqueeze(2).expand(-1, -1, frames, -1, -1) if frames > 1 else images

    pair = torch.stack([torch.from_numpy(picture(seed)) for seed in range(2)])
    alone = [to_squares(frame[None], backbone.transform) for frame in pair]
    assert torch.equal(to_squares(pair, backbone.transform), torch.cat(alone))
    for number, (height, width) in enumerate(SHAPES):
        frame = picture(number, height, width)
        expected = prepare(frame)
        with torch.inference_mode():
            theirs = module(repeated(expected[None])).numpy() if number < 2 else None
        squares = [to_squares(torch.from_numpy(frame[None]), backbone.transform)]
        if stored.antialias:
            squares.append(torch.from_numpy(squares_by_pil(frame[None], stored)))
        for square in squares:
            assert square.dtype == torch.uint8 and square.shape[1:] == expected.shape
            assert (square[0] - (expected * std + mean) * 255).abs().max() <= 2.01, (height, width)
            if theirs is not None:
                assert cosine(backbone(repeated(square)).numpy(), theirs).min() > 0.9999, (height, width)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder, _: of_open_clip(folder, resize_mode="tile"), "the resize mode 'tile'.*shortest or squash"),
        (lambda folder, _: of_open_clip(folder, interpolation="lanczos"), "the interpolation 'lanczos'.*bilinear"),
        (lambda folder, patch: of_timm(folder, patch, interpolation="nearest"), "the interpolation 'nearest'"),
        (lambda folder, patch: of_timm(folder, patch, crop_mode="corner"), "the crop mode 'corner'.*center or"),
        (lambda folder, patch: of_timm(folder, patch, input_size=(3, 32, 64)), r"images of \(32, 64\) pixels"),
    ],
)
def test_what_svb_cannot_prepare_is_refused_by_name(
    make: Callable[[Path, pytest.MonkeyPatch], Made], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_clip.transform.image_transform", lambda **_: None)  # which asserts the same
    name, *_ = make(tmp_path, monkeypatch)
    with pytest.raises(UsageError, match=f"^{name} wants {words}.*choose another model"):
        load(name)
    with pytest.raises(UsageError, match=r"^mine wants 1 channels"):
        Backbone("mine", nn.Identity(), Transform(8, (0.5,), (0.5,)), 3)


def test_a_local_checkpoint_is_prepared_as_the_published_weights_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip.pretrained import _PRETRAINED

    (tmp_path / "svb-tiny-pe.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "svb-tiny-pe.json")
    save_file(open_clip.CLIP(**TINY_CLIP).state_dict(), tmp_path / "w.safetensors")
    told = {**open_clip.get_pretrained_cfg("PE-Core-S-16-384", "meta")}
    monkeypatch.setitem(_PRETRAINED, "svb-tiny-pe", {"meta": told, "again": dict(told)})
    name = f"open_clip:svb-tiny-pe/{tmp_path / 'w.safetensors'}"
    half = (0.5, 0.5, 0.5)
    assert load(name).transform == Transform(32, half, half, mode="squash", interpolation="bilinear")
    monkeypatch.setitem(_PRETRAINED["svb-tiny-pe"], "other", {**told, "resize_mode": "shortest"})
    expected = Transform(32, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    messages = heard()
    assert load(name).transform == expected
    assert "published weights of svb-tiny-pe want frames prepared in different ways" in " ".join(messages)


class TestStores:
    """What a store says, and what may be added to it."""

    @pytest.fixture(autouse=True)
    def _toys(self, toy_backbones: None) -> None: ...

    def test_the_settings_of_a_plain_transform_are_those_of_earlier_stores(self) -> None:
        plain = Transform(224, MEAN, STD)
        held = {"image_size": 224, "resize": PLAIN, "mean": list(MEAN), "std": list(STD)}
        assert plain.settings() == held and PLAIN == "short side, antialiased bicubic on uint8, centre crop"
        assert fingerprint(plain.settings()) == "21676f1baa79cf5b"

    def test_a_store_whose_frames_were_prepared_wrongly(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, aside = tmp_path / "out", tmp_path / "aside.mp4"
        (folder / "a.mp4").rename(aside)
        with monkeypatch.context() as once:
            once.setitem(toy_backbone.TRANSFORMS, "squash", {})  # svb prepared every frame like this once
            run(folder, out, "toy:squash")
        assert "nothing to do" in " ".join(run(folder, out, "toy:squash"))
        aside.rename(folder / "a.mp4")
        with pytest.raises(
            MismatchError,
            match=r"toy:squash as it wants them: there short side scaled to 16 \(bicubic\), centre of 16 cropped, "
            r"but the model was trained on: whole frame squashed to 16x16 \(bilinear\) - extract into a new store "
            r"with `svb extract VIDEOS -o .*out-new --backbone toy:squash`",
        ):
            run(folder, out, "toy:squash")
        # A picture or video that is looked for in it is prepared as its rows were.
        held = FeatureStore(out).settings["backbones"]["toy:squash"]
        assert load_matching_backbone("toy:squash", held, CPU).transform == Transform(16, *[(0.5, 0.5, 0.5)] * 2)

    @pytest.mark.parametrize(("backbones", "size"), [(("toy:frames", "toy:wide"), 16), (("toy:squash",), [16, 16])])
    @pytest.mark.parametrize("decoder", ["pyav", "ffmpeg"])
    def test_frames_scaled_by_the_decoder(
        self, backbones: tuple[str, ...], size: object, decoder: str, clips_folder: Path, tmp_path: Path
    ) -> None:
        scaled = partial(run, clips_folder / "a.mp4", decoder=decoder)
        scaled(tmp_path / "device", *backbones)
        scaled(tmp_path / "decoder", *backbones, resize="decoder")
        store = FeatureStore(tmp_path / "decoder")
        assert store.settings["decoder"]["resize_px"] == size
        assert store.settings["decoder"].get("interpolation") == ("bilinear" if "toy:squash" in backbones else None)
        for backbone in backbones:
            here, there = (features(tmp_path / name, backbone)["a"] for name in ("device", "decoder"))
            np.testing.assert_allclose(here, there, atol=0.4)
        (chunk,) = OneFile(clips_folder / "a.mp4", stored_decode_options(store.settings)).chunks()
        assert chunk.frames.shape[1:] == ((16, 21, 3) if size == 16 else (16, 16, 3))
        assert "nothing to do" in " ".join(scaled(tmp_path / "decoder", *backbones, resize="decoder"))

    @pytest.mark.parametrize(
        ("backbones", "words"),
        [
            (("toy:longest",), "toy:longest wants them: long side scaled to 16, padded to a square (bicubic)"),
            (("toy:rough",), "toy:rough wants them"),
            (("toy:frames", "toy:squash"), "toy:squash wants them: whole frame.*; toy:frames wants: short side"),
            (("toy:squash", "toy:small-squash"), "toy:small-squash wants them: whole frame squashed to 12x12"),
        ],
    )
    def test_what_the_decoder_cannot_scale(
        self, backbones: tuple[str, ...], words: str, clips_folder: Path, tmp_path: Path
    ) -> None:
        words = words.replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(UsageError, match=f"{words}.* - leave out --resize decoder"):
            run(clips_folder, tmp_path / "out", *backbones, resize="decoder")
