"""PyTorch files of features: a dict of video_id to tensor, read without running what else such a file may hold."""

from __future__ import annotations

import functools
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from svb.data.importing.source import UNREADABLE, FoundRows, FoundVideo, Source, reading
from svb.errors import InputError, UsageError


def find_torch(path: Path, array: str | None) -> Source:
    """Find the tensors of a dict by video_id; they stay in the file until they are read, where it can be mapped."""
    if array is not None:
        raise UsageError("a PyTorch file holds one tensor a video - leave out --array")
    held = _load(path)
    if not isinstance(held, dict):
        raise InputError(f"{path} holds a {type(held).__name__} - expected a dict of video_id to tensor")
    for video_id, tensor in held.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path} holds a {type(tensor).__name__} for {video_id!r} - expected a tensor a video")
    places = {video_id: f"{path}, tensor {video_id!r}" for video_id in held}
    videos = (
        FoundVideo(str(v), places[v], path, False, functools.partial(_read, tensor, places[v]))
        for v, tensor in held.items()
    )
    return Source(len(held), videos)


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they ask for reports to PyTorch; what goes wrong is in the exception
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, ValueError):  # a file of before PyTorch 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, and loading that could run code that is hidden in it - load it where "
            "you trust it, and save a dict of video_id to tensor or a folder of .npy files"
        ) from error
    except (*UNREADABLE, IndexError, AssertionError) as error:  # torch's unpickler trips over damage in many ways
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read as a PyTorch file ({reason}) - make it again") from error


def _read(tensor: torch.Tensor, place: str) -> FoundRows:
    with reading(place):
        dense = tensor.detach().to_dense()
        return FoundRows((dense.float() if dense.dtype == torch.bfloat16 else dense).numpy())
