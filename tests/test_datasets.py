"""Official annotation files to caption tables: every form and protocol, and nothing taken that is not official."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunSvb
from messages import heard
from synthetic import TEXT_ENCODER, make_store, make_text_encoder

from svb.data.caption_features import CaptionFeatures, read_caption_features
from svb.data.caption_table import CaptionTable, hash_lines
from svb.data.datasets import (
    DATASETS,
    activitynet,
    didemo,
    lsmdc,
    match_names,
    msrvtt,
    msvd,
    read_dataset,
    vatex,
    with_names_of,
    youcook2,
)
from svb.data.datasets.official import KnownSplit, OfficialFile
from svb.errors import InputError, UsageError
from svb.extract import captions as stage
from svb.train.training_data import positions_of_splits

ROOT = Path(__file__).resolve().parents[1]
ANNOTATIONS = ROOT.parent / "shared" / "annotations"
needs_annotations = pytest.mark.skipif(
    not ANNOTATIONS.is_dir(), reason="the official annotation files are not ours to ship: no ../shared/annotations"
)

Splits = dict[str, dict[str, list[str]]]

# What is missed where an archive that holds it is gone.
OFFICIAL = {"train_val_annotation.zip": "no train_val_videodatainfo.json", "captions.zip": "no train.json"}
COOKED = "youcookii_annotations_trainval.json"
STEPS = '{"database": {"a": {"subset": "training", "annotations": [%s]}}}'

# What the small files of each data set hold under its first protocol.
SMALL: dict[str, Splits] = {
    "msrvtt": {
        "train": {"video0": ["a dog", "a dog runs"], "video2": ["a cat"], "video7011": ["a bird", "a bird sings"]},
        "test": {"video7010": ["someone, smiling"]},
    },
    "msvd": {
        "train": {"-4wsuPCjDBc_5_15": ["a squirrel eats", "a nut"], "-7KMZQEsJW4_205_208": ["an egg"]},
        "val": {"bQJQGoJF7_k_162_169": ["a man's hat"]},
        "test": {"eyhzdC936uk_15_27": ["a boat"], "f-24IxG9ijw_25_40": ["ein Café"]},
    },
    "vatex": {
        "train": {"Ptf_2VRj-V0_000122_000132": ["a train"], "CBL6uetTPHg_000089_000099": ["a car", "a bus"]},
        "val": {"3c0hLqxvSSI_000000_000010": ["a ship"]},
        "test": {"sf2PPeXQrUA_000000_000010": ["a plane"], "rIJPGdtdaHg_000006_000016": ["a kite", "a ball"]},
    },
    "activitynet": {
        "train": {"v_QOlSCBRmfWY": ["She dances. She ends."], "v_ehGHCYKzyZ8": ["He runs."]},
        "test": {"v_uqiMw7tQ1Cc": ["A tutorial. The coach helps."]},
    },
    "lsmdc": {
        "train": {"0001_A_Film_00.00.51.926-00.00.54.129": ["SOMEONE runs.", "A dog, too."]},
        "val": {"1004_B_00.01.00.000-00.01.02.500": ["The door opens."]},
        "test": {"1051_C_00.45.02.115-00.45.05.121": ['He says "no".']},
    },
    "didemo": {
        "train": {"10015567@N08_3655084291_d8b58466fa": ["a dog jumps the dog leaves"], "b": ["a car turns"]},
        "val": {"12090392@N02_13482799053_87ef417396": ["the man waves"]},
        "test": {"54322086@N00_2408598493_274c77d26a": ["first scene camera pans left"]},
    },
    "youcook2": {
        "train": {"GLd3aX16zBg_90_102": ["spread margarine"], "GLd3aX16zBg_114_127": ["place cheese"]},
        "test": {"xHr8X2Wpmno_9_14": ["boil water"]},
    },
}


def write_zip(path: Path, members: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)


def write_msrvtt(folder: Path, small: Splits) -> None:
    captions = {**small["train"], "video1": ["nobody asks for it"], "video7010": ["someone, smiling", "a smile"]}
    for test, name in ((False, "train_val_videodatainfo.json"), (True, "test_videodatainfo.json")):
        held = [(v, c) for v, cs in captions.items() for c in cs if (int(v[5:]) >= 7010) == test]
        # Sentences of a video do not lie side by side in the official file.
        held.sort(key=lambda pair: hash_lines(pair) if not test else "")
        sentences = [{"sen_id": n, "video_id": v, "caption": c} for n, (v, c) in enumerate(held)]
        text = json.dumps({"info": {}, "videos": [], "sentences": sentences})
        if test:
            (folder / name).write_text(text)
        else:
            write_zip(folder / "train_val_annotation.zip", {"category.txt": "music\t0\n", name: text})
    (folder / "MSRVTT_train.9k.csv").write_text("video_id\n" + "".join(f"{v}\n" for v in small["train"]))
    (folder / "MSRVTT_train.7k.csv").write_text("video_id\nvideo0\nvideo2\n")
    (folder / "MSRVTT_JSFUSION_test.csv").write_text(
        'key,vid_key,video_id,sentence\nret0,msr7010,video7010,"someone, smiling"\n'
    )


def write_msvd(folder: Path, small: Splits) -> None:
    lines = [f"{v} {c} \n" for videos in small.values() for v, captions in videos.items() for c in captions]
    (folder / "AllVideoDescriptions.txt").write_text("# a comment\n\n" + "".join(lines), "utf-8")
    for split, videos in small.items():
        (folder / f"{split}_list.txt").write_text("\n".join(videos))


def write_vatex(folder: Path, small: Splits) -> None:
    def videos(*splits: str) -> str:
        held = [pair for split in splits for pair in small[split].items()]
        return json.dumps([{"videoID": v, "enCap": captions, "chCap": ["一"]} for v, captions in held])

    (folder / "vatex_training_v1.0.json").write_text(videos("train"))
    (folder / "vatex_validation_v1.0.json").write_text(videos("test", "val"))
    for split in ("val", "test"):
        (folder / f"{split}_list.txt").write_text("".join(f"{v}\n" for v in small[split]))


def write_activitynet(folder: Path, small: Splits) -> None:
    def videos(split: str) -> str:
        held = {v: [f" {s.replace(' ', chr(10))}. " for s in c[:-1].split(".")] for v, (c,) in small[split].items()}
        return json.dumps({v: {"duration": 9, "timestamps": [[0, 9]], "sentences": s} for v, s in held.items()})

    members = {"train.json": videos("train"), "val_1.json": videos("test"), "val_2.json": "{}"}
    write_zip(folder / "captions.zip", {f"captions/{name}": text for name, text in members.items()})


def write_lsmdc(folder: Path, small: Splits) -> None:
    for split, name in (("train", "annos_training"), ("val", "annos_val"), ("test", "challenge_1000_publictect")):
        lines = [f"{v}\t00.00.01\t00.00.03\t00.00.00\t00.00.04\t{c}" for v, cs in small[split].items() for c in cs]
        (folder / f"LSMDC16_{name}.csv").write_text("\r\n".join([*lines, ""]))


def write_didemo(folder: Path, small: Splits) -> None:
    for split, videos in small.items():
        # The moments of a video do not lie side by side in the official file.
        moments = [
            {"annotation_id": n, "video": f"{video_id}.mov", "description": half, "times": [[0, 0]]}
            for n in (0, 1)
            for video_id, (paragraph,) in videos.items()
            for half in [" ".join(paragraph.split()[2 * n : 2 + 99 * n])]
        ]
        (folder / f"{split}_data.json").write_text(json.dumps(moments))


def write_youcook2(folder: Path, small: Splits) -> None:
    videos: dict[str, Any] = {"unheard": {"subset": "testing"}}
    for split, subset in (("train", "training"), ("test", "validation")):
        for clip, (sentence,) in small[split].items():
            video_id, begin, end = clip.rsplit("_", 2)
            video = videos.setdefault(video_id, {"subset": subset, "duration": 200.0, "annotations": []})
            step = {"id": len(video["annotations"]), "segment": [int(begin), int(end)], "sentence": sentence}
            video["annotations"].append(step)
    (folder / COOKED).write_text(json.dumps({"database": videos}))


WRITERS = (write_msrvtt, write_msvd, write_vatex, write_activitynet, write_lsmdc, write_didemo, write_youcook2)
WRITE: dict[str, Callable[[Path, Splits], None]] = dict(zip(SMALL, WRITERS, strict=True))


def known(videos: dict[str, list[str]]) -> KnownSplit:
    pairs = [f"{video_id}\t{caption}" for video_id, captions in videos.items() for caption in captions]
    return KnownSplit(len(videos), hash_lines(videos), len(pairs), hash_lines(pairs))


@pytest.fixture
def small_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the small files the official ones."""
    for name, splits in SMALL.items():
        protocols = DATASETS[name].protocols
        for split, videos in splits.items():
            monkeypatch.setitem(protocols[next(iter(protocols))], split, known(videos))  # type: ignore[arg-type]
    seven = {video_id: SMALL["msrvtt"]["train"][video_id] for video_id in ("video0", "video2")}
    monkeypatch.setitem(msrvtt.PROTOCOLS["1k-A-7k"], "train", known(seven))
    monkeypatch.setitem(msrvtt.PROTOCOLS["1k-A-7k"], "test", known(SMALL["msrvtt"]["test"]))
    monkeypatch.setattr(msvd, "_NUMBERS", {"train": range(1, 3), "val": range(3, 4), "test": range(4, 6)})


Folder = Callable[[str], Path]


@pytest.fixture
def folder(small_protocols: None, tmp_path: Path) -> Folder:
    """Return a function that writes the small annotation files of a data set into a new folder."""

    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        WRITE[name](tmp_path / name, SMALL[name])
        return tmp_path / name

    return make


def splits_of(table: CaptionTable) -> Splits:
    found: Splits = {}
    for video_id, caption, split in zip(table.video_ids, table.captions, table.splits, strict=True):
        found.setdefault(split, {}).setdefault(video_id, []).append(caption)
    return found


def in_order(splits: Splits) -> Splits:
    return {split: {v: sorted(captions) for v, captions in videos.items()} for split, videos in splits.items()}


def read(name: str, folder: Path, **options: Any) -> Splits:
    return in_order(splits_of(read_dataset(name, folder, **options).table))


class TestOfficialForms:
    @pytest.mark.parametrize("name", DATASETS)
    def test_every_data_set(self, folder: Folder, name: str) -> None:
        made = folder(name)
        official = read_dataset(name, made)
        assert in_order(splits_of(official.table)) == in_order(SMALL[name])
        assert list(splits_of(official.table)) == list(SMALL[name])
        assert official.table.has_split and official.protocol == next(iter(DATASETS[name].protocols))
        for split, videos in SMALL[name].items():
            assert official.splits[split]["videos"] == len(videos)
            assert official.splits[split]["video_ids_hash"] == hash_lines(videos)
            assert read(name, made, splits=[split]) == in_order({split: videos})
        # Zipped and unzipped are one.
        loose = made.parent / "loose"
        loose.mkdir()
        for path in made.iterdir():
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    for member in archive.namelist():
                        (loose / Path(member).name).write_bytes(archive.read(member))
            else:
                write_zip(loose / f"{path.name}.zip", {path.name: path.read_text("utf-8")})
        assert read_dataset(name, loose) == official
        # A val split that is missing is carved from train, never from test.
        features = CaptionFeatures(official.table, np.zeros((len(official.table), 1), np.float16), {})
        positions = positions_of_splits(features, val_fraction=0.5)
        held = {split: {official.table.video_ids[p] for p in found} for split, found in positions.items()}
        assert held["test"] == set(SMALL[name]["test"])
        assert held["val"] and not held["val"] & (held["test"] | held["train"])
        others = [videos for split, videos in SMALL[name].items() if split != "test"]
        assert held["val"] | held["train"] == {video_id for videos in others for video_id in videos}

    def test_msrvtt_7k_needs_no_test_captions(self, folder: Folder) -> None:
        made, test = folder("msrvtt"), {"test": SMALL["msrvtt"]["test"]}
        (made / "test_videodatainfo.json").unlink()
        assert list(read("msrvtt", made, protocol="1k-A-7k")["train"]) == ["video0", "video2"]
        with pytest.raises(InputError, match=r"no test_videodatainfo.json nor MSRVTT_data.json"):
            read("msrvtt", made, protocol="1k-A")
        assert read("msrvtt", made, protocol="1k-A", splits=["test"]) == test

    def test_msrvtt_full(self, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
        made = folder("msrvtt")
        ranges = {"train": range(1), "val": range(1, 3), "test": range(7010, 7012)}
        monkeypatch.setattr(msrvtt, "_FULL", ranges)
        for split, count in (("train", 2), ("val", 2), ("test", 4)):
            ids = [f"video{number}" for number in ranges[split]]
            full = KnownSplit(len(ids), hash_lines(ids), count)
            monkeypatch.setitem(msrvtt.PROTOCOLS["full"], split, full)
        found = read("msrvtt", made, protocol="full")
        assert [list(found[split]) for split in ("train", "val")] == [["video0"], ["video1", "video2"]]
        # All captions, not the one query of 1k-A.
        birds = ["a bird", "a bird sings"]
        assert found["test"] == {"video7010": ["a smile", "someone, smiling"], "video7011": birds}

    def test_msrvtt_data_json_holds_both(self, folder: Folder) -> None:
        made = folder("msrvtt")
        before = read("msrvtt", made)
        with zipfile.ZipFile(made / "train_val_annotation.zip") as archive:
            held = json.loads(archive.read("train_val_videodatainfo.json"))
        held["sentences"] += json.loads((made / "test_videodatainfo.json").read_text())["sentences"]
        (made / "MSRVTT_data.json").write_text(json.dumps(held))
        (made / "train_val_annotation.zip").unlink()
        (made / "test_videodatainfo.json").unlink()
        assert read("msrvtt", made) == before

    def test_msvd_corpus_csv_and_json_with_a_mapping(self, folder: Folder) -> None:
        made = folder("msvd")
        (made / "AllVideoDescriptions.txt").unlink()
        rows = ["VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description"]
        for videos in SMALL["msvd"].values():
            for video_id, captions in videos.items():
                youtube_id, begin, end = video_id.rsplit("_", 2)
                rows += [f'{youtube_id},{begin},{end},1,clean,2,English,"{caption}"' for caption in captions]
                rows += [f"{youtube_id},{begin},{end},1,clean,2,German,ein Satz"]
        rows += ["eyhzdC936uk,15,27,1,clean,2,English,", "elsewhere,1,2,1,clean,2,English,a clip of no split"]
        (made / "MSR Video Description Corpus.csv").write_text("\r\n".join(rows), "utf-8")
        messages = heard()
        assert read("msvd", made) == in_order(SMALL["msvd"])
        assert any("left out 1 rows without a description" in message for message in messages)
        for path in made.iterdir():
            path.unlink()
        every = {v: captions for videos in SMALL["msvd"].values() for v, captions in videos.items()}
        (made / "captions_msvd.json").write_text(json.dumps(every))
        numbered = [f"{v} vid{number}\n" for number, v in enumerate(every, start=1)]
        (made / "youtube_mapping.txt").write_text("".join(reversed(numbered)))
        assert read("msvd", made) == in_order(SMALL["msvd"])

    def test_vatex_json_lines(self, folder: Folder) -> None:
        made = folder("vatex")
        (made / "vatex_validation_v1.0.json").unlink()
        every = SMALL["vatex"]["val"] | SMALL["vatex"]["test"]
        lines = [json.dumps({"video_id": v, "captions": captions}) for v, captions in every.items()]
        (made / "validation.jsonl").write_text("\n".join(lines))
        assert read("vatex", made) == in_order(SMALL["vatex"])

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("lsmdc", "LSMDC16_challenge_1000_publictect.csv: 1 videos, but the official test split is said to"),
            ("didemo", "test_data.json: 1 videos, but the official test split is said to have 1004 - compare"),
            ("youcook2", "trainval.json: 1 videos, but the official test split is said to have 3492 - compare"),
        ],
    )
    def test_lists_that_we_never_had_are_taken_with_a_warning(self, name: str, words: str, tmp_path: Path) -> None:
        WRITE[name](tmp_path, SMALL[name])
        messages = heard()
        assert read(name, tmp_path) == in_order(SMALL[name])
        assert [message for message in messages if words in message]

    def test_a_val_split_of_1k_a_and_an_unknown_protocol_are_refused(self, folder: Folder) -> None:
        made = folder("msrvtt")
        with pytest.raises(UsageError, match="has no protocol '1k-B' - expected one of 1k-A, 1k-A-7k, full"):
            read("msrvtt", made, protocol="1k-B")
        with pytest.raises(UsageError, match="1k-A has no val split - expected one of train, test; svb train puts"):
            read("msrvtt", made, splits=["val"])


# fmt: off
FORMS = {
    "msrvtt": [
        ("train_val_videodatainfo.json", "[]", "no list of sentences"),
        ("train_val_videodatainfo.json", '{"sentences": [1]}', "no video_id or no caption"),
        ("train_val_videodatainfo.json", '{"sentences": [{"video_id": 1, "caption": ""}]}', "string"),
        ("MSRVTT_train.9k.csv", "id\nvideo0\n", "no column video_id"),
        ("MSRVTT_JSFUSION_test.csv", "video_id,sentence\nvideo7010\n", "line 2 has too few fields"),
        ("MSRVTT_JSFUSION_test.csv", "video_id,sentence\nvideo7010,caf\xe9\n", "0xe9 is not UTF-8"),
    ],
    "msvd": [
        ("captions_msvd.json", "[1]", "not an object of clips"),
        ("captions_msvd.json", '{"a": "text"}', "captions of 'a' are not a list of sentences"),
        ("video_corpus.csv", "VideoID,Language\na,English\n", "no column Start and no column End"),
        ("video_corpus.csv", "VideoID,Start,End,Language,Description\na,x,2,English,a\n", "of 'a' is not a number"),
    ],
    "vatex": [
        ("vatex_training_v1.0.json", "{}", "not a list of videos"),
        ("vatex_training_v1.0.json", "[{}]", "a video has no videoID"),
        ("vatex_training_v1.0.json", '[{"videoID": "a"}]', "captions of 'a' are not a list"),
        ("validation.jsonl", '{"video_id"', "not one JSON object a line"),
    ],
    "activitynet": [
        ("train.json", "[]", "not an object of videos"),
        ("train.json", '{"v_a": {"sentences": [1]}}', "captions of 'v_a' are not a list"),
        ("train.json", "[" * 100_000, "not JSON"),
    ],
    "lsmdc": [("LSMDC16_annos_val.csv", "a\t1\t2\tHe runs", "line 'a\\t1\\t2\\tHe runs' has 4 fields")],
    "didemo": [
        ("val_data.json", "{}", "not a list of moments"),
        ("val_data.json", '[{"description": "a"}]', "a moment has no video"),
        ("val_data.json", '[{"video": "a.avi"}]', "captions of 'a' are not a list of sentences"),
    ],
    "youcook2": [
        (COOKED, "[]", "no database of videos"),
        (COOKED, STEPS % "1", "annotations of 'a' are not a list of steps"),
        (COOKED, STEPS % '{"segment": [1]}', "a step of 'a' has no segment of two seconds"),
    ],
}
# fmt: on


class TestBadFiles:
    """Each names the file, what is wrong with it, and where another comes from."""

    def refused(self, name: str, folder: Path, *words: str, **options: Any) -> None:
        with pytest.raises(InputError) as caught:
            read_dataset(name, folder, **options)
        for word in words:
            assert word in str(caught.value)

    def test_no_folder_an_empty_one_and_that_of_another(self, folder: Folder, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        made = {name: folder(name) for name in DATASETS}
        for name, dataset in DATASETS.items():
            self.refused(name, tmp_path / "nowhere", "is not a folder", dataset.title)
            self.refused(name, tmp_path / "empty", "which is empty")
            for other in {*DATASETS} - {name}:
                self.refused(name, made[other], dataset.title if name != "vatex" else "VATEX")

    @pytest.mark.parametrize("name", DATASETS)
    def test_missing_or_cut_short(self, folder: Folder, name: str) -> None:
        made = folder(name)
        for file in sorted(path for path in made.iterdir() if path.name != "MSRVTT_train.7k.csv"):
            data = file.read_bytes()
            file.unlink()
            self.refused(
                name,
                made,
                OFFICIAL.get(file.name, f"no {file.name}"),
                f"in {made}",
                DATASETS[name].title,
                "get it: ",
                "--split",
            )
            for keep in (0.0, 0.3) if name == "lsmdc" else (0.0, 0.3, 0.9):  # its last sentence is cut at 0.9
                file.write_bytes(data[: int(keep * len(data))])
                # A caption that breaks off is told by the captions' hash alone, which knows no file.
                is_last_caption = (file.name, keep) == ("MSRVTT_JSFUSION_test.csv", 0.9)
                self.refused(name, made, *("word for word",) if is_last_caption else (str(file), "cut short"))
            file.write_bytes(data)

    @pytest.mark.parametrize(
        ("name", "file"), [("msrvtt", "MSRVTT_train.9k.csv"), ("msvd", "test_list.txt"), ("vatex", "test_list.txt")]
    )
    def test_lists_that_are_not_the_official_ones(self, folder: Folder, name: str, file: str) -> None:
        made = folder(name)
        lines = (made / file).read_text().split()
        (made / file).write_text("\n".join([*lines, "another"]))
        self.refused(name, made, file, f"{len(lines) + (file[-3:] == 'txt')} videos", "official", "split has")
        (made / file).write_text("\n".join([*lines[:-1], "another"]))
        self.refused(name, made, file, "are not those of the official", "sorted ids' hash", "expected")
        (made / file).write_text("\n".join([*lines[:-1], lines[-2]]))
        self.refused(name, made, file, f"video {lines[-2]!r} appears twice")

    def test_ids_of_the_annotations_themselves(self, folder: Folder) -> None:
        held: dict[str, Any] = {f"v_{letter}": {"sentences": ["a"]} for letter in "ab"}
        listed = [{"videoID": video_id, "enCap": ["a"]} for video_id in held]
        for name, file, content in (
            ("vatex", "vatex_training_v1.0.json", listed),
            ("activitynet", "train.json", held),
        ):
            made = folder(name)
            (made / file).write_text(json.dumps(content))
            self.refused(name, made, file, "2 videos, first", "are not those of the official train split")

    def test_captions_too_few_or_of_other_words(self, folder: Folder) -> None:
        made, messages = folder("msrvtt"), heard()
        file, queries = made / "test_videodatainfo.json", made / "MSRVTT_JSFUSION_test.csv"
        read("msrvtt", made)
        assert not any("word for word" in message for message in messages)
        whole = json.loads(file.read_text())["sentences"]
        for left_out, *words in (
            ({"a bird", "a bird sings"}, f"{file.name}: no caption of video 'video7011'", "cut short"),
            ({"a bird sings"}, "MSR-VTT 1k-A train: 4 captions, but the official files have 5", "again"),
        ):
            file.write_text(json.dumps({"sentences": [s for s in whole if s["caption"] not in left_out]}))
            self.refused("msrvtt", made, *words)
        # To train on other words is one's own affair; to be tested on them is not.
        file.write_text(json.dumps({"sentences": whole}).replace("a bird sings", "a bird cries"))
        read("msrvtt", made)
        (told,) = [message for message in messages if "word for word" in message]
        assert "MSR-VTT 1k-A train: the videos are the official ones" in told
        queries.write_text(queries.read_text().replace("smiling", "laughing"))
        self.refused("msrvtt", made, "MSR-VTT 1k-A test", "not, word for word", "would not compare", "get the fi")

    @pytest.mark.parametrize(
        ("name", "file", "content", "what"),
        [(name, *row) for name, rows in FORMS.items() for row in rows],
    )
    def test_forms(self, folder: Folder, name: str, file: str, content: str, what: str) -> None:
        made = folder(name)
        if file in ("captions_msvd.json", "video_corpus.csv"):
            (made / "AllVideoDescriptions.txt").unlink()
        if file == "validation.jsonl":
            (made / "vatex_validation_v1.0.json").unlink()
        (made / file).write_bytes(content.encode("latin-1"))
        self.refused(name, made, file, what, "again: ")

    @pytest.mark.parametrize("caption", ["  ", "a \\u0000", "half \\ud83d"])
    def test_captions_that_cannot_be(self, folder: Folder, caption: str) -> None:
        made = folder("activitynet")
        (made / "val_1.json").write_text('{"v_uqiMw7tQ1Cc": {"sentences": ["%s"]}}' % caption)  # noqa: UP031
        self.refused("activitynet", made, "'v_uqiMw7tQ1Cc#0'", str(made))


class TestNamesOfAStore:
    def test_one_name_fits_and_of_two_none(self, folder: Folder) -> None:
        assert match_names(["a", "b"], {}, ["a", "b", "c"]) == {"a": "a", "b": "b"}
        stored = ["TestVideo/video7010", "Train/deep/video1", "xvideo2"]
        assert match_names(["video1", "video2", "video7010"], {}, stored) == {
            "video1": "Train/deep/video1",
            "video7010": "TestVideo/video7010",
        }
        assert match_names(["a"], {}, ["x/a", "y/a"]) == {}
        assert match_names(["a"], {}, ["x/a", "a"]) == {"a": "a"}
        other = {"A_1_2": ["A"], "A_5_6": ["A"], "B_1_2": ["B"]}
        assert match_names(list(other), other, ["A", "B"]) == {"B_1_2": "B"}
        assert match_names(list(other), other, ["A", "A_1_2"]) == {"A_1_2": "A_1_2", "A_5_6": "A"}
        with pytest.raises(InputError, match="none of MSR-VTT's videos: its video_ids are such as 'clip', the"):
            with_names_of(read_dataset("msrvtt", folder("msrvtt")), ["clip"])

    @pytest.mark.parametrize(
        ("name", "video_id", "stored"),
        [
            ("msrvtt", "video7010", "TestVideo/video7010"),
            ("msvd", "eyhzdC936uk_15_27", "YouTubeClips/eyhzdC936uk_15_27"),
            ("msvd", "f-24IxG9ijw_25_40", "vid5"),
            ("vatex", "rIJPGdtdaHg_000006_000016", "rIJPGdtdaHg"),
            ("activitynet", "v_uqiMw7tQ1Cc", "val/uqiMw7tQ1Cc"),
            ("lsmdc", "1051_C_00.45.02.115-00.45.05.121", "1051_C/1051_C_00.45.02.115-00.45.05.121"),
            ("didemo", "54322086@N00_2408598493_274c77d26a", "test/54322086@N00_2408598493_274c77d26a"),
            ("youcook2", "xHr8X2Wpmno_9_14", "clips/xHr8X2Wpmno_9_14"),
        ],
    )
    def test_every_data_sets(self, folder: Folder, name: str, video_id: str, stored: str) -> None:
        before, messages = read_dataset(name, folder(name)), heard()
        after = with_names_of(before, [stored, "something else"])
        renamed = [v for v in after.table.video_ids if v not in before.table.video_ids]
        assert renamed == [stored] * len(SMALL[name]["test"][video_id])
        # What is compared between runs does not depend on what files are called.
        assert (after.splits, after.table.caption_ids) == (before.splits, before.table.caption_ids)
        assert f"test: the store has 1 of {len(SMALL[name]['test'])} videos, 1 under another name" in messages


class TestCommand:
    @pytest.fixture(autouse=True)
    def letters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stage, "load_text_encoder", lambda *_: make_text_encoder())

    def test_info_says_what_was_encoded(self, folder: Folder, run_svb: RunSvb, tmp_path: Path) -> None:
        out = tmp_path / "captions.h5"
        given = ("captions", folder("msrvtt"), "--dataset", "msrvtt", "--text-encoder", TEXT_ENCODER, "-o", out)
        ran = run_svb(*given)
        assert ran.exit_code == 0 and f"ids {hash_lines(SMALL['msrvtt']['test'])}" in ran.stderr
        held = json.loads(run_svb("info", out, "--json").stdout)
        assert held["dataset"] == {"name": "msrvtt", "protocol": "1k-A"}
        assert list(held["splits"]) == ["train", "test"]
        hashes = {"video_ids_hash": hash_lines(["video7010"])}
        hashes["captions_hash"] = hash_lines(["video7010\tsomeone, smiling"])
        assert held["splits"]["test"] == {"videos": 1, "captions": 1, **hashes}
        assert "nothing to do" in run_svb(*given).stderr
        ran = run_svb(*given, "--protocol", "1k-A-7k")
        assert ran.exit_code == 1 and "dataset.protocol: stored '1k-A', wanted '1k-A-7k'" in ran.stderr

    def test_the_stores_names(self, folder: Folder, run_svb: RunSvb, tmp_path: Path) -> None:
        made = folder("activitynet")
        store = make_store(tmp_path / "features", {"deep/uqiMw7tQ1Cc": np.ones((2, 4), np.float32)})
        given = ("captions", made, "--dataset", "activitynet", "--text-encoder", TEXT_ENCODER, "--split", "test")
        ran = run_svb(*given, "--store", store, "-o", tmp_path / "c.h5")
        assert ran.exit_code == 0 and "the store has 1 of 1 videos, 1 under another name" in ran.stderr
        assert read_caption_features(tmp_path / "c.h5").table.video_ids == ["deep/uqiMw7tQ1Cc"]

    def test_options_that_do_not_go_together(self, folder: Folder, run_svb: RunSvb, tmp_path: Path) -> None:
        (tmp_path / "table.csv").write_text("video_id,caption\na,a dog\n")
        table, made = tmp_path / "table.csv", folder("msvd")
        for given, option, exit_code, words in (
            (table, ["--protocol=1k-A"], 2, "--protocol goes with --dataset"),
            (table, ["--split=test"], 2, "--split goes with --dataset"),
            (table, ["--store=features"], 2, "--store goes with --dataset"),
            (made, ["--dataset=msvd", "--drop-empty"], 2, "--drop-empty goes with a table"),
            (made, [], 1, "is a folder"),
        ):
            ran = run_svb("captions", given, *option, "-o", tmp_path / "c.h5")
            assert ran.exit_code == exit_code and words in ran.stderr, ran


def test_the_hash_is_that_of_the_shell(tmp_path: Path) -> None:
    lines = ["video10", "video9", "-x", "Zebra", "a_b", "aB", "é"]
    (tmp_path / "list.txt").write_text("\n".join([*lines, ""]), "utf-8")
    done = subprocess.run(
        "LC_ALL=C sort list.txt | (sha256sum || shasum -a 256) | cut -c1-16",
        shell=True, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.stdout.strip() == hash_lines(lines)


def test_every_data_set_protocol_count_and_file_is_documented() -> None:
    text = (ROOT / "docs" / "datasets.md").read_text("utf-8")
    for name, dataset in DATASETS.items():
        assert f"--dataset {name}" in text and dataset.title in text
        for protocol, splits in dataset.protocols.items():
            assert f"`{protocol}`" in text
            for split in splits.values():
                assert split.num_videos is None or f"{split.num_videos:,}" in text
                assert split.video_ids_hash is None or f"`{split.video_ids_hash}`" in text
    for module in (msrvtt, msvd, vatex, activitynet, lsmdc, didemo, youcook2):
        for value in vars(module).values():
            for file in value.values() if isinstance(value, dict) else [value]:
                if isinstance(file, OfficialFile):
                    assert [name for name in file.names if name not in text] == []


SLOW = pytest.mark.slow


# What is known of the files in ../shared/annotations: captions a split, and one query.
@needs_annotations
@pytest.mark.parametrize(
    ("name", "protocol", "splits", "counts", "caption"),
    [
        ("msrvtt", "1k-A", ["test"], [1000], ("video9770#0", "video9770")),
        pytest.param("msrvtt", "1k-A-7k", [], [140_200, 1000], ("video9770#0", "video9770"), marks=SLOW),
        pytest.param(
            "msrvtt", "full", ["train", "val"], [130_260, 9940], ("video6513#19", "video6513"), marks=SLOW
        ),
        ("msvd", "all-sentences", [], [48_774, 4290, 27_763], ("eyhzdC936uk_15_27#0", "eyhzdC936uk_15_27")),
        ("vatex", "hgr", ["val", "test"], [15_000, 15_000], ("sf2PPeXQrUA_000000_000010#9",) * 2),
        ("activitynet", "val_1", [], [10_009, 4917], ("v_uqiMw7tQ1Cc#0", "v_uqiMw7tQ1Cc")),
    ],
)
def test_the_real_files(
    name: str, protocol: str, splits: list[str], counts: list[int], caption: tuple[str, str]
) -> None:
    messages = heard()
    official = read_dataset(name, ANNOTATIONS / name, protocol=protocol, splits=splits)
    assert [split["captions"] for split in official.splits.values()] == counts
    assert not [message for message in messages if "word for word" in message]
    table = official.table
    place = table.caption_ids.index(caption[0])
    assert table.video_ids[place] == caption[1].partition("#")[0]
    for split, contents in official.splits.items():
        split_known = DATASETS[name].protocols[protocol][split]
        known_of = (split_known.num_videos, split_known.video_ids_hash)
        assert (contents["videos"], contents["video_ids_hash"]) == known_of
    assert sum(map(len, splits_of(table).values())) == len(set(table.video_ids))


@needs_annotations
def test_the_lists_that_have_no_captions_here_and_the_numbers_of_msvd() -> None:
    """1k-A's 9,000 and VATEX's training ids are in the lists; their captions are not in ../shared."""
    lines = (ANNOTATIONS / "msrvtt" / "MSRVTT_train.9k.csv").read_text().split()[1:]
    assert hash_lines(lines) == msrvtt.PROTOCOLS["1k-A"]["train"].video_ids_hash
    lines = (ANNOTATIONS / "vatex" / "train_list.txt").read_text().split()
    assert hash_lines(lines) == vatex.PROTOCOLS["hgr"]["train"].video_ids_hash
    full = hash_lines(f"video{number}" for number in range(7010, 10_000))
    assert full == msrvtt.PROTOCOLS["full"]["test"].video_ids_hash
    names: dict[str, list[str]] = {}
    for split, videos in splits_of(read_dataset("msvd", ANNOTATIONS / "msvd").table).items():
        names |= msvd.other_names(split, list(videos))
    assert [names[clip] for clip in sorted(names)] == [[f"vid{number}"] for number in range(1, 1971)]
