"""`svb compare`: is one run better than another, according to the ranks that `svb evaluate` saved?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svb.errors import InputError, MismatchError
from svb.retrieve.measure.paired import Difference, paired_differences
from svb.retrieve.measure.query_ranks import RANKS_FILE, Ranks, read_ranks
from svb.retrieve.model.embedder import run_embedder
from svb.train.config import stored_options
from svb.train.run import read_run


@dataclass(frozen=True)
class Measured:
    """One side of a comparison.

    Attributes:
        path: The path that the user named.
        seeds: The seeds of the runs; None for a file of ranks, which does not name its seed.
        ranks: The ranks of each run.
        checkpoints: The checkpoint of each run, `best` or `last`; empty for a file.
    """

    path: Path
    seeds: tuple[int | None, ...]
    ranks: tuple[Ranks, ...]
    checkpoints: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        a: The first side.
        b: The second side.
        differences: B - A, one for each metric.
    """

    a: Measured
    b: Measured
    differences: list[Difference]

    @property
    def selected_on_split(self) -> bool:
        """Whether the compared split itself chose a checkpoint, so its numbers are too good."""
        return any(
            ranks.selected_on == ranks.queries.split and checkpoint == "best"
            for side in (self.a, self.b)
            for ranks, checkpoint in zip(side.ranks, side.checkpoints, strict=False)
        )

    @property
    def selected_on_test(self) -> bool:
        """Whether the test split chose the best checkpoint of a run."""
        return any(ranks.selected_on == "test" for side in (self.a, self.b) for ranks in side.ranks)

    @property
    def relevances_of_one_side(self) -> list[str]:
        """The relevances by which some of the evaluations were measured, and others not."""
        named = [set(ranks.relevances) for side in (self.a, self.b) for ranks in side.ranks]
        return sorted(named[0].union(*named) - named[0].intersection(*named))

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
    """Compare two runs, or two sets of runs that differ only in their seeds.

    Single runs or files are compared whatever their seeds; sets are paired by seed.

    Args:
        a: A run, a folder with one run per seed, or a file of ranks (`svb evaluate --ranks`).
        b: The same, for the other side.

    Raises:
        InputError: There are no ranks, or the sets have different seeds.
        MismatchError: The ranks belong to different queries (the error names the first) or to other weights.
        StoreError: A file is damaged.
    """
    of_a, of_b = _measured(Path(a)), _measured(Path(b))
    is_one_pair = len(of_a.ranks) == len(of_b.ranks) == 1
    if not is_one_pair and of_a.seeds != of_b.seeds:
        raise InputError(
            f"{a} holds {_seeds_text(of_a)}, {b} {_seeds_text(of_b)} - expected the same seeds, to compare pair by "
            "pair"
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
            f"{path} is not a run and holds none - expected a run, a folder of runs that differ in their seeds, or "
            "a file of ranks from `svb evaluate --ranks FILE`"
        )
    descriptions = [read_run(run) for run in runs]
    by_seed: dict[int, Path] = {}
    for run, description in zip(runs, descriptions, strict=True):
        seed = int(description["config"]["seed"])
        if seed in by_seed:
            raise InputError(f"{by_seed[seed]} and {run} both have the seed {seed} - expected one run per seed")
        by_seed[seed] = run
        _require_alike(runs[0], descriptions[0], run, description)
    seeds = tuple(sorted(by_seed))
    ranks = tuple(read_ranks(by_seed[seed] / RANKS_FILE) for seed in seeds)
    checkpoints = tuple(checkpoint_of(by_seed[seed], held) for seed, held in zip(seeds, ranks, strict=True))
    return Measured(path, seeds, ranks, checkpoints)


def _require_alike(first: Path, held: dict[str, Any], run: Path, other: dict[str, Any]) -> None:
    a, b = ({**stored_options(one["config"]), "seed": None, **one["video"]} for one in (held, other))
    name = next((name for name in (*a, *b) if a.get(name) != b.get(name)), None)
    if name is not None:
        raise InputError(
            f"{first} and {run} differ in more than their seed ({name}: {a.get(name)!r} and {b.get(name)!r}) - "
            "name the runs of one setting, or a single run"
        )


def checkpoint_of(run: Path, ranks: Ranks) -> str:
    """Return the checkpoint that the ranks belong to.

    Raises:
        MismatchError: They belong to neither: the run was trained further, or the file is from another run.
    """
    for checkpoint in ("last", "best"):
        try:
            if run_embedder(run, checkpoint, torch.device("cpu")).fingerprint == ranks.model:
                return checkpoint
        except InputError:  # the run has no such checkpoint
            continue
    raise MismatchError(
        f"{ranks.path} belongs to other weights than {run} holds now - measure these with `svb evaluate {run}`"
    )


def _seeds_text(side: Measured) -> str:
    return f"seeds {', '.join(map(str, side.seeds))}" if side.checkpoints else "one file of ranks"
