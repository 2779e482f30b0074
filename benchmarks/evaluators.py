"""What well-known evaluators report of the same similarities: `python benchmarks/evaluators.py [matrix.npy ...]`.

Their rules, as docs/evaluation.md describes them, are written here anew, none of their code: each says which place
the own candidate gets where others are equal to it. Prints the tables of docs/evaluation.md; a file is a square
float matrix, rows are captions, each video with one caption, and is measured as it is and rounded to 0.01.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from svb.train.retrieval_metrics import summarise, t2v_ranks, v2t_ranks

Matrix = NDArray[np.floating]
Owners = NDArray[np.integer]
Row = dict[str, float]
COLUMNS = ("R@1", "R@5", "R@10", "MedR", "MeanR")


def better_and_equal(similarity: Matrix, own: Owners) -> tuple[Owners, Owners]:
    """Return how many candidates beat each query's own, and how many others equal it."""
    value = similarity[np.arange(len(own)), own][:, None]
    return (similarity > value).sum(axis=1), (similarity == value).sum(axis=1) - 1


def row_of(ranks: Matrix, median: Callable[[Matrix], float] = np.median) -> Row:
    recalls = {f"R@{k}": float(100 * (ranks <= k).mean()) for k in (1, 5, 10)}
    return {**recalls, "MedR": float(median(ranks)), "MeanR": float(ranks.mean())}


def svb(similarity: Matrix, own: Owners) -> Row:
    """Ties averaged."""
    return {name: value for name, value in summarise(t2v_ranks(similarity, own)).items() if name in COLUMNS}


def first_of_equals(similarity: Matrix, own: Owners) -> Row:
    """In collaborative-experts the own candidate stands before all that equal it."""
    better, _ = better_and_equal(similarity, own)
    return row_of(1.0 + better)


def averaged_then_rounded_down(similarity: Matrix, own: Owners) -> Row:
    """In MMT the mean place; found within k where it is below k + 1, but first only where it is 1."""
    better, equal = better_and_equal(similarity, own)
    return mmt_row(1.0 + better + equal / 2)


def mmt_row(ranks: Matrix) -> Row:
    recalls = {f"R@{k}": float(100 * (ranks < k + 1).mean()) for k in (5, 10)}
    return {**row_of(ranks), **recalls}


def every_equal_is_a_query(similarity: Matrix, own: Owners) -> Row:
    """In CLIP4Clip each place that an equal candidate takes counts as one more query."""
    better, equal = better_and_equal(similarity, own)
    places = [1.0 + first + np.arange(count + 1) for first, count in zip(better, equal, strict=True)]
    return row_of(np.concatenate(places))


def sorted_places(similarity: Matrix) -> NDArray[np.int64]:
    """Return each candidate's place from 1, equal ones in the order that torch happens to sort them in."""
    order = torch.argsort(torch.from_numpy(np.ascontiguousarray(similarity)), dim=-1, descending=True)
    places: NDArray[np.int64] = order.argsort(dim=-1).numpy() + 1
    return places


def as_sorted(similarity: Matrix, own: Owners) -> Row:
    """In open_clip equal candidates come as they were sorted; the median is rounded down."""
    ranks = sorted_places(similarity)[np.arange(len(own)), own]
    return row_of(ranks, lambda values: float(np.floor(np.median(values))))


def top_k_as_sorted(similarity: Matrix, own: Owners) -> Row:
    """Hit rate of torchmetrics: sorted a query at a time; it has no ranks, so no MedR and MeanR."""
    ranks = np.array([sorted_places(row)[column] for row, column in zip(similarity, own, strict=True)])
    return {name: value for name, value in row_of(ranks).items() if name.startswith("R@")}


ONE_CAPTION: dict[str, Callable[[Matrix, Owners], Row]] = {
    "svb": svb,
    "collaborative-experts": first_of_equals,
    "MMT": averaged_then_rounded_down,
    "CLIP4Clip": every_equal_is_a_query,
    "open_clip": as_sorted,
    "torchmetrics": top_k_as_sorted,
}


def several_captions(similarity: Matrix, owners: Owners) -> dict[str, Row]:
    """Return the v2t metrics of each evaluator that takes several captions a video."""
    num_videos = similarity.shape[1]
    better, mean = np.empty((2, *similarity.shape))  # of a caption among all captions, for each video
    for video in range(num_videos):
        column = similarity[:, video]
        better[:, video] = (column[None, :] > column[:, None]).sum(axis=1)
        mean[:, video] = 1 + better[:, video] + ((column[None, :] == column[:, None]).sum(axis=1) - 1) / 2
    places = np.stack([sorted_places(column) for column in similarity.T], axis=1)
    is_own = owners[:, None] == np.arange(num_videos)[None, :]
    sets = np.stack([similarity[owners == video].max(axis=0) for video in range(num_videos)])
    top = np.where(is_own, places, len(owners) + 1).min(axis=0)
    recalls = {
        f"R@{k}": float(100 * ((is_own & (places <= k)).sum(axis=0) / is_own.sum(axis=0)).mean())
        for k in (1, 5, 10)
    }
    ours = {convention: summarise(v2t_ranks(similarity, owners, convention)) for convention in ("set", "best")}
    return {
        "svb `set`": {name: ours["set"][name] for name in COLUMNS},
        "CLIP4Clip": every_equal_is_a_query(sets.T, np.arange(num_videos)),
        "svb `best`": {name: ours["best"][name] for name in COLUMNS},
        "collaborative-experts": row_of(1 + np.where(is_own, better, np.inf).min(axis=0)),
        "MMT": mmt_row(np.where(is_own, mean, np.inf).min(axis=0)),
        "torchmetrics hit rate": {name: value for name, value in row_of(top).items() if name.startswith("R@")},
        "torchmetrics recall": recalls,
    }


def square_matrices() -> dict[str, Matrix]:
    """Return small matrices of 200 captions and as many videos: without ties, with many, and collapsed."""
    clear = (np.random.default_rng(0).normal(size=(200, 200)) + 2 * np.eye(200)).astype(np.float32)
    return {"random": clear, "rounded": clear.round(), "collapsed": np.full_like(clear, 0.5)}


def matrices_with_siblings() -> dict[str, Matrix]:
    """Return the same of 200 captions and 40 videos; caption i is of video i // 5."""
    clear = np.random.default_rng(0).normal(size=(200, 40)) + np.repeat(np.eye(40), 5, axis=0)
    return {
        "random": clear.astype(np.float32),
        "rounded": clear.astype(np.float32).round(),
        "collapsed": np.full((200, 40), 0.5, np.float32),
    }


def lines(matrix: str, rows: dict[str, Row]) -> list[str]:
    """Return a line of a Markdown table for each evaluator."""
    cells = {
        name: " | ".join(f"{row[column]:.1f}" if column in row else "" for column in COLUMNS)
        for name, row in rows.items()
    }
    return [f"| {matrix} | {name} | {values} |" for name, values in cells.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    matrices = square_matrices()
    for file in parser.parse_args().files:
        similarity = np.load(file)
        for name, of_file in ((file.stem, similarity), (f"{file.stem} rounded", similarity.round(2))):
            matrices |= {f"{name}, t2v": of_file, f"{name}, v2t": of_file.T}
    header = f"| matrix | evaluator | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 2)}|"
    print(header)
    for name, similarity in matrices.items():
        own = np.arange(len(similarity))
        print(*lines(name, {evaluator: rule(similarity, own) for evaluator, rule in ONE_CAPTION.items()}), sep="\n")
    print(f"\n{header}")
    for name, similarity in matrices_with_siblings().items():
        print(*lines(name, several_captions(similarity, np.repeat(np.arange(40), 5))), sep="\n")


if __name__ == "__main__":
    main()
