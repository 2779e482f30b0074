"""The TOML file of `svb ablate`: its cells, its seeds and its baseline.

Every field of `TrainConfig` but `seed`, and the inputs `store`, `captions` and `backbone`, can be set for all
cells, for the baseline, in the grid and in single cells. See docs/experiments.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svb.config import default_path, fingerprint
from svb.errors import InputError, UsageError
from svb.train.config import TrainConfig, renamed_options
from svb.train.retrieval_metrics import V2T_CONVENTIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

INPUTS = ("store", "captions", "backbone")
TYPES = typing.get_type_hints(TrainConfig)
FIELDS = {field.name: field.default for field in dataclasses.fields(TrainConfig) if field.name != "seed"}
SPLITS = ("train", "val", "test")
CHECKPOINTS = ("best", "last")
_TOP: dict[str, type] = {
    **{"store": str, "captions": str, "backbone": str, "seeds": list, "split": str, "checkpoint": str, "v2t": str},
    **{
        "relevance": list,
        "allow_missing": bool,
        "jobs": int,
        "config": dict,
        "baseline": object,
        "grid": dict,
        "cells": list,
    },
}
_TYPE_NAMES = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
_TYPE_NAMES |= {list: "an array", dict: "a table"}


@dataclass(frozen=True)
class Cell:
    """One row of the table: the data and options of its runs.

    Attributes:
        name: The options that differ, such as `variant=cross loss=max_margin`, or its name in the config file.
        store: A feature store.
        captions: The caption features of the data set.
        backbone: The backbone to train on; None if the store holds only one.
        config: The options; each run sets its seed.
    """

    name: str
    store: Path
    captions: Path
    backbone: str | None
    config: TrainConfig

    @property
    def identity(self) -> str:
        """A key of everything but the name."""
        inputs = [str(self.store), str(self.captions), self.backbone]
        return fingerprint({"inputs": inputs, "config": dataclasses.asdict(self.config)})

    def with_seed(self, seed: int) -> TrainConfig:
        return dataclasses.replace(self.config, seed=seed)


@dataclass(frozen=True)
class Ablation:
    """The content of a config file.

    Attributes:
        cells: All cells, including the baseline.
        baseline: The cell that all others are compared with.
        seeds: The seeds of every cell's runs.
        split: The split to measure.
        checkpoint: The checkpoint to measure, `best` or `last`.
        v2t_convention: One of `svb.train.retrieval_metrics.V2T_CONVENTIONS`.
        relevance: Relevances to measure graded retrieval by, as `--relevance` of `svb evaluate`.
        allow_missing: Leave out captions whose videos have no features.
        jobs: Number of runs at a time.
    """

    cells: tuple[Cell, ...]
    baseline: Cell
    seeds: tuple[int, ...]
    split: str
    checkpoint: str
    v2t_convention: str
    relevance: tuple[str, ...]
    allow_missing: bool
    jobs: int


def read_ablation(path: Path) -> Ablation:
    """Read a config file and check every value of it.

    Raises:
        InputError: There is no such file, it is not TOML, or a value is wrong; the error names the file, and the
            line or the table.
    """
    if not path.is_file():
        raise InputError(f"no config file at {path} - write one as docs/experiments.md shows")
    try:
        written = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:  # the message has the line
        raise InputError(
            f"{path} is not TOML ({error}) - correct that line, then run the same command again"
        ) from error
    try:
        return _ablation(written)
    except (InputError, UsageError) as error:
        raise InputError(f"{path}: {error}") from error


def _ablation(written: dict[str, Any]) -> Ablation:
    for key, value in written.items():
        if key in FIELDS:
            raise InputError(f"{key} is at the top - put options of all cells below [config]")
        _require_known(key, _TOP, "the top")
        _require_type(key, value, _TOP[key])
    common = _options(written.get("config", {}), "[config]")
    common = {**{name: written[name] for name in INPUTS if name in written}, **common}
    cells = [*_grid_cells(written.get("grid", {}), common), *_single_cells(written.get("cells", []), common)]
    if not cells:
        raise InputError("there are no cells - add lists of values below [grid], or [[cells]]")
    for before, cell in itertools.combinations(cells, 2):
        if before.name == cell.name:
            raise InputError(f"two cells are named {cell.name!r} - give each a name of its own")
        if before.identity == cell.identity:
            raise InputError(f"the cells {before.name!r} and {cell.name!r} are the same - leave one out")
    baseline = _baseline(written.get("baseline"), cells, common)
    if baseline not in cells:
        cells.insert(0, baseline)
    split = _choice(written, "split", SPLITS, "val")
    # Val chooses the best checkpoint, so val must not report it.
    checkpoint = _choice(written, "checkpoint", CHECKPOINTS, "best" if split == "test" else "last")
    jobs = written.get("jobs", 1)
    if jobs < 1:
        raise InputError(f"jobs is {jobs} - expected at least 1")
    v2t_convention = _choice(written, "v2t", tuple(V2T_CONVENTIONS), "set")
    allow_missing = written.get("allow_missing", False)
    seeds = _seeds(written.get("seeds", [0, 1, 2]))
    relevance = written.get("relevance", [])
    for name in relevance:
        _require_type("a relevance", name, str)
    return Ablation(
        tuple(cells),
        baseline,
        seeds,
        split,
        checkpoint,
        v2t_convention,
        tuple(dict.fromkeys(relevance)),
        allow_missing,
        jobs,
    )


def _grid_cells(grid: Mapping[str, Any], common: Mapping[str, Any]) -> list[Cell]:
    if not grid:
        return []
    for name, values in grid.items():
        _require_known(name, (*FIELDS, *INPUTS), "[grid]")
        if not isinstance(values, list) or not values:
            raise InputError(f"[grid] {name} is {values!r} - expected a list of values, such as {name} = [1, 2]")
    rows = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    varied = [name for name in grid if len(grid[name]) > 1] or list(grid)
    cells = []
    for row in rows:
        name = name_of({key: row[key] for key in varied})
        cells.append(_cell(name, common, _options(row, f"[grid] {name}")))
    return cells


def _single_cells(tables: list[Any], common: Mapping[str, Any]) -> list[Cell]:
    cells = []
    for number, table in enumerate(tables, start=1):
        place = f"[[cells]] number {number}"
        if not isinstance(table, dict):
            raise InputError(f"{place} is {table!r} - expected a table of options")
        options = dict(table)
        name = options.pop("name", None)
        if name is not None:
            _require_type(f"{place} name", name, str)
            if not name.strip() or not name.isprintable():
                raise InputError(f"{place} is named {name!r} - expected one or more words")
        checked = _options(options, place, more=("name",))
        cells.append(_cell(name or name_of(checked), common, checked))
    return cells


def _baseline(written: object, cells: list[Cell], common: Mapping[str, Any]) -> Cell:
    """Return the cell that the config file names or describes, or the first cell if it does neither."""
    if written is None:
        return cells[0]
    if isinstance(written, str):
        named = {cell.name: cell for cell in cells}
        if written not in named:
            raise InputError(
                f"the baseline {written!r} is not a cell{_nearest(written, named)} - expected one of "
                f"{'; '.join(named)}, or a table [baseline] of options"
            )
        return named[written]
    if not isinstance(written, dict):
        raise InputError(f"baseline is {written!r} - expected a cell's name, or a table [baseline] of options")
    options = _options(written, "[baseline]")
    baseline = _cell(name_of(options), common, options)
    same = next((cell for cell in cells if cell.identity == baseline.identity), None)
    if same is None and any(cell.name == baseline.name for cell in cells):
        return dataclasses.replace(baseline, name=f"baseline {baseline.name}")
    return same or baseline


def _cell(name: str, common: Mapping[str, Any], own: Mapping[str, Any]) -> Cell:
    options = {**common, **own}
    store = options.pop("store", None) or default_path("SVB_FEATURES", "features")
    captions = options.pop("captions", None) or default_path("SVB_CAPTIONS", "captions.h5")
    backbone = options.pop("backbone", None)
    try:
        return Cell(name, Path(store), Path(captions), backbone, TrainConfig(**options))
    except UsageError as error:
        raise InputError(f"cell {name!r}: {error}") from error


def _options(written: Mapping[str, Any], place: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the options of a cell, each in the type of its field."""
    options: dict[str, Any] = {}
    for name, value in renamed_options(written).items():
        _require_known(name, (*FIELDS, *INPUTS, *more), place)
        wanted = TYPES.get(name, str)
        _require_type(f"{place} {name}", value, wanted)
        options[name] = float(value) if wanted is float else value
    return options


def _seeds(seeds: list[Any]) -> tuple[int, ...]:
    if not seeds:
        raise InputError("seeds is empty - expected whole numbers, such as seeds = [0, 1, 2]")
    for seed in seeds:
        _require_type("a seed", seed, int)
        if not 0 <= seed < 2**32:
            raise InputError(f"a seed is {seed} - expected 0 to {2**32 - 1}")
        if seeds.count(seed) > 1:
            raise InputError(f"seeds lists {seed} twice - expected each seed once")
    return tuple(seeds)


def name_of(options: Mapping[str, Any]) -> str:
    """Return a name such as `variant=cross batch_size=64`, or `plain` if no option is set."""
    return " ".join(f"{name}={_text(value)}" for name, value in options.items()) or "plain"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _choice(written: Mapping[str, Any], name: str, choices: tuple[str, ...], default: str) -> str:
    value: str = written.get(name, default)
    if value not in choices:
        raise InputError(f"{name} is {value!r} - expected one of {', '.join(choices)}")
    return value


def _require_type(what: str, value: object, wanted: type) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {float: is_number, int: is_number and isinstance(value, int)}.get(wanted, isinstance(value, wanted))
    if not fits:
        raise InputError(f"{what} is {value!r} - expected {_TYPE_NAMES.get(wanted, wanted.__name__)}")


def _require_known(name: str, known: Iterable[str], place: str) -> None:
    if name == "seed":
        raise InputError(f"{place} sets the seed - every cell runs with all seeds = [...] at the top")
    if name not in set(known):
        raise InputError(
            f"{place} has an unknown option {name!r}{_nearest(name, known)} - expected one of {', '.join(known)}"
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
