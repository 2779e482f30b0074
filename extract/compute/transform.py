"""Frames onto the device, and there to the square images that a backbone takes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
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


# Frames are scaled a few at a time: a narrow strip grows to many times its bytes before it is cropped.
SCALED_BYTES = 64 * 2**20


def to_squares(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Scale the short side to `size` with antialiased bicubic, on the frames' device, and crop the centre.

    On the CPU torch computes this on uint8 directly, within 2 of 255 of PIL's bicubic, which CLIP models
    were trained with; elsewhere in float32, rounded.

    Args:
        frames: `(T, H, W, 3)` uint8.
        size: S in pixels.

    Returns:
        `(T, 3, S, S)` uint8.
    """
    height, width = frames.shape[1:3]
    # The length is cut off and the margin rounded as torchvision does, and with it CLIP's own preprocessing.
    long_side = int(size * max(height, width) / min(height, width))
    scaled = (size, long_side) if height <= width else (long_side, size)
    at_once = max(1, SCALED_BYTES // (3 * size * long_side))
    return torch.cat([_scale_and_crop(part, scaled, size) for part in frames.split(at_once)])


def _scale_and_crop(frames: torch.Tensor, scaled: tuple[int, int], size: int) -> torch.Tensor:
    images = frames.permute(0, 3, 1, 2)  # a channels-last view, which the uint8 kernel is fastest on
    if images.shape[-2:] != scaled:
        if images.device.type == "cpu":
            images = F.interpolate(images, scaled, mode="bicubic", antialias=True, align_corners=False)
        else:
            resized = F.interpolate(images.float(), scaled, mode="bicubic", antialias=True, align_corners=False)
            images = resized.round_().clamp_(0, 255).to(torch.uint8)
    top, left = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return images[:, :, top : top + size, left : left + size]
