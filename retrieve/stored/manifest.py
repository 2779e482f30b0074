"""An index's manifest and the parts that it names.

manifest.json     the commit point, written last: names every file of the index with its size and hash
<part>/<key>/     immutable files; the key is a hash of their hashes. Parts that are no longer named are removed

A commit replaces the manifest in one step, so a reader sees the whole index as it was before or after.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from svb.config import canonical_json
from svb.data.description import publish_description, read_description
from svb.data.publish import hash_file, published_folder, recover_folder, remove_leftovers, sync
from svb.errors import StoreError

FORMAT_VERSION = 2
PARTS = ("segments", "tombstones", "captions", "metadata", "heads", "text", "speech", "confidence")
HEADS = "heads.safetensors"
# Parts of indexes that older versions made: nothing reads them, and the next commit leaves them out.
OLD_PARTS = ("hubs",)
# How often a reader whose files were removed by commits tries again, before it reports them as lost.
MAX_TRIES = 20
_KEY = re.compile(r"[0-9a-f]{16}")

T = TypeVar("T")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return an index's manifest.

    Raises:
        InputError: There is no index.
        StoreError: The manifest is damaged, or of another format.
    """
    path = folder / "manifest.json"
    manifest = read_description(path, kind="an index", make=f"svb index -o {folder}", format_version=FORMAT_VERSION)
    if manifest["format_version"] < FORMAT_VERSION:
        raise StoreError(
            f"{path} has format {manifest['format_version']} - this svb reads format {FORMAT_VERSION}: make the "
            f"index again with `svb index --rebuild -o {folder}`"
        )
    return manifest


def commit(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace an index's manifest, then remove what it no longer names; only the one writer may call this."""
    publish_description(folder / "manifest.json", manifest, format_version=FORMAT_VERSION)
    remove_unnamed(folder, manifest)


def read_whole(folder: Path, open_parts: Callable[[dict[str, Any]], T]) -> T:
    """Open an index's parts by its manifest, and again by the next one where a commit came in between.

    Args:
        folder: The index's.
        open_parts: Called with the manifest.

    Raises:
        InputError, StoreError: As `read_manifest`, or from `open_parts` while the manifest stays the same.
    """
    manifest = read_manifest(folder)
    for _ in range(MAX_TRIES):
        try:
            return open_parts(manifest)
        except (StoreError, OSError):
            newer = read_manifest(folder)
            if newer == manifest:
                raise
            manifest = newer
    return open_parts(manifest)


def named_parts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every part that a manifest names: the folder it lies in, and its entry."""
    for part in PARTS:
        for entry in manifest.get(part, []):
            yield part, entry
    for entry in manifest["segments"]:
        if entry["deleted"] is not None:
            yield "tombstones", entry["deleted"]


def part_folder(folder: Path, part: str, entry: Mapping[str, Any]) -> Path:
    """Return where a part's files lie."""
    return folder / part / str(entry["key"])


def heads_file(folder: Path, manifest: Mapping[str, Any]) -> Path | None:
    """Return the whole file of the embedder's weights, `Embedder.weights`; None if an index keeps none.

    Raises:
        StoreError: The file's hash is not that of the manifest.
    """
    for entry in manifest["heads"]:
        path = part_folder(folder, "heads", entry) / HEADS
        try:
            reason = "its hash is wrong" if hash_file(path) != entry["files"][HEADS] else ""
        except OSError as error:
            reason = str(error)
        if reason:
            raise StoreError(
                f"{path} is damaged ({reason}) - restore it, or make the index again with `svb index --rebuild`"
            )
        return path
    return None


def publish_part(out: Path, part: str, write: Callable[[Path], None]) -> dict[str, Any]:
    """Write a part's files under a name made of their content, and return its entry for the manifest.

    Args:
        out: The index's folder.
        part: One of `PARTS`.
        write: Called with the folder to fill; it holds files alone.

    Returns:
        `key`, `files` (the hash of each) and `sizes` (in bytes).
    """
    (out / part).mkdir(parents=True, exist_ok=True)
    building = out / part / "building"
    with published_folder(building) as aside:
        write(aside)
    paths = sorted(building.iterdir())
    files = {path.name: hash_file(path) for path in paths}
    sizes = {path.name: path.stat().st_size for path in paths}
    key = hashlib.sha256(canonical_json(files).encode()).hexdigest()[:16]
    final = out / part / key
    if final.exists() and not is_damaged(final, files):
        shutil.rmtree(building)
    else:
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        sync(out / part)
    return {"key": key, "files": files, "sizes": sizes}


def remove_unnamed(out: Path, manifest: Mapping[str, Any]) -> None:
    """Remove the parts that a manifest does not name; only the index's one writer may call this."""
    remove_leftovers(out)
    named = {(part, str(entry["key"])) for part, entry in named_parts(manifest)}
    for part in (*PARTS, *OLD_PARTS):
        if (out / part).is_dir():
            remove_leftovers(out / part)
            recover_folder(out / part / "building")  # of which a kill may have left two halves
            shutil.rmtree(out / part / "building", ignore_errors=True)
            for path in (out / part).iterdir():
                # Only what is named as parts are: the folder may have held other things before.
                if (part, path.name) not in named and _KEY.fullmatch(path.name):
                    shutil.rmtree(path)


def is_damaged(folder: Path, files: Mapping[str, str]) -> bool:
    return any(not (folder / name).is_file() or hash_file(folder / name) != files[name] for name in files)


def describe_index(folder: Path) -> dict[str, Any]:
    """Return what an index holds, for `svb info`; errors as `read_manifest`."""
    manifest = read_manifest(folder)
    deleted = [entry["deleted"] for entry in manifest["segments"] if entry["deleted"] is not None]
    return {
        "generation": manifest["generation"],
        "videos": manifest["videos"],
        "moments_total": manifest["moments_total"],
        "moments": manifest["moments"],
        "embedding_size": manifest["embedding_size"],
        "segments": len(manifest["segments"]),
        "deleted": {count: sum(entry[count] for entry in deleted) for count in ("videos", "moments")},
        "captions": {entry["name"]: entry["captions"] for entry in manifest["captions"]},
        "metadata": [column for entry in manifest["metadata"] for column in entry["columns"]],
        "speech": _described(manifest["speech"][0]) if manifest.get("speech") else None,
        "text_tower": _described(manifest["text"][0]) if manifest["text"] else None,
        # None if an older version made it, empty if there was too little to measure with.
        "confidence": next(map(_described, manifest["confidence"]), {}) if "confidence" in manifest else None,
        "vectors": manifest["vectors"],
        "store": manifest["store"],
        **{key: manifest[key] for key in ("model_fingerprint", "model")},
    }


def _described(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("key", "files", "sizes")}
