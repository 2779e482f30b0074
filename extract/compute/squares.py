"""Frames to the squares that a backbone takes, by PIL: for a few frames, without torch.

PIL is what the networks were trained with; `svb.extract.compute.transform` comes within 2 of 255 of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from svb.extract.backbones.transform import Transform


def squares_by_pil(frames: NDArray[np.uint8], transform: Transform) -> NDArray[np.uint8]:
    """Scale frames and crop or pad them as `to_squares` does.

    Args:
        frames: `(T, H, W, 3)` uint8.
        transform: How; it must ask for antialiasing.

    Returns:
        `(T, 3, S, S)` uint8.
    """
    size = transform.image_size
    height, width = transform.scaled_px(*frames.shape[1:3])
    box = round(max(width - size, 0) / 2), round(max(height - size, 0) / 2)
    place = max(size - width, 0) // 2, max(size - height, 0) // 2
    squares = np.empty((len(frames), 3, size, size), np.uint8)
    for frame, square in zip(frames, squares, strict=True):
        scaled = Image.fromarray(frame).resize((width, height), Image.Resampling[transform.interpolation.upper()])
        canvas = Image.new("RGB", (size, size), transform.fill)
        canvas.paste(scaled.crop((*box, min(box[0] + size, width), min(box[1] + size, height))), place)
        square[:] = np.asarray(canvas).transpose(2, 0, 1)
    return squares
