"""What tests of the decoders share: both decoders, and what they give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from svb.extract.decode import ffmpeg_decoder, pyav_decoder
from svb.extract.decode.decoder import DecodeEnd, DecodeError, Decoder, FrameChunk, VideoProperties
from svb.extract.decode.options import DecodeOptions, resized
from svb.extract.decode.sampling import Sampling

DECODERS: dict[str, Decoder] = {"pyav": pyav_decoder.decode, "ffmpeg": ffmpeg_decoder.decode}
EVERY_FRAME = Sampling(every_nth=1)
B_FRAMES = ("-c:v", "libx264", "-bf", "3", "-pix_fmt", "yuv420p")

each_decoder = pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)


@dataclass
class Decoded:
    properties: VideoProperties
    frames: NDArray[np.uint8]
    times_seconds: NDArray[np.float64]
    end: DecodeEnd


def run(decoder: Decoder, path: Path, given: Sampling | DecodeOptions) -> Decoded:
    """Decode a file, and check what holds for every file."""
    options = given if isinstance(given, DecodeOptions) else DecodeOptions(given)
    properties, *chunks, end = decoder(path, options)
    assert isinstance(properties, VideoProperties) and isinstance(end, DecodeEnd)
    assert chunks and all(isinstance(chunk, FrameChunk) for chunk in chunks)
    frames = np.concatenate([chunk.frames for chunk in chunks])
    times = np.concatenate([chunk.frame_times_seconds for chunk in chunks])
    assert frames.dtype == np.uint8 and times.dtype == np.float64
    width, height = resized(properties.width_px, properties.height_px, options.resize_px)
    assert frames.shape == (len(times), height, width, 3)
    assert (np.diff(times) > 0).all()
    return Decoded(properties, frames, times, end)


def times_of(decoder: Decoder, path: Path, given: Sampling | DecodeOptions) -> list[float]:
    return [round(float(seconds), 6) for seconds in run(decoder, path, given).times_seconds]


def failure(decoder: Decoder, path: Path) -> str:
    """Return the status of a file that gives nothing, whatever the sampling."""
    statuses = set()
    for sampling in (Sampling(fps=1), Sampling(frames=1)):
        with pytest.raises(DecodeError) as caught:
            list(decoder(path, DecodeOptions(sampling)))
        assert str(path) in str(caught.value)
        statuses.add(caught.value.status)
    (status,) = statuses
    return status
