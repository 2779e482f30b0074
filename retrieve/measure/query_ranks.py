"""ranks.npz: the rank and the graded measures of every query, and the model that `svb evaluate` measured."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.data.caption_table import CaptionTable
from svb.data.publish import published_file
from svb.data.relevance import make_relevance
from svb.errors import InputError, MismatchError, StoreError, UsageError
from svb.train.graded_metrics import Values, graded_means, graded_values, left_out
from svb.train.retrieval_metrics import RanksOfBoth

RANKS_FILE = "ranks.npz"
# The names of the arrays of graded measures, and of the fingerprints of their relevances, begin with these.
GRADED, RELEVANCE = "graded/", "relevance/"


@dataclass(frozen=True)
class Queries:
    """The queries of an evaluation; two evaluations of equal queries can be paired.

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
        path: The file that holds them.
        queries: The queries.
        t2v: `(C,)` rank of each caption's own video, from 1; averaged ties give halves.
        v2t: `(V,)` rank of each video's captions.
        v2t_convention: How several captions of a video count.
        tie_rule: How equal similarities count.
        model: Fingerprint of the measured model.
        selected_on: The split that chose the run's best checkpoint; empty for a store.
        graded: Values of every query in percent, such as `t2v/nDCG by words`; NaN if a query has none.
        relevances: The fingerprint of each relevance, by its name.
    """

    path: Path
    queries: Queries
    t2v: NDArray[np.float64]
    v2t: NDArray[np.float64]
    v2t_convention: str
    tie_rule: str
    model: str
    selected_on: str
    graded: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    relevances: dict[str, str] = field(default_factory=dict)

    def graded_means(self) -> dict[str, float]:
        """Return the mean over the queries that have a value, in percent, for each of `graded`."""
        return {name: float(np.nanmean(held)) for name, held in self.graded.items() if not np.isnan(held).all()}


def write_ranks(
    path: Path,
    found: dict[str, RanksOfBoth],
    ids: tuple[Sequence[str], Sequence[str], Sequence[str]],
    how: dict[str, Any],
) -> None:
    """Write ranks.npz; `ids` are the caption_ids, each caption's video_id, and the video_ids."""
    arrays = {
        f"{direction}_{method}" if method else direction: values
        for method, pair in found.items()
        for direction, values in zip(("t2v", "v2t"), pair, strict=True)
    }
    names = ("caption_ids", "caption_video_ids", "video_ids")
    held: dict[str, Any] = {**arrays, **dict(zip(names, ids, strict=True)), **how}
    with published_file(path) as aside, aside.open("wb") as file:
        np.savez(file, **held)


def read_ranks(path: Path) -> Ranks:
    """Read a file that `svb evaluate` wrote.

    Raises:
        InputError: There is no such file, or an older svb wrote it.
        StoreError: The file is damaged.
    """
    if not path.is_file():
        raise InputError(
            f"no ranks at {path} - write them with `svb evaluate {path.parent}`, or for a store with --ranks {path}"
        )
    try:
        if not zipfile.is_zipfile(path):  # numpy would take it for a pickle
            raise ValueError("it is not a .npz, or is cut short")
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
        missing = {"caption_video_ids", "model", "tie_rule", "v2t_convention", "selected_on"} - set(held)
        if missing and {"t2v", "v2t", "caption_ids", "video_ids", "split"} <= set(held):
            raise InputError(
                f"an older svb wrote {path}: it lacks {', '.join(sorted(missing))} - write it again with "
                "`svb evaluate`"
            )
        queries = Queries(
            str(held["split"]),
            *(tuple(map(str, held[name].tolist())) for name in ("caption_ids", "caption_video_ids", "video_ids")),
        )
        ranks = Ranks(
            path,
            queries,
            held["t2v"].astype(np.float64),
            held["v2t"].astype(np.float64),
            v2t_convention=str(held["v2t_convention"]),
            tie_rule=str(held["tie_rule"]),
            model=str(held["model"]),
            selected_on=str(held["selected_on"]),
            graded={name.removeprefix(GRADED): held[name] for name in held if name.startswith(GRADED)},
            relevances={
                name.removeprefix(RELEVANCE): str(held[name]) for name in held if name.startswith(RELEVANCE)
            },
        )
        lengths = {"t2v": len(queries.caption_ids), "v2t": len(queries.video_ids)}
        for name, values in ranks.graded.items():
            if values.shape != (lengths[name.partition("/")[0]],) or values.dtype != np.float64:
                raise ValueError(f"{values.shape} values of {name} do not fit its ids")
        if ranks.t2v.shape != (len(queries.caption_ids),) or ranks.v2t.shape != (len(queries.video_ids),):
            raise ValueError(f"{ranks.t2v.shape} and {ranks.v2t.shape} ranks do not fit its ids")
        queries.caption_video()
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{path} is not a whole file of ranks ({error}) - write it again with `svb evaluate`, or "
            "name another file"
        ) from error
    return ranks


def require_comparable(a: Ranks, b: Ranks) -> None:
    """Refuse two evaluations whose queries do not match.

    Raises:
        MismatchError: They differ; the error names the first difference.
    """
    require_same_queries(a.queries, b.queries, str(a.path), str(b.path))
    for what, of_a, of_b in (
        ("v2t convention", a.v2t_convention, b.v2t_convention),
        ("tie rule", a.tie_rule, b.tie_rule),
    ):
        if of_a != of_b:
            raise MismatchError(
                f"{a.path} was written with the {what} {of_a!r}, {b.path} with {of_b!r} - "
                "evaluate both in the same way"
            )
    for name in sorted(a.relevances.keys() & b.relevances.keys()):
        if a.relevances[name] != b.relevances[name]:
            raise MismatchError(
                f"{a.path} and {b.path} were measured by different relevances {name} (other words, groups or "
                "judgements) - evaluate both with the same captions and the same file"
            )


def require_same_queries(a: Queries, b: Queries, name_a: str, name_b: str) -> None:
    """Refuse queries that are not the same in the same order.

    Raises:
        MismatchError: They differ; the error names the first difference.
    """
    do_next = "evaluate both on the same split of the same captions and videos"
    if a.split != b.split:
        raise MismatchError(f"{name_a} is on the {a.split} split, {name_b} on {b.split} - {do_next}")
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
                f"{name_a} has {len(ids_a)} {what}s, {name_b} {len(ids_b)}: the first extra one is "
                f"{_shown(ids[shorter])} in {name} - {do_next}"
            )


def _pairs(queries: Queries) -> list[tuple[str, str]]:
    return list(zip(queries.caption_ids, queries.caption_video_ids, strict=True))


def _shown(query: object) -> str:
    return f"{query[0]!r} of {query[1]!r}" if isinstance(query, tuple) else repr(query)


# --- graded measures


@dataclass(frozen=True)
class Graded:
    """Graded measures by one relevance, see `svb.train.graded_metrics`.

    Attributes:
        description: How the relevance is counted.
        fingerprint: Equal for equal relevances; only values of one relevance can be compared.
        metrics: Means in percent, such as `t2v/nDCG@10 of others`; without measures that no query has.
        left_out: The number of queries without any relevant candidate, by measure.
    """

    description: str
    fingerprint: str
    metrics: dict[str, float]
    left_out: dict[str, int]


def graded_measures(
    names: Sequence[str],
    similarity: NDArray[np.floating],
    table: CaptionTable,
    measured: tuple[list[str], list[str], list[str]],
    caption_video: NDArray[np.int64],
) -> tuple[dict[str, Graded], dict[str, Any]]:
    """Return the graded measures by each relevance, and every query's value as `ranks.npz` holds it.

    Args:
        names: Names of relevances for `svb.data.relevance.make_relevance`.
        similarity: `(C, V)`.
        table: The whole caption table.
        measured: The C captions and caption_ids, and the V video_ids.
        caption_video: `(C,)` column of each caption's own video.
    """
    captions, caption_ids, video_ids = measured
    graded: dict[str, Graded] = {}
    held: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        relevance = make_relevance(
            name,
            table,
            captions=captions,
            caption_ids=caption_ids,
            video_ids=video_ids,
            caption_video=caption_video,
        )
        values: dict[str, Values] = graded_values(similarity, caption_video, relevance)
        if relevance.name in graded:
            raise UsageError(f"two relevances are named {relevance.name} - give the files different names")
        graded[relevance.name] = Graded(
            relevance.description, relevance.fingerprint, graded_means(values), left_out(values)
        )
        held |= {f"{GRADED}{measure} by {relevance.name}": of_queries for measure, of_queries in values.items()}
        held[f"{RELEVANCE}{relevance.name}"] = relevance.fingerprint
    return graded, held
