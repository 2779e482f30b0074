"""A frozen backbone as the pipeline sees it, whatever its family."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from svb.device import precision_name
from svb.errors import SvbError, UsageError
from svb.extract.backbones.graph import Graph
from svb.extract.backbones.transform import Transform


@dataclass(frozen=True)
class Classifier:
    """The last layer of a classifier: features to logits of named classes.

    Attributes:
        weight: `(classes, F)` float32.
        bias: `(classes,)` float32.
        class_names: One a row.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    class_names: list[str]


@dataclass(frozen=True)
class RunningBatch:
    """A batch under way.

    Attributes:
        fetch: Waits for its features, `(B, F)` float32 on the CPU.
        is_done: Tells whether `fetch` would not wait.
    """

    fetch: Callable[[], torch.Tensor]
    is_done: Callable[[], bool]


@dataclass
class Backbone:
    """A frozen network from frames, or from clips of frames, to features.

    Attributes:
        name: `family:model[/weights]`, the key in every store.
        module: `(B, 3, S, S)` -> `(B, F)`, or `(B, 3, clip_frames, S, S)` -> `(B, F)` for a clip backbone.
        transform: How frames become the `(B, 3, S, S)` that enter the network.
        feature_size: F.
        clip_frames: How many frames one row is made of; 1 for a frame backbone.
        classifier: The layer that was cut off, where its classes have names.
        weights_hash: A hash of the module, or of the whole CLIP model that it is a tower of, in its file's
            precision.

    Raises:
        UsageError: svb cannot prepare frames as `transform` wants them.
    """

    name: str
    module: nn.Module
    transform: Transform
    feature_size: int
    clip_frames: int = 1
    classifier: Classifier | None = None
    weights_hash: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    _compiled: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, init=False, repr=False)
    _graph: Graph | None = field(default=None, init=False, repr=False)
    _mean: torch.Tensor = field(init=False, repr=False, compare=False)
    _std: torch.Tensor = field(init=False, repr=False, compare=False)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input: `(3, S, S)`, or `(3, clip_frames, S, S)`."""
        clip = (self.clip_frames,) if self.clip_frames > 1 else ()
        return (3, *clip, self.image_size, self.image_size)

    def __post_init__(self) -> None:
        self.transform.require_possible(self.name)
        self._place_mean_and_std()

    @property
    def image_size(self) -> int:
        """S in pixels."""
        return self.transform.image_size

    def place(self, device: torch.device, dtype: torch.dtype, compile: bool = False, batch_size: int = 1) -> None:
        """Move the network to a device and precision; convolutions run channels-last there.

        Args:
            device: The device to move it to.
            dtype: The precision to compute in.
            compile: Compile the network, which takes a minute and changes the last bits of its rows. `module`
                stays the network itself, whose weights the compiled one shares.
            batch_size: B of the batches to come, for which it is compiled.

        Raises:
            SvbError: The network cannot be compiled here.
        """
        self.device, self.dtype, self._compiled = device, dtype, None
        self._place_mean_and_std()
        self.module.to(device=device, dtype=dtype)
        if self.clip_frames == 1:
            self.module.to(memory_format=torch.channels_last)
        if compile:
            self._compile(batch_size)

    def _place_mean_and_std(self) -> None:
        """Bring both to the device once: a copy for every batch would wait for those before it."""
        shape = (1, 3, *[1] * (len(self.input_shape) - 1))
        self._mean = torch.tensor(self.transform.mean, device=self.device).view(shape)
        self._std = torch.tensor(self.transform.std, device=self.device).view(shape)

    def use_graph(self, graph: Graph) -> None:
        """Have ONNX Runtime compute it from here on, on the CPU in float32; the network gives up its memory."""
        self._graph, self._compiled = graph, None
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.module.to(device="meta")

    def _compile(self, batch_size: int) -> None:
        zeros = torch.zeros(batch_size, *self.input_shape, dtype=torch.uint8)
        try:
            self._compiled = torch.compile(self.module, dynamic=False)
            self(zeros)  # compiling waits for the first batch: fail here rather than midway
        except torch.OutOfMemoryError:
            return  # it is compiled all the same; who gives the batches can make them smaller
        except Exception as error:  # the compilers' errors have no common root
            self._compiled = None
            reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
            raise SvbError(
                f"{self.name} cannot be compiled for {self.device} ({reason}) - expected a C++ compiler (on a GPU "
                "Triton too) and a network that torch.compile knows: install one, or run without compiling"
            ) from error

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of a batch.

        Args:
            images: `(B, 3, S, S)` or `(B, 3, clip_frames, S, S)` uint8, on any device.

        Returns:
            `(B, F)` float32 on the CPU.
        """
        return self.start(images).fetch()

    @torch.inference_mode()
    def start(self, images: torch.Tensor) -> RunningBatch:
        """Start on a batch, whose features are fetched later; as `__call__` otherwise.

        A GPU is given its work and goes on while this process does something else.
        """
        if self._graph is not None:
            return _done(torch.from_numpy(self._graph(images.numpy())))
        pixels = images.to(self.device, non_blocking=True).float().div_(255).sub_(self._mean).div_(self._std)
        pixels = pixels.to(self.dtype)
        if self.clip_frames == 1:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        features: torch.Tensor = (self._compiled or self.module)(pixels).float()
        if self.device.type != "cuda":
            return _done(features.cpu())
        fetched = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        fetched.copy_(features, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))

        def fetch() -> torch.Tensor:
            done.synchronize()
            return fetched

        return RunningBatch(fetch, done.query)

    def settings(self) -> dict[str, Any]:
        """Return what shapes this backbone's rows, as stored and fingerprinted."""
        return {
            "weights_hash": self.weights_hash,
            "feature_size": self.feature_size,
            **self.transform.settings(),
            "clip_frames": self.clip_frames,
            "precision": precision_name(self.dtype),
            **({"compiled": True} if self._compiled else {}),
            **({"engine": "onnx"} if self._graph else {}),
        }


def _done(features: torch.Tensor) -> RunningBatch:
    return RunningBatch(lambda: features, lambda: True)


def cut_classifier(module: nn.Module, class_names: list[str] | None) -> tuple[int, Classifier | None]:
    """Replace a network's last layer by nothing, so that it gives that layer's inputs.

    The layer is a linear one, or a convolution that treats every position by itself and whose outputs the
    network averages. Averaging and a linear map commute: with the layer gone the network averages its inputs,
    and the layer makes of that average what it made before.

    Args:
        module: Changed in place.
        class_names: Names of the classes; a layer of another size is not the named classes' layer.

    Returns:
        The feature size F and the layer that was cut, None where its classes have no names.

    Raises:
        UsageError: The network does not end in such a layer.
    """
    path, last = _last_layer(module)
    parent = module.get_submodule(path.rpartition(".")[0])
    setattr(parent, path.rpartition(".")[2], nn.Identity())
    weight = last.weight.detach().float().flatten(1)  # (classes, F) of (classes, F, 1, 1, 1)
    num_classes, feature_size = weight.shape
    if class_names is None or len(class_names) != num_classes:
        return feature_size, None
    bias = last.bias.detach().float() if last.bias is not None else torch.zeros(num_classes)
    return feature_size, Classifier(weight.numpy(), bias.numpy(), class_names)


def _last_layer(module: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d | nn.Conv3d]:
    # The very last: SqueezeNet's convolution is followed by a ReLU, which does not commute with averaging.
    *_, (path, last) = module.named_modules()
    if isinstance(last, nn.Linear) or (isinstance(last, nn.Conv2d | nn.Conv3d) and _is_pointwise(last)):
        return path, last
    raise UsageError(
        f"{type(module).__name__} does not end in a linear layer or a pointwise convolution - choose another model"
    )


def _is_pointwise(layer: nn.Conv2d | nn.Conv3d) -> bool:
    once = (*layer.kernel_size, *layer.stride, layer.groups)
    return set(once) == {1} and layer.padding in ((0, 0), (0, 0, 0))


def imagenet_class_names() -> list[str]:
    """Return the 1,000 names of ImageNet's classes in their usual order, as torchvision ships them."""
    from torchvision.models import ResNet152_Weights

    names: list[str] = ResNet152_Weights.IMAGENET1K_V2.meta["categories"]
    return names
