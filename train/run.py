"""`svb train`: a feature store and caption features -> heads, losses, support set -> a run."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from svb.config import fingerprint, require_same
from svb.data.caption_features import CaptionFeatures, read_caption_features
from svb.data.description import publish_description, read_description
from svb.data.feature_store import FeatureStore
from svb.data.publish import lock_folder, published_file, remove_leftovers
from svb.device import choose_device, choose_precision, precision_name
from svb.errors import InputError
from svb.train.checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint
from svb.train.config import TrainConfig
from svb.train.embed import split_metrics
from svb.train.losses import cross_captioning, info_nce, max_margin
from svb.train.metrics import recall_sum
from svb.train.model import RetrievalModel
from svb.train.support_set import mix, own_mask, support_weights
from svb.train.training_data import SplitData, epoch_batches, load_split, positions_of_splits
from svb.train.vocabulary import PADDING, Vocabulary, pad

# Seconds of work that a kill may cost; epochs are often shorter than it takes to write a checkpoint.
CHECKPOINT_SECONDS = 20.0


def train(
    store: Path | str,
    captions: Path | str,
    out: Path | str,
    config: TrainConfig | None = None,
    *,
    backbone: str | None = None,
    device: str = "auto",
    on_epoch: Callable[[dict[str, float]], None] = lambda metrics: None,
    on_message: Callable[[str], None] = lambda message: None,
) -> Path:
    """Train heads on cached features; continue where an earlier run stopped.

    On the CPU, a run that was killed and taken up again ends with bitwise the same weights as one that
    was not.

    Args:
        store: A feature store.
        captions: A caption features file.
        out: The run's folder; made where there is none.
        config: Options; the defaults where not given.
        backbone: Whose features, where the store holds several.
        device: `auto`, `cpu`, `cuda:0`, ...
        on_epoch: Called after every epoch with its line of metrics.jsonl.
        on_message: Called with a line that the user should see.

    Returns:
        `out`.

    Raises:
        InputError: Store and captions have too little in common, or one is missing.
        MismatchError: `out` holds a run with other options.
        StoreError: A file is damaged, or another process is training this run.
    """
    out, config = Path(out), config or TrainConfig()
    torch_device = choose_device(device)
    feature_store, caption_features = FeatureStore(Path(store)), read_caption_features(Path(captions))
    backbone = feature_store.only_backbone(backbone)
    train_split, val_split = _load_splits(
        feature_store, backbone, caption_features, config, torch_device, on_message
    )
    description = _describe(config, feature_store, backbone, caption_features)
    description["decoder_precision"] = precision_name(_decoder_dtype(torch_device))
    description["data"] = {
        "train": split_contents(train_split),
        "val": split_contents(val_split) if val_split is not None else None,
    }
    vocabulary = None
    if config.variant != "none":
        vocabulary = Vocabulary.of(train_split.captions, config.min_word_count)
    torch.manual_seed(config.seed)
    model = build_model(description, len(vocabulary) if vocabulary else None).to(torch_device)
    # Only now, so that options which make no model leave no run behind.
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    try:
        _open_run(out, description, feature_store.path, Path(captions))
        loop = _Loop(model, train_split, val_split, vocabulary, config, out)
        loop.resume(on_message)
        if loop.epoch == config.epochs:
            on_message(f"nothing to do: {out} has had its {config.epochs} epochs")
        while loop.epoch < config.epochs:
            on_epoch(loop.run_epoch())
    finally:
        os.close(lock)
    return out


def build_model(description: dict[str, Any], vocabulary_size: int | None = None) -> RetrievalModel:
    """Return the untrained model that a run's config.json describes, with a decoder if a size is given."""
    return RetrievalModel(
        TrainConfig(**description["config"]),
        description["video"]["backbone_settings"]["feature_size"],
        description["text"]["text_encoder"]["feature_size"],
        shared_space=description["shared_space"],
        vocabulary_size=vocabulary_size,
    )


@dataclass
class _Step:
    """The losses of one step, and what is worth watching."""

    loss: torch.Tensor
    contrastive: torch.Tensor
    cross_captioning: torch.Tensor


class _Loop:
    """The training loop and all of its state."""

    def __init__(
        self,
        model: RetrievalModel,
        train_split: SplitData,
        val_split: SplitData | None,
        vocabulary: Vocabulary | None,
        config: TrainConfig,
        out: Path,
    ) -> None:
        self.epoch, self.best = 0, -math.inf
        self._model, self._config, self._out = model, config, out
        self._train, self._val = train_split, val_split
        self._caption_video = train_split.caption_video.cpu().numpy()
        self._tokens = [vocabulary.encode(caption) for caption in train_split.captions] if vocabulary else []
        self._steps_per_epoch = len(self._batches(0))
        self._optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.learning_rate)
        self._decoder_dtype = _decoder_dtype(train_split.caption_video.device)
        self._saved_at = time.monotonic()

    def run_epoch(self) -> dict[str, float]:
        """Train one epoch, evaluate and save what is due; return its line of metrics."""
        # What is drawn at random depends on the epoch alone, so a resumed run draws the same.
        torch.manual_seed(self._config.seed * 1_000_003 + self.epoch)
        self._model.train()
        totals = torch.zeros(4)
        for step, batch in enumerate(self._batches(self.epoch)):
            learning_rate = self._learning_rate(self.epoch * self._steps_per_epoch + step)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            losses = self._losses(torch.from_numpy(batch).to(self._train.caption_video.device))
            self._optimizer.zero_grad(set_to_none=True)
            losses.loss.backward()
            gradient_norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._model.limit_logit_scale()
            watched = [losses.loss, losses.contrastive, losses.cross_captioning, gradient_norm]
            totals += torch.stack(watched).detach().cpu()
        self.epoch += 1
        mean = (totals / self._steps_per_epoch).tolist()
        if not all(map(math.isfinite, mean)):
            raise InputError(
                f"the loss is {mean[0]}, its gradient {mean[3]} in epoch {self.epoch} - lower --learning-rate, or "
                "look for odd values in the features with `svb verify`; best/ and last/ hold the state before"
            )
        metrics = dict(zip(("loss", "contrastive", "cross_captioning", "gradient_norm"), mean, strict=True))
        metrics["logit_scale"] = float(self._model.logit_scale.detach())
        return self._evaluate_and_save({"epoch": self.epoch, **metrics})

    def _losses(self, batch: torch.Tensor) -> _Step:
        config, model = self._config, self._model
        rows = self._train.caption_video[batch]  # (B,)
        frame_features, frame_mask = self._train.frames.gather(rows)  # (B, T, F), (B, T)
        video_embeddings, frame_sequences = model.video_head(frame_features, frame_mask)  # (B, D), (B, T, D)
        caption_embeddings = model.text_head(self._train.caption_features[batch].float())  # (B, D)
        own = own_mask(rows, rows)  # (B, B)
        similarity = caption_embeddings @ video_embeddings.T  # (B, B), rows captions
        if config.loss == "info_nce":
            contrastive = info_nce(similarity, own, model.logit_scale)
        else:
            contrastive = max_margin(similarity, own, config.margin)
        if model.decoder is None:
            return _Step(contrastive, contrastive, torch.zeros_like(contrastive))
        if config.variant == "cross":
            # Where a batch holds one video alone there is no other to rebuild its captions from.
            kept = (~own).any(dim=1).nonzero().squeeze(1)
            if not len(kept):
                return _Step(contrastive, contrastive, torch.zeros_like(contrastive))
            batch, own, caption_embeddings = batch[kept], own[kept], caption_embeddings[kept]
        weights = support_weights(
            caption_embeddings,
            video_embeddings,
            own,
            variant=config.variant,
            temperature=config.support_temperature,
        )  # (B, S), S is the batch
        mixtures, mixture_mask = mix(weights, frame_sequences, frame_mask)  # (B, T, D), (B, T)
        tokens = pad([self._tokens[position] for position in batch.tolist()]).to(rows.device)  # (B, L)
        is_word = tokens[:, 1:] != PADDING  # (B, L - 1)
        with torch.autocast(rows.device.type, self._decoder_dtype, enabled=self._decoder_dtype != torch.float32):
            logits = model.decoder(tokens[:, :-1], mixtures, mixture_mask, is_word)  # (N, vocabulary)
        rebuilding = cross_captioning(logits, tokens[:, 1:][is_word])
        return _Step(contrastive + config.cross_captioning_weight * rebuilding, contrastive, rebuilding)

    def _evaluate_and_save(self, metrics: dict[str, float]) -> dict[str, float]:
        is_last = self.epoch == self._config.epochs
        is_due = is_last or self.epoch % self._config.evaluate_every == 0
        if is_due and self._val is not None:
            val = split_metrics(self._model, self._val)
            metrics |= {f"val/{name}": value for name, value in val.items()}
            if recall_sum(val) > self.best:
                self.best = recall_sum(val)
                self._save("best", val, training={})
        _append_line(self._out / "metrics.jsonl", metrics)
        if is_last or time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS:
            self._save("last", {}, {"optimizer": self._optimizer.state_dict(), "best": self.best})
            self._saved_at = time.monotonic()
        if is_last and self._val is None:
            self._save("best", {}, training={})
        return metrics

    def _save(self, name: str, metrics: dict[str, float], training: dict[str, Any]) -> None:
        save_checkpoint(self._out / name, Checkpoint(self.epoch, metrics, self._model.state_dict(), training))

    def resume(self, on_message: Callable[[str], None]) -> None:
        """Take up the state of last/, where there is one, and drop the metrics after it."""
        try:
            checkpoint = load_checkpoint(self._out / "last")
        except InputError:
            checkpoint = None
        if checkpoint is not None:
            load_weights(self._model, checkpoint.model, self._out / "last")
            self._optimizer.load_state_dict(checkpoint.training["optimizer"])
            self.epoch, self.best = checkpoint.epoch, checkpoint.training["best"]
            if self.epoch < self._config.epochs:
                on_message(f"resuming {self._out} after epoch {self.epoch} of {self._config.epochs}")
        _keep_lines(self._out / "metrics.jsonl", self.epoch)

    def _batches(self, epoch: int) -> list[Any]:
        return epoch_batches(
            self._caption_video,
            caption_sampling=self._config.caption_sampling,
            batch_size=self._config.batch_size,
            seed=self._config.seed,
            epoch=epoch,
        )

    def _learning_rate(self, step: int) -> float:
        total = self._config.epochs * self._steps_per_epoch
        warmup = max(1, round(self._config.warmup * total))
        if step < warmup:
            return self._config.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return self._config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def _decoder_dtype(device: torch.device) -> torch.dtype:
    # The decoder is nearly all of the cost; float16 would need its loss scaled.
    dtype = choose_precision(device)
    return dtype if dtype == torch.bfloat16 else torch.float32


def _parameter_groups(model: RetrievalModel, weight_decay: float) -> list[dict[str, Any]]:
    # Decay shrinks matrices; gains, biases and the scale are left alone.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _describe(config: TrainConfig, store: FeatureStore, backbone: str, captions: CaptionFeatures) -> dict[str, Any]:
    return {
        "format": "svb run",
        "config": asdict(config),
        "shared_space": is_one_model(store.video_settings(backbone), captions.settings["text_encoder"]),
        "video": store.video_settings(backbone),
        "text": {
            "captions_fingerprint": captions.fingerprint,
            "text_encoder": captions.settings["text_encoder"],
        },
    }


def read_run(run: Path) -> dict[str, Any]:
    """Return a run's config.json; errors as `svb.data.description.read_description`."""
    return read_description(run / "config.json", kind="a run", make=f"svb train -o {run}")


def is_one_model(video: Mapping[str, Any], text_encoder: Mapping[str, Any]) -> bool:
    """Tell whether a backbone and a text encoder are the two towers of one model, whose space they share.

    Their weights' hash covers both towers, so it tells, whatever the two are called.
    """
    return bool(video["backbone_settings"]["weights_hash"] == text_encoder["weights_hash"])


def split_contents(split: SplitData) -> dict[str, Any]:
    """Return how much a split holds, and a key of its videos and captions."""
    key = fingerprint({"videos": split.frames.video_ids, "captions": split.caption_ids})
    return {"videos": split.num_videos, "captions": len(split.captions), "ids": key}


def _open_run(out: Path, description: dict[str, Any], store: Path, captions: Path) -> None:
    if not (out / "config.json").exists():
        # Where the inputs lay is no setting: a run whose inputs were moved can still be resumed.
        paths = {"store": str(store.absolute()), "captions": str(captions.absolute())}
        publish_description(out / "config.json", {**description, "paths": paths})
        return
    stored = read_run(out)
    del stored["paths"], stored["format_version"]
    require_same(
        stored,
        description,
        what=f"the run {out}",
        do_next="Give the options it was made with to resume it, or write to another folder with -o.",
    )
    remove_leftovers(out)


def _load_splits(
    store: FeatureStore,
    backbone: str,
    captions: CaptionFeatures,
    config: TrainConfig,
    device: torch.device,
    on_message: Callable[[str], None],
) -> tuple[SplitData, SplitData | None]:
    _say_what_is_left_out(store, captions, on_message)
    positions = positions_of_splits(
        captions, val_fraction=config.val_fraction, seed=config.seed, on_message=on_message
    )
    usable = set(store.video_ids)
    if positions["val"] and not any(captions.table.video_ids[position] in usable for position in positions["val"]):
        on_message("no video of the val split has features: the checkpoint of the last epoch will be best/")
        positions["val"] = []
    loaded = {
        split: load_split(store, backbone, captions, positions[split], max_frames=config.max_frames, device=device)
        for split in ("train", "val")
        if positions[split]
    }
    if "train" not in loaded or loaded["train"].num_videos < 2:
        raise InputError(
            f"{loaded['train'].num_videos if 'train' in loaded else 0} training videos have both features and "
            "captions - expected at least 2; look at the caption table's video_id and split columns"
        )
    return loaded["train"], loaded.get("val")


def _say_what_is_left_out(
    store: FeatureStore, captions: CaptionFeatures, on_message: Callable[[str], None]
) -> None:
    held, captioned = set(store.video_ids), set(captions.table.video_ids)
    for missing, what in (
        (sorted(captioned - held), "videos of the caption table have no features"),
        (sorted(held - captioned), "videos of the store have no captions"),
    ):
        if missing:
            on_message(f"{len(missing)} {what} and are left out, first {missing[0]!r}")


def _append_line(path: Path, metrics: dict[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def _keep_lines(path: Path, epochs: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["epoch"] <= epochs:
                kept.append(line + "\n")
        except ValueError:  # a line that a kill cut short
            continue
    with published_file(path) as aside:
        aside.write_text("".join(kept), "utf-8")
