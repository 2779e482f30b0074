"""Frames onto the device, and there to the square images that a backbone takes."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from svb.extract.backbones.export import one_line
from svb.extract.backbones.transform import Transform

logger = logging.getLogger(__name__)

# CUDA's kernel for antialiased scaling refuses to make a frame more than about 47 times smaller.
MAX_DEVICE_SCALE = 40
# One staging buffer is filled while the other is on its way.
NUM_BUFFERS = 2


class Uploader:
    """Copies frames to a device; on a GPU from pinned memory, on a stream of its own.

    Args:
        device: The device to copy to; nothing is copied on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._next = 0
        self._has_told = False
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._buffers = [torch.empty(0, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_BUFFERS)]
            self._copied = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]

    def squares(
        self, frames: NDArray[np.uint8], transforms: Iterable[Transform]
    ) -> dict[tuple[object, ...], torch.Tensor]:
        """Return the squares of `(T, H, W, 3)` uint8 frames by the geometry of transforms, on the device.

        The weights of one geometry are made once. What the device cannot scale is scaled on the CPU.
        """
        squares: dict[tuple[object, ...], torch.Tensor] = {}
        uploaded: torch.Tensor | None = None
        for transform in transforms:
            if transform.geometry in squares:
                continue
            made: torch.Tensor | None = None
            if self._device.type != "cuda" or _scale_of(frames, transform) <= MAX_DEVICE_SCALE:
                try:
                    uploaded = self.upload(frames) if uploaded is None else uploaded
                    made = to_squares(uploaded, transform)
                except RuntimeError as error:
                    self._tell_of_failure(frames, error)
                    uploaded = None
            if made is None:  # behind the except block, which would hold what had been allocated
                made = self.upload(to_squares(torch.from_numpy(frames), transform).numpy())
            squares[transform.geometry] = made
        return squares

    def _tell_of_failure(self, frames: NDArray[np.uint8], error: RuntimeError) -> None:
        if not self._has_told:
            self._has_told = True
            logger.warning(
                f"{self._device} cannot scale {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]} "
                f"({one_line(error)}): such frames are scaled on the CPU; last bits of features may differ"
            )

    def upload(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """Return `(T, H, W, 3)` uint8 frames on the device, or squares of them.

        On a GPU the frames may be overwritten once this returns; on the CPU the result is the same memory.
        """
        if self._device.type != "cuda":
            return torch.from_numpy(frames).to(self._device)
        number, self._next = self._next, (self._next + 1) % NUM_BUFFERS
        self._copied[number].synchronize()
        if self._buffers[number].numel() < frames.size:
            self._buffers[number] = torch.empty(frames.size, dtype=torch.uint8, pin_memory=True)
        staged = self._buffers[number][: frames.size].view(frames.shape)
        np.copyto(staged.numpy(), frames)  # on this thread: torch would take the cores from the decoders
        with torch.cuda.stream(self._stream):
            uploaded = staged.to(self._device, non_blocking=True)
            self._copied[number].record(self._stream)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        uploaded.record_stream(computing)
        return uploaded


# Frames are scaled a few at a time: a narrow strip grows to many times its bytes before it is cropped.
SCALED_BYTES = 64 * 2**20


def _scale_of(frames: NDArray[np.uint8], transform: Transform) -> float:
    """Return how many times smaller antialiased scaling makes frames; other scaling has no limit."""
    height, width = frames.shape[1:3]
    scaled_height, scaled_width = transform.scaled_px(height, width)
    return max(height / scaled_height, width / scaled_width) if transform.antialias else 1.0


def to_squares(frames: torch.Tensor, transform: Transform) -> torch.Tensor:
    """Scale frames and crop or pad them to squares, on their device, as a backbone's transform says.

    On the CPU torch computes this on uint8 directly, within 2 of 255 of PIL, with which the networks were
    trained; elsewhere in float32, rounded.

    Args:
        frames: `(T, H, W, 3)` uint8.
        transform: The backbone's; its mean and deviation are left to the network.

    Returns:
        `(T, 3, S, S)` uint8.
    """
    height, width = transform.scaled_px(*frames.shape[1:3])
    at_once = max(1, SCALED_BYTES // (3 * height * width))
    squares = [_crop_or_pad(_scaled(part, transform), transform) for part in frames.split(at_once)]
    return torch.cat(squares)


def _scaled(frames: torch.Tensor, transform: Transform) -> torch.Tensor:
    images = frames.permute(0, 3, 1, 2)  # a channels-last view, which the uint8 kernel is fastest on
    size = transform.scaled_px(*images.shape[-2:])
    if images.shape[-2:] == size:
        return images
    on_cpu = images.device.type == "cpu"
    scaled = F.interpolate(
        images if on_cpu else images.float(),
        size,
        mode=transform.interpolation,
        antialias=transform.antialias,
        align_corners=False,
    )
    return scaled if on_cpu else scaled.round_().clamp_(0, 255).to(torch.uint8)


def _crop_or_pad(images: torch.Tensor, transform: Transform) -> torch.Tensor:
    # Margins are rounded as torchvision's and timm's centre crops round them.
    (height, width), size = images.shape[-2:], transform.image_size
    top, left = round(max(height - size, 0) / 2), round(max(width - size, 0) / 2)
    cropped = images[:, :, top : top + size, left : left + size]
    if cropped.shape[-2:] == (size, size):
        return cropped
    fill = torch.tensor(transform.fill, dtype=torch.uint8, device=images.device)
    padded = fill.view(1, 3, 1, 1).repeat(len(images), 1, size, size)
    top, left = max(size - height, 0) // 2, max(size - width, 0) // 2
    padded[:, :, top : top + cropped.shape[2], left : left + cropped.shape[3]] = cropped
    return padded
