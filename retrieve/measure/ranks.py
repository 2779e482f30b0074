"""ranks.npz: the rank of every query, as `svb evaluate` wrote them, and which run and checkpoint they are of."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svb.errors import InputError, MismatchError, StoreError

FILE = "ranks.npz"


@dataclass(frozen=True)
class Queries:
    """What was asked: two results can be paired where these are equal.

    Attributes:
        split: `train`, `val` or `test`.
        caption_ids: C ids, the queries of t2v.
        caption_video_ids: C ids, each caption's own video.
        video_ids: V ids, the candidates of t2v and queries of v2t.
    """

    split: str
    caption_ids: tuple[str, ...]
    caption_video_ids: tuple[str, ...]
    video_ids: tuple[str, ...]

    def caption_video(self) -> NDArray[np.int64]:
        """Return the `(C,)` row of each caption's video in `video_ids`."""
        row_of = {video_id: row for row, video_id in enumerate(self.video_ids)}
        return np.array([row_of[video_id] for video_id in self.caption_video_ids])


@dataclass(frozen=True)
class Ranks:
    """One evaluation.

    Attributes:
        path: The file they were read from.
        queries: What was asked.
        t2v: `(C,)` rank of each caption's own video, from 1; a half where ties are averaged.
        v2t: `(V,)` rank of each video's captions.
        v2t_convention: How several captions of a video count.
        tie_rule: How equal similarities count.
        model: Fingerprint of the model that was measured.
        selected_on: The split by which its run chose the best checkpoint; empty where it is no run.
    """

    path: Path
    queries: Queries
    t2v: NDArray[np.float64]
    v2t: NDArray[np.float64]
    v2t_convention: str
    tie_rule: str
    model: str
    selected_on: str


def read_ranks(path: Path) -> Ranks:
    """Read a file that `svb evaluate` wrote.

    Raises:
        InputError: There is none, or an older svb wrote it.
        StoreError: It is damaged.
    """
    if not path.is_file():
        raise InputError(
            f"no ranks at {path} - write them with `svb evaluate {path.parent}`, or of a store with --ranks {path}"
        )
    try:
        if not zipfile.is_zipfile(path):  # numpy would take it for a pickle
            raise ValueError("it is no .npz, or cut short")
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
        missing = {"caption_video_ids", "model", "tie_rule", "v2t_convention", "selected_on"} - set(held)
        if missing and {"t2v", "v2t", "caption_ids", "video_ids", "split"} <= set(held):
            raise InputError(
                f"{path} was written by an older svb: it lacks {', '.join(sorted(missing))} - write it again "
                "with `svb evaluate`"
            )
        queries = Queries(
            str(held["split"]),
            *(tuple(map(str, held[name].tolist())) for name in ("caption_ids", "caption_video_ids", "video_ids")),
        )
        ranks = Ranks(
            path,
            queries,
            *(held[name].astype(np.float64) for name in ("t2v", "v2t")),
            *(str(held[name]) for name in ("v2t_convention", "tie_rule", "model", "selected_on")),
        )
        if ranks.t2v.shape != (len(queries.caption_ids),) or ranks.v2t.shape != (len(queries.video_ids),):
            raise ValueError(f"{ranks.t2v.shape} and {ranks.v2t.shape} ranks do not fit its ids")
        queries.caption_video()
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{path} is not a whole file of ranks ({error}) - write it again with `svb evaluate`, or name another"
        ) from error
    return ranks


def require_comparable(a: Ranks, b: Ranks) -> None:
    """Refuse two evaluations of which not every query has its twin.

    Raises:
        MismatchError: Names the first that differs.
    """
    require_same_queries(a.queries, b.queries, str(a.path), str(b.path))
    for what, of_a, of_b in (
        ("v2t convention", a.v2t_convention, b.v2t_convention),
        ("tie rule", a.tie_rule, b.tie_rule),
    ):
        if of_a != of_b:
            raise MismatchError(
                f"{a.path} was written with the {what} {of_a!r}, {b.path} with {of_b!r} - evaluate both alike"
            )


def require_same_queries(a: Queries, b: Queries, name_a: str, name_b: str) -> None:
    """Refuse queries that are not the same in the same order.

    Raises:
        MismatchError: Names the first that differs.
    """
    do_next = "evaluate both on the same split of the same captions and videos"
    if a.split != b.split:
        raise MismatchError(f"{name_a} is of the {a.split} split, {name_b} of {b.split} - {do_next}")
    for what, ids_a, ids_b in (
        ("caption", list(zip(a.caption_ids, a.caption_video_ids, strict=True)), _pairs(b)),
        ("video", list(a.video_ids), list(b.video_ids)),
    ):
        for row, (id_a, id_b) in enumerate(zip(ids_a, ids_b, strict=False), start=1):
            if id_a != id_b:
                raise MismatchError(
                    f"{what} {row} is {_shown(id_a)} in {name_a}, {_shown(id_b)} in {name_b} - {do_next}"
                )
        if len(ids_a) != len(ids_b):
            name, ids, shorter = (
                (name_a, ids_a, len(ids_b)) if len(ids_a) > len(ids_b) else (name_b, ids_b, len(ids_a))
            )
            raise MismatchError(
                f"{name_a} has {len(ids_a)} {what}s, {name_b} {len(ids_b)}: first more is {_shown(ids[shorter])} "
                f"in {name} - {do_next}"
            )


def _pairs(queries: Queries) -> list[tuple[str, str]]:
    return list(zip(queries.caption_ids, queries.caption_video_ids, strict=True))


def _shown(query: object) -> str:
    return f"{query[0]!r} of {query[1]!r}" if isinstance(query, tuple) else repr(query)
