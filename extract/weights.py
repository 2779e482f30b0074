"""What all frozen networks share: their names, the hash of their weights, and loading weights safely."""

from __future__ import annotations

import pickle
import textwrap
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from svb.data.pretrained import hash_tensors
from svb.data.t5 import absolute_t5_name
from svb.errors import InputError, ModelUnavailableError, UsageError

_UNREADABLE = (pickle.UnpicklingError, SafetensorError)
OFFLINE_HINT = (
    "choose --backbone offline:efficientnet-lite0 and --text-encoder offline:minilm-l6 (weights that are "
    "installed with svb), or name a local file: open_clip:ViT-B-32/PATH"
)


def split_name(name: str) -> tuple[str, str, str]:
    """Split `family:model/weights` into its three parts; `weights` is empty where none are named.

    `open_clip:local-dir:PATH` and `sentence_transformers:PATH` name a folder, `t5:OWNER/MODEL` a hub's model:
    their model is the whole rest.

    Raises:
        UsageError: There is no family or no model.
    """
    family, _, rest = name.partition(":")
    if not family or not rest:
        raise UsageError(f"{name!r} names no network - expected family:model or family:model/weights")
    if family in ("sentence_transformers", "t5") or rest.startswith("local-dir:"):
        return family, rest, ""
    model, _, weights = rest.partition("/")
    return family, model, weights


def absolute_name(name: str) -> str:
    """Return a network's name with the local file or folder in it made absolute, so that it holds everywhere."""
    family, model, weights = split_name(name)
    if family == "sentence_transformers":
        return f"{family}:{Path(model).absolute()}"
    if family == "t5":
        return f"{family}:{absolute_t5_name(model)}"
    if model.startswith("local-dir:"):
        return f"{family}:local-dir:{Path(model.removeprefix('local-dir:')).absolute()}"
    if weights and Path(weights).is_file():
        return f"{family}:{model}/{Path(weights).absolute()}"
    return name


def hash_weights(module: nn.Module) -> str:
    """Return `hash_tensors` of all of a network's weights and buffers."""
    return hash_tensors(module.state_dict())


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a `.safetensors` or PyTorch file without running code from it.

    A file that holds it under `state_dict` or `model`, as trainers write it, is taken too.

    Raises:
        InputError: The file is missing or holds no state dict.
    """
    if not path.is_file():
        raise InputError(f"no weights at {path} - expected a PyTorch or safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, LookupError, ValueError, EOFError, *_UNREADABLE) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a readable weights file ({first_line}) - get it again") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"{path} holds no state dict - expected tensors by name")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_into(module: nn.Module, path: Path) -> None:
    """Load the weights in a file into a network.

    Raises:
        InputError: The file is unreadable or its tensors are not the network's.
    """
    try:
        module.load_state_dict(load_state(path))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise InputError(f"{path} does not fit this network ({first}) - name the model it is of") from error


def unavailable(name: str, error: Exception) -> ModelUnavailableError:
    """Return the error for weights that a hub would have served, saying what works without one."""
    reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
    return ModelUnavailableError(f"the weights of {name} cannot be had here ({reason}) - {OFFLINE_HINT}")
