"""Brings decoded frames onto the device as uint8, beside the work that it does."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

# One staging buffer is filled while the other is on its way.
NUM_BUFFERS = 2


class Uploader:
    """Copies frames to a device; on a GPU from pinned memory, on a stream of its own.

    Args:
        device: Where to; on the CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._next = 0
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._buffers = [torch.empty(0, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_BUFFERS)]
            self._copied = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]

    def upload(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """Return `(T, H, W, 3)` uint8 frames on the device.

        On a GPU the frames may be overwritten once this returns; on the CPU the result is the same memory.
        """
        host = torch.from_numpy(frames)
        if self._device.type != "cuda":
            return host.to(self._device)
        number, self._next = self._next, (self._next + 1) % NUM_BUFFERS
        self._copied[number].synchronize()
        if self._buffers[number].numel() < host.numel():
            self._buffers[number] = torch.empty(host.numel(), dtype=torch.uint8, pin_memory=True)
        staged = self._buffers[number][: host.numel()].view(host.shape)
        staged.copy_(host)
        with torch.cuda.stream(self._stream):
            uploaded = staged.to(self._device, non_blocking=True)
            self._copied[number].record(self._stream)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        uploaded.record_stream(computing)
        return uploaded
