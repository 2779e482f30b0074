"""The page of `svb explain`, and the same as one picture."""

from __future__ import annotations

import base64
import html
import io
import logging
import math
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from svb.data.feature_store import FeatureStore
from svb.data.publish import published_file
from svb.extract.decode.decoder import FrameChunk
from svb.extract.decode.options import DecodeOptions
from svb.extract.decode.sampling import Sampling
from svb.extract.plan import PlannedVideo
from svb.extract.pool.decode_pool import DecodePool
from svb.extract.pool.worker import Finished

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

logger = logging.getLogger(__name__)

STRIP_FRAMES = 6
FRAME_HEIGHT_PX = 96
NO_FRAMES = "no frames: its file cannot be read any more"
BAR_COLOUR = "#e0632a"


@dataclass(frozen=True)
class SupportVideo:
    """A video that takes part in a mixture.

    Attributes:
        video_id: Of the training split.
        weight: Its share of the mixture; all of the support set's sum to 1.
        caption: One of its own.
        file: What it was extracted from.
    """

    video_id: str
    weight: float
    caption: str
    file: Path


@dataclass(frozen=True)
class Explanation:
    """What a run makes of a query.

    Attributes:
        query: The caption, or the name of the video.
        own_video: The video_id that the query belongs to, which took no part; None where there is none.
        run: The run.
        epoch: Of its checkpoint.
        variant: What it was trained to rebuild captions from.
        note: What else is to be known of the run's numbers; mostly nothing.
        temperature: Of the softmax over the support set.
        support_size: S, how many training videos the weights are shared among.
        entropy: Of the weights, nats; `log(S)` where all weigh the same.
        videos: The heaviest, the heaviest first.
        written: What the decoder of words wrote from the mixture; None without such a decoder.
        nearest: Training captions nearest to the embedding that was rebuilt from the mixture, with their
            cosines; empty without an embedding decoder.
        matrices: Weights by variant, each `(b, b)`: captions by videos of one batch, alike ones side by side.
        matrix_captions: The b captions, whose videos are the columns in the same order.
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
    """Write `index.html` and `explain.png`.

    Args:
        explanation: What to show.
        out: The folder; made where there is none.
        store: Says how its videos were decoded.

    Returns:
        The page; it needs no other file.
    """
    strips = _frame_strips(explanation.videos, store.settings["decoder"]["name"])
    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with published_file(out / "explain.png") as aside:
            _picture(explanation, strips).savefig(aside, dpi=100)
        with published_file(out / "index.html") as aside:
            aside.write_text(_html(explanation, strips), "utf-8")
    if any("missing from font" in str(warning.message) for warning in caught):
        logger.info(
            "the pictures have boxes for letters that their font lacks; the text of index.html has them all"
        )
    return out / "index.html"


def summary(explanation: Explanation) -> str:
    """Return in one sentence what was asked of which run."""
    even = math.log(explanation.support_size)
    without = f" without its own, {explanation.own_video}" if explanation.own_video is not None else ""
    return (
        f"{explanation.run} (epoch {explanation.epoch}, variant {explanation.variant}), support set of "
        f"{explanation.support_size} training videos{without}, temperature {explanation.temperature:.3g}, "
        f"entropy of the weights {explanation.entropy:.2f} nats of {even:.2f} if all weighed the same"
        f"{explanation.note and f'; {explanation.note}'}"
    )


def rebuilt(explanation: Explanation) -> list[str]:
    """Return in lines what became of the mixture."""
    if explanation.written is not None:
        return [f"the decoder wrote: {explanation.written or '(nothing)'}"]
    if explanation.nearest:
        heading = "the embedding rebuilt is nearest to these training captions:"
        return [heading, *(f"{cosine:.2f}  {caption}" for caption, cosine in explanation.nearest)]
    return ["trained without cross-captioning: there is no decoder to rebuild anything"]


def _frame_strips(videos: list[SupportVideo], decoder: str) -> list[list[NDArray[np.uint8]]]:
    """Return a few small frames of each video; none of one that cannot be decoded any more."""
    strips: list[list[NDArray[np.uint8]]] = [[] for _ in videos]
    planned = [PlannedVideo(video.video_id, video.file) for video in videos]
    for position, message in DecodePool(2, DecodeOptions(Sampling(frames=STRIP_FRAMES), decoder)).run(planned):
        if isinstance(message, FrameChunk):
            strips[position] += [_small(frame) for frame in message.frames]
        elif isinstance(message, Finished) and not strips[position]:
            logger.info(f"no frames of {videos[position].file} can be shown ({message.status}): {message.error}")
    return strips


def _small(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from PIL import Image

    height, width, _ = frame.shape
    size = max(1, round(width * FRAME_HEIGHT_PX / height)), FRAME_HEIGHT_PX
    return np.asarray(Image.fromarray(frame).resize(size))


def _joined(strip: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return a strip's frames side by side."""
    return np.concatenate([np.empty((FRAME_HEIGHT_PX, 0, 3), np.uint8), *strip], axis=1)


def _draw_matrices(explanation: Explanation, figure: Figure | SubFigure) -> None:
    panels = figure.subplots(1, len(explanation.matrices))
    highest = max(matrix.max() for matrix in explanation.matrices.values())
    for axes, (variant, matrix) in zip(panels, explanation.matrices.items(), strict=True):
        # The square root shows small weights beside the 1 of identity.
        drawn = axes.imshow(np.sqrt(matrix), cmap="magma", vmin=0, vmax=np.sqrt(highest))
        axes.set_title(variant)
        axes.set_xlabel("their videos")
        axes.set_xticks([])
        axes.set_yticks([])
    panels[0].set_yticks(range(len(explanation.matrix_captions)))
    labels = [_shortened(caption, 40) for caption in explanation.matrix_captions]
    panels[0].set_yticklabels(labels, fontsize=8, parse_math=False)
    scale = figure.colorbar(drawn, ax=list(panels), shrink=0.85, pad=0.01, label="weight")
    ticks = np.linspace(0, np.sqrt(highest), 5)
    scale.set_ticks(ticks.tolist(), labels=[f"{tick**2:.2f}" for tick in ticks])


def _picture(explanation: Explanation, strips: list[list[NDArray[np.uint8]]]) -> Figure:
    from matplotlib.figure import Figure

    said = [f"query: {explanation.query}", *rebuilt(explanation)]
    lines = [part for line in said for part in textwrap.wrap(line, 150)]
    small = textwrap.wrap(summary(explanation), 210)
    heights = [0.25 + 0.21 * len(lines) + 0.18 * len(small), 1.1 * len(strips), 3.6]
    figure = Figure(figsize=(14, sum(heights)), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)[:, 0]
    inch = 1 / heights[0]
    top.text(0.01, 1 - 0.1 * inch, "\n".join(lines), va="top", fontsize=11, parse_math=False)
    top.text(0.01, 0.05 * inch, "\n".join(small), va="bottom", fontsize=8, color="0.35", parse_math=False)
    _draw_strips(explanation.videos, strips, middle)
    _draw_matrices(explanation, bottom)
    bottom.suptitle("weights of the four variants over one batch (colours by the square root)", fontsize=10)
    return figure


def _draw_strips(videos: list[SupportVideo], strips: list[list[NDArray[np.uint8]]], figure: SubFigure) -> None:
    joined = [_joined(strip) for strip in strips]
    width = max(1, *(strip.shape[1] for strip in joined))
    panels = figure.subplots(len(strips), 2, width_ratios=(0.27, 0.73), squeeze=False)
    for (beside, axes), video, strip in zip(panels, videos, joined, strict=True):
        beside.set(xlim=(0, 1), ylim=(0, 1))
        beside.barh(0.94, video.weight / videos[0].weight, height=0.1, color=BAR_COLOUR)
        caption = textwrap.fill(video.caption, 44, max_lines=3, placeholder="...")
        text = f"{video.weight:.3f}  {_shortened(video.video_id, 34)}\n{caption}"
        beside.text(0, 0.84, text, va="top", fontsize=9, parse_math=False).set_in_layout(False)
        if strip.shape[1]:
            # All as wide as the widest, so that all frames are of one height.
            padding = np.full((FRAME_HEIGHT_PX, width - strip.shape[1], 3), 255, np.uint8)
            axes.imshow(np.concatenate([strip, padding], axis=1))
        else:
            axes.text(0, 0.5, NO_FRAMES, va="center", fontsize=9, color="0.35")
        axes.set_anchor("W")
        for panel in (beside, axes):
            panel.axis("off")


def _html(explanation: Explanation, strips: list[list[NDArray[np.uint8]]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.5), layout="constrained")
    _draw_matrices(explanation, figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    heaviest = explanation.videos[0].weight
    videos = [
        f"<figure><figcaption><b>{video.weight:.3f}</b> <code>{html.escape(video.video_id)}</code> "
        f"{html.escape(video.caption)}</figcaption>"
        f"<div class=bar style='width:{100 * video.weight / heaviest:.1f}%'></div>"
        f"{_html_strip(video, strip)}</figure>"
        for video, strip in zip(explanation.videos, strips, strict=True)
    ]
    return _TEMPLATE.format(
        query=html.escape(explanation.query),
        colour=BAR_COLOUR,
        summary=html.escape(summary(explanation)),
        rebuilt="<br>".join(html.escape(line) for line in rebuilt(explanation)),
        videos="\n".join(videos),
        matrices=_as_source(buffer.getvalue(), "png"),
    )


def _html_strip(video: SupportVideo, strip: list[NDArray[np.uint8]]) -> str:
    if not strip:
        return f"<p class=small>{NO_FRAMES}</p>"
    return f"<img alt='frames of {html.escape(video.video_id)}' src='{_as_source(_jpeg(_joined(strip)), 'jpeg')}'>"


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _as_source(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _shortened(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


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
figure img, .matrices {{ max-width: 100%; display: block; }}
.bar {{ height: 4px; background: {colour}; margin: 2px 0; }}
.rebuilt {{ border-left: 4px solid {colour}; padding-left: 1rem; }}
.small {{ opacity: 0.75; font-size: 0.9rem; }}
</style>
<h1>&ldquo;{query}&rdquo;</h1>
<p class="small">{summary}</p>
<p class="rebuilt">{rebuilt}</p>
<h2>The support videos that weigh most</h2>
{videos}
<h2>The four variants over one batch</h2>
<p class="small">Rows are captions, columns their videos in the same order, alike ones next to each other: identity
rebuilds a caption from its own video, full from all, hybrid from the mean of the two, cross from all but its own.
Colours by the square root of the weight.</p>
<img class="matrices" alt="heat maps of the support weights of the four variants" src="{matrices}">
</html>
"""
