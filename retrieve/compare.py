"""`svb compare`: is one run better than another, from the ranks that `svb evaluate` saved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svb.errors import InputError, MismatchError
from svb.retrieve.measure.paired import Difference, paired_differences
from svb.retrieve.measure.ranks import FILE, Ranks, read_ranks
from svb.retrieve.model.embedder import run_embedder
from svb.train.run import read_run


@dataclass(frozen=True)
class Measured:
    """One side of a comparison.

    Attributes:
        path: As the user named it.
        seeds: Of the runs that are compared; None for a file of ranks, which names none.
        ranks: Of each.
        checkpoints: Of each, `best` or `last`; empty for a file.
    """

    path: Path
    seeds: tuple[int | None, ...]
    ranks: tuple[Ranks, ...]
    checkpoints: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        a: The first side.
        b: The second.
        differences: B - A, a line a metric.
    """

    a: Measured
    b: Measured
    differences: list[Difference]

    @property
    def selected_on_split(self) -> bool:
        """Whether a checkpoint was chosen by the very split that is compared, so its numbers flatter."""
        return any(
            ranks.selected_on == ranks.queries.split and checkpoint == "best"
            for side in (self.a, self.b)
            for ranks, checkpoint in zip(side.ranks, side.checkpoints, strict=False)
        )

    @property
    def selected_on_test(self) -> bool:
        """Whether a run chose its best checkpoint by the test split."""
        return any(ranks.selected_on == "test" for side in (self.a, self.b) for ranks in side.ranks)

    def as_json(self) -> dict[str, Any]:
        queries = self.a.ranks[0].queries
        return {
            **{
                name: {
                    "path": str(side.path),
                    "seeds": list(side.seeds),
                    "checkpoints": list(side.checkpoints),
                    "ranks": [str(ranks.path) for ranks in side.ranks],
                }
                for name, side in (("a", self.a), ("b", self.b))
            },
            "split": queries.split,
            "num_captions": len(queries.caption_ids),
            "num_videos": len(queries.video_ids),
            "v2t_convention": self.a.ranks[0].v2t_convention,
            "selected_on_split": self.selected_on_split,
            "selected_on_test": self.selected_on_test,
            "differences": [dataclasses.asdict(difference) for difference in self.differences],
        }


def compare(a: Path | str, b: Path | str) -> Comparison:
    """Compare two runs, or two sets of runs that differ in their seeds.

    Args:
        a: A run, a folder that holds one run a seed, or a file of ranks (`svb evaluate --ranks`).
        b: Likewise. One run or file is compared with another whatever their seeds; sets are paired by seed.

    Raises:
        InputError: There are no ranks, or the sets have other seeds.
        MismatchError: The ranks are of other queries, naming the first that differs, or not of the run's weights.
        StoreError: A file is damaged.
    """
    of_a, of_b = _measured(Path(a)), _measured(Path(b))
    is_one_pair = len(of_a.ranks) == len(of_b.ranks) == 1
    if not is_one_pair and of_a.seeds != of_b.seeds:
        raise InputError(
            f"{a} holds {_seeds_text(of_a)}, {b} {_seeds_text(of_b)} - expected the same seeds, which are compared "
            "pair by pair"
        )
    return Comparison(of_a, of_b, paired_differences(of_a.ranks, of_b.ranks))


def _measured(path: Path) -> Measured:
    if path.is_file():
        return Measured(path, (None,), (read_ranks(path),), ())
    if (path / "config.json").is_file():
        runs = [path]
    else:
        runs = sorted(found.parent for found in path.glob("*/config.json"))
    if not runs:
        raise InputError(
            f"{path} is no run and holds none - expected a run, a folder of runs that differ in their seeds, or a "
            "file of ranks written by `svb evaluate --ranks FILE`"
        )
    descriptions = [read_run(run) for run in runs]
    by_seed: dict[int, Path] = {}
    for run, description in zip(runs, descriptions, strict=True):
        seed = int(description["config"]["seed"])
        if seed in by_seed:
            raise InputError(f"{by_seed[seed]} and {run} both have the seed {seed} - expected one run a seed")
        by_seed[seed] = run
        _require_alike(runs[0], descriptions[0], run, description)
    seeds = tuple(sorted(by_seed))
    ranks = tuple(read_ranks(by_seed[seed] / FILE) for seed in seeds)
    checkpoints = tuple(_checkpoint_of(by_seed[seed], held) for seed, held in zip(seeds, ranks, strict=True))
    return Measured(path, seeds, ranks, checkpoints)


def _require_alike(first: Path, held: dict[str, Any], run: Path, other: dict[str, Any]) -> None:
    a, b = ({**description["config"], "seed": None, **description["video"]} for description in (held, other))
    name = next((name for name in (*a, *b) if a.get(name) != b.get(name)), None)
    if name is not None:
        raise InputError(
            f"{first} and {run} differ in more than their seed ({name}: {a.get(name)!r} and {b.get(name)!r}) - "
            "name the runs of one setting, or a single run"
        )


def _checkpoint_of(run: Path, ranks: Ranks) -> str:
    """Return which checkpoint the ranks are of.

    Raises:
        MismatchError: Of neither: the run was trained on, or the file is another's.
    """
    for checkpoint in ("last", "best"):
        try:
            if run_embedder(run, checkpoint, torch.device("cpu")).fingerprint == ranks.model:
                return checkpoint
        except InputError:  # there is none
            continue
    raise MismatchError(
        f"{ranks.path} was measured on other weights than {run} holds now - measure them with `svb evaluate {run}`"
    )


def _seeds_text(side: Measured) -> str:
    return f"seeds {', '.join(map(str, side.seeds))}" if side.checkpoints else "one file of ranks"
