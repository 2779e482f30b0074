"""From clips to answers with the embedded backbone and text encoder, zero-shot; both load for seconds, once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from clips import X264, make_clip, run_ffmpeg
from indexes import edit_manifest, index

from svb.cli import cli
from svb.data.feature_store import FeatureStore
from svb.errors import InputError, StoreError
from svb.extract.backbones.backbone import Classifier
from svb.extract.backbones.engine import prepare_graph
from svb.extract.captions import captions
from svb.extract.config import ExtractConfig
from svb.extract.run import extract
from svb.retrieve.answer import Answer, SearchRequest
from svb.retrieve.evaluate import evaluate
from svb.retrieve.indexing.verify_index import verify_index
from svb.retrieve.model import embedder
from svb.retrieve.model.torch_media import TorchMedia
from svb.retrieve.search import Searcher
from svb.retrieve.stored.manifest import read_manifest

BACKBONE = "offline:efficientnet-lite0"
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
        real = embedder.load_classifier

        def every_twentieth(backbone: str) -> Classifier:
            classifier = real(backbone)
            assert classifier is not None
            rows = (classifier.weight[::20], classifier.bias[::20])
            return Classifier(*rows, classifier.class_names[::20])

        patch.setattr(embedder, "load_classifier", every_twentieth)  # a thousand class names take seconds to embed
        patch.setattr(TorchMedia, "keep_graphs", lambda media: None)  # so do exports
        config = ExtractConfig((BACKBONE,), engine="torch", workers=1)
        store = extract([folder / "videos"], folder / "features", config)
        features = captions(folder / "captions.csv", folder / "captions.h5", text_encoder="offline:minilm-l6")
        built = index(store, folder / "index", captions=features)
        assert verify_index(built) == []
        yield World(folder, store, features, Searcher(built))


def test_a_clip_finds_itself_first(world: World) -> None:
    for number in range(len(SOURCES)):
        answer = world.searcher.search(SearchRequest(video=str(world.clip(number)), by="video"))
        # What the first query loads is kept.
        assert (answer.elapsed_seconds["load"] > 0) == (number == 0)
        assert answer.elapsed_seconds["load"] < answer.elapsed_seconds["embed"]
        assert answer.results[0].video_id == f"clip{number}"
        assert answer.results[0].score == pytest.approx(1, abs=5e-3)
        assert len(answer.results) == len(SOURCES) and len(answer.captions) == 5
        assert sorted(answer.captions, key=lambda caption: caption.rank) == list(answer.captions)


def test_a_part_of_a_clip_finds_it(world: World) -> None:
    part = world.searcher.search(SearchRequest(video=str(world.clip(1)), span_seconds=(1.0, 2.0), num_captions=2))
    assert part.results[0].video_id == "clip1" and len(part.captions) == 2
    no_captions = world.searcher.search(SearchRequest(like="clip1", num_captions=0))
    assert not no_captions.captions and "clip1" not in [result.video_id for result in no_captions.results]


def refuse_text(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Have it fail to load what a query in pictures has no need of."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"{arguments} was asked for")

    for name in names:
        monkeypatch.setattr(embedder, name, refuse)


def test_a_picture_needs_no_text_encoder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ffmpeg("-i", str(world.clip(1)), "-ss", "1", "-frames:v", "1", str(tmp_path / "frame.png"))
    request = SearchRequest(image=str(tmp_path / "frame.png"))
    refuse_text(monkeypatch, "load_text_encoder", "embed_class_names", "load_classifier")
    found = Searcher(world.searcher.path).search(request)
    assert found.results[0].video_id == "clip1"
    monkeypatch.undo()
    # An index without embeddings of its class names computes them, and they are the same.
    shutil.copytree(world.searcher.path, tmp_path / "old")
    (path,) = (tmp_path / "old").glob("heads/*/heads.safetensors")
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"heads\.safetensors is damaged .* make the index again"):
        Searcher(tmp_path / "old").search(request)
    assert verify_index(tmp_path / "old") == [f"{path} has changed since it was written"]
    edit_manifest(tmp_path / "old", heads=[])
    again = Searcher(tmp_path / "old").search(request)  # in torch, which scales the picture
    assert [result.video_id for result in again.results] == [result.video_id for result in found.results]
    assert [result.score for result in again.results] == pytest.approx(
        [result.score for result in found.results], abs=5e-3
    )


def test_class_names_are_embedded_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world.searcher.path, tmp_path / "index")
    before = read_manifest(tmp_path / "index")
    refuse_text(monkeypatch, "embed_class_names", "load_classifier")
    index(world.store, tmp_path / "index", captions=world.captions)
    assert read_manifest(tmp_path / "index") == before
    (tmp_path / "pool.txt").write_text("a dog runs\n")  # the model is loaded for it
    index(world.store, tmp_path / "index", captions=world.captions, pools=(tmp_path / "pool.txt",))
    after = read_manifest(tmp_path / "index")
    assert after["heads"] == before["heads"] and len(after["captions"]) == len(before["captions"]) + 1
    monkeypatch.undo()
    edit_manifest(tmp_path / "index", heads=[])
    index(world.store, tmp_path / "index", captions=world.captions, no_pools=True)
    assert read_manifest(tmp_path / "index")["heads"] == before["heads"]


def test_a_text_finds_videos(world: World) -> None:
    answer = world.searcher.search(SearchRequest(text="a television test picture", k=3))
    assert len(answer.results) == 3 and not answer.captions
    assert [result.score for result in answer.results] == sorted((r.score for r in answer.results), reverse=True)
    assert all(Path(result.source_path).is_file() for result in answer.results)
    with pytest.raises(InputError, match=r"the query has \d+ tokens, but offline:minilm-l6 reads"):
        world.searcher.search(SearchRequest(text="dog " * 3000))


def test_a_new_text_loads_no_torch(world: World) -> None:
    program = f"""
import sys
from svb.retrieve.search import Searcher
from svb.retrieve.answer import SearchRequest
answer = Searcher({str(world.searcher.path)!r}).search(SearchRequest(text="a clock that was never asked for"))
assert len(answer.results) == 4
print(sorted({{"torch", "h5py", "pandas", "scipy", "av"}} & set(sys.modules)), "onnxruntime" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.returncode) == ("[] True\n", 0), ran.stderr


@pytest.mark.slow
def test_a_file_as_a_query_loads_no_torch(world: World, tmp_path: Path) -> None:
    """Neither on the command line nor in the server's helper, whose process goes on from one file to the next."""
    prepare_graph(BACKBONE, FeatureStore(world.store).video_settings(BACKBONE)["backbone_settings"])
    run_ffmpeg("-i", str(world.clip(1)), "-ss", "1", "-frames:v", "1", str(tmp_path / "frame.png"))
    queries = [{"image": str(tmp_path / "frame.png")}, {"video": str(world.clip(2)), "k": 2}]
    program = f"""
import json, sys
import numpy as np
from svb.retrieve.answer import SearchRequest
from svb.retrieve.search import Searcher
from svb.retrieve.server import worker
if __name__ == "__main__":
    index, took = {str(world.searcher.path)!r}, []
    searcher = Searcher(index)
    for query in {queries!r}:
        print(searcher.search(SearchRequest.from_json(query)).results[0].video_id)
        task = {{"task": "embed", "index": index, "request": query, "device": "auto", "max_seconds": 60}}
        took.append(worker.answer(json.dumps(task))["result"]["elapsed_seconds"]["load"])
    print(took[0] > 0, took[1], "torch" in sys.modules)
"""
    (tmp_path / "program.py").write_text(program)  # the decode worker imports it again
    ran = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["clip1", "clip2", "True", "0.0", "False"], ran.stderr


def test_zero_shot_is_measured_and_the_command_prints_json(world: World) -> None:
    evaluation = evaluate(world.store, captions=world.captions)
    assert (evaluation.model, evaluation.checkpoint, evaluation.epoch) == ("zero-shot ConSE", "", 0)
    assert (evaluation.num_captions, evaluation.num_videos) == (5, 4)
    assert not evaluation.selected_on_split
    assert not (world.store / "ranks.npz").exists()
    arguments = ["search", "--video", str(world.clip(1)), "--by", "video", "--json"]
    held = json.loads(CliRunner().invoke(cli, [*arguments, "--index", str(world.folder / "index")]).stdout)
    assert held["results"][0]["video_id"] == "clip1"
    assert {caption["pool"] for caption in held["captions"]} == {"training"}
    assert json.loads(json.dumps(Answer.from_json(held).as_json())) == held
