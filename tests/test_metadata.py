"""A table of a user's own beside the videos: what is kept of it, and what it filters."""

from __future__ import annotations

import datetime
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from messages import heard

from svb.errors import InputError, StoreError
from svb.retrieve.stored.metadata import Metadata, publish_metadata

VIDEO_IDS = ["a", "b/c", "d", "e"]
TABLE = """video_id,views,title,date,when<5
a,10,A Dog runs,2024-01-31,x
b/c,9.5,Straße,2023-12-01,y
d,,,2024-02-01,x
elsewhere,1e3,a cat,,x
"""


def publish(folder: Path, text: str, name: str = "t.csv", video_ids: Sequence[str] = VIDEO_IDS) -> dict[str, Any]:
    (folder / name).write_text(text)
    return {"metadata": [publish_metadata(folder / "index", folder / name, video_ids)]}


@pytest.fixture
def opened(tmp_path: Path) -> Metadata:
    return Metadata.open(tmp_path / "index", publish(tmp_path, TABLE))


def matching(metadata: Metadata, *where: str) -> str:
    return " ".join(np.array(VIDEO_IDS)[metadata.matches(where, VIDEO_IDS)])


class TestWhere:
    @pytest.mark.parametrize(
        ("where", "expected"),
        [
            ("views = 10.0", "a"),
            ("views>=9.5", "a b/c"),
            ("views<1e1", "b/c"),
            ("views>-1", "a b/c"),
            ("title=a dog runs", ""),
            ("title!=A Dog runs", "b/c d e"),
            ("title~dOg", "a"),
            ("title~STRASSE", "b/c"),
            ("title~", "a b/c"),
            ("date>=2024-01-01", "a d"),
            ("date<2024", "b/c"),
            ("when<5=x", "a d"),
            ("  views = 10 ", "a"),
        ],
    )
    def test_operators(self, opened: Metadata, where: str, expected: str) -> None:
        assert matching(opened, where) == expected

    def test_all_conditions_must_fit(self, opened: Metadata) -> None:
        assert matching(opened) == "a b/c d e"
        assert matching(opened, "date>=2024", "views!=10") == "d"
        assert matching(opened, "views=10", "views=9.5") == ""

    def test_another_list_of_videos_is_looked_up_anew(self, opened: Metadata) -> None:
        assert matching(opened, "views=10") == "a"
        assert opened.matches(["views=10"], ["d", "a"]).tolist() == [False, True]
        assert opened.matches(["views=1000"], ["elsewhere"]).tolist() == [True]
        assert opened.matches(["views=10"], []).tolist() == []

    @pytest.mark.parametrize(
        ("where", "message"),
        [
            ("likes=3", "no column 'likes' - expected one of views, title, date, when<5"),
            ("view=3", "no column 'view'"),
            ("=3", "no column ''"),
            ("", "no column ''"),
            ("title", "'title' has no operator - expected one of != <= >= = < > ~ after title"),
            ("title is x", "no column 'title is x'"),
            ("views=many", "views holds numbers - expected one, as in views>=10, got 'many'"),
            ("views=", "got ''"),
            ("views==3", "got '=3'"),
            ("views=nan", "got 'nan'"),
            ("views>1_000", "got '1_000'"),
            ("views~1", "views holds numbers, and ~ searches text - use = != < <= > or >="),
        ],
    )
    def test_conditions_that_mean_nothing(self, opened: Metadata, where: str, message: str) -> None:
        with pytest.raises(InputError) as caught:
            opened.matches([where], VIDEO_IDS)
        assert message in str(caught.value)

    def test_without_metadata(self, tmp_path: Path) -> None:
        empty = Metadata.open(tmp_path, {"metadata": []})
        assert empty.columns == {} and empty.of("a") == {} and empty.matches([], VIDEO_IDS).all()
        with pytest.raises(InputError, match="the index has no metadata - give it a table with `svb index"):
            empty.matches(["views=3"], VIDEO_IDS)

    @pytest.mark.parametrize("seed", range(5))
    def test_as_a_slow_reading_says(self, seed: int, tmp_path: Path) -> None:
        random, video_ids = np.random.default_rng(seed), [f"v{number}" for number in range(200)]
        held = {
            video_id: (
                str(round(random.normal(), 1)) if random.random() < 0.9 else "",
                random.choice(["x", "y", ""]),
            )
            for video_id in video_ids
            if random.random() < 0.8
        }
        table = "\n".join(["video_id,n,t", *(f"{video_id},{n},{t}" for video_id, (n, t) in held.items())])
        metadata = Metadata.open(tmp_path / "index", publish(tmp_path, table))
        compare = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le}
        for symbol, function in {**compare, ">": operator.gt, ">=": operator.ge}.items():
            for column, place, kind, value in (("n", 0, float, 0.3), ("t", 1, str, "x")):
                known = [held.get(video_id, ("", ""))[place] for video_id in video_ids]
                expected = [function(kind(each), value) if each else symbol == "!=" for each in known]
                assert metadata.matches([f"{column}{symbol}{value}"], video_ids).tolist() == expected


class TestTables:
    def test_what_is_known_of_a_video(self, opened: Metadata) -> None:
        assert opened.columns == {"views": "number", "title": "text", "date": "text", "when<5": "text"}
        assert opened.of("a") == {"views": 10, "title": "A Dog runs", "date": "2024-01-31", "when<5": "x"}
        assert isinstance(opened.of("a")["views"], int)
        assert opened.of("b/c")["views"] == 9.5
        assert opened.of("d") == {"date": "2024-02-01", "when<5": "x"}
        assert opened.of("e") == {} and opened.of("elsewhere")["views"] == 1000

    def test_what_a_format_types_is_kept(self, tmp_path: Path) -> None:
        days = [datetime.date(2024, 1, 2)] * 2
        columns = {"count": [3, 2], "share": [0.5, None], "name": ["x", None], "good": [True, False], "day": days}
        frame = pd.DataFrame({"video_id": ["b", "a"], **columns})
        frame.to_csv(tmp_path / "t.csv", index=False)
        frame.to_parquet(tmp_path / "t.parquet")
        for name in ("t.csv", "t.parquet"):
            entry = publish_metadata(tmp_path / "index", tmp_path / name, ["a"])
            metadata = Metadata.open(tmp_path / "index", {"metadata": [entry]})
            assert list(metadata.columns.values()) == ["number", "number", "text", "text", "text"], name
            known = metadata.of("b")
            assert (known["count"], known["share"], known["name"]) == (3, 0.5, "x"), name
            assert str(known["good"]).lower() == "true" and str(known["day"]).startswith("2024-01-02"), name
            assert {*metadata.of("a")} == {"count", "good", "day"}, name

    def test_json_lines_need_not_have_every_column(self, tmp_path: Path) -> None:
        lines = '{"video_id": 7, "a": 1}\n{"video_id": "x", "b": "t"}\n'
        metadata = Metadata.open(tmp_path / "index", publish(tmp_path, lines, "t.jsonl"))
        assert metadata.of("7") == {"a": 1} and metadata.of("x") == {"b": "t"}

    @pytest.mark.parametrize("value", ["1_0", "nan", "inf", "1e999", str(10**19), "9007199254740992", "007"])
    def test_what_is_no_number_is_text(self, value: str, tmp_path: Path) -> None:
        number = value if re.fullmatch(r"[1-9]\d*(e\d+)?", value) else f'"{value}"'
        lines = f'{{"video_id": "v0", "n": {number}}}'
        for name, text in (("t.csv", f"video_id,n\nv0,{value}\n"), ("t.jsonl", lines)):
            metadata = Metadata.open(tmp_path / "index", publish(tmp_path, text, name))
            assert metadata.columns == {"n": "text"}
            assert name == "t.jsonl" or metadata.of("v0") == {"n": value}
        mixed = Metadata.open(tmp_path / "index", publish(tmp_path, "video_id,n\nv0,1\nv1,two\n"))
        assert mixed.columns == {"n": "text"} and mixed.of("v0") == {"n": "1"}

    def test_videos_that_the_index_does_not_hold_are_said_and_kept(self, tmp_path: Path) -> None:
        messages = heard()
        metadata = Metadata.open(tmp_path / "index", publish(tmp_path, TABLE + "a,10,A Dog runs,2024-01-31,x\n"))
        (message,) = messages
        said = (
            f"{tmp_path}/t.csv: 1 of 4 videos are not in the index, first 'elsewhere'; their values are kept until"
        )
        assert message.startswith(said) and metadata.of("a")["views"] == 10  # the same row twice is one

    def test_of_a_table_of_captions_what_is_said_of_the_video_is_taken(self, tmp_path: Path) -> None:
        text = "video_id,caption,n,take,split\na,a dog,1,1,val\na,a puppy,1,2,val\nb,a cat,2,1,train\n"
        (tmp_path / "t.csv").write_text(text)
        messages = heard()
        entry = publish_metadata(tmp_path / "index", tmp_path / "t.csv", ["a", "b"])
        assert entry["columns"] == {"n": "number", "split": "text"}
        metadata = Metadata.open(tmp_path / "index", {"metadata": [entry]})
        assert metadata.of("a") == {"n": 1, "split": "val"}
        assert [message.partition(": ")[2] for message in messages] == [
            "caption differs between the rows of a video, first 'a'; the column is left out",
            "take differs between the rows of a video, first 'a'; the column is left out",
        ]

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("t.csv", "video_id,n\na,1\na,2\n", "line 3: 'a' appears twice with different values"),
            ("t.csv", "video_id,n\n,1\n", "line 2: video_id is empty"),
            ("t.csv", "video_id\na\n", "has no column besides video_id - expected columns to show"),
            ("t.csv", "video_id,n\n", "holds no rows"),
            ("t.csv", "id,n\na,1\n", "no column video_id, only id, n - expected the header video_id and columns"),
            ("t.jsonl", '{"video_id": "a", "n": [1]}', "line 1, n holds list - expected a number or text"),
            ("t.jsonl", '{"video_id": "a", "n": "\\u0000"}', "line 1, n holds a NUL"),
        ],
    )
    def test_bad_tables(self, name: str, text: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            publish(tmp_path, text, name)
        assert message in str(caught.value) and str(tmp_path / name) in str(caught.value)
        assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("name", ["video_id_utf8", "column0", "column1_offsets"])
def test_damage(name: str, tmp_path: Path) -> None:
    manifest = publish(tmp_path, TABLE)
    path = tmp_path / "index/metadata" / manifest["metadata"][0]["key"] / f"{name}.npy"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:30], None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(StoreError, match="is damaged" if damaged is None else f"is damaged .{name}.npy has"):
            Metadata.open(tmp_path / "index", manifest)
