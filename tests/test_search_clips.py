"""From clips to answers with the embedded backbone and text encoder, zero-shot; both load for seconds, once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from clips import X264, make_clip, make_sound, run_ffmpeg

from svb.cli import cli
from svb.errors import InputError
from svb.extract.backbones.backbone import Classifier
from svb.extract.captions import captions
from svb.extract.run import extract
from svb.extract.text_encoders.text_encoder import TextEncoder
from svb.retrieve import conse, embedder
from svb.retrieve.evaluate import evaluate
from svb.retrieve.index import index, verify_index
from svb.retrieve.search import Searcher

torch.set_num_threads(1)  # two test processes with two threads each get into each other's way
SOURCES = ("testsrc2", "mandelbrot", "life=mold=10:ratio=0.2", "smptebars")


@dataclass(frozen=True)
class World:
    folder: Path
    store: Path
    captions: Path
    searcher: Searcher

    def clip(self, number: int) -> Path:
        return self.folder / "videos" / f"clip{number}.mp4"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    (folder / "videos").mkdir()
    for number, source in enumerate(SOURCES):
        # `mandelbrot` and `life` have no duration of their own and are cut by the filter.
        path = folder / "videos" / f"clip{number}.mp4"
        if source in {"testsrc2", "smptebars"}:
            make_clip(path, seconds=3, fps=5, source=source)
        else:
            pattern = f"{source}{':' if '=' in source else '='}size=64x48:rate=5"
            run_ffmpeg("-f", "lavfi", "-i", pattern, "-vf", "trim=duration=3", *X264, f"file:{path}")
    rows = [f"clip{n},a picture of {word},val" for n, word in enumerate(("a test", "a fractal", "mold", "bars"))]
    (folder / "captions.csv").write_text("\n".join(["video_id,caption,split", *rows, "clip0,a clock,val"]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        real, kept = embedder.embed_class_names, {}

        def once(classifier: Classifier, text_encoder: TextEncoder) -> torch.Tensor:
            if text_encoder.name not in kept:
                kept[text_encoder.name] = real(classifier, text_encoder)
            return kept[text_encoder.name]

        patch.setattr(embedder, "embed_class_names", once)
        patch.setattr(conse, "PROMPTS", conse.PROMPTS[:1])  # a quarter of the time, and less good, but alike
        store = extract(
            [folder / "videos"], folder / "features", backbones=["offline:efficientnet-lite0"], num_workers=1
        )
        features = captions(folder / "captions.csv", folder / "captions.h5", text_encoder="offline:minilm-l6")
        built = index(store, folder / "index", captions=features)
        assert verify_index(built) == []
        yield World(folder, store, features, Searcher(built))


def test_a_clip_finds_itself_first(world: World) -> None:
    for number in range(len(SOURCES)):
        found_captions, found_videos = world.searcher.search_video(world.clip(number), 10)
        assert found_videos[0].video_id == f"clip{number}"
        assert found_videos[0].score == pytest.approx(1, abs=5e-3)
        assert len(found_videos) == len(SOURCES) and len(found_captions) == 5


def test_a_text_finds_videos(world: World) -> None:
    results = world.searcher.search_text("a television test picture", 3)
    assert len(results) == 3 and results[0].score >= results[1].score
    assert all(Path(result.source_path).is_file() for result in results)
    with pytest.raises(InputError, match="offline:minilm-l6 reads"):
        world.searcher.search_text("dog " * 3000)


def test_what_is_no_video_is_a_clear_error(world: World, tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("no video at all")
    with pytest.raises(InputError, match=r"notes\.mp4 cannot be used as a video"):
        world.searcher.search_video(tmp_path / "notes.mp4")
    with pytest.raises(InputError, match=r"sound\.wav cannot be used as a video"):
        world.searcher.search_video(make_sound(tmp_path / "sound.wav"))
    with pytest.raises(InputError, match=r"gone\.mp4 cannot be used as a video"):
        world.searcher.search_video(tmp_path / "gone.mp4")


def test_zero_shot_is_measured_and_the_command_prints_json(world: World) -> None:
    evaluation = evaluate(world.store, captions=world.captions)
    assert (evaluation.model, evaluation.checkpoint, evaluation.epoch) == ("zero-shot ConSE", "", 0)
    assert (evaluation.num_captions, evaluation.num_videos) == (5, 4)
    assert not evaluation.selected_on_split
    assert not (world.store / "ranks.npz").exists()
    arguments = ["search", "--video", str(world.clip(1)), "--json", "--index", str(world.folder / "index")]
    held = json.loads(CliRunner().invoke(cli, arguments).stdout)
    assert set(held) == {"video", "captions", "results"}
    assert held["results"][0]["video_id"] == "clip1"
    assert set(held["captions"][0]) == {"rank", "score", "caption", "video_id"}
