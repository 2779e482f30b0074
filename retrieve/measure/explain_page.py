"""The page of `svb explain`: a single HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import io
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svb.data.feature_store import FeatureStore
from svb.data.publish import published_file
from svb.errors import InputError
from svb.extract.decode.decoder import FrameChunk
from svb.extract.decode.options import DecodeOptions
from svb.extract.decode.sampling import Sampling
from svb.extract.one_file import decode_files

logger = logging.getLogger(__name__)

STRIP_FRAMES = 6
FRAME_HEIGHT_PX = 96

Strip = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class SupportVideo:
    """A video that takes part in a mixture.

    Attributes:
        video_id: The video's id in the training split.
        weight: The video's share of the mixture; the shares of the whole support set sum to 1.
        caption: One of its captions.
        file: The file that its features were extracted from.
    """

    video_id: str
    weight: float
    caption: str
    file: Path


@dataclass(frozen=True)
class Explanation:
    """How a run rebuilds a query.

    Attributes:
        query: The caption, or the name of the video.
        own_video: The video_id that the query belongs to, which takes no part; None if it belongs to none.
        run: The run.
        epoch: The epoch of its checkpoint.
        variant: The videos from which it was trained to rebuild captions.
        note: A warning about the run's numbers; usually empty.
        temperature: Temperature of the softmax over the support set.
        support_size: S, the number of training videos that share the weights.
        entropy: Entropy of the weights in nats; `log(S)` if all weigh the same.
        videos: The videos with the largest weights, in descending order.
        written: The words that the decoder wrote from the mixture; None without a decoder of words.
        nearest: The training captions nearest to the embedding rebuilt from the mixture, with their cosines; empty
            without an embedding decoder.
        matrices: Weights by variant, each `(b, b)`: captions by videos of one batch, similar ones side by side.
        matrix_captions: The b captions; the columns are their videos in the same order.
    """

    query: str
    own_video: str | None
    run: str
    epoch: int
    variant: str
    note: str
    temperature: float
    support_size: int
    entropy: float
    videos: list[SupportVideo]
    written: str | None
    nearest: list[tuple[str, float]]
    matrices: dict[str, NDArray[np.float32]]
    matrix_captions: list[str]


def write_page(explanation: Explanation, out: Path, store: FeatureStore) -> Path:
    """Write `index.html` to a folder, which is created if it does not exist, and return its path.

    Args:
        explanation: The content.
        out: The folder.
        store: The feature store, which says how its videos were decoded.
    """
    strips = _frame_strips(explanation.videos, store.settings["decoder"]["name"])
    out.mkdir(parents=True, exist_ok=True)
    with published_file(out / "index.html") as aside:
        aside.write_text(_page(explanation, strips), "utf-8")
    return out / "index.html"


def summary(explanation: Explanation) -> str:
    """Return one sentence about the run and its support set."""
    even = math.log(explanation.support_size)
    without = f" without its own, {explanation.own_video}" if explanation.own_video is not None else ""
    return (
        f"{explanation.run} (epoch {explanation.epoch}, variant {explanation.variant}), support set of "
        f"{explanation.support_size} training videos{without}, temperature {explanation.temperature:.3g}, "
        f"entropy of the weights {explanation.entropy:.2f} nats of {even:.2f} if all weighed the same"
        f"{explanation.note and f'; {explanation.note}'}"
    )


def _frame_strips(videos: list[SupportVideo], decoder: str) -> list[Strip]:
    """Return a few small frames of each video, or none if its file can no longer be decoded."""
    strips: list[Strip] = [[] for _ in videos]
    options = DecodeOptions(Sampling(frames=STRIP_FRAMES), decoder)
    for position, item in decode_files([video.file for video in videos], options, num_workers=2):
        if isinstance(item, FrameChunk):
            strips[position] += [_small(frame) for frame in item.frames]
        elif isinstance(item, InputError) and not strips[position]:
            logger.info(f"cannot show frames: {item}")
    return strips


def _small(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from PIL import Image

    height, width, _ = frame.shape
    size = max(1, round(width * FRAME_HEIGHT_PX / height)), FRAME_HEIGHT_PX
    return np.asarray(Image.fromarray(frame).resize(size))


def _page(explanation: Explanation, strips: list[Strip]) -> str:
    heaviest = explanation.videos[0].weight
    videos = [
        f"<figure><figcaption><b>{video.weight:.3f}</b> <code>{html.escape(video.video_id)}</code> "
        f"{html.escape(video.caption)}</figcaption>"
        f"<div class=bar style='width:{100 * video.weight / heaviest:.1f}%'></div>"
        f"{_strip(video, strip)}</figure>"
        for video, strip in zip(explanation.videos, strips, strict=True)
    ]
    return _TEMPLATE.format(
        query=html.escape(explanation.query),
        summary=html.escape(summary(explanation)),
        rebuilt="<br>".join(html.escape(line) for line in _rebuilt(explanation)),
        videos="\n".join(videos),
        matrices=_matrices(explanation),
    )


def _rebuilt(explanation: Explanation) -> list[str]:
    """Return in lines what the decoder makes of the mixture."""
    if explanation.written is not None:
        return [f"the decoder wrote: {explanation.written or '(nothing)'}"]
    if explanation.nearest:
        heading = "the training captions nearest to the rebuilt embedding:"
        return [heading, *(f"{cosine:.2f}  {caption}" for caption, cosine in explanation.nearest)]
    return ["trained without cross-captioning, so there is no decoder to rebuild anything"]


def _strip(video: SupportVideo, strip: Strip) -> str:
    if not strip:
        return "<p class=small>no frames: its file can no longer be read</p>"
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(strip, axis=1)).save(buffer, "JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f"<img alt='frames of {html.escape(video.video_id)}' src='{source}'>"


def _matrices(explanation: Explanation) -> str:
    """Return a table whose rows are captions and whose columns are their videos, for each variant in turn."""
    size, highest = len(explanation.matrix_captions), max(matrix.max() for matrix in explanation.matrices.values())
    titles = "".join(f"<th><th colspan={size}>{variant}</th>" for variant in explanation.matrices)
    rows = []
    for row, caption in enumerate(explanation.matrix_captions):
        cells = "<td class=gap>".join(
            # The square root shows small weights beside the 1 of identity.
            "".join(f"<td style='--w:{math.sqrt(w / highest):.3f}' title='{w:.3f}'>" for w in matrix[row].tolist())
            for matrix in explanation.matrices.values()
        )
        rows.append(f"<tr><th>{html.escape(caption)}</th>{cells}</tr>")
    return f"<table><tr>{titles}</tr>\n{chr(10).join(rows)}\n</table>"


_TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>svb explain: {query}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }}
figure {{ margin: 1rem 0; }}
figure img {{ max-width: 100%; display: block; }}
.bar {{ height: 4px; background: #e0632a; margin: 2px 0; }}
.rebuilt {{ border-left: 4px solid #e0632a; padding-left: 1rem; }}
.small {{ opacity: 0.75; font-size: 0.9rem; }}
table {{ border-spacing: 1px; font-size: 0.8rem; }}
tr th:first-child {{ max-width: 18rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
th {{ font-weight: normal; padding: 0 0.4rem; }}
td {{ width: 11px; height: 11px; padding: 0; background: rgb(224 99 42 / calc(0.06 + 0.94 * var(--w))); }}
td.gap {{ background: none; }}
</style>
<h1>&ldquo;{query}&rdquo;</h1>
<p class="small">{summary}</p>
<p class="rebuilt">{rebuilt}</p>
<h2>The support videos with the largest weights</h2>
{videos}
<h2>The four variants over one batch</h2>
<p class="small">Rows are captions, and columns are their videos in the same order, similar ones next to each other.
Identity rebuilds a caption from its own video, full from all videos, hybrid from the mean of the two, and cross
from all videos but its own. Colours show the square root of a weight; point at a cell to read the weight.</p>
{matrices}
</html>
"""
