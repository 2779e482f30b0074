"""From decoded frames to the square images that a backbone takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    images = frames.permute(0, 3, 1, 2)  # a channels-last view, which the uint8 kernel is fastest on
    height, width = images.shape[-2:]
    # The length is cut off and the margin rounded as torchvision does, and with it CLIP's own preprocessing.
    long_side = int(size * max(height, width) / min(height, width))
    scaled = (size, long_side) if height <= width else (long_side, size)
    if (height, width) != scaled:
        if images.device.type == "cpu":
            images = F.interpolate(images, scaled, mode="bicubic", antialias=True, align_corners=False)
        else:
            resized = F.interpolate(images.float(), scaled, mode="bicubic", antialias=True, align_corners=False)
            images = resized.round_().clamp_(0, 255).to(torch.uint8)
    top, left = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return images[:, :, top : top + size, left : left + size]
