"""What all frozen networks share: the hash of their weights, and loading weights safely."""

from __future__ import annotations

import pickle
import textwrap
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from svb.data.pretrained import hash_tensors
from svb.errors import InputError, ModelUnavailableError

_UNREADABLE = (pickle.UnpicklingError, SafetensorError)
OFFLINE_HINT = (
    "choose --backbone offline:efficientnet-lite0 and --text-encoder offline:minilm-l6 (weights that are "
    "installed with svb), or name a local file: open_clip:ViT-B-32/PATH"
)


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
