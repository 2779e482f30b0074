"""Pictures in a terminal: by kitty's graphics protocol, as iTerm2's inline images, or as coloured half blocks."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svb.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

KINDS = ("auto", "kitty", "iterm", "blocks", "none")

# Columns and rows of a picture, in the terminal's cells, each about twice as high as it is wide. Half blocks are
# coarse: a picture of them is larger.
CELLS = {"kitty": (18, 5), "iterm": (18, 5), "blocks": (25, 7)}
GAP = 2
HEIGHT_PX = 180
# A frame that is not there after this is not worth the wait.
SECONDS_A_PICTURE = 5.0
# The kitty protocol takes no longer part.
PART_LETTERS = 4096


def kind_of_terminal(environment: Mapping[str, str]) -> str:
    """Return how pictures are shown in the terminal that the environment tells of: one of `KINDS` but `auto`."""
    terminal, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    # Multiplexers let neither protocol through.
    if not ("TMUX" in environment or "STY" in environment or terminal.startswith(("screen", "tmux"))):
        if terminal in {"xterm-kitty", "xterm-ghostty"} or "KITTY_WINDOW_ID" in environment or program == "ghostty":
            return "kitty"
        if program in {"iTerm.app", "WezTerm"}:
            return "iterm"
    if environment.get("COLORTERM", "") in {"truecolor", "24bit"} and "NO_COLOR" not in environment:
        return "blocks"
    return "none"


def thumbnail(path: Path, seconds: float) -> Image.Image | None:
    """Return the frame that is shown at a time, None where the file gives none."""
    from svb.retrieve.searching.pictures import frame_at

    try:
        return frame_at(path, seconds, HEIGHT_PX, time_limit_seconds=SECONDS_A_PICTURE)
    except InputError:
        return None


def beside(picture: Image.Image | None, lines: Sequence[str], kind: str) -> str:
    """Return lines of text with a picture on their left, as many as it is high at least.

    Args:
        picture: What is shown; None leaves its place empty.
        lines: What stands beside it.
        kind: One of `CELLS`.
    """
    width, height = CELLS[kind]
    padded = [*lines, *[""] * (height - len(lines))]
    if picture is None:
        return "".join(f"{' ' * (width + GAP)}{line}".rstrip() + "\n" for line in padded)
    columns, rows = cells_of(picture, kind)
    if kind == "blocks":
        drawn = [*half_blocks(picture, columns, rows), *[" " * columns] * (len(padded) - rows)]
        gap = " " * (width - columns + GAP)
        return "".join(f"{cells}{gap}{line}\n" for cells, line in zip(drawn, padded, strict=True))
    image = kitty(picture, columns, rows) if kind == "kitty" else iterm(picture, columns, rows)
    # Room is made first, so that nothing scrolls beneath the picture; then the cursor returns to write beside it.
    room = "\n" * len(padded) + f"\x1b[{len(padded)}A"
    text = "".join(f"\x1b[{width + GAP}C{line}\n" for line in padded)
    return f"{room}\x1b7{image}\x1b8{text}"


def cells_of(picture: Image.Image, kind: str) -> tuple[int, int]:
    """Return the `(columns, rows)` that a picture takes up, its proportions kept."""
    width, height = CELLS[kind]
    columns = round(2 * height * picture.width / picture.height)
    if columns <= width:
        return max(columns, 1), height
    return width, max(round(width * picture.height / picture.width / 2), 1)


def kitty(picture: Image.Image, columns: int, rows: int) -> str:
    """Return the sequences that have a terminal of the kitty protocol show a picture and leave the cursor alone."""
    held = io.BytesIO()
    picture.save(held, "PNG")
    data = base64.b64encode(held.getvalue()).decode()
    parts = [data[begin : begin + PART_LETTERS] for begin in range(0, len(data), PART_LETTERS)]
    first = f"a=T,f=100,c={columns},r={rows},C=1,q=2,"
    return "".join(
        f"\x1b_G{'' if number else first}m={int(number < len(parts) - 1)};{part}\x1b\\"
        for number, part in enumerate(parts)
    )


def iterm(picture: Image.Image, columns: int, rows: int) -> str:
    """Return the sequence that has iTerm2, or what understands it, show a picture."""
    from svb.retrieve.searching.pictures import as_jpeg

    jpeg = as_jpeg(picture)
    size = f"size={len(jpeg)};width={columns};height={rows};preserveAspectRatio=1"
    return f"\x1b]1337;File=inline=1;{size}:{base64.b64encode(jpeg).decode()}\x07"


def half_blocks(picture: Image.Image, columns: int, rows: int) -> list[str]:
    """Return a line a row: each cell is an upper half block in one colour on a ground of another."""
    from PIL import Image

    small = picture.convert("RGB").resize((columns, 2 * rows), Image.Resampling.BOX)
    data = small.tobytes()
    pixels = [tuple(data[begin : begin + 3]) for begin in range(0, len(data), 3)]
    lines = []
    for row in range(0, 2 * rows, 2):
        upper, lower = (pixels[line * columns : (line + 1) * columns] for line in (row, row + 1))
        cells = [
            f"\x1b[38;2;{top[0]};{top[1]};{top[2]};48;2;{low[0]};{low[1]};{low[2]}m\u2580"
            for top, low in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return lines
