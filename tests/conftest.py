"""What many tests share: a command line in this process, clips, and one small real feature store."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import clips
import pytest
from messages import heard, stop_hearing

from svb.cli import run

if TYPE_CHECKING:
    from indexes import Kept
    from runs import Task
    from serving import Serving

# Arrays this small are slower on two threads than on one, here and in the processes that tests start.
for library in ("OMP", "MKL", "OPENBLAS"):
    os.environ[f"{library}_NUM_THREADS"] = "1"


class Ran(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


RunSvb = Callable[..., Ran]


def assert_refused(ran: Ran, words: str) -> None:
    """Assert that a command ended with a line that says `words`, and with no output."""
    assert ran.exit_code == 1 and not ran.stdout and "Traceback" not in ran.stderr, ran
    assert ran.stderr.splitlines()[-1].startswith("svb: ") and words in ran.stderr.splitlines()[-1], ran.stderr


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process, which makes what its tests share once; slow tests are dealt out one by one."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.option.markexpr == "not slow" else None


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard() -> None:
    """Undo what a script does to a command in the background: it and all that it starts ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def quick_workers() -> Iterator[None]:
    """Fork decode workers of a process that has imported their modules; `spawned_workers` has svb start them."""
    from svb.extract.pool import decode_pool

    modules = ("pool.worker", "decode.pyav_decoder", "decode.ffmpeg_decoder")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload([f"svb.extract.{module}" for module in modules])
    forkserver.ensure_running()  # now, with the environment of no test
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_pool, "multiprocessing", SimpleNamespace(get_context=lambda method: forking))
        yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def spawned_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svb.extract.pool.decode_pool.multiprocessing", multiprocessing)


@pytest.fixture(scope="session", autouse=True)
def without_curves() -> Iterator[None]:
    """Trainings draw no curves: that takes longer than most of them."""
    from svb.train import run as train_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_run, "draw_curves", lambda run: run / "curves.png")
        yield


@pytest.fixture(scope="session", autouse=True)
def own_graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The graphs of these tests are exported once, and are none of the user's; matplotlib keeps its own cache."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib")))
        patch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        yield


@pytest.fixture(autouse=True)
def hearing_ends() -> Iterator[None]:
    """What a test hears ends with it."""
    yield
    stop_hearing()


@pytest.fixture
def run_svb(capfd: pytest.CaptureFixture[str]) -> RunSvb:
    """Return `run_svb(*arguments) -> (exit code, stdout, stderr)`; what worker processes say is seen too."""

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        exit_code = run([str(argument) for argument in arguments])
        return Ran(exit_code, *capfd.readouterr())

    return call


@pytest.fixture
def toy_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `toy:frames` and its like known: see toy_backbone.py."""
    from svb.extract.backbones import FAMILIES

    monkeypatch.setitem(FAMILIES, "toy", "toy_backbone")


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of videos with every decode that ends."""
    from svb.extract.pool.decode_pool import DecodePool, WorkSource
    from svb.extract.pool.worker import Message, Started

    counts: list[int] = []
    pool_run = DecodePool.run

    def counted(pool: DecodePool, source: WorkSource) -> Iterator[tuple[int, Message]]:
        started = 0
        for position, message in pool_run(pool, source):
            started += isinstance(message, Started)
            yield position, message
        counts.append(started)

    monkeypatch.setattr(DecodePool, "run", counted)
    return counts


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of four clips of 1 to 4 s, one of them in a sub-folder. Not to be written to."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "deep").mkdir()
    for seconds, name in enumerate(("a.mp4", "b.mkv", "c.webm", "deep/d.avi"), start=1):
        codec = ("-c:v", "libvpx", "-deadline", "realtime") if name.endswith("webm") else clips.X264
        clips.make_clip(folder / name, seconds=seconds, codec=codec)
    return folder


@pytest.fixture
def folder(clips_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of `clips_folder` that the test may change."""
    return Path(shutil.copytree(clips_folder, tmp_path / "clips"))


@pytest.fixture(scope="session")
def extracted_store(clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a feature store of `clips_folder` with offline:efficientnet-lite0 features. Not to be written to."""
    from svb.extract.config import ExtractConfig
    from svb.extract.run import extract

    options: dict[str, Any] = {"precision": "float32", "engine": "torch", "workers": 1, "batch_size": 4}
    config = ExtractConfig(("offline:efficientnet-lite0",), **options)
    return extract([clips_folder], tmp_path_factory.mktemp("store") / "features", config)


@pytest.fixture(scope="session")
def toy_store(clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a feature store of `clips_folder` as `extraction.run` makes it. Not to be written to."""
    import extraction

    from svb.extract.backbones import FAMILIES

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "toy", "toy_backbone")
        extraction.run(clips_folder, out := tmp_path_factory.mktemp("toy") / "features")
    return out


@pytest.fixture
def out(toy_store: Path, clips_folder: Path, folder: Path, tmp_path: Path) -> Path:
    """Return a store of `folder` that the test may change: what `extraction.run` would make, in no time."""
    from svb.data.feature_store import FeatureStore
    from svb.data.feature_store_writer import FeatureStoreWriter

    made = FeatureStore(toy_store)
    with FeatureStoreWriter(tmp_path / "out", made.settings, made.description["provenance"]) as writer:
        for video_id, record in made.records.items():
            path = folder / Path(record.source_path).relative_to(clips_folder)
            writer.add(dataclasses.replace(record, source_path=str(path)), made.rows_of(video_id))
    return tmp_path / "out"


@pytest.fixture
def own_store(extracted_store: Path, tmp_path: Path) -> Path:
    """Return a copy of `extracted_store` that the test may damage."""
    return Path(shutil.copytree(extracted_store, tmp_path / "own-features"))


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Return the store and captions of a tiny task; only to be read."""
    from runs import tiny_task

    return tiny_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def indexed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on 80 made-up videos, beside its store and captions. Not to be written to."""
    import indexes
    import synthetic

    from svb.train.run import train

    folder = tmp_path_factory.mktemp("indexed")
    return train(*synthetic.make_task(folder), folder / "run", indexes.CONFIG)


@pytest.fixture(scope="session")
def built_index(indexed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an index of `indexed_run`'s 80 videos. Not to be written to."""
    import indexes
    from indexes import index

    return index(indexed_run, tmp_path_factory.mktemp("built") / "index", **indexes.MOMENTS)


@pytest.fixture
def indexed_store(indexed_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the store of `built_index` that the test may change."""
    return Path(shutil.copytree(indexed_run.parent / "features", tmp_path / "features"))


@pytest.fixture
def words_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the text encoder of the made-up world for every index and run."""
    import synthetic

    encoder = synthetic.make_text_encoder()
    monkeypatch.setattr("svb.retrieve.model.embedder.load_matching_text_encoder", lambda settings, device: encoder)


@pytest.fixture
def said() -> list[str]:
    """Return a list that gets every message of the library in the test."""
    return heard()


@pytest.fixture
def own_index(built_index: Path, tmp_path: Path) -> Path:
    """Return a copy of `built_index` that the test may change."""
    return Path(shutil.copytree(built_index, tmp_path / "index"))


@pytest.fixture
def kept(indexed_run: Path, indexed_store: Path, own_index: Path, said: list[str]) -> Kept:
    """Return `built_index` with its store and run, and what is said of it; the test may change all but the run."""
    from indexes import Kept

    return Kept(indexed_run, indexed_store, own_index, said)


@pytest.fixture
def served(index: Path) -> Iterator[Serving]:
    """Serve the file's fake index."""
    from serving import serving

    with serving(index) as served:
        yield served


@pytest.fixture
def worked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the log of the odd workers that the servers of the test have."""
    from serving import use_odd_workers

    return use_odd_workers(monkeypatch, tmp_path)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the video_ids whose features are read."""
    from svb.data.feature_store import FeatureStore
    from svb.data.rows import FrameFeatures

    read: list[str] = []
    load = FeatureStore.load

    def counted(store: FeatureStore, backbone: str, video_ids: Sequence[str] | None = None) -> FrameFeatures:
        read.extend(store.video_ids if video_ids is None else video_ids)
        return load(store, backbone, video_ids)

    monkeypatch.setattr(FeatureStore, "load", counted)
    return read
