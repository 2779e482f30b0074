"""The training loop and all of its state."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svb.data.relevance import Relevance, TextRelevance, words_relevance
from svb.errors import InputError, StoreError, UsageError
from svb.train.checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint
from svb.train.config import TrainConfig
from svb.train.decoders import EmbeddingDecoder
from svb.train.epoch_log import add_metrics, drop_metrics_after
from svb.train.memory_bank import MemoryBank
from svb.train.model import RetrievalModel, graded_score, split_metrics
from svb.train.objective import Objective
from svb.train.processes import Processes
from svb.train.retrieval_metrics import recall_sum
from svb.train.training_data import SplitData, epoch_batches

logger = logging.getLogger(__name__)

# A kill may cost this many seconds of work; writing a checkpoint takes far longer than a step. If that takes more
# than a second, as T5's 2 GB do, checkpoints are rarer: at most a twentieth of the time goes into them.
CHECKPOINT_SECONDS = 20.0
_WATCHED = ("loss", "contrastive", "cross_captioning", "support_entropy", "gradient_norm")


class Loop:
    """Trains step by step, from where the run stopped.

    Random draws depend only on the seed, the epoch and the step, so a resumed run draws the same.

    Args:
        choosing_split: The split `config.select_on`, which chooses the best checkpoint; None without one.
        relevance: The relevance by which nDCG chooses it; None where recalls choose it.
        decoder_dtype: The type of the caption decoder's matrix products.
    """

    def __init__(
        self,
        model: RetrievalModel,
        train_split: SplitData,
        choosing_split: SplitData | None,
        relevance: Relevance | None,
        config: TrainConfig,
        out: Path,
        *,
        processes: Processes,
        decoder_dtype: torch.dtype,
    ) -> None:
        self.epoch, self._step, self._best = 0, 0, -math.inf
        self._totals = torch.zeros(len(_WATCHED))
        self._model, self._config, self._out, self._processes = model, config, out, processes
        self._train, self._choosing, self._relevance = train_split, choosing_split, relevance
        self._batches = self._batches_of(0)
        if min(map(len, self._batches)) < processes.world:
            raise UsageError(
                f"batches of {min(map(len, self._batches))} captions for {processes.world} processes - expected at "
                "least one caption per process: start fewer processes, or raise --batch-size"
            )
        self._steps_per_epoch = len(self._batches)
        # The fused optimizer saves a sixth of a step's time.
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(model, config.weight_decay), lr=config.learning_rate, fused=True
        )
        self._objective = Objective(
            config,
            model,
            train_split,
            _encode(model, train_split),
            _make_bank(config, model, train_split),
            processes,
            decoder_dtype,
            _caption_relevance(config, train_split),
        )
        self._saved_at, self._save_seconds, self._is_last_whole = time.monotonic(), 0.0, True

    def run_epoch(self, interrupted: Callable[[], int] = lambda: 0) -> dict[str, float]:
        """Train to the end of the epoch, evaluate and save what is due; return its line of metrics.

        Args:
            interrupted: Called after every step; if it returns a true value, the state is saved and training ends.

        Raises:
            KeyboardInterrupt: `interrupted` returned a true value.
            InputError: The loss is no longer finite.
        """
        self._batches = self._batches_of(self.epoch)
        self._model.train()
        is_interrupted = False
        while self._step < self._steps_per_epoch:
            is_interrupted = self._run_step(interrupted)
            self._step += 1
            if self._step < self._steps_per_epoch and (is_interrupted or self._is_checkpoint_due()):
                self._save_last()
            if is_interrupted and self._step < self._steps_per_epoch:
                raise KeyboardInterrupt
        mean = (self._totals / self._steps_per_epoch).tolist()
        self.epoch, self._step, self._totals = self.epoch + 1, 0, torch.zeros(len(_WATCHED))
        metrics = dict(zip(_WATCHED, mean, strict=True))
        metrics["logit_scale"] = float(self._model.logit_scale.detach())
        metrics["support_temperature"] = float(self._model.support_temperature.detach())
        metrics = self._evaluate_and_save({"epoch": self.epoch, **metrics})
        # Asking again could stop processes at different steps, which would wait for each other.
        if is_interrupted and self.epoch < self._config.epochs:
            self._save_last()
            raise KeyboardInterrupt
        return metrics

    def _run_step(self, interrupted: Callable[[], int]) -> bool:
        """Take one step; return whether any process was interrupted."""
        batch = self._batches[self._step]
        random = np.random.default_rng([self._config.seed, 2, self.epoch, self._step])
        torch.manual_seed(int(random.integers(2**62)) + self._processes.rank)
        done = self.epoch * self._steps_per_epoch + self._step
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(done)
        losses = self._objective(
            batch,
            _draw(len(batch), self._config.decode_fraction, random),
            done / (self._config.epochs * self._steps_per_epoch),
        )
        self._optimizer.zero_grad(set_to_none=True)
        losses.loss.backward()
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        gradients = []
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
        stop = torch.full((), float(interrupted()), device=losses.loss.device)
        watched = [*losses.watched(), stop]
        self._processes.average([*gradients, *watched])
        gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        # Here the host waits for the GPU, once a step: a loss that is not finite must not reach the weights.
        on_host = torch.stack([*watched[:-1], gradient_norm, stop]).cpu().numpy()
        values, is_stopped = on_host[:-1], on_host[-1]
        if not np.isfinite(values).all():
            raise InputError(
                f"the loss is {values[0]}, its gradient {values[-1]} in epoch {self.epoch + 1} - "
                "lower --learning-rate, or look for odd values in the features with `svb verify`; best/ and last/ "
                "hold the state before it"
            )
        self._optimizer.step()
        self._model.limit_scales()
        self._totals += torch.from_numpy(values)
        return bool(is_stopped)

    def _evaluate_and_save(self, metrics: dict[str, float]) -> dict[str, float]:
        is_last = self.epoch == self._config.epochs
        is_due = is_last or self.epoch % self._config.evaluate_every == 0
        if not self._processes.is_first:
            return metrics
        if is_due and self._choosing is not None:
            measured = split_metrics(self._model, self._choosing, self._relevance)
            metrics |= {f"{self._config.select_on}/{name}": value for name, value in measured.items()}
            score = recall_sum(measured) if self._relevance is None else graded_score(measured, self._relevance)
            if score > self._best:
                self._best = score
                self._save("best", measured)
        add_metrics(self._out, metrics)
        if is_last or self._is_checkpoint_due():
            self._save_last()
        if is_last and self._choosing is None:
            self._save("best", {})
        return metrics

    def _is_checkpoint_due(self) -> bool:
        return time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS * max(1.0, self._save_seconds)

    def _save_last(self) -> None:
        if not self._processes.is_first:
            return
        began, bank = time.monotonic(), self._objective.bank
        training = {
            "optimizer": self._optimizer.state_dict(),
            "best": self._best,
            # A name that also occurs in the optimizer's state would be pickled in fewer bytes before a resume.
            "steps": self._step,
            "totals": self._totals,
            "memory_bank": bank.state_dict() if bank is not None else {},
        }
        self._save("last", {}, training, previous=self._out / "previous" if self._is_last_whole else None)
        self._is_last_whole = True
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - began

    def _save(
        self,
        name: str,
        metrics: dict[str, float],
        training: dict[str, Any] | None = None,
        previous: Path | None = None,
    ) -> None:
        checkpoint = Checkpoint(self.epoch, metrics, self._model.state_dict(), training or {})
        save_checkpoint(self._out / name, checkpoint, previous=previous)

    def resume(self) -> None:
        """Load the state of last/, or of previous/ if last/ is damaged, and drop the metrics after it."""
        found = self._newest_whole()
        if found is not None:
            folder, checkpoint = found
            load_weights(self._model, checkpoint.model, folder)
            training = checkpoint.training
            self._optimizer.load_state_dict(training["optimizer"])
            self.epoch, self._best = checkpoint.epoch, training["best"]
            self._step, self._totals = training["steps"], training["totals"]
            if self._objective.bank is not None:
                self._objective.bank.load_state_dict(training["memory_bank"])
            if self.epoch < self._config.epochs:
                within = f" and {self._step} of {self._steps_per_epoch} steps" if self._step else ""
                logger.info(f"resuming {self._out} after epoch {self.epoch} of {self._config.epochs}{within}")
        if self._best > -math.inf:
            self._require_best()
        if self._processes.is_first:
            drop_metrics_after(self._out, self.epoch)

    def _newest_whole(self) -> tuple[Path, Checkpoint] | None:
        last, previous = self._out / "last", self._out / "previous"
        try:
            return last, load_checkpoint(last)
        except (InputError, StoreError) as error:
            damage = error
        try:
            checkpoint = load_checkpoint(previous)
        except (InputError, StoreError) as error:
            if isinstance(damage, InputError) and isinstance(error, InputError):
                return None  # nothing has been saved yet
            raise (damage if isinstance(damage, StoreError) else error) from None
        logger.info(f"{damage}; continuing from the checkpoint before it, {previous}")
        self._is_last_whole = False
        return previous, checkpoint

    def _require_best(self) -> None:
        try:
            load_checkpoint(self._out / "best")
        except (InputError, StoreError) as damage:
            if self.epoch == self._config.epochs:
                raise
            logger.info(f"{damage}; the best evaluation from here on will replace it")
            self._best = -math.inf

    def _batches_of(self, epoch: int) -> list[NDArray[np.int64]]:
        return epoch_batches(
            self._train.video_of,
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


def _encode(model: RetrievalModel, split: SplitData) -> list[list[int]]:
    if model.decoder is None or isinstance(model.decoder, EmbeddingDecoder):
        return []
    encoded: list[list[int]] = model.decoder.encode(split.captions)
    return encoded


def _caption_relevance(config: TrainConfig, split: SplitData) -> TextRelevance | None:
    if not config.relevant_from and not config.relevance_margin:
        return None
    return words_relevance(split.captions, split.video_of, split.num_videos, config.caption_relevance)


def _make_bank(config: TrainConfig, model: RetrievalModel, split: SplitData) -> MemoryBank | None:
    if model.decoder is None or not config.memory_bank:
        return None
    longest = int(split.frames.num_frames.max())
    frames = longest if config.support_values == "frames" else 1
    device = split.caption_video.device
    try:
        return MemoryBank(config.memory_bank, frames, model.embedding_size, device)
    except RuntimeError as error:  # torch has no narrower error for a lack of memory on the CPU
        gigabytes = 4 * config.memory_bank * (frames + 1) * model.embedding_size / 1e9
        raise UsageError(
            f"memory_bank is {config.memory_bank}, which takes {gigabytes:.0f} GB - expected a bank that fits into "
            f"the memory of {device}: lower it, or try --support-values pooled"
        ) from error


def _draw(total: int, fraction: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """Return `(total,)` bool that is True on a random `fraction`, at least one."""
    drawn = np.zeros(total, dtype=bool)
    drawn[random.permutation(total)[: max(1, round(fraction * total))]] = True
    return drawn


def _parameter_groups(model: RetrievalModel, weight_decay: float) -> list[dict[str, Any]]:
    # Weight decay shrinks matrices only, not gains, biases and scales.
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in learned if parameter.ndim >= 2]
    others = [parameter for parameter in learned if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
