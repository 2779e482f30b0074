"""The parts of an index besides its segments: heads, captions, speech, metadata, text tower, how it is scanned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svb.config import fingerprint
from svb.data.publish import hash_file
from svb.errors import InputError, ModelUnavailableError, SvbError
from svb.retrieve.indexing.index_config import LOCAL, IndexConfig
from svb.retrieve.indexing.index_plan import live_videos
from svb.retrieve.indexing.index_source import IndexModel
from svb.retrieve.stored.calibration import KNOWN, RULES, meanings_of
from svb.retrieve.stored.cues import open_speech, publish_speech
from svb.retrieve.stored.manifest import is_damaged, part_folder, publish_part
from svb.retrieve.stored.metadata import publish_metadata
from svb.retrieve.stored.pools import open_pool, publish_pool
from svb.retrieve.stored.segment import Segment, open_array, require_sizes

logger = logging.getLogger(__name__)

# How many captions of sidecars, or windows of speech, are embedded between two commits.
SAVED_CAPTIONS = 32_768


class IndexParts:
    """Makes the parts of an index and puts them into its next manifest.

    Args:
        out: The index's folder.
        draft: The next manifest, with `inputs`.
        model: Loaded only if something must be embedded.
        config: The options of this run.
    """

    def __init__(self, out: Path, draft: dict[str, Any], model: IndexModel, config: IndexConfig) -> None:
        self._out, self._draft, self._model = out, draft, model
        self._config = config
        self._lacks_tower = False

    def drop_damaged(self) -> bool:
        """Remove parts from the draft whose files are missing or have the wrong size; return whether any were.

        They are made again. Only `svb verify`, which reads all of a file, finds changes within it.
        """
        dropped = False
        for part in ("captions", "metadata", "heads", "text", "speech", "confidence"):
            for entry in list(self._draft.get(part, [])):
                folder = part_folder(self._out, part, entry)
                try:
                    require_sizes(folder, entry["sizes"])
                except (OSError, ValueError) as error:
                    logger.info(f"{folder} is damaged ({error}): making it again")
                    self._draft[part].remove(entry)
                    self._draft["finished"] = None
                    if part == "text":
                        self._draft["text_made_for"] = None
                    dropped = True
        return dropped

    def start(self) -> None:
        """Make what depends on no video, for the first commit."""
        self._update_heads()
        self._draft["captions"] = [*self._training_pools(), *self._file_pools(), *self._pools("sidecar")]

    @property
    def are_finished(self) -> bool:
        """Tell whether this run or an earlier one has called `finish` for the draft's segments and inputs."""
        return bool(self._draft.get("finished") == self._finished())

    def note_finished(self) -> None:
        """Note that nothing is left to finish; if the run is killed before this, the next one finishes."""
        self._draft["finished"] = None if self._lacks_tower else self._finished()

    def _finished(self) -> str:
        # Older versions, which calibrated fewer indexes or none, named no rules: their indexes are finished anew.
        return fingerprint({"rules": RULES, **{part: self._draft[part] for part in ("inputs", "segments")}})

    def finish(self, segments: Sequence[Segment]) -> None:
        """Make what depends on all videos."""
        if not self._draft["heads"]:
            self._update_heads()  # an older version made none for a classifier
        self._update_metadata(segments)
        self._update_confidence(segments)
        self._update_text_tower()

    def update_sidecars(self, segments: Sequence[Segment], commit: Callable[[], object]) -> None:
        """Update the pool of sidecars from the files beside the videos, with commits in between."""
        if not self._draft["inputs"]["sidecars"]:
            self._draft["captions"] = [*self._pools("training"), *self._pools("file")]
            return
        from svb.retrieve.indexing.make_pools import sidecar_pool

        videos = [(video_id, segments[s].source_paths[row]) for video_id, (s, row) in live_videos(segments)]
        entries = self._pools("sidecar")
        held = open_pool(self._out, entries[0]) if entries else None
        while True:
            pool = sidecar_pool(videos, self._embed, held, max_captions=SAVED_CAPTIONS)
            if pool is held:
                return
            found = [] if pool is None else [publish_pool(self._out, pool)]
            self._draft["captions"] = [*self._pools("training"), *self._pools("file"), *found]
            commit()
            held = open_pool(self._out, found[0]) if found else None
            if held is None:
                return

    def update_speech(
        self, segments: Sequence[Segment], commit: Callable[[], object], on_progress: Callable[[int, int], None]
    ) -> None:
        """Update the speech to the files beside and inside the videos, with commits in between."""
        inputs = self._draft["inputs"]
        if not inputs["speech"]:
            self._draft["speech"] = []
            return
        from svb.retrieve.indexing.make_speech import collect_speech

        transcripts = Path(inputs["transcripts"]) if inputs["transcripts"] else None
        if transcripts is not None and not transcripts.is_dir():
            raise InputError(
                f"{transcripts} is not a folder of transcripts - bring it back, name another with --transcripts, "
                "or remove them with --no-transcripts"
            )
        videos = [(video_id, segments[s].source_paths[row]) for video_id, (s, row) in live_videos(segments)]
        while True:
            held = open_speech(self._out, self._draft["speech"][0]) if self._draft["speech"] else None
            try:
                speech = collect_speech(
                    videos,
                    self._embed,
                    held,
                    transcripts=transcripts,
                    embedding_size=int(self._draft["embedding_size"]),
                    max_windows=SAVED_CAPTIONS,
                    on_progress=on_progress,
                )
            except ModelUnavailableError as error:  # searches by video need no text encoder
                logger.warning(f"what is said is not in the index: {error}")
                return
            if speech is held or speech is None:
                return
            self._draft["speech"] = [publish_speech(self._out, speech)]
            commit()

    def mirror(self, on_progress: Callable[[int, int], None]) -> None:
        """Send the vectors to a server, if one is to hold them; all other parts of the draft must be made."""
        uri = self._draft["inputs"]["to"]
        if uri == LOCAL:
            self._draft["vectors"] = None
            return
        from svb.retrieve.milvus.milvus_mirror import mirror

        self._draft["vectors"] = mirror(self._out, self._draft, uri, on_progress=on_progress)

    def remove_gone(self) -> None:
        """Remove from a server what the committed index does not hold any more."""
        if self._draft["vectors"] is not None:
            from svb.retrieve.milvus.milvus_mirror import remove_gone

            remove_gone(self._out, self._draft)

    def _update_heads(self) -> None:
        from safetensors.torch import save_file

        from svb.retrieve.stored.manifest import HEADS

        weights = self._model.embedder.weights
        if weights:
            self._draft["heads"] = [
                publish_part(self._out, "heads", lambda folder: save_file(weights, folder / HEADS))
            ]

    def _pools(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self._draft["captions"] if entry["kind"] == kind]

    def _training_pools(self) -> list[dict[str, Any]]:
        from svb.retrieve.indexing.make_pools import training_pool

        captions = self._model.opened.captions
        if captions is None:
            return []
        if (held := self._pools("training")) and held[0]["source"] == captions.fingerprint:
            return held
        return [publish_pool(self._out, training_pool(captions, self._model.embedder))]

    def _file_pools(self) -> list[dict[str, Any]]:
        from svb.retrieve.indexing.make_pools import file_pool

        held = {entry["path"]: entry for entry in self._pools("file")}
        entries = []
        for path, *_ in self._draft["inputs"]["pools"]:
            if not self._config.pools and path in held and not Path(path).is_file():
                logger.info(f"{path} is gone: its captions stay in the index")
                entries.append(held[path])
            elif path in held and Path(path).is_file() and hash_file(Path(path)).startswith(held[path]["source"]):
                entries.append(held[path])
            else:
                self._require_there(path, bool(self._config.pools), "--pool", "--no-pools")
                pool = file_pool(Path(path), self._embed)
                entries.append({**publish_pool(self._out, pool), "path": path})
        return entries

    def _embed(self, captions: Sequence[str]) -> Any:
        from svb.retrieve.indexing.make_pools import caption_embedder

        embed = caption_embedder(self._model.embedder, lambda: self._model.text_encoder)
        return embed(captions)

    def _update_metadata(self, segments: Sequence[Segment]) -> None:
        if not self._draft["inputs"]["metadata"]:
            self._draft["metadata"] = []
        for path, *_ in self._draft["inputs"]["metadata"]:
            if not self._config.metadata and self._draft["metadata"] and not Path(path).is_file():
                logger.info(f"{path} is gone: its columns stay in the index")
            else:
                self._require_there(path, self._config.metadata is not None, "--metadata", "--no-metadata")
                video_ids = {video_id for video_id, _ in live_videos(segments)}
                self._draft["metadata"] = [publish_metadata(self._out, Path(path), video_ids)]

    def _update_confidence(self, segments: Sequence[Segment]) -> None:
        from svb.retrieve.indexing.calibrate import calibrate

        self._draft["confidence"] = calibrate(self._out, segments, self._model.opened, self._random_texts)
        for level, meaning in meanings_of(self._draft).items():
            logger.info(f"{level}: {meaning}")

    def _random_texts(self) -> NDArray[np.float16] | None:
        """Return `(n, D)` embeddings of random texts: those that the index holds, if they are of its model.

        None if there is no text encoder, and so no search by text.
        """
        from svb.retrieve.indexing.calibrate import random_texts

        for entry in self._draft.get("confidence", []):
            folder = part_folder(self._out, "confidence", entry)
            is_of_model = entry.get("made_for") == self._model.embedder.fingerprint
            if is_of_model and not is_damaged(folder, entry["files"]):
                return open_array(folder / KNOWN)
        try:
            embeddings: NDArray[np.float16] = self._embed(random_texts()).astype(np.float16)
        except SvbError as error:
            logger.info(f"the confidence of answers is not measured: {error}")
            return None
        return embeddings

    def _require_there(self, path: str, is_asked: bool, option: str, without: str) -> None:
        """Refuse to drop a file silently that an index was made with; one named in this run raises when read."""
        if not is_asked and not Path(path).is_file():
            raise InputError(
                f"{path}, which the index was made with, is gone - bring it back, name another file with "
                f"{option}, or remove it with {without}"
            )

    def _update_text_tower(self) -> None:
        from svb.retrieve.indexing.export_tower import export_tower

        embedder = self._model.embedder
        if self._draft.get("text_made_for") == embedder.fingerprint:
            return
        described: list[dict[str, Any] | None] = []
        try:
            encoder = self._model.text_encoder
        except SvbError as error:  # text searches will fail too, but searches by video will not
            logger.info(f"no text tower: {error}")
            self._draft["text"], self._draft["text_made_for"] = [], None
            self._lacks_tower = isinstance(error, ModelUnavailableError)  # the next run may find it
            return
        part = publish_part(
            self._out, "text", lambda folder: described.append(export_tower(folder, embedder, encoder))
        )
        self._draft["text"] = [{**part, **entry} for entry in described if entry is not None]
        self._draft["text_made_for"] = embedder.fingerprint


def keep_scan_within_budget(out: Path, manifest: Mapping[str, Any], segments: Sequence[Segment]) -> None:
    """Decide whether a committed index is searched exactly, or approximately if an exact scan would be too slow."""
    if manifest["vectors"] is not None:
        return  # a server searches it
    from svb.retrieve.indexing.tune_ivf import describe_decision, keep_within_budget

    training = [entry for entry in manifest["captions"] if entry["kind"] == "training"]
    decision = keep_within_budget(
        out,
        segments,
        budget_seconds=manifest["inputs"]["latency_budget_seconds"],
        captions=open_pool(out, training[0]).embeddings if training else None,
    )
    logger.info(describe_decision(decision))


def keep_words_of(out: Path, manifest: Mapping[str, Any]) -> None:
    """Make the words of a committed index's speech searchable, so that the first search need not."""
    for entry in manifest["speech"]:
        if entry["windows"]:
            from svb.retrieve.searching.words import keep_words

            keep_words(out, entry["key"], open_speech(out, entry))
