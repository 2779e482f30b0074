"""Weights of pretrained networks: their hash, how a file of them is read safely, and how a hub is asked."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import pickle
import socket
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from svb.errors import InputError, ModelUnavailableError, first_line

_UNREADABLE = (pickle.UnpicklingError, SafetensorError)
OFFLINE_HINT = (
    "choose --backbone offline:efficientnet-lite0 and --text-encoder offline:minilm-l6 (weights that are "
    "installed with svb), or name a local file: open_clip:PE-Core-B-16/PATH"
)


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the first 16 hex digits of a SHA-256 over tensors, in order, with names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_weights(module: nn.Module) -> str:
    """Return `hash_tensors` of all of a network's weights and buffers."""
    return hash_tensors(module.state_dict())


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a `.safetensors` or PyTorch file without running code from it.

    The state dict may be under `state_dict` or `model`, as trainers write it.

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
        raise InputError(f"{path} is not a readable weights file ({first_line(error)}) - get it again") from error
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


@contextlib.contextmanager
def hub() -> Iterator[None]:
    """Load weights from a hub or its local cache within this block, without log messages.

    If the hub's name cannot be resolved, only the cache is asked: the client would retry for a minute.
    """
    import huggingface_hub.constants as settings

    was_offline, was_disabled = settings.HF_HUB_OFFLINE, logging.root.manager.disable
    try:
        socket.getaddrinfo(urlsplit(settings.ENDPOINT).hostname, 443)
    except OSError:
        settings.HF_HUB_OFFLINE = True
    logging.disable(logging.CRITICAL)  # the exception says what went wrong
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = was_offline
        logging.disable(was_disabled)


def unavailable(name: str, error: Exception) -> ModelUnavailableError:
    """Return the error for weights that a hub would have served, saying what works without one."""
    reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
    return ModelUnavailableError(f"the weights of {name} cannot be had here ({reason}) - {OFFLINE_HINT}")
