"""The emoji data set: made from packages of the same layout, without network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from svb.cli import cli
from svb.data.caption_table import read_caption_table
from svb.errors import InputError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


def emoji(hexcode: str, label: str, tags: list[str], tones: tuple[str, ...] = ()) -> dict[str, Any]:
    first, *rest = hexcode.split("-")
    skins = [
        {"hexcode": "-".join([first, tone, *rest]), "label": f"{label}: tone {number}"}
        for number, tone in enumerate(tones, start=1)
    ]
    return {"hexcode": hexcode, "label": label, "tags": tags} | ({"skins": skins} if skins else {})


DATA = [
    emoji("1F9D1-200D-1F33E", "farmer", ["farmer", "rancher"], TONES),
    emoji("1F469-200D-1F33E", "woman farmer", ["rancher", "woman"], TONES),
    emoji("1F3C3", "person running", ["fast", "person"], TONES),
    emoji("1F3C3-200D-2640-FE0F", "woman running", ["fast"], TONES),
    emoji("1F9B8", "superhero", ["good"], TONES),
    emoji("1F9B8-200D-2642-FE0F", "man superhero", ["good"], TONES),
    emoji("1F415", "dog", ["animal", "pet"]),
    emoji("1F436", "dog face", ["pet", "face"]),
    emoji("1F389", "party popper", ["celebration", "party", "popper"]),
    emoji("0023-FE0F-20E3", "keycap: #", []),
    emoji("002A-FE0F-20E3", "keycap: *", []),
    emoji("1FA85", "pi\u00f1ata", ["candy"]),
    emoji("1F1E9-1F1EA", "flag: Germany", ["flag"]),
    emoji("1F3F4-E0067-E0062-E007F", "flag: England", ["flag"]),
]
SHORTCODES = {
    "emojibase": {"1F415": "dog", "1F436": "dog_face", "1F389": ["party", "party_popper", "tada"]},
    "github": {"1F436": "dog", "1F389": "tada", "1F3C3-200D-2640-FE0F": "running_woman", "0023-FE0F-20E3": "hash"},
    "iamcal": {"1F9B8": "+1", "1F3C3": "runner"},
    "joypixels": {},
}
# The pictures' own spelling: small letters, a flag's end left off and its letters joined.
STEMS = [
    *(variant["hexcode"].lower() for entry in DATA[:12] for variant in (entry, *entry.get("skins", []))),
    *("23-fe0f-20e3", "1f1e9-1f1ea", "1f3f4-e0067_e0062"),
]


def pack(path: Path, files: dict[str, bytes]) -> str:
    """Write a package and return its integrity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script with small packages in the place of the real ones, which lie in `registry/`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import fluent_emoji as module

    registry, images = tmp_path / "registry", {}
    for number in (1, 2):
        files = {f"assets/{stem}.webp": stem.encode() for stem in STEMS[number - 1 :: 2]}
        files |= {"assets/.gitkeep": b"", "README.md": b""}
        package = pack(registry / f"them-pictures-{number}-1.0.0.tgz", files)
        images[f"@them/pictures-{number}@1.0.0"] = package
    names = {"data": DATA} | {f"shortcodes/{name}": table for name, table in SHORTCODES.items()}
    files = {f"en/{name}.json": json.dumps(content).encode() for name, content in names.items()}
    monkeypatch.setattr(module, "IMAGES", images)
    monkeypatch.setattr(module, "NAMES", {"names@2.0.0": pack(registry / "names-2.0.0.tgz", files)})
    return module


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an npm on the PATH that takes packages from `registry/`."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    name = 'file=$(echo "$2" | sed -e "s/^@//" -e "s|[/@]|-|g").tgz'
    npm.write_text(f'#!/bin/sh\n[ "$1" = pack ] || exit 9\n{name}\ncp "{tmp_path}/registry/$file" .\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    return npm


@pytest.mark.parametrize(
    ("variants", "group"),
    [
        (["1f44b", "1f44b-1f3fb", "1f44b-1f3ff"], "1f44b"),
        (["1f469-1f3fb-200d-1f33e", "1f468-200d-1f33e", "1f9d1-1f3fd-200d-1f33e"], "1f9d1-200d-1f33e"),
        (["1f3c3-1f3fb-200d-2640-fe0f", "1f3c3-200d-2642-fe0f", "1f3c3"], "1f3c3"),
        (["1f468", "1f469-1f3ff", "1f9d1"], "1f9d1"),
        (["1f468-200d-1f469-200d-1f466-200d-1f467", "1f469-200d-1f467", "1f46a"], "1f46a"),
        (["1f468-1f3fb-200d-2764-fe0f-200d-1f48b-200d-1f469-1f3fc", "1f48f"], "1f48f"),
        (["1f46b-1f3fb", "1f46d"], "1f9d1-200d-1f91d-200d-1f9d1"),
        (["1f478-1f3fb", "1f934"], "1fac5"),
        (["0023-fe0f-20e3", "23-20e3"], "23-20e3"),
        (["1f3fb"], "1f3fb"),
        (["2764-fe0f"], "2764"),
        (["2764-fe0f-200d-1f525"], "2764-200d-1f525"),
    ],
)
def test_variants_are_one_group(script: ModuleType, variants: list[str], group: str) -> None:
    assert {script.group_of(script.code_points(variant)) for variant in variants} == {group}


def test_split_never_changes(script: ModuleType) -> None:
    fixed = {"1f3c3": "train", "1f9d1-200d-1f33e": "train", "1f9b8": "test", "1f6b6": "test", "1f9db": "val"}
    assert {group: script.split_of(group) for group in fixed} == fixed
    splits = [script.split_of(f"{number:x}") for number in range(10_000)]
    assert [round(splits.count(split) / 10_000, 1) for split in ("train", "val", "test")] == [0.7, 0.1, 0.2]


@pytest.mark.usefixtures("npm")
def test_what_is_made(script: ModuleType, tmp_path: Path) -> None:
    """The tables and the files name the same videos; only train and `variants.csv` hold variants."""
    script.make(tmp_path / "a")
    table, every = (read_caption_table(tmp_path / "a" / name) for name in ("captions.csv", "variants.csv"))
    files = {path.relative_to(tmp_path / "a" / "videos"): path for path in (tmp_path / "a/videos").rglob("*.*")}
    assert {path.with_suffix("").as_posix() for path in files} == set(every.video_ids)
    assert every.groups == [video_id.split("/")[0] for video_id in every.video_ids] and table.groups == []
    rows = list(zip(every.video_ids, every.captions, every.splits, strict=True))
    held = list(zip(table.video_ids, table.captions, table.splits, strict=True))
    variants = [row for row in rows if row not in held]
    assert [row for row in rows if row not in variants] == held
    # Two genders of five skin tones beside the neutral one, the man without one, and a keycap in a second spelling.
    assert len({video_id for video_id, _, _ in variants}) == 2 * 5 + 1 + 1
    assert {split for _, _, split in variants} == {"test"}
    assert {video_id.split("/")[0] for video_id, _, _ in variants} == {"superhero", "keycap-23-20e3"}
    assert all(path.read_text() == path.stem for path in files.values())
    expected = {"pinata/1fa85", "keycap-23-20e3/0023-fe0f-20e3", "keycap-2a-20e3/002a-fe0f-20e3"}
    assert expected <= set(table.video_ids) and not any("flag" in video_id for video_id in table.video_ids)

    by_emoji, captions, meant = (defaultdict(set), defaultdict(list), defaultdict(set))
    for video_id, caption, split in held:
        by_emoji[video_id.split("/")[0]].add((video_id.split("/")[1], split))
        captions[video_id.split("/")[1]].append(caption)
        meant[caption].add((video_id, split))
    assert {split for _, split in by_emoji["farmer"]} == {"train"}
    assert len(by_emoji["farmer"]) == len(by_emoji["person-running"]) == 12
    assert by_emoji["superhero"] == {("1f9b8", "test")}
    assert all(len(of_one) == 1 for of_one in by_emoji.values() if {split for _, split in of_one} != {"train"})
    assert captions["1f3c3"] == ["person running", "person running: fast", "runner"]
    assert captions["1f3c3-1f3fd"] == ["person running, tone 3", "person running: fast", "runner"]
    woman = ["woman running, tone 1", "woman running: fast", "running woman"]
    assert captions["1f3c3-1f3fb-200d-2640-fe0f"] == woman
    assert captions["1f389"] == ["party popper", "party popper: celebration", "party", "tada"]
    # `dog` is another emoji's name, `+1` is no word.
    assert captions["1f436"] == ["dog face", "dog face: pet"]
    assert captions["1f415"] == ["dog", "dog: animal, pet"]
    assert captions["1f9b8"] == ["superhero", "superhero: good"]
    assert {split for of_one in meant.values() if len(of_one) > 1 for _, split in of_one} == {"train"}


def test_what_goes_wrong_is_said_in_one_line_and_nothing_is_kept(
    script: ModuleType, npm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, real = npm.parents[1] / "a", npm.read_text()
    monkeypatch.setattr(sys, "argv", ["fluent_emoji.py", str(folder)])
    for body, words in (
        (f'{real}\necho more >> "$file"\n', "is not @them/pictures-1@1.0.0: its sha512 is "),
        ("#!/bin/sh\necho network is down >&2; exit 3\n", "(exit status 3: network is down) - check that npm"),
        ("", "npm is not on the PATH to fetch @them/pictures-1@1.0.0 - install Node.js"),
    ):
        npm.write_text(body)
        if not body:
            monkeypatch.setenv("PATH", str(folder))
        assert script.main() == 1
        out, err = capsys.readouterr()
        (line,) = [line for line in err.splitlines() if not line.startswith("fetching ")]
        assert out == "" and line.startswith("error: ") and words in line
        assert not [*folder.rglob("*.tgz"), *folder.rglob("captions.csv")]


@pytest.mark.usefixtures("npm")
def test_a_second_run_needs_no_npm_and_the_commands_that_go_on_are_printed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "two words"
    monkeypatch.setattr(sys, "argv", ["fluent_emoji.py", str(folder)])
    assert script.main() == 0
    half, table = min(folder.rglob("*.webp")), (folder / "captions.csv").read_bytes()
    half.write_bytes(b"")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert script.main() == 0
    assert half.read_text() == half.stem and (folder / "captions.csv").read_bytes() == table
    out = capsys.readouterr().out
    commands = [line.split() for line in out.splitlines() if line.startswith("  svb ")]
    names = ["extract", "captions", "train", "evaluate", "captions", "evaluate"]
    assert [command[1] for command in commands] == names * 2 and f"'{folder}'/videos" in out
    for _, name, *arguments in commands:
        known = {option for parameter in cli.commands[name].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("-")} <= known
    package = folder / "packages" / "them-pictures-2-1.0.0.tgz"
    package.write_bytes(b"half")
    half.unlink()
    with pytest.raises(InputError, match=r"them-pictures-2-1\.0\.0\.tgz is not .* remove "):
        script.make(folder)
