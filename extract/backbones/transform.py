"""How a backbone wants its frames prepared, as its library's own configuration says; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svb.errors import MismatchError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODES = ("shortest", "squash", "longest")
INTERPOLATIONS = ("bilinear", "bicubic")

# What stores say of the transform that CLIP was trained with; all others are said field by field.
PLAIN = "short side, antialiased bicubic on uint8, centre crop"


@dataclass(frozen=True)
class Transform:
    """All that is done to a frame: it is scaled, its centre is cropped, it is divided by 255 and normalised.

    Attributes:
        image_size: S, the side of the square that a network takes, in pixels. What a scaled frame has beyond it is
            cropped on both sides alike; where the frame is smaller, `fill` is put around it.
        mean: The mean of each RGB channel, for values from 0 to 1.
        std: The deviation of each RGB channel, for values from 0 to 1.
        mode: `shortest` scales the short side to `resize_px`, `longest` the long side; `squash` scales the whole
            frame to that size, whatever its shape.
        resize_px: `(height, width)`, equal but for `squash`; None is S by S.
        interpolation: `bilinear` or `bicubic`.
        antialias: Whether a filter grows with the scale when a frame becomes smaller, as PIL's do.
        fill: The colour that is put around a frame, RGB from 0 to 255.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "shortest"
    resize_px: tuple[int, int] | None = None
    interpolation: str = "bicubic"
    antialias: bool = True
    fill: tuple[int, int, int] = (0, 0, 0)

    @property
    def box_px(self) -> tuple[int, int]:
        """The height and width that frames are scaled to, or that one side of them is."""
        return self.resize_px or (self.image_size, self.image_size)

    @property
    def geometry(self) -> tuple[object, ...]:
        """What decides on the square of a frame: backbones that differ in mean or deviation share it."""
        return self.image_size, self.mode, self.box_px, self.interpolation, self.antialias, self.fill

    def scaled_px(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of a scaled frame, rounded as torchvision and timm do."""
        if self.mode == "squash":
            return self.box_px
        side = self.box_px[0]
        if self.mode == "longest":
            ratio = max(height, width) / side
            return max(1, round(height / ratio)), max(1, round(width / ratio))
        long_side = int(side * max(height, width) / min(height, width))
        return (side, long_side) if height <= width else (long_side, side)

    def __str__(self) -> str:
        """Say it for a message: `whole frame squashed to 384x384 (bilinear)`."""
        height, width = self.box_px
        scaled = {
            "squash": f"whole frame squashed to {width}x{height}",
            "longest": f"long side scaled to {height}, padded to a square",
        }.get(self.mode, f"short side scaled to {height}")
        cropped = (
            f", centre of {self.image_size} cropped" if self.mode == "shortest" or height > self.image_size else ""
        )
        return f"{scaled} ({self.interpolation}){cropped}"

    def require_possible(self, name: str) -> None:
        """Refuse what svb cannot do: a model must see what it was trained on, not something near it.

        Args:
            name: The backbone, for the error.

        Raises:
            UsageError: A field has a value that svb does not know.
        """
        for what, value, known in (
            ("resize mode", self.mode, MODES),
            ("interpolation", self.interpolation, INTERPOLATIONS),
        ):
            if value not in known:
                raise cannot_prepare(name, f"the {what} {value!r}", " or ".join(known))
        if len(self.mean) != 3 or len(self.std) != 3:
            raise cannot_prepare(name, f"{len(self.mean)} channels", "the three of RGB")
        if self.mode != "squash" and self.box_px[0] != self.box_px[1]:
            raise cannot_prepare(name, f"{self.mode} side to {self.box_px}", "one size")

    def settings(self) -> dict[str, Any]:
        """Return this as it is stored and fingerprinted."""
        height, width = self.box_px
        said = {
            "mode": self.mode,
            "height": height,
            "width": width,
            "interpolation": self.interpolation,
            "antialias": self.antialias,
            "fill": list(self.fill),
        }
        plain = Transform(self.image_size, self.mean, self.std)
        return {
            "image_size": self.image_size,
            "resize": PLAIN if self.geometry == plain.geometry else said,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def stored_transform(settings: Mapping[str, Any]) -> Transform:
    """Return the transform that a backbone's settings in a store tell."""
    image_size, mean, std = settings["image_size"], tuple(settings["mean"]), tuple(settings["std"])
    said = settings["resize"]
    if said == PLAIN:
        return Transform(image_size, mean, std)
    red, green, blue = said["fill"]
    return Transform(
        image_size,
        mean,
        std,
        mode=said["mode"],
        resize_px=(said["height"], said["width"]),
        interpolation=said["interpolation"],
        antialias=said["antialias"],
        fill=(red, green, blue),
    )


def square_side(name: str, size: int | Sequence[int]) -> int:
    """Return the side of the square that a library's configuration tells as `S`, `[S]` or `(S, S)`.

    Raises:
        UsageError: It is no square.
    """
    sides = {size} if isinstance(size, int) else {int(side) for side in size}
    if len(sides) != 1:
        raise cannot_prepare(name, f"images of {tuple(size)} pixels", "square ones")  # type: ignore[arg-type]
    return sides.pop()


def cannot_prepare(name: str, wanted: str, expected: str) -> UsageError:
    """Return the error of a backbone whose frames svb cannot prepare."""
    return UsageError(
        f"{name} wants {wanted}, which svb cannot prepare - expected {expected}: choose another model"
    )


def require_same_transforms(stored: Mapping[str, Any], wanted: Mapping[str, Any], out: Path) -> None:
    """Refuse to add to a store whose frames were prepared in another way; `stored` and `wanted` are settings.

    svb once scaled the short side for every backbone, with bicubic, whatever its library says.

    Raises:
        MismatchError: Names the backbone, both ways, and the command that extracts anew.
    """
    for name, settings in wanted["backbones"].items():
        held = stored["backbones"].get(name, {})
        if "resize" not in held or settings["weights_hash"] != held["weights_hash"]:
            continue
        before, now = stored_transform(held), stored_transform(settings)
        if before != now:
            raise MismatchError(
                f"frames in the feature store {out} were not prepared for {name} as it wants them: there {before}, "
                f"but the model was trained on: {now} - extract into a new store with `svb extract VIDEOS -o "
                f"{out}-new --backbone {name}`; this one can still be trained on, indexed and searched"
            )


def squares_by_pil(frames: NDArray[np.uint8], transform: Transform) -> NDArray[np.uint8]:
    """Scale frames and crop or pad them by PIL: for a few frames, without torch.

    PIL is what the networks were trained with; `svb.extract.compute.transform` comes within 2 of 255 of it.

    Args:
        frames: `(T, H, W, 3)` uint8.
        transform: How; it must ask for antialiasing.

    Returns:
        `(T, 3, S, S)` uint8.
    """
    import numpy as np
    from PIL import Image

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
