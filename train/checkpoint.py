"""Checkpoints: folders that exist only if they are whole.

model.safetensors   the model's weights
training.pt         optimizer, memory bank and place in the epoch, loadable with weights_only=True (only in
                    last/ and previous/)
checkpoint.json     epoch, metrics, the hash of every other file, and a fingerprint of these
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from svb.data.description import publish_description, read_description
from svb.data.publish import hash_file, published_folder
from svb.errors import InputError, StoreError


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        epoch: Number of finished epochs.
        metrics: Metrics on val at that epoch; empty if it was not evaluated.
        model: Weights by name.
        training: State of the optimizer and the loop; empty in best/.
    """

    epoch: int
    metrics: dict[str, float]
    model: dict[str, torch.Tensor]
    training: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, previous: Path | None = None) -> None:
    """Replace a checkpoint by a newer one; at every moment one of the two can be read.

    If `previous` is given, the older one is kept there.
    """
    with published_folder(folder, previous) as aside:
        model = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.items()}
        save_file(model, aside / "model.safetensors")
        if checkpoint.training:
            torch.save(checkpoint.training, aside / "training.pt")
        hashes = {path.name: hash_file(path) for path in sorted(aside.iterdir())}
        description = {"epoch": checkpoint.epoch, "metrics": checkpoint.metrics, "hashes": hashes}
        publish_description(aside / "checkpoint.json", description)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        InputError: There is no checkpoint.
        StoreError: A file is missing, damaged, or not what was written.
    """
    folder = _whole_folder(folder)
    if not folder.is_dir():
        raise InputError(f"no checkpoint at {folder} - train first with `svb train`")
    try:
        description = read_description(folder / "checkpoint.json", kind="a whole checkpoint", make="svb train")
        for name, expected in description["hashes"].items():
            if hash_file(folder / name) != expected:
                raise StoreError(
                    f"{folder / name} is not what was written - restore the folder, or remove it and train again"
                )
        model = load_file(folder / "model.safetensors")
        training: dict[str, Any] = {}
        if "training.pt" in description["hashes"]:
            training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    except (InputError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(
            f"{folder} is not a whole checkpoint ({error}) - restore it, or remove it and train again"
        ) from error
    return Checkpoint(int(description["epoch"]), description["metrics"], model, training)


def _whole_folder(folder: Path) -> Path:
    """Return the folder that holds the whole checkpoint, which a kill between two renames leaves beside `folder`.

    This renames nothing: a run may be read while it trains, and only the training may tidy it up.
    """
    beside = (folder.parent / f".{folder.name}.{role}" for role in ("new", "old"))
    return next((path for path in (folder, *beside) if path.is_dir()), folder)


def load_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Load a checkpoint's weights into a model; a model without a decoder ignores the decoder's weights.

    Raises:
        StoreError: The checkpoint belongs to a model of other sizes.
    """
    wanted = module.state_dict()
    extra = [name for name in weights if name not in wanted and not name.startswith("decoder.")]
    wrong = [
        f"{name} {tuple(weights[name].shape) if name in weights else 'missing'}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name not in weights or weights[name].shape != tensor.shape
    ]
    if wrong or extra:
        what = "; ".join([*wrong, *(f"{name} unknown" for name in extra)][:3])
        raise StoreError(
            f"the checkpoint {folder} does not fit its run's config.json ({what}) - it belongs to another model: "
            "restore the folder, or remove it and train again"
        )
    module.load_state_dict({name: weights[name] for name in wanted})
