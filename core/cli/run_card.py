"""`svb info RUN --card FILE.md`: a page that says what a run is, how it was made and how good it is."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from svb import __version__
from svb.config import fingerprint
from svb.errors import MismatchError
from svb.retrieve.compare import checkpoint_of
from svb.retrieve.measure.ablation_plan import changed_options
from svb.retrieve.measure.paired import intervals
from svb.retrieve.measure.query_ranks import RANKS_FILE, Ranks, read_ranks
from svb.train.checkpoint import load_checkpoint
from svb.train.config import TrainConfig, selection_note, stored_options
from svb.train.retrieval_metrics import ranks_metrics
from svb.train.run import read_run

logger = logging.getLogger(__name__)

# Ranks, and the checkpoint that they belong to.
Evaluations: TypeAlias = list[tuple[Ranks, str]]


def run_card(run: Path) -> str:
    """Return the card of a run in Markdown.

    The metrics come from the files of ranks that `svb evaluate` wrote to the run's folder.

    Raises:
        InputError: The folder is not a run.
        StoreError: A file is damaged.
    """
    description = read_run(run)
    config, found = TrainConfig(**stored_options(description["config"])), list(_evaluations(run))
    lines = [f"# {run.name}", "", f"Written by svb {__version__}.", ""]
    if note := selection_note(config.select_on):
        lines += [f"**{note}.**", ""]
    lines += ["## Model", "", *_table(["", ""], _model(description)), ""]
    lines += ["## Data", "", *_table(["split", "videos", "captions", "hash of the ids"], _data(description)), ""]
    lines += ["## Selection", "", _selection(run, config), ""]
    lines += ["## Metrics", "", *_metrics(run, found), ""]
    lines += ["## Commands", "", "```", *_commands(run, description, config, found), "```", ""]
    lines += ["## Options", "", *_table(["option", "value"], asdict(config).items()), ""]
    return "\n".join(lines)


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]


def _model(description: dict[str, Any]) -> Iterator[tuple[str, str]]:
    video, text = description["video"], description["text"]
    yield "videos by", f"{video['backbone']}, hash of its settings `{fingerprint(video)}`"
    yield (
        "captions by",
        f"{text['text_encoder']['name']}, hash of its weights `{text['text_encoder']['weights_hash']}`",
    )
    yield "captions file", f"hash of its contents `{text['captions_fingerprint']}`"


def _data(description: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for split, held in description["data"].items():
        if held:
            yield split, held["videos"], held["captions"], f"`{held['ids']}`"


def _selection(run: Path, config: TrainConfig) -> str:
    by = "sum of R@1, R@5 and R@10" if config.select_by == "recalls" else f"nDCG@10 of others by {config.select_by}"
    epochs = {name: load_checkpoint(run / name).epoch for name in ("best", "last") if (run / name).is_dir()}
    held = ", ".join(f"`{name}` is epoch {epoch}" for name, epoch in epochs.items()) or "there is no checkpoint yet"
    return (
        f"The best checkpoint has the highest {by} of both directions on {config.select_on}, which is measured "
        f"every {config.evaluate_every} epochs, of {config.epochs} in all. Here {held}. The seed is {config.seed}."
    )


def _evaluations(run: Path) -> Iterator[tuple[Ranks, str]]:
    """Yield the evaluations of the run's weights, and the checkpoint that each measured."""
    for path in sorted(run.glob("*.npz")):
        ranks = read_ranks(path)
        try:
            yield ranks, checkpoint_of(run, ranks)
        except MismatchError as error:
            logger.warning(f"left out of the card: {error}")


def _metrics(run: Path, found: Evaluations) -> Iterator[str]:
    if not found:
        yield f"None: `svb evaluate {run}` has not measured these weights yet."
    for ranks, checkpoint in found:
        queries = ranks.queries
        chosen = f"chosen on {ranks.selected_on or 'nothing'}" if checkpoint == "best" else "not chosen"
        yield (
            f"**{queries.split}**, checkpoint {checkpoint} ({chosen}): {len(queries.caption_ids)} captions against "
            f"{len(queries.video_ids)} videos; {ranks.tie_rule}; v2t by {ranks.v2t_convention}. Intervals of 95 % "
            "are over videos."
        )
        if checkpoint == "best" and ranks.selected_on == queries.split:
            yield f"**The {queries.split} split chose this checkpoint, so its numbers there are too good.**"
        yield ""
        plain = ranks_metrics(ranks.t2v, ranks.v2t)
        rows = [
            (name, f"{value:.2f}", f"{at.low:.2f} to {at.high:.2f}")
            for name, (value, at) in intervals(ranks).items()
        ]
        rows += [(name, f"{plain[name]:.1f}", "") for name in ("t2v/MedR", "v2t/MedR")]
        yield from _table(["metric", "value", "interval"], rows)
        yield ""


def _commands(run: Path, description: dict[str, Any], config: TrainConfig, found: Evaluations) -> Iterator[str]:
    paths = description["paths"]
    train = ["svb", "train", paths["store"], paths["captions"], "-o", str(run)]
    train += ["--backbone", description["video"]["backbone"]]  # the store may hold several
    yield shlex.join([*train, *changed_options(config), "--seed", str(config.seed)])
    for ranks, checkpoint in found:
        words = ["svb", "evaluate", str(run), "--split", ranks.queries.split, "--checkpoint", checkpoint]
        words += ["--v2t", ranks.v2t_convention] if ranks.v2t_convention != "set" else []
        words += [word for name in ranks.relevances for word in ("--relevance", name)]
        words += ["--ranks", str(ranks.path)] if ranks.path.name != RANKS_FILE else []
        yield shlex.join(words)
