"""The runs of an ablation: a folder and the commands for each cell and seed, and which of them are finished."""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svb.config import fingerprint
from svb.data.caption_features import CaptionFeatures, read_caption_features
from svb.data.feature_store import FeatureStore
from svb.data.relevance import relevance_name
from svb.errors import InputError, SvbError
from svb.retrieve.measure.ablation_config import FIELDS, Ablation, Cell
from svb.retrieve.measure.query_ranks import RANKS_FILE, Queries, read_ranks, require_same_queries
from svb.retrieve.model.embedder import run_embedder
from svb.train.checkpoint import load_checkpoint
from svb.train.config import TrainConfig, stored_options
from svb.train.decoders import absolute_decoder
from svb.train.run import read_run
from svb.train.training_data import draw_captions, positions_of_splits

logger = logging.getLogger(__name__)

# Store, captions, backbone, and the share of training videos that is held out.
_Key = tuple[Path, Path, str | None, float]


@dataclass(frozen=True)
class PlannedRun:
    """One cell with one seed.

    Attributes:
        cell: The data and options of the run.
        seed: The run's seed.
        folder: The run's folder, which may not exist yet.
        train_command: The words of the `svb train` command that makes it.
        evaluate_command: The words of the `svb evaluate` command that measures it.
        is_trained: It has had all its epochs, with these options on these data.
        is_finished: It is trained, and its ranks belong to its weights and to the planned queries.
    """

    cell: Cell
    seed: int
    folder: Path
    train_command: list[str]
    evaluate_command: list[str]
    is_trained: bool = False
    is_finished: bool = False

    @property
    def name(self) -> str:
        return f"{self.cell.name} seed {self.seed}"

    @property
    def config(self) -> TrainConfig:
        return self.cell.with_seed(self.seed)

    @property
    def command(self) -> str:
        """Both commands, for a shell."""
        return f"{shlex.join(self.train_command)} && {shlex.join(self.evaluate_command)}"


@dataclass(frozen=True)
class _CellData:
    """The data that cells with the same store, captions and backbone share.

    Attributes:
        store: The feature store.
        video: The settings that shaped the backbone's rows.
        captions: Captions with their features.
        queries: The queries that every run will answer.
    """

    store: FeatureStore
    video: dict[str, Any]
    captions: CaptionFeatures
    queries: Queries


def plan_runs(
    ablation: Ablation, out: Path, device: str = "auto", *, quiet: bool = False
) -> tuple[list[PlannedRun], Queries]:
    """Find or choose a folder for each cell and seed.

    A run is found by its data and options, not by its name, so it is kept when the config file changes around it.

    Returns:
        The runs, those of the first seed first, and the queries that they share.

    Raises:
        InputError: A store, captions or the split's videos are missing.
        MismatchError: The cells would answer different queries.
    """
    tell = logger.debug if quiet else logger.info
    data = _open_data(ablation, quiet)
    queries = data[_key(ablation.baseline)].queries
    held: dict[str, Path] = {}
    for path in sorted((out / "runs").glob("*/*/config.json")):
        identity = _identity_of(path.parent)
        if identity is not None:
            held.setdefault(identity, path.parent)
    planned, asked = [], set()
    for seed in ablation.seeds:
        for cell in ablation.cells:
            identity = _identity(cell, seed, data[_key(cell)])
            folder = held.get(identity)
            if folder is None:
                folder = out / "runs" / _slug(cell.name) / f"seed-{seed}"
                if (folder / "config.json").exists() or folder in asked:
                    other = folder
                    folder = out / "runs" / f"{_slug(cell.name)}-{cell.identity[:6]}" / f"seed-{seed}"
                    tell(f"{other} holds a run with other settings, which is kept; this run goes to {folder}")
            asked.add(folder)
            run = PlannedRun(
                cell, seed, folder, _train_command(cell, seed, folder), _evaluate_command(ablation, cell, folder)
            )
            if device != "auto":
                for command in (run.train_command, run.evaluate_command):
                    command += ["--device", device]
            is_trained = identity in held and _is_trained(run)
            is_finished = is_trained and _is_measured(run, ablation, queries)
            planned.append(dataclasses.replace(run, is_trained=is_trained, is_finished=is_finished))
    left = [folder for folder in held.values() if folder not in asked]
    if left:
        tell(f"{len(left)} other runs in {out / 'runs'} are kept, first {left[0]}")
    return planned, queries


def _train_command(cell: Cell, seed: int, folder: Path) -> list[str]:
    """Return the words of the command that makes a run, without options at their defaults."""
    words = ["svb", "train", str(cell.store), str(cell.captions), "-o", str(folder)]
    if cell.backbone is not None:
        words += ["--backbone", cell.backbone]
    return [*words, *changed_options(cell.config), "--seed", str(seed)]


def changed_options(config: TrainConfig) -> list[str]:
    """Return the words of the options that are not at their defaults; the seed is not among them."""
    words = []
    for name, default in FIELDS.items():
        value, option = getattr(config, name), name.replace("_", "-")
        if value != default:
            is_switch = isinstance(value, bool)
            words += [f"--{'' if value else 'no-'}{option}"] if is_switch else [f"--{option}", str(value)]
    return words


def _evaluate_command(ablation: Ablation, cell: Cell, folder: Path) -> list[str]:
    words = ["svb", "evaluate", str(folder), "--store", str(cell.store), "--captions", str(cell.captions)]
    words += ["--split", ablation.split, "--checkpoint", ablation.checkpoint, "--v2t", ablation.v2t_convention]
    words += [word for name in ablation.relevance for word in ("--relevance", name)]
    return [*words, *(["--allow-missing"] if ablation.allow_missing else [])]


def _open_data(ablation: Ablation, quiet: bool) -> dict[_Key, _CellData]:
    data: dict[_Key, _CellData] = {}
    for cell in ablation.cells:
        if _key(cell) not in data:
            store = FeatureStore(cell.store)
            captions = read_caption_features(cell.captions, store.records)
            video = store.video_settings(store.only_backbone(cell.backbone))
            queries = _queries_of_split(ablation, store, captions, cell, quiet)
            data[_key(cell)] = _CellData(store, video, captions, queries)
            first = next(iter(data))
            require_same_queries(data[first].queries, queries, _named(first), _named(_key(cell)))
    return data


def _queries_of_split(
    ablation: Ablation, store: FeatureStore, captions: CaptionFeatures, cell: Cell, quiet: bool
) -> Queries:
    splits = set(captions.table.splits)
    positions = positions_of_splits(captions, val_fraction=cell.config.put_aside, quiet=quiet)[ablation.split]
    if not positions:
        raise InputError(
            f"{cell.captions} has no {ablation.split} split - expected one of {', '.join(sorted(splits))}"
        )
    usable = set(store.video_ids)
    missing = sorted({captions.table.video_ids[row] for row in positions} - usable)
    if missing and not ablation.allow_missing:
        raise InputError(
            f"{len(missing)} videos of the {ablation.split} split have no features in {cell.store}, first "
            f"{missing[0]!r} - extract them, or leave out their captions with allow_missing = true"
        )
    return _queries(store, captions, positions, ablation.split)


def _queries(store: FeatureStore, captions: CaptionFeatures, positions: Sequence[int], split: str) -> Queries:
    """Return what `svb.train.training_data.load_split` would load, without the features."""
    table, usable = captions.table, set(store.video_ids)
    rows = sorted(
        (row for row in positions if table.video_ids[row] in usable), key=lambda row: table.video_ids[row]
    )
    video_ids = tuple(table.video_ids[row] for row in rows)
    return Queries(split, tuple(table.caption_ids[row] for row in rows), video_ids, tuple(sorted(set(video_ids))))


def _identity(cell: Cell, seed: int, data: _CellData) -> str:
    config = cell.with_seed(seed)
    # This is the form that the run stores.
    config = dataclasses.replace(config, caption_decoder=absolute_decoder(config.caption_decoder))
    positions = positions_of_splits(data.captions, val_fraction=config.put_aside, quiet=True)["train"]
    if config.captions_per_video:
        positions = draw_captions(data.captions, positions, config.captions_per_video, seed)
    trained_on = _queries(data.store, data.captions, positions, "train")
    return fingerprint(
        {
            "config": dataclasses.asdict(config),
            "video": data.video,
            "captions": data.captions.fingerprint,
            "train": fingerprint({"videos": trained_on.video_ids, "captions": trained_on.caption_ids}),
        }
    )


def _identity_of(run: Path) -> str | None:
    """Return the identity of an existing run; None if it cannot be read, which training it will report."""
    try:
        held = read_run(run)
        return fingerprint(
            {
                # Options newer than the run get values that change nothing.
                "config": dataclasses.asdict(TrainConfig(**stored_options(held["config"]))),
                "video": held["video"],
                "captions": held["text"]["captions_fingerprint"],
                "train": held["data"]["train"]["ids"],
            }
        )
    except (SvbError, KeyError, TypeError):
        return None


def _is_trained(run: PlannedRun) -> bool:
    try:
        return load_checkpoint(run.folder / "last").epoch == run.config.epochs
    except SvbError:  # training reports or repairs what is missing or damaged
        return False


def _is_measured(run: PlannedRun, ablation: Ablation, queries: Queries) -> bool:
    try:
        ranks = read_ranks(run.folder / RANKS_FILE)
        require_same_queries(ranks.queries, queries, "", "")
        measured = run_embedder(run.folder, ablation.checkpoint, torch.device("cpu")).fingerprint
    except SvbError:
        return False
    is_graded = {relevance_name(name) for name in ablation.relevance} <= set(ranks.relevances)
    return ranks.model == measured and ranks.v2t_convention == ablation.v2t_convention and is_graded


def _named(key: _Key) -> str:
    store, captions, _, put_aside = key
    return f"{store} with {captions} and val_fraction {put_aside:g}"


def _key(cell: Cell) -> _Key:
    return cell.store, cell.captions, cell.backbone, cell.config.put_aside


def _slug(name: str) -> str:
    """Return a readable folder name for a cell, which no other cell has."""
    slug = re.sub(r"[^\w.,=+:-]", "_", name.replace(" ", ",")).lstrip(".-")[:100]
    return slug if slug == name.replace(" ", ",") else f"{slug}-{fingerprint({'name': name})[:6]}"
