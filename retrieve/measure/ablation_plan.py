"""What an ablation has to run: a folder for each cell and seed, and which of them are finished already."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svb.config import fingerprint
from svb.data.caption_features import CaptionFeatures, read_caption_features
from svb.data.feature_store import FeatureStore
from svb.errors import InputError, SvbError
from svb.retrieve.measure.ablation_config import Ablation, Cell
from svb.retrieve.measure.ranks import FILE, Queries, read_ranks, require_same_queries
from svb.retrieve.model.embedder import run_embedder
from svb.train.checkpoint import load_checkpoint
from svb.train.config import TrainConfig
from svb.train.decoders import absolute_decoder
from svb.train.run import read_run
from svb.train.training_data import draw_captions, positions_of_splits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedRun:
    """One cell with one seed.

    Attributes:
        cell: What is asked.
        seed: Of the run.
        folder: The run's; it may not exist yet.
        is_trained: It has had all its epochs, on what is asked.
        is_finished: And its ranks are of its weights and of the queries that are asked.
    """

    cell: Cell
    seed: int
    folder: Path
    is_trained: bool = False
    is_finished: bool = False

    @property
    def name(self) -> str:
        return f"{self.cell.name} seed {self.seed}"

    @property
    def config(self) -> TrainConfig:
        return self.cell.with_seed(self.seed)


@dataclass(frozen=True)
class Inputs:
    """What cells with the same store, captions and backbone share.

    Attributes:
        store: Opened.
        video: Settings that shaped the backbone's rows.
        captions: With their features.
        queries: What will be asked of every run.
    """

    store: FeatureStore
    video: dict[str, Any]
    captions: CaptionFeatures
    queries: Queries


def plan(ablation: Ablation, out: Path, *, quiet: bool = False) -> tuple[list[PlannedRun], Queries]:
    """Find or choose a folder for each cell and seed.

    A run that is held already is found by what it was trained on and with, not by its name: it is kept when
    the config file changes around it.

    Returns:
        The runs, those of the first seed first, and the queries they share.

    Raises:
        InputError: A store, captions or the split's videos are missing.
        MismatchError: Cells would be asked different queries.
    """
    tell = logger.debug if quiet else logger.info
    inputs = _open_inputs(ablation)
    queries = inputs[_key(ablation.baseline)].queries
    held: dict[str, Path] = {}
    for path in sorted((out / "runs").glob("*/*/config.json")):
        identity = _identity_of(path.parent)
        if identity is not None:
            held.setdefault(identity, path.parent)
    planned, asked = [], set()
    for seed in ablation.seeds:
        for cell in ablation.cells:
            identity = _identity(cell, seed, inputs[_key(cell)])
            folder = held.get(identity)
            if folder is None:
                folder = out / "runs" / _slug(cell.name) / f"seed-{seed}"
                if (folder / "config.json").exists() or folder in asked:
                    other = folder
                    folder = out / "runs" / f"{_slug(cell.name)}-{cell.identity[:6]}" / f"seed-{seed}"
                    tell(f"{other} holds a run with other settings, which is kept: this one goes to {folder}")
            asked.add(folder)
            run = PlannedRun(cell, seed, folder)
            is_trained = identity in held and _is_trained(run)
            is_finished = is_trained and _is_measured(run, ablation, queries)
            planned.append(dataclasses.replace(run, is_trained=is_trained, is_finished=is_finished))
    left = [folder for folder in held.values() if folder not in asked]
    if left:
        tell(f"{len(left)} runs in {out / 'runs'} are not asked for and are kept, first {left[0]}")
    return planned, queries


def _open_inputs(ablation: Ablation) -> dict[tuple[Path, Path, str | None, float], Inputs]:
    inputs: dict[tuple[Path, Path, str | None, float], Inputs] = {}
    for cell in ablation.cells:
        if _key(cell) not in inputs:
            store, captions = FeatureStore(cell.store), read_caption_features(cell.captions)
            video = store.video_settings(store.only_backbone(cell.backbone))
            queries = _queries_of_split(ablation, store, captions, cell)
            inputs[_key(cell)] = Inputs(store, video, captions, queries)
            first = next(iter(inputs))
            require_same_queries(inputs[first].queries, queries, _named(first), _named(_key(cell)))
    return inputs


def _queries_of_split(ablation: Ablation, store: FeatureStore, captions: CaptionFeatures, cell: Cell) -> Queries:
    splits = set(captions.table.splits)
    positions = positions_of_splits(captions, val_fraction=cell.config.put_aside, quiet=True)[ablation.split]
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
    """Return what `svb.train.training_data.load_split` would load, without any feature."""
    table, usable = captions.table, set(store.video_ids)
    rows = sorted(
        (row for row in positions if table.video_ids[row] in usable), key=lambda row: table.video_ids[row]
    )
    video_ids = tuple(table.video_ids[row] for row in rows)
    return Queries(split, tuple(table.caption_ids[row] for row in rows), video_ids, tuple(sorted(set(video_ids))))


def _identity(cell: Cell, seed: int, inputs: Inputs) -> str:
    config = cell.with_seed(seed)
    config = dataclasses.replace(config, decoder=absolute_decoder(config.decoder))  # as a run remembers it
    positions = positions_of_splits(inputs.captions, val_fraction=config.put_aside, quiet=True)["train"]
    if config.captions_per_video:
        positions = draw_captions(inputs.captions, positions, config.captions_per_video, seed)
    trained_on = _queries(inputs.store, inputs.captions, positions, "train")
    return fingerprint(
        {
            "config": dataclasses.asdict(config),
            "video": inputs.video,
            "captions": inputs.captions.fingerprint,
            "train": fingerprint({"videos": trained_on.video_ids, "captions": trained_on.caption_ids}),
        }
    )


def _identity_of(run: Path) -> str | None:
    """Return the same of a run that is held; None where it cannot be read: training it will say why."""
    try:
        held = read_run(run)
        return fingerprint(
            {
                # Options that are newer than the run have their defaults, which leave all as it was.
                "config": dataclasses.asdict(TrainConfig(**held["config"])),
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
    except SvbError:  # whatever is missing or damaged, training says or mends it
        return False


def _is_measured(run: PlannedRun, ablation: Ablation, queries: Queries) -> bool:
    try:
        ranks = read_ranks(run.folder / FILE)
        require_same_queries(ranks.queries, queries, "", "")
        measured = run_embedder(run.folder, ablation.checkpoint, torch.device("cpu")).fingerprint
    except SvbError:
        return False
    return ranks.model == measured and ranks.v2t_convention == ablation.v2t_convention


def _named(key: tuple[Path, Path, str | None, float]) -> str:
    store, captions, _, put_aside = key
    return f"{store} with {captions} and val_fraction {put_aside:g}"


def _key(cell: Cell) -> tuple[Path, Path, str | None, float]:
    return cell.store, cell.captions, cell.backbone, cell.config.put_aside


def _slug(name: str) -> str:
    """Return a folder's name for a cell, readable and unlike that of any other."""
    slug = re.sub(r"[^\w.,=+:-]", "_", name.replace(" ", ",")).lstrip(".-")[:100]
    return slug if slug == name.replace(" ", ",") else f"{slug}-{fingerprint({'name': name})[:6]}"
