"""What an index is made from, as far as files tell without loading a model: has anything changed since?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from svb.data.description import read_description
from svb.data.feature_store import FeatureStore, shard_names


@dataclass(frozen=True)
class IndexSource:
    """A run or a store, and the options that say how it is read; see `svb.retrieve.model.inputs.open_inputs`."""

    path: Path
    store: Path | None = None
    captions: Path | None = None
    backbone: str | None = None
    text_encoder: str | None = None
    checkpoint: str | None = None

    def state(self) -> list[Any]:
        """Return what is another when the run or the captions were made again; costs no reading."""
        files = [self.path / "config.json", self.path / (self.checkpoint or "best") / "checkpoint.json"]
        return [state_of(path) for path in [*files, *([self.captions_path] if self.captions_path else [])]]

    @property
    def is_run(self) -> bool:
        return (self.path / "config.json").is_file()

    @cached_property
    def store_path(self) -> Path:
        """Return where the features lie.

        Raises:
            InputError, StoreError: The run cannot be read.
        """
        if not self.is_run:
            return self.path
        return self.store or Path(self._run["paths"]["store"])

    @property
    def captions_path(self) -> Path | None:
        """Return where the captions' features lie; None where a store has none."""
        if self.captions is not None or not self.is_run:
            return self.captions
        return Path(self._run["paths"]["captions"])

    def identity(self, store: FeatureStore) -> dict[str, Any]:
        """Return what decides which model and captions this stands for; equal ones are the same.

        Raises:
            InputError, StoreError: The run or its checkpoint cannot be read.
        """
        held = {
            "store": store.fingerprint,
            "captions": [state_of(self.captions_path)] if self.captions_path else [],
            "options": [self.backbone, self.text_encoder, self.checkpoint, not self.is_run and str(self.store)],
        }
        if not self.is_run:
            return held
        run = {key: value for key, value in self._run.items() if key != "paths"}
        folder = self.path / (self.checkpoint or "best")
        checkpoint = read_description(folder / "checkpoint.json", kind="a whole checkpoint", make="svb train")
        return {**held, "run": run, "checkpoint": checkpoint}

    def watched(self, files: Sequence[Path]) -> list[Any]:
        """Return what changes when there is work to do: the store's shards, and other files' states."""
        paths = [*files, *([self.captions_path] if self.captions_path else [])]
        place = self.store_path if self.store_path.is_file() else self.store_path / "store.json"
        return [shard_names(self.store_path), *map(state_of, [place, *paths])]

    @cached_property
    def _run(self) -> dict[str, Any]:
        return read_description(self.path / "config.json", kind="a run", make=f"svb train -o {self.path}")


def state_of(path: Path) -> list[Any]:
    """Return what tells that a file has changed: its path, size and time; of one that is not there its path."""
    try:
        stat = path.stat()
    except OSError:
        return [str(path.absolute())]
    return [str(path.absolute()), stat.st_size, stat.st_mtime_ns]
