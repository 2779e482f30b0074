"""Makes caption pools from training captions, from a user's file, and from sidecars beside the videos."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from svb.config import fingerprint
from svb.data.tables import TableKind, read_table, text_of
from svb.data.text import mtime_ns_of
from svb.errors import InputError
from svb.retrieve.indexing.sidecars import SUFFIXES, find_sidecars, read_sidecar
from svb.retrieve.stored.cues import Cue
from svb.retrieve.stored.pools import Pool, SidecarRows
from svb.retrieve.stored.segment import StringColumn

if TYPE_CHECKING:
    from svb.data.caption_features import CaptionFeatures
    from svb.extract.text_encoders.text_encoder import TextEncoder
    from svb.retrieve.model.embedder import Embedder

logger = logging.getLogger(__name__)

# Captions to `(C, D)` float32, L2-normalised.
EmbedCaptions = Callable[[Sequence[str]], NDArray[np.float32]]
# Size in bytes and mtime_ns of a file.
State = tuple[int, int]
# Largest file of a user's own captions: ten million of them.
MAX_FILE_BYTES = 2**30

_KIND = TableKind(
    "caption pool", ("caption",), "caption (and optionally video_id)", "quote captions that hold a comma"
)


def caption_embedder(embedder: Embedder, load: Callable[[], TextEncoder]) -> EmbedCaptions:
    """Return a function that embeds captions, and loads the text encoder with the first ones.

    Args:
        embedder: The index's.
        load: Returns the index's text encoder.
    """

    def embed(captions: Sequence[str]) -> NDArray[np.float32]:
        import torch

        encoder = load()
        cut = [caption for caption in captions if encoder.num_tokens(caption) > encoder.max_tokens]
        if cut:
            logger.info(
                f"{len(cut)} captions are longer than the {encoder.max_tokens} tokens that {encoder.name} reads "
                f"and were cut, first {cut[0][:60]!r}"
            )
        return embedder.embed_captions(torch.from_numpy(encoder.encode(captions)))

    return embed


def training_pool(captions: CaptionFeatures, embedder: Embedder) -> Pool:
    """Return the distinct captions of a features file, each with the first video that has it."""
    import torch

    table = captions.table
    first = {caption: position for position, caption in reversed(list(enumerate(table.captions)))}
    positions = sorted(first.values())
    embeddings = embedder.embed_captions(torch.from_numpy(captions.features[positions]))
    rows = [(Cue(table.captions[position]), table.video_ids[position]) for position in positions]
    return _pool("training", "training", captions.fingerprint, rows, embeddings)


def file_pool(path: Path, embed: EmbedCaptions) -> Pool:
    """Return the captions of a user's file.

    Args:
        path: A text file with one caption per line, subtitles, or a table with `caption` and optionally `video_id`.
        embed: Embeds captions with the index's model.

    Raises:
        InputError: It cannot be read, or holds no caption.
    """
    if path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise InputError(f"no caption pool at {path} - expected a file with one caption per line")
        rows = [(cue, "") for cue in read_sidecar(path, MAX_FILE_BYTES)]
    else:
        rows = _table_rows(path)
    rows = list(dict.fromkeys(rows))
    if not rows:
        raise InputError(f"{path} holds no captions - expected one per line, or a table with a column caption")
    source = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return _pool(path.name, "file", source, rows, _embed(rows, embed))


def sidecar_pool(
    videos: Iterable[tuple[str, str]],
    embed: EmbedCaptions,
    previous: Pool | None = None,
    *,
    max_captions: int | None = None,
) -> Pool | None:
    """Return the captions of all sidecars; unchanged ones are not read or embedded again.

    Args:
        videos: The index's: the video_id and the file's path of each.
        embed: Embeds captions with the index's model.
        previous: An earlier pool of the same model.
        max_captions: Embed at most about this many, so that long work can be saved in between: call it again with
            the pool that it returned, until it returns that pool itself.

    Returns:
        `previous` itself if nothing has changed; None if no sidecar holds a caption.
    """
    known = _known(previous)
    kept: list[tuple[tuple[str, str], State, list[Cue]]] = []
    num_new = 0
    for key, state in sorted(_states(videos).items()):
        cues = known.get((key[0], state))
        if cues is None and (max_captions is None or num_new < max_captions):
            cues = _read(Path(key[0]))
            num_new += len(cues)
        if cues is not None:  # an empty one is kept too, so that its problem is reported once
            kept.append((key, state, cues))
    source = fingerprint({"sidecars": [[key, state] for key, state, _ in kept]})
    if previous is not None and source == previous.source:
        return previous
    rows = [(cue, key[1]) for key, _, cues in kept for cue in cues]
    if not rows:
        return None
    held = {} if previous is None else dict(zip(previous.captions, previous.embeddings, strict=True))
    sidecars = SidecarRows(
        StringColumn.of(key[0] for key, _, _ in kept),
        np.array([state for _, state, _ in kept], np.int64),
        np.array([0, *accumulate(len(cues) for _, _, cues in kept)], np.int64),
    )
    return _pool("sidecars", "sidecar", source, rows, _embed(rows, embed, held), sidecars)


def _states(videos: Iterable[tuple[str, str]]) -> dict[tuple[str, str], State]:
    """Return size and mtime_ns of every sidecar, by its path and the video_id that it belongs to."""
    ids_of: dict[Path, list[str]] = {}
    for video_id, source_path in videos:
        ids_of.setdefault(Path(source_path), []).append(video_id)
    states: dict[tuple[str, str], State] = {}
    for video, sidecars in find_sidecars(ids_of).items():
        for sidecar in sidecars:
            with contextlib.suppress(OSError):  # it is gone by now
                stat = sidecar.stat()
                states |= {
                    (str(sidecar), video_id): (stat.st_size, mtime_ns_of(stat)) for video_id in ids_of[video]
                }
    return states


def _known(previous: Pool | None) -> dict[tuple[str, State], list[Cue]]:
    """Return the cues of a pool's sidecars, by path and state."""
    if previous is None or previous.sidecars is None:
        return {}
    held, ends = previous.sidecars, previous.sidecars.offsets.tolist()
    seconds = previous.seconds.astype(object)
    seconds[np.isnan(previous.seconds)] = None
    cues = [Cue(text, *times) for text, times in zip(previous.captions, seconds.tolist(), strict=True)]
    return {
        (path, (state[0], state[1])): cues[begin:end]
        for path, state, begin, end in zip(held.paths, held.state.tolist(), ends[:-1], ends[1:], strict=True)
    }


def _read(path: Path) -> list[Cue]:
    try:
        return read_sidecar(path)
    except InputError as error:
        logger.info(f"{error}; it was left out")
        return []


def _table_rows(path: Path) -> list[tuple[Cue, str]]:
    rows, num_empty = list[tuple[Cue, str]](), 0
    for place, row in read_table(path, _KIND):
        caption = text_of(place, "caption", row["caption"])
        video_id = text_of(place, "video_id", row.get("video_id"))
        num_empty += not caption
        if caption:
            rows.append((Cue(caption), video_id))
    if num_empty:
        logger.info(f"{path}: {num_empty} rows have no caption and were left out")
    return rows


def _embed(
    rows: Sequence[tuple[Cue, str]], embed: EmbedCaptions, held: Mapping[str, NDArray[np.float16]] | None = None
) -> NDArray[np.float16]:
    """Return `(C, D)`; every distinct caption is embedded once, unless it is held already."""
    embedding_of = dict(held or {})
    new = [caption for caption in dict.fromkeys(cue.text for cue, _ in rows) if caption not in embedding_of]
    if new:
        embedding_of |= zip(new, embed(new).astype(np.float16), strict=True)
    return np.stack([embedding_of[cue.text] for cue, _ in rows])


def _pool(
    name: str,
    kind: str,
    source: str,
    rows: Sequence[tuple[Cue, str]],
    embeddings: NDArray[np.floating],
    sidecars: SidecarRows | None = None,
) -> Pool:
    seconds = [(cue.begin_seconds, cue.end_seconds) for cue, _ in rows]
    return Pool(
        name,
        kind,
        source,
        StringColumn.of(cue.text for cue, _ in rows),
        StringColumn.of(video_id for _, video_id in rows),
        np.array(seconds, np.float64),  # None becomes NaN
        embeddings.astype(np.float16),
        sidecars,
    )
