"""Features go out to the layouts of other tools, and come in from them, as the very numbers they were."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
import torch
from conftest import RunSvb
from indexes import index
from messages import heard
from numpy.typing import NDArray
from runs import tiny, tiny_task

from svb.data import export as export_module
from svb.data.export import LAYOUTS, export
from svb.data.feature_store import FeatureStore, verify_store
from svb.data.importing import files as import_files
from svb.data.importing.import_features import import_features
from svb.data.publish import one_writer
from svb.data.rows import VideoRows
from svb.errors import InputError, MismatchError, StoreError, UsageError
from svb.retrieve.answer import SearchRequest
from svb.retrieve.search import Searcher
from svb.train.run import train

NAME = "s3d:howto100m"
OTHER_LAYOUTS = [layout for layout in LAYOUTS if layout != "h5"]
# What a video_id can be made of, and what it does to those who take it for a path or a name.
HOSTILE_IDS = (
    *("a", "A", "a@b", "a/b", "a@b@c", "a/b@c", "a@b/c", "a.npz/b", "..", "../up", "up/../../up", "/etc/x", "."),
    *("a//b", "b/", ".hidden", "x/.y", "n" * 300, "/".join("n" * 200), "\u00e9", "e\u0301", "\u00df", "ss"),
    *("tab\t", "a\\b", "con", "features", "times_seconds", "video_id", "videos", "-rf", "a~0123456789abcdef"),
    "q\\x00z",
)


def numbers(rows: int = 3, size: int = 4, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, size)).astype(np.float16).astype(np.float32)


def content(store: Path, backbone: str = NAME) -> dict[str, tuple[list[list[float]], list[float]]]:
    """Return a store's features and times by video_id."""
    loaded = FeatureStore(store).load(backbone)
    spans = zip(loaded.video_ids, loaded.offsets[:-1], loaded.offsets[1:], strict=True)
    return {v: (loaded.features[b:e].tolist(), loaded.times_seconds[b:e].tolist()) for v, b, e in spans}


def imported(source: Path, out: Path, **options: Any) -> Path:
    return import_features(source, out, **{"backbone": NAME, **options})


def said(source: Path, out: Path, **options: Any) -> str:
    lines = heard()
    imported(source, out, **options)
    return "\n".join(lines)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def npy_folder(folder: Path, videos: Mapping[str, NDArray[Any]]) -> Path:
    for name, array in videos.items():
        path = folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two backbones with a failed video, in several shards; only to be read."""
    videos = {f"clip/{v}": numbers(1 + v, seed=v) for v in range(5)} | {"failed": np.empty((0, 4), np.float32)}
    beside = {
        "toy:wide": {v: VideoRows(-f[:1, :3].astype(np.float16), np.zeros(1)) for v, f in videos.items() if len(f)}
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svb.data.feature_store_writer.SHARD_VIDEOS", 2)
        folder = tmp_path_factory.mktemp("store") / "features"
        return synthetic.make_store(folder, videos, seconds_between_frames=0.4, beside=beside)


class TestRoundTrip:
    @pytest.mark.parametrize("layout", OTHER_LAYOUTS)
    @pytest.mark.parametrize("backbone", ["synthetic:frames", "toy:wide", "synthetic:frames+toy:wide"])
    def test_the_same_numbers_come_back(self, layout: str, backbone: str, store: Path, tmp_path: Path) -> None:
        assert len(FeatureStore(store).shards) > 1
        messages = heard()
        out = export(FeatureStore(store), tmp_path / "out", layout=layout, backbone=backbone)
        assert messages == [f"1 videos without features are left out - `svb info {store} --failures` lists them"]
        if layout == "parquet":  # told by its name alone
            out = out.rename(tmp_path / "out.parquet")
        back = imported(out, tmp_path / "back")
        assert content(back) == content(store, backbone)
        assert verify_store(back) == []

    @pytest.mark.parametrize("layout", OTHER_LAYOUTS)
    def test_hostile_ids(self, layout: str, tmp_path: Path) -> None:
        videos = {video_id: numbers(1, seed=v) for v, video_id in enumerate(HOSTILE_IDS)}
        hostile = synthetic.make_store(tmp_path / "in" / "features", videos)
        out = export(FeatureStore(hostile), tmp_path / "in" / "deep" / "out.parquet", layout=layout)
        assert names_in(tmp_path) == ["in"]
        assert names_in(tmp_path / "in") == ["deep", "features"]
        assert names_in(tmp_path / "in" / "deep") == ["out.parquet"]
        if layout == "npz":  # whose files stay apart where letters have no case
            names = {path.relative_to(out).as_posix().removesuffix(".npz") for path in out.rglob("*.npz")}
            assert len({name.casefold() for name in names}) == len(HOSTILE_IDS)
            assert {"a/b", "a@b", "con"} <= names
            assert max(len(part.encode()) for name in names for part in name.split("/")) <= 200
        assert content(imported(out, tmp_path / "back")) == content(hostile, "synthetic:frames")


class TestExport:
    def test_what_others_read_without_svb(
        self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(export_module, "ROW_GROUP_BYTES", 40)
        held = FeatureStore(store)
        with h5py.File(export(held, tmp_path / "x.h5", layout="h5-per-video", backbone="toy:wide")) as exported:
            assert list(exported) == [f"clip@{v}" for v in range(5)] and exported.attrs["backbone"] == "toy:wide"
            assert json.loads(exported.attrs["settings"])["sampling"] == {"fps": 2.5}
            dataset = exported["clip@2"]
            assert (dataset.shape, dataset.dtype) == ((1, 3), np.float16)
            assert dataset.attrs["video_id"] == "clip/2" and dataset.attrs["times_seconds"].tolist() == [0.0]

        out = export(held, tmp_path / "x", layout="npz", backbone="synthetic:frames")
        assert names_in(out) == ["clip"] and names_in(out / "clip") == [f"{v}.npz" for v in range(5)]
        with np.load(out / "clip" / "2.npz") as arrays:
            assert sorted(arrays) == ["features", "times_seconds", "video_id"]
            assert (arrays["features"].shape, arrays["features"].dtype) == ((3, 4), np.float16)
            assert arrays["times_seconds"].tolist() == [0.0, 0.4, 0.8] and str(arrays["video_id"]) == "clip/2"

        out = export(held, tmp_path / "x.parquet", layout="parquet", backbone="synthetic:frames")
        schema, frame = pq.read_schema(out), pd.read_parquet(out)
        assert schema.names == ["video_id", "time_seconds", "features"]
        assert schema.field("features").type == pa.list_(pa.float32(), 4)
        assert schema.metadata[b"backbone"] == b"synthetic:frames"
        assert len(frame) == 15 and frame.video_id.nunique() == 5
        rows = frame[frame.video_id == "clip/2"]
        assert rows.time_seconds.tolist() == [0.0, 0.4, 0.8]
        assert np.stack(rows.features.tolist()).tolist() == numbers(3, seed=2).tolist()

    def test_times_of_many_hours(self, tmp_path: Path) -> None:
        long = synthetic.make_store(tmp_path / "long", {"v": numbers(50_000, 1)})
        out = export(FeatureStore(long), tmp_path / "x.h5", layout="h5-per-video")
        assert content(imported(out, tmp_path / "back")) == content(long, "synthetic:frames")

    def test_what_is_there_is_not_touched(self, store: Path, tmp_path: Path, run_svb: RunSvb) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "folder" / "deep").mkdir(parents=True)
        (tmp_path / "link").symlink_to("nowhere")
        for layout, name in itertools.product(LAYOUTS, ("file", "folder", "link")):
            ran = run_svb("export", store, "-o", tmp_path / name, "--format", layout)
            assert ran.exit_code == 1 and ran.stdout == ""
            assert ran.stderr == f"svb: {tmp_path / name} exists - remove it, or name another with -o\n"
        assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "folder" / "deep").is_dir()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_two_at_once_into_one_place(self, layout: str, store: Path, tmp_path: Path) -> None:
        with one_writer(tmp_path / "x"), pytest.raises(StoreError, match="another process is writing to it"):
            export(
                FeatureStore(store), tmp_path / "x", layout=layout, backbone=None if layout == "h5" else "toy:wide"
            )
        assert not names_in(tmp_path)

    @pytest.mark.parametrize("layout", OTHER_LAYOUTS)
    def test_what_fails_half_way_leaves_nothing(
        self, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svb.data.feature_store_writer.SHARD_VIDEOS", 1)
        path = synthetic.make_store(tmp_path / "features", {"a": numbers(), "b": numbers(seed=1)})
        store = FeatureStore(path)
        store.shards[1].path.unlink()
        with pytest.raises(InputError, match="no feature store at"):
            export(store, tmp_path / "out", layout=layout)
        assert names_in(tmp_path) == ["features"]

    def test_options(self, store: Path, tmp_path: Path, run_svb: RunSvb) -> None:
        for words, *options in (
            ("svb: h5 holds all backbones of a store - leave out --backbone", "--backbone=toy:wide"),
            ("holds several backbones", "--format=npz"),
            ("holds no features of 'x'", "--format=npz", "--backbone=x"),
        ):
            ran = run_svb("export", store, "-o", tmp_path / "x", *options)
            assert ran.exit_code in (1, 2) and words in ran.stderr and not (tmp_path / "x").exists()

    def test_one_file_of_all_backbones_and_a_store_without_features(
        self, store: Path, tmp_path: Path, run_svb: RunSvb
    ) -> None:
        out = tmp_path / "x"
        ran = run_svb("export", store, "-o", out)
        assert (ran.exit_code, ran.stdout) == (0, f"{out}\n") and verify_store(out) == []
        failed = FeatureStore(synthetic.make_store(tmp_path / "f", {"v": np.empty((0, 4))}))
        with pytest.raises(InputError, match=r"no video of .* has features - `svb info .* --failures` says why"):
            export(failed, tmp_path / "none", layout="npz")


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch ran",))


Make = Callable[[Path], Path]


def at(name: str, write: Callable[[Path], object]) -> Make:
    """Return what writes a file or a folder of that name into a folder, and returns its path."""

    def make(folder: Path) -> Path:
        write(folder / name)
        return folder / name

    return make


def h5(**arrays: Any) -> Make:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as held:
            for name, array in arrays.items():
                held.create_dataset(name, data=array, compression="gzip")

    return at("s.hdf5", write)


def files(**contents: bytes) -> Make:
    """Make a folder; the last underscore of a name stands for its dot."""

    def write(folder: Path) -> None:
        folder.mkdir()
        for name, held in contents.items():
            (folder / ".".join(name.rsplit("_", 1))).write_bytes(held)

    return at("s", write)


def npy(**arrays: Any) -> Make:
    return lambda folder: npy_folder(folder / "s", arrays)


def npz(**arrays: Any) -> Make:
    return at("s", lambda path: (path.mkdir(), np.savez(path / "a.npz", **arrays)))


def parquet(**columns: Any) -> Make:
    return at("s.parquet", lambda path: pq.write_table(pa.table(columns), path))


def torch_file(value: Any, is_old: bool = False) -> Make:
    return at("s.pt", lambda path: torch.save(value, path, _use_new_zipfile_serialization=not is_old))


def file(name: str, held: bytes) -> Make:
    return at(name, lambda path: path.write_bytes(held))


def huge_h5(path: Path) -> None:
    with h5py.File(path, "w") as held:
        held.create_dataset("a", shape=(2**50, 2**8), dtype=np.float64, chunks=(1, 256))


def repeated_h5(path: Path) -> None:
    with h5py.File(path, "w") as held:
        held["a"], held["b"] = numbers(), numbers()
        held["b"].attrs["video_id"] = "a"


GOOD, OTHER = numbers(), numbers(seed=1)
ROW = [1.0, 2.0]
MS, SECONDS = np.array([40.0, 1000.0, 2500.0]), [0.04, 1.0, 2.5]
OF_VIDEO_FEATURES = npy(v_rgb=GOOD, v_flow=OTHER, v_fps=np.array(25.0), v_timestamps_ms=MS)
OF_TWO_NETWORKS = h5(
    **{
        f"v_{v}/{name}": held
        for v in (1, 2)
        for name, held in (("c3d", GOOD), ("i3d", OTHER), ("timestamps_ms", MS))
    }
)
TENSORS = {"a": torch.from_numpy(GOOD).bfloat16(), 7: torch.ones(4, requires_grad=True)}
NUMBERS = {"a": TENSORS["a"].float().numpy(), "7": np.ones((1, 4))}
V_1_AND_V_2 = {"v_1": GOOD, "v_2": OTHER}

# fmt: off
# What other tools write: how it is made, the options, what is said, the videos, and their times if there are any.
READ: dict[str, tuple[Make, dict[str, Any], str, dict[str, NDArray[Any]], list[float] | None]] = {
    "npy": (npy(**{"a": GOOD, "deep/b": OTHER[None], "c.mp4": GOOD[0].astype(float)}), {}, "a .npy file a video",
            {"a": GOOD, "deep/b": OTHER, "c.mp4": GOOD[:1]}, None),
    "video_features": (OF_VIDEO_FEATURES, {"array": "rgb", "fps": 3.0}, "has times: using them instead of --fps",
                       {"v": GOOD}, SECONDS),
    "video_features, no times": (npy(v_1_r21d=GOOD, v_2_r21d=OTHER), {"layout": "video-features"},
                                 "as video_features writes them", V_1_AND_V_2, None),
    "npy named alike": (npy(v_1_r21d=GOOD), {}, "a .npy file a video", {"v_1_r21d": GOOD}, None),
    "npz": (npz(clip=GOOD, sizes=np.ones(2), timestamps_ms=MS), {"array": "clip"}, "", {"a": GOOD}, SECONDS),
    "groups": (h5(**{"v_1/c3d": GOOD, "v_2/c3d": OTHER}), {}, "an HDF5 group a video", V_1_AND_V_2, None),
    "one group": (h5(**{"v_1/c3d": GOOD}), {}, "an HDF5 group a video", {"v_1": GOOD}, None),
    "two networks": (OF_TWO_NETWORKS, {"array": "i3d"}, "", {"v_1": OTHER, "v_2": OTHER}, SECONDS),
    **{" ".join(ids): (h5(**dict(zip(ids, (GOOD, OTHER), strict=True))), {}, "an HDF5 dataset a video",
                       dict(zip(ids, (GOOD, OTHER), strict=True)), None)
       for ids in (["v_1", "v_2"], ["val/v_1", "val/v_2"], ["train/v_1", "val/v_2"], ["v_1", "val/v_2"])},
    "torch": (torch_file(TENSORS), {}, "a dict of video_id to tensor", NUMBERS, None),
    "old torch": (torch_file(TENSORS, is_old=True), {}, "a dict of video_id to tensor", NUMBERS, None),
}
# fmt: on


class TestLayouts:
    @pytest.mark.parametrize("case", READ)
    def test_what_other_tools_write(self, case: str, tmp_path: Path) -> None:
        make, options, words, videos, times = READ[case]
        text = said(make(tmp_path), tmp_path / "out", **options)
        assert words in text and ("assuming 1 row a second" in text) == (times is None)
        assert content(tmp_path / "out") == {
            v: (rows.tolist(), times or np.arange(len(rows)).tolist()) for v, rows in videos.items()
        }

    def test_a_folder_of_npy(self, tmp_path: Path) -> None:
        source = npy_folder(tmp_path / "s", {"a": GOOD, "deep/b": OTHER})
        (source / "._a.npy").write_bytes(b"what a Mac leaves")
        text = said(source, tmp_path / "out")
        assert f"importing {source} into {tmp_path / 'out'} as {NAME}: a .npy file a video" in text
        assert "a.npy has no times: assuming 1 row a second" in text and text.count("has no times") == 1
        assert text.endswith("2 videos imported; 6 rows of 4 numbers added")
        path, record = source / "deep" / "b.npy", FeatureStore(tmp_path / "out").records["deep/b"]
        assert (record.source_path, record.size_bytes, record.decoder) == (
            str(path),
            path.stat().st_size,
            "imported",
        )
        assert record.status == "ok" and np.isnan(record.duration_seconds) and len(record.content_hash) == 64
        assert "has no times" not in said(source, tmp_path / "faster", fps=2.5)
        assert content(tmp_path / "faster")["a"][1] == [0.0, 0.4, 0.8]

    def test_a_rate_of_frames_and_the_array_are_kept(self, tmp_path: Path) -> None:
        imported(OF_VIDEO_FEATURES(tmp_path), tmp_path / "out", array="rgb")
        assert FeatureStore(tmp_path / "out").records["v"].frame_rate == 25.0
        with pytest.raises(MismatchError, match=r"array: stored 'rgb', wanted 'flow'"):
            imported(tmp_path / "s", tmp_path / "out", array="flow")

    def test_parquet_a_row_a_video(self, tmp_path: Path) -> None:
        features = [numbers(1 + v, seed=v).tolist() for v in range(40)]
        times = [[0.5 * t for t in range(1 + v)] for v in range(40)]
        names = [f"v{v:02}" for v in range(40)]
        source = parquet(video_id=names, features=features, times_seconds=times)(tmp_path)
        assert [*content(imported(source, tmp_path / "out")).values()] == list(zip(features, times, strict=True))

    def test_parquet_a_row_a_feature_row(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(import_files, "BATCH_ROWS", 2)
        kinds = (pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 4))
        for number, kind in enumerate(kinds):
            rows = pa.array([[np.float16(x) for x in row] for row in numbers(6)], kind)
            table = pa.table({"video_id": pa.array([3, 3, 3, 1, 1, 2]), "clip": rows, "label": list("abcdef")})
            pq.write_table(table, tmp_path / "s.pq", row_group_size=4)
            held = content(imported(tmp_path / "s.pq", tmp_path / f"out{number}"))
            assert {v: len(f) for v, (f, _) in held.items()} == {"1": 2, "2": 1, "3": 3}
            assert held["3"][0] + held["1"][0] + held["2"][0] == numbers(6).tolist()


# fmt: off
REFUSED = {
    # What lies there.
    "nothing there": (lambda folder: folder / "s", "no such file or folder: {s} - expected a folder of .npy or"),
    "empty folder": (files(), "{s} holds no .npy or .npz file (it holds nothing) - expected a folder"),
    "both kinds": (files(a_npy=b"", b_npz=b""), "{s} holds 1 .npy and 1 .npz files - choose with --format npy or"),
    "pickle": (file("s.pkl", pickle.dumps(RunsCode())), "{s} holds pickles, and reading one runs whatever code is"),
    "clip-retrieval": (npy(img_emb_0=GOOD), "{s}/img_emb_0.npy has a row for each of many images, as clip"),
    "pickle as npy": (files(a_npy=pickle.dumps(RunsCode())), "{s}/a.npy cannot be read ("),
    "pickle as pt": (file("s.pt", pickle.dumps(RunsCode())), "{s} holds more than tensors, and loading that could"),
    # What a video's rows may be, whatever the file.
    "objects": (npy(a=np.array([{}])), "a.npy cannot be read (Object arrays cannot be loaded when"),
    "text": (npy(a=np.array(["x"])), "a.npy holds <U1 - expected numbers"),
    "scalar": (npy(a=np.array(1.0)), "a.npy has shape () - expected (T, F), (1, T, F) or (F,), none of them 0"),
    "empty": (npy(a=np.empty((0, 4))), "a.npy has shape (0, 4) - expected (T, F)"),
    "maps": (npy(a=np.ones((2, 4, 7, 7))), "a.npy has shape (2, 4, 7, 7) - expected (T, F), (1, T, F) or (F,)"),
    "nan": (npy(a=GOOD, b=GOOD * np.nan), "b.npy holds NaN or infinity - leave the video out, or extract it again"),
    "too large": (npy(a=GOOD, b=GOOD - 7e4), "- float16 holds up to 65504: scale all features"),
    "too small": (npy(a=GOOD * 1e-9), "a.npy holds only values that float16 rounds to 0 - scale all features"),
    "two sizes": (npy(a=GOOD, b=GOOD[:, :3]), "b.npy: rows of 3 numbers, where those before have 4 - one backbone"),
    # Folders of .npy and .npz.
    "cut npy": (files(a_npy=b"\x93NUMPY\x01\0"), "a.npy cannot be read ("),
    "cut npz": (files(a_npz=b"PK\3\4"), "a.npz cannot be read ("),
    "npz as npy": (lambda f: npz(x=GOOD)(f) / "a.npz", "{s} is one .npz file - give the folder that holds one for"),
    "one npy": (lambda f: npy(a=GOOD)(f) / "a.npy", "{s} is one .npy file - give the folder that holds one for ev"),
    "no id": (npz(features=GOOD, video_id=np.array("")), "a.npz: its video_id is empty - give every video an id"),
    "times too few": (npz(features=GOOD, times_seconds=[0.0, 1.0]), "times of shape (2,) for 3 rows - expected on"),
    "times back": (npz(features=GOOD, times_seconds=[0, 2, 1]), "its times are not finite, ascending numbers - fi"),
    "misnamed": (npy(a_rgb=GOOD, a_fps=np.array(1), b=GOOD), "b.npy is not called <video_id>_<feature>.npy, as vi"),
    "no rate": (npy(a_rgb=GOOD, a_fps=GOOD), "a_fps.npy cannot be read (cannot reshape array of size 12"),
    # HDF5.
    "cut h5": (file("s.h5", b"\x89HDF\r\n\x1a\n" + bytes(100)), "{s} cannot be read ("),
    "empty h5": (h5(), "{s} holds no videos - expected an HDF5 dataset a video"),
    "huge h5": (at("s.h5", huge_h5), "{s}, dataset 'a' cannot be read ("),
    "twice": (at("s.h5", repeated_h5), "{s}, dataset 'b': video_id 'a' appears twice - make every video_id unique"),
    # Parquet.
    "cut parquet": (file("s.parquet", b"PAR1"), "{s} cannot be read ("),
    "no column": (parquet(id=["a"], features=[ROW]), "{s}: no column video_id, only id, features - add it"),
    "no lists": (parquet(video_id=["a"], features=[1.0]), "{s}: no column of lists of numbers - expected one call"),
    "apart": (parquet(video_id=["a", "b", "a"], features=[ROW] * 3), "row 3: the rows of video 'a' are not next t"),
    "null id": (parquet(video_id=["a", None], features=[ROW] * 2), "row 2: video_id is missing - give every row t"),
    "null row": (parquet(video_id=["a", "a"], features=[ROW, None]), "row 1 cannot be read (a row has no features"),
    "null number": (parquet(video_id=["a"], features=[[1.0, None]]), "video 'a' holds NaN or infinity"),
    "ragged": (parquet(video_id=["a", "a"], features=[ROW, [1.0]]), "row 1 cannot be read (rows of 2 and of 1 num"),
    # PyTorch.
    "not a dict": (torch_file([torch.ones(2)]), "{s} holds a list - expected a dict of video_id to tensor"),
    "nested": (torch_file({"a": {"b": torch.ones(2)}}), "{s} holds a dict for 'a' - expected a tensor a video"),
    "cut pt": (file("s.pt", b"PK\3\4"), "{s} cannot be read as a PyTorch file ("),
    # Options that do not fit.
    "arrays in npz": (npz(clip=GOOD, sizes=ROW), "a.npz holds clip, sizes - expected one array of features"),
    "video_features": (OF_VIDEO_FEATURES, "holds flow, rgb - expected one array of features; name it with"),
    "arrays in a group": (OF_TWO_NETWORKS, "group 'v_1' holds c3d, i3d - expected one array"),
    "no such array": (OF_TWO_NETWORKS, "group 'v_1' has no array 'x', only c3d, i3d - name one", "--array=x"),
    "a folder": (npy(a=GOOD), "{s} is a folder - h5-groups is a file: ", "--format=h5-groups"),
    "a file": (file("s.npy", b""), "{s} is a file - npy is a folder: ", "--format=npy"),
    "no rate of rows": (npy(a=GOOD), "0.0 rows a second - expected a number above 0", "--fps=0"),
    "rate nan": (npy(a=GOOD), "nan rows a second - expected a number above 0", "--fps=nan"),
    "npy has one": (npy(a=GOOD), ".npy files hold one array each - leave out --array", "--array=x"),
    "h5 has one": (h5(a=GOOD), "is one array each - leave out --array", "--array=x", "--format=h5-per-video"),
    "torch has one": (torch_file(TENSORS), "one tensor a video - leave out --array", "--array=x"),
    "no name": (npy(a=GOOD), "' ' cannot name a backbone - expected a name such as s3d:howto100m", "--backbone= "),
    "a taken name": (npy(a=GOOD), "'videos' cannot name a backbone", "--backbone=videos"),
    "not UTF-8": (npy(a=GOOD), "cannot name a backbone", "--backbone=a\udcff"),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, words, *options = REFUSED[case]
    source = make(tmp_path)
    ran = run_svb("import", source, "-o", tmp_path / "out", "--backbone", NAME, *options)
    is_usage = any(text in words for text in ("rows a second", "--array", "cannot name"))
    assert ran.exit_code == (2 if is_usage else 1) and ran.stdout == "" and "Traceback" not in ran.stderr
    error = ran.stderr.splitlines()[-1]
    assert error.startswith("svb: ") and words.format(s=source) in error and " - " in error  # what to do next
    assert not (tmp_path / "ran").exists()
    # What came before the refused video is whole.
    assert not (tmp_path / "out").exists() or verify_store(tmp_path / "out") == []


def test_what_cannot_be_a_source_or_an_output(
    store: Path, tmp_path: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, one = npy_folder(tmp_path / "s", {"a": GOOD}), export(FeatureStore(store), tmp_path / "one.h5")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="unknown layout 'csv' - expected one of h5, "):
        export(FeatureStore(store), tmp_path / "x", layout="csv")
    with pytest.raises(UsageError, match="unknown layout 'csv' - expected one of npy, "):
        imported(source, tmp_path / "x", layout="csv")
    for given, out, words in (
        (store, "out", "is a feature store already - give it to `svb train`"),
        (one, "out", "is a feature store already - give it to `svb train`"),
        (source, "s", "is the source itself - name another folder with -o"),
        (source, "file", "is a file - name another folder with -o"),
    ):
        with pytest.raises(InputError, match=words):
            imported(given, tmp_path / out)
    monkeypatch.chdir(tmp_path)
    assert run_svb("import", source, "--backbone", "a/b+c").stdout == "features\n"
    assert content(tmp_path / "features", "a/b+c")["a"][0] == GOOD.tolist()


class TestAgain:
    def test_only_what_is_new_or_has_changed_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = npy_folder(tmp_path / "s", dict.fromkeys("abd", GOOD))
        imported(source, tmp_path / "out")
        fingerprint, load = FeatureStore(tmp_path / "out").fingerprint, np.load
        read: list[str] = []
        monkeypatch.setattr(np, "load", lambda file, **options: (read.append(file.name), load(file, **options))[1])
        npy_folder(source, {"a": numbers(5, seed=9), "c": OTHER})
        os.utime(source / "b.npy")
        text = said(source, tmp_path / "out")
        assert text.endswith("1 videos imported, 1 changed, 2 unchanged; 8 rows of 4 numbers added")
        assert read == ["a.npy", "b.npy", "c.npy"]
        assert content(tmp_path / "out")["a"][0] == numbers(5, seed=9).tolist()
        assert list(content(tmp_path / "out")) == [*"abcd"] and verify_store(tmp_path / "out") == []
        assert FeatureStore(tmp_path / "out").fingerprint == fingerprint
        grown = h5(a=GOOD)(tmp_path)
        imported(grown, tmp_path / "other")
        with h5py.File(grown, "a") as held:
            held["b"] = OTHER
        assert "1 videos imported, 1 unchanged; 3 rows" in said(grown, tmp_path / "other")

    def test_moved_and_foreign_sources(self, tmp_path: Path, toy_store: Path) -> None:
        source = npy_folder(tmp_path / "s", {"a": GOOD})
        imported(source, tmp_path / "out")
        moved = source.rename(tmp_path / "moved")
        assert "0 videos imported, 1 unchanged" in said(moved, tmp_path / "out")
        shutil.copytree(toy_store, tmp_path / "extracted")
        other, narrow = (npy_folder(tmp_path / "o", {"a": OTHER}), npy_folder(tmp_path / "n", {"b": GOOD[:, :3]}))
        for given, out, options, words in (
            (other, "out", {}, r"the store holds other features of 'a', from .*/s/a.npy - import"),
            (narrow, "out", {}, r"b.npy: rows of 3 numbers, where those before have 4"),
            (moved, "out", {"fps": 2.0}, "sampling.fps: stored 1.0, wanted 2.0"),
            (moved, "out", {"backbone": "other"}, "backbones.other: stored None"),
            (moved, "extracted", {}, r"decoder.name: stored 'pyav', wanted 'imported'"),
        ):
            with pytest.raises((InputError, MismatchError), match=words):
                imported(given, tmp_path / out, **options)
        assert content(tmp_path / "out")["a"][0] == GOOD.tolist()

    @pytest.mark.parametrize("make", [npy, h5])
    def test_stopped_half_way(
        self, make: Callable[..., Make], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svb.data.feature_store_writer.SHARD_VIDEOS", 2)
        videos = {f"v{v}": numbers(seed=v) for v in range(7)}
        source = make(**videos)(tmp_path)

        def stop(done: int, total: int) -> None:
            if done == 5:
                os._exit(9)

        child = os.fork()
        if not child:
            imported(source, tmp_path / "out", on_progress=stop)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert verify_store(tmp_path / "out") == [] and list(content(tmp_path / "out")) == ["v0", "v1", "v2", "v3"]
        assert "3 videos imported, 4 unchanged" in said(source, tmp_path / "out")
        held = {video_id: rows for video_id, (rows, _) in content(tmp_path / "out").items()}
        assert held == {video_id: rows.tolist() for video_id, rows in videos.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on an imported store, beside it; only to be read."""
    folder = tmp_path_factory.mktemp("imported")
    features, captions = tiny_task(folder)
    out = export(FeatureStore(features), folder / "x", layout="npz")
    return train(imported(out, folder / "imported"), captions, folder / "run", tiny())


class TestInUse:
    """An imported store is trained on, evaluated, indexed and searched; what cannot be done says so."""

    def test_evaluate_index_search(
        self, run: Path, tmp_path: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load = "svb.retrieve.model.embedder.load_matching_text_encoder"
        monkeypatch.setattr(load, lambda settings, device: synthetic.make_text_encoder(8))
        assert run_svb("evaluate", run).exit_code == 0
        built = index(run, tmp_path / "index")
        found = Searcher(built).search(SearchRequest(text="a dog", k=3, fold=False)).results
        assert len(found) == 3 and found[0].source_path.endswith(f"{found[0].video_id}.npz")
        ran = run_svb("search", "--video", tmp_path / "clip.mp4", "--index", built)
        assert ran.exit_code == 1
        assert ran.stderr == (
            f"svb: the features of {NAME} were imported and cannot be computed of {tmp_path / 'clip.mp4'} here - "
            "search with a text, or train on features that `svb extract` made\n"
        )

    @pytest.mark.parametrize("name", ["open_clip:ViT-B-32/laion2b_s34b_b79k", "offline:efficientnet-lite0", NAME])
    def test_it_is_never_searched_without_training(
        self, name: str, tmp_path: Path, run_svb: RunSvb, clips_folder: Path
    ) -> None:
        """Not even where the name is of a backbone that svb has: which weights made the features is not known."""
        out = imported(npy_folder(tmp_path / "s", {"a": GOOD}), tmp_path / "out", backbone=name)
        ran = run_svb("extract", clips_folder, "-o", out, "--backbone", name)
        assert ran.exit_code == 1 and "decoder.name: stored 'imported', wanted 'pyav'" in ran.stderr
        for command in (["evaluate", out], ["index", out, "-o", tmp_path / "index"]):
            ran = run_svb(*command)
            assert ran.exit_code == 1 and not (tmp_path / "index").exists()
            assert (
                f"svb: the features of {name} were imported, and we do not know which weights made them: they "
                "cannot be searched without training - train heads with `svb train`" in ran.stderr
            )

    def test_info_and_verify(self, run: Path, run_svb: RunSvb) -> None:
        path = run.parent / "imported"
        held = json.loads(run_svb("info", path, "--json").stdout)
        assert held["backbones"][NAME]["imported"] is True and held["videos"] == {"ok": 18}
        assert held["decoder"]["name"] == "imported" and held["provenance"]["layout"] == "npz"
        assert json.loads((run / "config.json").read_text())["shared_space"] is False
        assert f"backbones.{NAME}.imported: True" in run_svb("info", path, "--all").stdout
        assert run_svb("verify", path).stdout == f"{path}: a whole feature store\n"
        one = export(FeatureStore(path), path.parent / "one.h5")
        assert run_svb("verify", one).stdout == f"{one}: a whole feature store\n"
