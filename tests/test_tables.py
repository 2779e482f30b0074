"""Tables that users give: every format says the same, and what is damaged is refused with its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from svb.data.caption_table import CaptionTable, read_caption_table
from svb.data.tables import TableKind, read_table
from svb.errors import InputError

KIND = TableKind("caption table", ("video_id", "caption"), "video_id,caption", "quote captions that hold a comma")
ROWS = [{"video_id": "a", "caption": 'a "dog",\nrunning'}, {"video_id": "007", "caption": "nan\t"}]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pd.DataFrame(rows)
    if path.suffix in (".csv", ".tsv"):
        table.to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".CSV"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"t{suffix.lower()}", ROWS).rename(tmp_path / f"t{suffix}")
    assert [dict(row) for _, row in read_table(path, KIND)] == ROWS


def test_what_a_format_alone_can_say(tmp_path: Path) -> None:
    def rows(name: str) -> list[tuple[str, dict[str, Any]]]:
        return [(place.removeprefix(f"{tmp_path}/"), dict(row)) for place, row in read_table(tmp_path / name, KIND)]

    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfvideo_id,caption\r\n1,"x\r\ny"\r\n\r\n2,\r\n')
    first = ("a.csv, line 2", {"video_id": "1", "caption": "x\r\ny"})
    assert rows("a.csv") == [first, ("a.csv, line 5", {"video_id": "2", "caption": ""})]
    (tmp_path / "a.json").write_text('[{"video_id": 7, "caption": null, "more": {}}]')
    assert rows("a.json") == [("a.json, row 1", {"video_id": 7, "caption": None, "more": {}})]
    # A whole number stays one beside a missing one, and a named index is a column.
    table = pd.DataFrame({"video_id": ["a", "b"], "caption": ["x", "y"], "n": pd.array([1, None], "Int64")})
    table.set_index("video_id").to_parquet(tmp_path / "a.parquet")
    assert rows("a.parquet") == [
        ("a.parquet, row 1", {"video_id": "a", "caption": "x", "n": 1}),
        ("a.parquet, row 2", {"video_id": "b", "caption": "y", "n": None}),
    ]
    table.iloc[1:].to_parquet(tmp_path / "a.parquet")
    assert rows("a.parquet") == [("a.parquet, row 1", {"video_id": "b", "caption": "y", "n": None})]


# fmt: off
REFUSED = [
    ("t.csv", b"", "no column video_id and no column caption, only nothing - expected the header video_id,caption"),
    ("t.csv", b"\nvideo_id,caption\n", "line 1 is blank - expected the header"),
    ("t.csv", b"video_id,caption,caption\n1,2,3\n", "column 'caption' appears twice - leave one of them out"),
    ("t.csv", b"video_id,caption\n1\n", "line 2: 1 fields where the header has 2 - quote captions that hold a"),
    ("t.csv", b'video_id,caption\n1,"a\nb"\n1,2,3\n', "line 4: 3 fields where the header has 2"),
    ("t.csv", b'video_id,caption\n1,x\n2,"y\n3,z\n4,z\n', "line 3: not readable (unexpected end of data) - close"),
    ("t.csv", b'video_id,caption\n1,"x\n2,"y"\n', "line 2: not readable (',' expected after '\"') - close every"),
    ("t.csv", b"video_id,caption\n1," + b"x" * 200_000, "line 2: not readable (field larger than field limit"),
    ("t.csv", b"video_id,caption\n" + b"a,b\n" * 30_000 + b"a,\xe9\n", "line 30002: byte 0xe9 is not UTF-8"),
    ("t.tsv", b"video_id,caption\n1,2\n", "no column video_id and no column caption, only video_id,caption"),
    ("t.jsonl", b'{"video_id": "a", "caption": "x"}\n{"video_id": ', "line 2: not JSON ("),
    ("t.jsonl", b'\n[1]', "line 2: not a JSON object - write one object a line"),
    ("t.jsonl", b'{"video_id": "\xff"}', "line 1: byte 0xff is not UTF-8"),
    ("t.json", b'{"video_id": "a"}', "not an array - write an array of objects, or one object a line as .jsonl"),
    ("t.json", b'[{"video_id": "a", "caption": "x"}, 1]', "row 2: not a JSON object"),
    ("t.json", b"[" * 100_000, "not JSON ("),
    ("t.parquet", b"PAR1", "not readable as Parquet ("),
    ("t.xlsx", b"", "cannot tell the format from '.xlsx' - expected .csv, .tsv, .jsonl, .ndjson, .json or"),
]
# fmt: on


@pytest.mark.parametrize(("name", "content", "words"), REFUSED)
def test_what_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_table(tmp_path / name, KIND))
    assert str(tmp_path / name) in str(caught.value) and words in str(caught.value)


class TestCaptions:
    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
    def test_a_list_is_several_captions(self, suffix: str, tmp_path: Path) -> None:
        rows = [
            {"video_id": "a", "caption": ["x", " y "], "caption_id": None},
            {"video_id": "b", "caption": ["z"], "caption_id": "q"},
        ]
        table = read_caption_table(written(tmp_path / f"t{suffix}", rows))
        assert table == CaptionTable(["a#0", "a#1", "q#0"], ["a", "a", "b"], ["x", "y", "z"], ["train"] * 3, False)
        rows[1]["caption"] = ["z", ""]
        with pytest.raises(InputError, match=r"the caption is empty \(1 such rows\)"):
            read_caption_table(written(tmp_path / f"t{suffix}", rows))

    def test_outer_spaces_and_other_names_of_splits(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("video_id,caption,caption_id,split\n a ,x,1 , validation\nb,y,,test \n")
        table = read_caption_table(tmp_path / "t.csv")
        assert table == CaptionTable(["1", "b#0"], ["a", "b"], ["x", "y"], ["val", "test"], True)

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ({"video_id": "a", "caption": {"en": "x"}}, "row 1: caption holds a dict - expected a text or"),
            ({"video_id": "a", "caption": [["x"]]}, "row 1: caption holds a list - expected a text or a"),
            ({"video_id": "a", "caption": True}, "row 1: caption holds a bool"),
            ({"video_id": ["a"], "caption": "x"}, "row 1: video_id holds a list"),
            ({"video_id": "a", "caption": "x", "split": 1}, "row 1: split is '1' - expected one of train"),
        ],
    )
    def test_what_is_neither_text_nor_number(self, row: dict[str, Any], words: str, tmp_path: Path) -> None:
        (tmp_path / "t.json").write_text(json.dumps([row]))
        with pytest.raises(InputError) as caught:
            read_caption_table(tmp_path / "t.json")
        assert words in str(caught.value)
