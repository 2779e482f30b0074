"""Pretrained weights where they rest: how they are told apart, and how a hub is asked for them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

import torch


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the first 16 hex digits of a SHA-256 over tensors, in order, with names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def hub() -> Iterator[None]:
    """Load weights from a hub or its local cache within this block: quietly, and without waiting for nothing.

    Where the hub's name cannot be resolved, only the cache is asked: the client would try for a minute.
    """
    import huggingface_hub.constants as settings

    was_offline, was_disabled = settings.HF_HUB_OFFLINE, logging.root.manager.disable
    try:
        socket.getaddrinfo(urlsplit(settings.ENDPOINT).hostname, 443)
    except OSError:
        settings.HF_HUB_OFFLINE = True
    logging.disable(logging.CRITICAL)  # what goes wrong is in the exception
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = was_offline
        logging.disable(was_disabled)
