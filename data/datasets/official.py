"""Official annotation files: found in a folder or in a zip file there, read in place, and named in every error."""

from __future__ import annotations

import csv
import io
import json
import logging
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from svb.data.caption_table import hash_lines
from svb.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OfficialFile:
    """A file of a data set.

    Attributes:
        names: The file's official name, then other names and forms in which it is passed on.
        origin: Who publishes it, and in which archive.
    """

    names: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class Document:
    """An official file that was found and read.

    Attributes:
        file: The entry of the data set that this file answers to.
        name: The one of the entry's names that this file has.
        place: The document's path, for messages.
    """

    file: OfficialFile
    name: str
    place: str
    text: str

    def error(self, what: str) -> InputError:
        """Return the error that says what is wrong with this file, and what to do about it."""
        return InputError(
            f"{self.place}: {what} - it is cut short, altered or of another data set; get {self.file.names[0]} "
            f"again: {self.file.origin}"
        )

    def json(self) -> Any:
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"not JSON ({error})") from error

    def json_lines(self) -> list[Any]:
        try:
            return [json.loads(line) for line in self.text.split("\n") if line.strip()]
        except (ValueError, RecursionError) as error:
            raise self.error(f"not one JSON object a line ({error})") from error

    def csv_rows(self, *columns: str) -> list[dict[str, str]]:
        """Return the rows of a CSV file that must have these columns, each of which is a string."""
        try:
            reader = csv.DictReader(io.StringIO(self.text, newline=""))
            missing = [column for column in columns if column not in (reader.fieldnames or [])]
            if missing:
                raise self.error(f"no column {' and no column '.join(missing)}")
            rows = []
            for row in reader:
                if any(row[column] is None for column in columns):
                    raise self.error(f"line {reader.line_num} has too few fields")
                rows.append({column: row[column] for column in columns})
        except csv.Error as error:
            raise self.error(f"not readable as CSV ({error})") from error
        return rows

    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    def captions(self, video_id: Any, sentences: Any) -> list[str]:
        """Return a video's sentences.

        Raises:
            InputError: They are not a list of strings.
        """
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise self.error(f"the captions of {video_id!r} are not a list of sentences")
        return sentences


@dataclass(frozen=True)
class Annotations:
    """The folder that holds a data set's annotation files.

    Attributes:
        title: The data set, for messages.
        folder: Holds them as they are or in zip files.
        opened: The documents that were read already, by place.
    """

    title: str
    folder: Path
    opened: dict[str, Document] = field(default_factory=dict)

    def get(self, file: OfficialFile) -> Document:
        """Read a file.

        Raises:
            InputError: It is not there, or not readable.
        """
        found = self.find(file)
        if found is None:
            held = sorted(path.name for path in self.folder.iterdir())
            there = f"only {', '.join(held[:6])}{' ...' if len(held) > 6 else ''}" if held else "which is empty"
            raise InputError(
                f"no {' nor '.join(file.names)} in {self.folder}, nor in a zip file there ({there}) - "
                f"{self.title} needs it; get it: {file.origin}. Or read only the splits that do without it, with "
                "--split"
            )
        return found

    def find(self, file: OfficialFile) -> Document | None:
        """Read a file, or return None where there is none."""
        for name in file.names:
            path = self.folder / name
            if path.is_file():
                return self._read(file, name, str(path), path.read_bytes)
            for archive in sorted(self.folder.glob("*.zip")):
                member = _member(archive, name)
                if member is not None:
                    return self._read(file, name, f"{archive}/{name}", partial(_read_member, archive, member))
        return None

    def _read(self, file: OfficialFile, name: str, place: str, read: Callable[[], bytes]) -> Document:
        if place in self.opened:
            return replace(self.opened[place], file=file)
        data = read()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise Document(file, name, place, "").error(
                f"line {line}: byte {data[error.start]:#04x} is not UTF-8"
            ) from error
        logger.info(f"reading {place}")
        self.opened[place] = Document(file, name, place, text)
        return self.opened[place]


def _member(archive: Path, name: str) -> str | None:
    with _zip_errors(archive), zipfile.ZipFile(archive) as opened:
        return next((member for member in opened.namelist() if member.rsplit("/", 1)[-1] == name), None)


def _read_member(archive: Path, member: str) -> bytes:
    with _zip_errors(archive), zipfile.ZipFile(archive) as opened:
        return opened.read(member)


@contextmanager
def _zip_errors(archive: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{archive} cannot be read ({error}) - it is cut short or damaged; get it again, or take it out of "
            "the folder if it is not of this data set"
        ) from error


@dataclass(frozen=True)
class KnownSplit:
    """The facts that are known of an official split.

    Attributes:
        num_videos: Number of videos; None if the publications differ.
        video_ids_hash: `svb.data.caption_table.hash_lines` of their ids; None if we never had the official file.
        num_captions: Number of captions; None if the versions in use differ.
        captions_hash: The hash that `split_contents` gives; None if it could not be taken from the official file.
    """

    num_videos: int | None = None
    video_ids_hash: str | None = None
    num_captions: int | None = None
    captions_hash: str | None = None

    def require_ids(self, video_ids: Sequence[str], split: str, document: Document) -> None:
        """Raise if a list is not the official one; if we never had that file, only warn if the number differs.

        Raises:
            InputError: Ids are missing, repeated, or not the official ones.
        """
        twice = [video_id for video_id, count in Counter(video_ids).items() if count > 1]
        if twice:
            raise document.error(f"video {twice[0]!r} appears twice")
        if self.video_ids_hash is None:
            if self.num_videos not in (None, len(video_ids)):
                logger.warning(
                    f"{document.place}: {len(video_ids)} videos, but the official {split} split is said to have "
                    f"{self.num_videos} - compare results only with those on the same list"
                )
            return
        if len(video_ids) != self.num_videos:
            first = f", first {video_ids[0]!r}" if video_ids else ""
            raise document.error(
                f"{len(video_ids)} videos{first}, but the official {split} split has {self.num_videos}"
            )
        found = hash_lines(video_ids)
        if found != self.video_ids_hash:
            raise document.error(
                f"{len(video_ids)} videos, first {video_ids[0]!r}, are not those of the official {split} split "
                f"(the sorted ids' hash is {found}, expected {self.video_ids_hash})"
            )


def read_a_file_each(
    annotations: Annotations,
    files: Mapping[str, OfficialFile],
    known: Mapping[str, KnownSplit],
    splits: Sequence[str],
    parse: Callable[[Document], dict[str, list[str]]],
) -> dict[str, dict[str, list[str]]]:
    """Return each split's videos with their captions, where every split has a file of its own.

    Raises:
        InputError: A file is missing, damaged, or not the official one.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for split in splits:
        document = annotations.get(files[split])
        found[split] = parse(document)
        known[split].require_ids(list(found[split]), split, document)
    return found


def select(
    video_ids: Iterable[str], captions: Mapping[str, list[str]], documents: Sequence[Document]
) -> dict[str, list[str]]:
    """Return the captions of these videos, in this order.

    Raises:
        InputError: A video has none in the documents that the captions were read from.
    """
    chosen: dict[str, list[str]] = {}
    for video_id in video_ids:
        if not captions.get(video_id):
            raise documents[-1].error(f"no caption of video {video_id!r}")
        chosen[video_id] = captions[video_id]
    return chosen
