"""A Ray cluster gives what one process gives, whatever of it dies on the way."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import clips
import pytest
import timm
import torch
from conftest import RunSvb
from extraction import contents
from messages import heard

from svb.data.feature_store import FeatureStore, verify_store
from svb.errors import DeviceError, InputError, Interrupted, SvbError, UsageError
from svb.extract.config import ExtractConfig
from svb.extract.progress import ExtractProgress
from svb.extract.run import extract

ray = pytest.importorskip("ray", reason="Ray is not installed: run pip install '.[ray]' in svb's folder")

MARK = "SVB_TEST_RAY"


@pytest.fixture(scope="module")
def mark() -> Iterator[str]:
    """Return what stands in the environment of every process of these tests, and of no other."""
    value = f"{MARK}={uuid.uuid4()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*value.split("="))
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield value


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a small network that every process can load by name, with random weights in a file."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    return f"timm:test_resnet/{path}"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of thirty clips of 1 to 4 s, one of which is none."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(29):
        clips.make_clip(folder / f"{number:02}.mp4", seconds=1 + number % 4, filters=f"hue=h={number * 12}")
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def alone(videos: Path, backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store that one process without Ray extracted."""
    return run(videos, tmp_path_factory.mktemp("alone") / "out", backbone)


def run(videos: Path, out: Path, backbone: str, ray: str | None = None, **options: Any) -> Path:
    on_progress = options.pop("on_progress", lambda progress: None)
    settings = {"fps": 10, "precision": "float32", "engine": "torch", "batch_size": 4, **options}
    return extract([videos], out, ExtractConfig((backbone,), ray=ray, **settings), on_progress=on_progress)


def assert_same(out: Path, alone: Path) -> None:
    assert contents(out) == contents(alone)
    assert verify_store(out) == []
    recorded = [record.video_id for shard in FeatureStore(out).shards for record in shard.records]
    assert sorted(recorded) == sorted(set(recorded)), "recorded twice"


def started(mark: str, start: Callable[[], Any]) -> Any:
    """Start a node; Ray gives it half a minute, which may be too little while another test has all the cores."""
    before = processes(mark, "/ray/")
    for tries_left in (2, 1, 0):
        try:
            return start()
        except Exception as error:
            if not tries_left or "timed out during startup" not in str(error):
                raise
            for process_id in {*processes(mark, "/ray/")} - {*before, os.getpid()}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
    raise AssertionError("not reached")


def processes(mark: str, words: str) -> list[int]:
    """Return the processes of these tests whose command line has these words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, UnicodeDecodeError):  # it is gone, or another user's
            if words in (folder / "cmdline").read_text() and mark in (folder / "environ").read_text():
                found.append(int(folder.name))
    return sorted(found)


@pytest.fixture
def kill(mark: str) -> Iterator[Callable[[str, int], None]]:
    """Return `kill(words, times)`: it kills processes with these words, each as soon as there is one."""
    ended = threading.Event()

    def watch(words: str, times: int = 1) -> None:
        killed: set[int] = set()
        while len(killed) < times and not ended.is_set():
            for process in sorted({*processes(mark, words)} - killed):
                if len(killed) < times:
                    os.kill(process, signal.SIGKILL)
                    killed.add(process)
            time.sleep(0.05)

    with ThreadPoolExecutor() as executor:
        yield functools.partial(executor.submit, watch)
        ended.set()


def power_off(cluster: Any, node: Any) -> None:
    """Kill a node of a simulated cluster at once; Ray's own way lets its workers live for some seconds."""
    (raylet,) = node.all_processes["raylet"]
    tasks = Path(f"/proc/{raylet.process.pid}/task").iterdir()
    workers = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    cluster.remove_node(node, allow_graceful=False)
    for process in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def running_cluster(mark: str, num_cpus: int) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = started(mark, lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus}))
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc")
def test_a_node_that_dies_halfway(videos: Path, alone: Path, backbone: str, tmp_path: Path, mark: str) -> None:
    messages = heard()
    done: list[int] = []

    def watch(progress: ExtractProgress) -> None:
        done.append(progress.videos_done)
        actors, loading = (processes(mark, f"ray::BackboneActor{what}") for what in ("", ".open"))
        if progress.videos_done >= 4 and len(actors) == 2 and not loading and cluster.worker_nodes:
            power_off(cluster, next(iter(cluster.worker_nodes)))

    with running_cluster(mark, 1) as cluster:
        started(mark, lambda: cluster.add_node(num_cpus=1))
        run(videos, tmp_path / "out", backbone, cluster.address, on_progress=watch)
        assert messages[0] == "Ray: backbone actors: 2 (one a node), decoders: 2 (one a CPU)"
        assert not cluster.worker_nodes and done[-1] == 30
    # Whether its actor had videos just then is chance; an actor that surely has some is killed below.
    assert_same(tmp_path / "out", alone)


@pytest.fixture(scope="module")
def address(mark: str) -> Iterator[str]:
    with running_cluster(mark, 2) as cluster:
        yield cluster.address


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc")
class TestProcessesThatDie:
    def test_a_decoder_costs_one_video(
        self, videos: Path, alone: Path, backbone: str, tmp_path: Path, address: str, kill: Any
    ) -> None:
        kill("spawn_main")
        out = run(videos, tmp_path / "out", backbone, address)
        failed = [record for record in FeatureStore(out).records.values() if record.status == "decoder_crash"]
        assert [record.error for record in failed] == ["the decoder's process died with exit code -9"]
        run(videos, out, backbone, address, retry_failed="decoder_crash")
        assert_same(out, alone)

    @pytest.mark.parametrize(("words", "times"), [("ray::decode", 2), ("ray::BackboneActor.run", 1)])
    def test_a_decode_task_or_a_backbone_actor_costs_none(
        self,
        words: str,
        times: int,
        videos: Path,
        alone: Path,
        backbone: str,
        tmp_path: Path,
        address: str,
        kill: Any,
    ) -> None:
        messages = heard()
        kill(words, times)
        out = run(videos, tmp_path / "out", backbone, address)
        assert any("was lost" in message for message in messages) or words == "ray::decode"
        assert_same(out, alone)

    def test_a_video_whose_task_always_dies_is_given_up(
        self, videos: Path, backbone: str, tmp_path: Path, address: str, kill: Any
    ) -> None:
        kill("ray::decode", 3)
        out = run(videos / "00.mp4", tmp_path / "out", backbone, address)
        record = FeatureStore(out).records["00"]
        assert record.status == "decoder_crash"
        assert record.error.startswith("3 decode tasks were lost while they had it, the last to ")
        stat = (videos / "00.mp4").stat()
        assert (record.size_bytes, record.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


@pytest.mark.slow
def test_the_command_line_with_a_cluster_of_its_own(
    clips_folder: Path, backbone: str, tmp_path: Path, mark: str, kill: Any
) -> None:
    before = processes(mark, "raylet")
    kill("ray::decode")
    options = ("--backbone", backbone, "--precision", "float32", "--batch-size", "4", "--fps", "10")
    words = ("-m", "svb", "extract", str(clips_folder), "-o", str(tmp_path / "out"), "--ray", "local", "--json")
    ran = subprocess.run([sys.executable, *words, *options], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Ray: backbone actors: 1 (one a node), decoders: " in ran.stderr and "Traceback" not in ran.stderr
    assert json.loads(ran.stdout)["videos"] == {"ok": 4}
    engine = FeatureStore(tmp_path / "out").settings["backbones"][backbone].get("engine", "torch")  # the faster one
    assert "engine: " in ran.stderr
    assert_same(tmp_path / "out", run(clips_folder, tmp_path / "alone", backbone, engine=engine))
    assert processes(mark, "raylet") == before, "the cluster has ended"


@pytest.mark.slow
def test_what_is_whole_is_kept_when_the_driver_is_told_to_stop(
    videos: Path, alone: Path, backbone: str, tmp_path: Path, address: str
) -> None:
    signals: list[int] = []

    def stop(progress: ExtractProgress) -> None:
        if progress.videos_done >= 4 and not signals:
            signals.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"interrupted - .* run the same command again to go on") as caught:
        run(videos, tmp_path / "out", backbone, address, on_progress=stop)
    assert caught.value.exit_code == 75
    assert 4 <= len(contents(tmp_path / "out")) < 30
    assert_same(run(videos, tmp_path / "out", backbone), alone)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a path that is this process's own")
def test_a_file_that_only_the_driver_sees_is_not_recorded(
    videos: Path, backbone: str, tmp_path: Path, address: str
) -> None:
    folder = os.open(videos, os.O_RDONLY)
    try:
        with pytest.raises(InputError, match=r"00.mp4 is here, but not on a node of the Ray cluster"):
            run(Path(f"/proc/self/fd/{folder}/00.mp4"), tmp_path / "out", backbone, address)
    finally:
        os.close(folder)
    assert contents(tmp_path / "out") == {}


class TestMistakes:
    def test_ray_is_not_installed(
        self, clips_folder: Path, tmp_path: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        ran = run_svb("extract", clips_folder, "-o", tmp_path / "out", "--ray", "auto")
        assert ran.exit_code == 2
        assert ran.stderr.splitlines()[-1] == (
            "svb: --ray auto needs Ray, which is not installed - run pip install '.[ray]' in svb's folder"
        )

    @pytest.mark.parametrize(
        ("address", "words"),
        [
            ("127.0.0.1:1", "cannot join a Ray cluster at '127.0.0.1:1' ("),
            ("nonsense", "cannot join a Ray cluster at 'nonsense' (Invalid address format: nonsense)"),
            ("ray://127.0.0.1:1", "cannot join 'ray://127.0.0.1:1' by Ray's client - give HOST:PORT"),
        ],
    )
    def test_a_wrong_address(
        self, address: str, words: str, clips_folder: Path, tmp_path: Path, run_svb: RunSvb
    ) -> None:
        ran = run_svb("extract", clips_folder, "-o", tmp_path / "out", "--ray", address)
        assert ran.exit_code in (1, 2)
        assert len(ran.stderr.splitlines()) == 2, "what it began with, and one line of error"
        assert f"svb: {words}" in ran.stderr
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"rank": 0, "world_size": 2}, "got a rank and a Ray cluster, which shares the work out itself"),
            ({"device": "cuda:1"}, "device 'cuda:1' on a Ray cluster - expected auto, cpu or cuda"),
            ({"hwaccel": "cuda", "decoder": "ffmpeg"}, "hardware decoder 'cuda' on a Ray cluster"),
            ({"workers": 2}, "got --workers 2 and --ray, which decodes on all CPUs - leave out --workers"),
        ],
    )
    def test_options_that_mean_nothing_there(
        self, options: dict[str, Any], words: str, clips_folder: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=words):
            run(clips_folder, tmp_path / "out", "timm:test_resnet", "auto", **options)


@pytest.mark.parametrize("error", ["CUDA error: an illegal memory access", "out of memory", "cannot compute"])
def test_a_sick_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch, error: str, tmp_path: Path) -> None:
    """Two places without a cluster: the actors of one fail in their first batch, those of the other do all."""
    from svb.extract.plan import PlannedVideo
    from svb.extract.together import ray as driver
    from svb.extract.together.ray_actor import ActorDid

    kind = {"out of memory": torch.OutOfMemoryError, "cannot compute": DeviceError}.get(error, RuntimeError)
    videos = [PlannedVideo(str(number), tmp_path / str(number)) for number in range(6)]
    retired = threading.Event()

    def work(actors: Any, place: dict[str, Any], given: dict[str, PlannedVideo]) -> Iterator[ActorDid]:
        if place["name"] == "sick":
            given |= {video.video_id: video for video in actors._next_videos()}
            raise ray.exceptions.RayTaskError("run", "traceback", kind(error))
        assert retired.wait(600)
        while taken := actors._next_videos():
            yield ActorDid([(video, {}) for video in taken], 0, 0.0, 0.0, 0.0, [])
        actors._stop.set()

    monkeypatch.setattr(driver.BackboneActors, "_work", work)
    resources = driver.ClusterResources(2, [{"name": "sick"}, {"name": "well"}], "")
    said, done = [], []
    with driver.BackboneActors(ExtractConfig(), resources, videos) as actors:
        while len(done) < len(videos):
            event = actors.next()
            if isinstance(event, str):
                said.append(event)
                if "without that place" in event:
                    retired.set()
            elif isinstance(event, ActorDid):
                done += [video.video_id for video, _ in event.contents]
    assert sorted(done) == [video.video_id for video in videos]
    assert len(said) == 3 and error in said[0] and "going on without that place, with the other 1" in said[2]
    # Where it is the only one, there is nobody to go on.
    resources = driver.ClusterResources(1, [{"name": "sick"}], "")
    with driver.BackboneActors(ExtractConfig(), resources, videos) as actors, pytest.raises(SvbError, match=error):
        while True:
            actors.next()


def test_the_first_actor_on_a_cpu_chooses_the_engine_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from svb.extract.together import ray as driver
    from svb.extract.together.ray_actor import ActorLoaded

    backbone = {"precision": "float32", "engine": "onnx"}
    settings = {"decoder": {"name": "pyav"}, "sampling": {"fps": 1.0}, "backbones": {"toy:frames": backbone}}
    opened: list[str] = []

    def make(config: ExtractConfig, *arguments: object) -> SimpleNamespace:
        def load() -> ActorLoaded:
            opened.append(config.engine)
            return ActorLoaded({**settings, "batch_size": 32}, {}, "cpu")

        return SimpleNamespace(open=SimpleNamespace(remote=load))

    actors = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=make))
    monkeypatch.setattr(
        driver, "ray", SimpleNamespace(remote=lambda kind: actors, get=lambda value: value, kill=lambda actor: None)
    )
    places = [{"scheduling_strategy": number} for number in range(4)]
    started = driver.BackboneActors(ExtractConfig(("toy:frames",)), driver.ClusterResources(4, places, ""), [])
    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(started._started, places))
    assert sorted(opened) == ["auto", "onnx", "onnx", "onnx"]
