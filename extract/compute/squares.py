"""Frames to the squares that a backbone takes, by PIL: for a few frames, without torch.

PIL is what the networks were trained with; `svb.extract.compute.transform` comes within 2 of 255 of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def squares_by_pil(frames: NDArray[np.uint8], settings: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Scale and crop frames as `to_squares` does.

    Args:
        frames: `(T, H, W, 3)` uint8.
        settings: A backbone's, from its store.

    Returns:
        `(T, 3, S, S)` uint8.
    """
    size = settings["image_size"]
    height, width = frames.shape[1:3]
    long_side = int(size * max(height, width) / min(height, width))
    scaled = (size, long_side) if height <= width else (long_side, size)
    squares = np.empty((len(frames), 3, size, size), np.uint8)
    for frame, square in zip(frames, squares, strict=True):
        picture = Image.fromarray(frame).resize((scaled[1], scaled[0]), Image.Resampling.BICUBIC)
        top, left = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
        square[:] = np.asarray(picture.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
    return squares
