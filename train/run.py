"""`svb train`: a feature store and caption features -> heads, losses, support set -> a run."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from svb.config import fingerprint, require_same
from svb.data.caption_features import CaptionFeatures, read_caption_features
from svb.data.description import publish_description, read_description
from svb.data.feature_store import FeatureStore
from svb.data.fusion import parts_of, shared_part
from svb.data.publish import lock_folder, recover_folder, remove_leftovers
from svb.data.relevance import Relevance, make_relevance
from svb.device import choose_device, choose_precision, describe_device, explained_errors, precision_name
from svb.errors import InputError
from svb.interrupts import deferred_interrupts
from svb.train.config import TrainConfig, selection_note, stored_options
from svb.train.decoders import absolute_decoder, needs_vocabulary
from svb.train.decoders.t5 import T5Decoder
from svb.train.decoders.transformer import SPECIAL, Vocabulary
from svb.train.epoch_log import EpochClock, TensorBoard, draw_curves
from svb.train.loop import Loop
from svb.train.model import RetrievalModel
from svb.train.processes import Processes, joined_processes
from svb.train.training_data import SplitData, draw_captions, load_split, positions_of_splits

logger = logging.getLogger(__name__)

SMALLER = "train a new run with a smaller --batch-size, --memory-bank or --max-frames"


def train(
    store: Path | str,
    captions: Path | str,
    out: Path | str,
    config: TrainConfig | None = None,
    *,
    backbone: str | None = None,
    device: str = "auto",
    on_epoch: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> Path:
    """Train heads on cached features, or continue where an earlier training of this run stopped.

    On the CPU, with the same number of threads, a killed and resumed run ends with bitwise the same weights as an
    uninterrupted one. SIGINT and SIGTERM end a run after the current step, which is saved.

    Processes that torchrun started train together on batches of the size that the config names. They end with the
    weights that one process would reach, except for dropout, which each draws for itself. The first one writes the
    run.

    Args:
        store: A feature store.
        captions: A caption features file.
        out: The run's folder; created if it does not exist.
        config: The options, by default those of `TrainConfig()`.
        backbone: The backbone to train on, if the store holds several.
        device: `auto`, `cpu`, `cuda:0`, ...; each of several processes takes its own GPU.
        on_epoch: Called after every epoch with its line of metrics.jsonl.

    Returns:
        `out`.

    Raises:
        DeviceError: The device failed, or has too little memory.
        KeyboardInterrupt: SIGINT or SIGTERM arrived.
        InputError: Store and captions have too little in common, or one is missing.
        MismatchError: `out` holds a run with other options.
        StoreError: A file is damaged, or another process is training this run.
    """
    with joined_processes(device) as (processes, own_device), processes.only_the_first_speaks():
        chosen = choose_device(own_device)
        with explained_errors(chosen, smaller=SMALLER):
            return _train(
                Path(store),
                Path(captions),
                Path(out),
                config or TrainConfig(),
                backbone=backbone,
                device=chosen,
                processes=processes,
                on_epoch=on_epoch if processes.is_first else lambda metrics: None,
            )


def _train(
    store: Path,
    captions: Path,
    out: Path,
    config: TrainConfig,
    *,
    backbone: str | None,
    device: torch.device,
    processes: Processes,
    on_epoch: Callable[[dict[str, float]], None],
) -> Path:
    clock = EpochClock(out)
    config = replace(config, caption_decoder=absolute_decoder(config.caption_decoder))
    feature_store = FeatureStore(store)
    caption_features = read_caption_features(captions, feature_store.records)
    backbone = feature_store.only_backbone(backbone)
    if selection_note(config.select_on):
        logger.info(selection_note(config.select_on))
    train_split, choosing_split = _load_splits(feature_store, backbone, caption_features, config, device)
    description = _describe(config, feature_store, backbone, caption_features)
    if config.variant != "none" and config.rebuild == "tokens":
        # Only a decoder of words uses this precision: any other run can be continued on another device.
        description["decoder_precision"] = precision_name(_decoder_dtype(device))
    description["data"] = {"train": split_summary(train_split), "val": None}
    if choosing_split is not None:
        description["data"][config.select_on] = split_summary(choosing_split)
    vocabulary = None
    if needs_vocabulary(config):
        vocabulary = Vocabulary.of(train_split.captions, config.min_word_count)
    torch.manual_seed(config.seed)
    model = build_model(description, with_decoder=True, vocabulary=vocabulary).to(device)
    if isinstance(model.decoder, T5Decoder):
        description["decoder_weights_hash"] = model.decoder.weights_hash
    loop = Loop(
        model,
        train_split,
        choosing_split,
        _choosing_relevance(config, caption_features, choosing_split),
        config,
        out,
        processes=processes,
        decoder_dtype=_decoder_dtype(device),
    )
    lock = None
    try:
        if processes.is_first:
            # Not earlier, so that options that make no model leave no run behind.
            out.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(out)
            about = {
                # Paths and devices are not settings: a run whose inputs were moved can still be resumed.
                "paths": {"store": str(feature_store.path.absolute()), "captions": str(captions.absolute())},
                "provenance": {**describe_device(device), "torch": torch.__version__},
            }
            _open_run(out, description, vocabulary, about)
        processes.wait()
        loop.resume()
        processes.wait()
        if loop.epoch == config.epochs:
            logger.info(f"nothing to do: {out} is already trained for {config.epochs} epochs")
        if loop.epoch < config.epochs:
            _run_epochs(loop, config, out, processes, clock, on_epoch)
        processes.wait()
    finally:
        if lock is not None:
            os.close(lock)
    return out


def _choosing_relevance(
    config: TrainConfig, captions: CaptionFeatures, split: SplitData | None
) -> Relevance | None:
    """Return the relevance by which nDCG chooses the best checkpoint; None where recalls choose it."""
    if config.select_by == "recalls" or split is None:
        return None
    return make_relevance(
        config.select_by,
        captions.table,
        captions=split.captions,
        caption_ids=split.caption_ids,
        video_ids=split.frames.video_ids,
        caption_video=split.caption_video.cpu().numpy(),
    )


def _run_epochs(
    loop: Loop,
    config: TrainConfig,
    out: Path,
    processes: Processes,
    clock: EpochClock,
    on_epoch: Callable[[dict[str, float]], None],
) -> None:
    board = TensorBoard(out, loop.epoch) if processes.is_first else None
    try:
        with deferred_interrupts() as interrupted:
            while loop.epoch < config.epochs:
                metrics = loop.run_epoch(interrupted)
                if board is not None:
                    board.add(metrics)
                    clock.stamp(loop.epoch)
                on_epoch(metrics)
    except BaseException:
        if board is not None:
            # The user must hear what ended the training, not what went wrong with the picture.
            with contextlib.suppress(OSError, ValueError):
                draw_curves(out)
        raise
    finally:
        if board is not None:
            board.close()
    if board is not None:
        draw_curves(out)


def build_model(
    description: dict[str, Any], *, with_decoder: bool = False, vocabulary: Vocabulary | None = None
) -> RetrievalModel:
    """Return the untrained model that a run's config.json describes, with its caption decoder on request."""
    return RetrievalModel(
        TrainConfig(**stored_options(description["config"])),
        [settings["feature_size"] for settings in parts_of(description["video"]).values()],
        description["text"]["text_encoder"]["feature_size"],
        shared_part=shared_part(description["video"], description["text"]["text_encoder"]),
        with_decoder=with_decoder,
        vocabulary=vocabulary,
    )


def _decoder_dtype(device: torch.device) -> torch.dtype:
    # The decoder costs nearly all of the time; float16 would need a scaled loss.
    dtype = choose_precision(device)
    return dtype if dtype == torch.bfloat16 else torch.float32


def _describe(config: TrainConfig, store: FeatureStore, backbone: str, captions: CaptionFeatures) -> dict[str, Any]:
    return {
        "format": "svb run",
        "config": asdict(config),
        "shared_space": shared_part(store.video_settings(backbone), captions.settings["text_encoder"]) is not None,
        "video": store.video_settings(backbone),
        "text": {"captions_fingerprint": captions.fingerprint, "text_encoder": captions.settings["text_encoder"]},
    }


def read_run(run: Path) -> dict[str, Any]:
    """Return a run's config.json; errors as `svb.data.description.read_description`."""
    return read_description(run / "config.json", kind="a run", make=f"svb train -o {run}")


def split_summary(split: SplitData) -> dict[str, Any]:
    """Return the size of a split, and a key of its videos and captions."""
    key = fingerprint({"videos": split.frames.video_ids, "captions": split.caption_ids})
    return {"videos": split.num_videos, "captions": len(split.captions), "ids": key}


def read_vocabulary(run: Path) -> Vocabulary | None:
    """Return the words that a run's caption decoder knows; None if it has no decoder that needs them."""
    if not (run / "vocabulary.json").exists():
        return None
    stored = read_description(run / "vocabulary.json", kind="a vocabulary", make=f"svb train -o {run}")
    return Vocabulary(stored["words"])


def _open_run(out: Path, description: dict[str, Any], vocabulary: Vocabulary | None, about: dict[str, Any]) -> None:
    if not (out / "config.json").exists():
        if vocabulary is not None:
            publish_description(out / "vocabulary.json", {"words": vocabulary.words[len(SPECIAL) :]})
        publish_description(out / "config.json", {**description, **about})
        return
    stored = {name: held for name, held in read_run(out).items() if name not in (*about, "format_version")}
    if "decoder_precision" not in description:
        stored.pop("decoder_precision", None)  # older runs name one even if they do not use it
    # An option that is newer than the run has a value that changes nothing.
    stored["config"] = {**asdict(TrainConfig()), **stored_options(stored["config"])}
    require_same(
        stored,
        description,
        what=f"the run {out}",
        do_next="Repeat the options it was made with to resume it, or choose another folder with -o.",
    )
    remove_leftovers(out)
    for name in ("last", "previous", "best"):
        recover_folder(out / name)


def _load_splits(
    store: FeatureStore, backbone: str, captions: CaptionFeatures, config: TrainConfig, device: torch.device
) -> tuple[SplitData, SplitData | None]:
    _say_what_is_left_out(store, captions)
    positions = positions_of_splits(captions, val_fraction=config.put_aside)
    usable, choosing = set(store.video_ids), config.select_on
    if not any(captions.table.video_ids[position] in usable for position in positions[choosing]):
        if choosing == "test":
            raise InputError(
                "no video of a test split has both features and captions - --select-on test needs some; check the "
                "caption table's video_id and split columns, or leave the option out"
            )
        if positions[choosing]:
            logger.info("no video of the val split has features: best/ will hold the checkpoint of the last epoch")
        positions[choosing] = []
    if config.captions_per_video:
        positions["train"] = draw_captions(captions, positions["train"], config.captions_per_video, config.seed)
    loaded = {
        split: load_split(store, backbone, captions, positions[split], max_frames=config.max_frames, device=device)
        for split in ("train", choosing)
        if positions[split]
    }
    if "train" not in loaded or loaded["train"].num_videos < 2:
        raise InputError(
            f"{loaded['train'].num_videos if 'train' in loaded else 0} training videos have both features and "
            "captions - expected at least 2; check the caption table's video_id and split columns"
        )
    in_epoch = loaded["train"].num_videos if config.caption_sampling == "one" else len(loaded["train"].captions)
    if in_epoch < config.batch_size:
        logger.info(
            f"the batch size {config.batch_size} exceeds the data: every batch holds all {in_epoch} captions"
        )
    return loaded["train"], loaded.get(choosing)


def _say_what_is_left_out(store: FeatureStore, captions: CaptionFeatures) -> None:
    held, captioned = set(store.video_ids), set(captions.table.video_ids)
    for missing, what in (
        (sorted(captioned - held), "videos of the caption table have no features"),
        (sorted(held - captioned), "videos of the store have no captions"),
    ):
        if missing:
            logger.info(f"{len(missing)} {what} and are left out, first {missing[0]!r}")
