"""The device that networks run on, and its fastest precision. Only functions that need torch import it."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from svb.errors import DeviceError, UsageError, first_line

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

DRIVER_FILE = Path("/proc/driver/nvidia/version")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def choose_device(name: str = "auto") -> torch.device:
    """Return the named device, after it has computed something; `auto` takes the first GPU where there is one.

    A GPU becomes the current one of this process, so that nothing is put onto another. What is computed in float32
    on it is float32 from then on: torch's default for convolutions is TF32, which has 10 bits instead of 23.

    Raises:
        DeviceError: The device exists but cannot compute.
        UsageError: torch does not know the device, or it does not exist.
    """
    import torch

    if name == "auto":
        name = "cuda" if _has_gpu() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(device)
        else:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"cannot use device {name!r} ({first_line(error)}) - try auto, cpu or cuda:0") from error
    if device.type == "cuda":
        _compute_float32_as_float32()
        _try(device)
    return device


def _has_gpu() -> bool:
    """Tell whether a GPU can be used; log why if there is one that cannot."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        is_there = torch.cuda.is_available()
    if not is_there and said:
        logger.warning(
            f"computing on the CPU, because torch {torch.__version__} cannot use the GPU "
            f"({first_line(said[0].message)}) - update the driver, or install a PyTorch for it"
        )
    return is_there


def _try(device: torch.device) -> None:
    """Compute one number: a GPU that PyTorch does not support gives memory but fails at its first kernel."""
    import torch

    try:
        number = float((torch.ones(1, device=device) + 1).item())
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(device)
        raise DeviceError(
            f"{device} ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor}) cannot compute "
            f"({first_line(error)}) - see whether nvidia-smi shows it healthy and free, install a PyTorch that "
            "supports it, or choose another --device"
        ) from error
    if number != 2:
        raise DeviceError(f"{device} computes 1 + 1 = {number} - it is broken: choose another --device")


def _compute_float32_as_float32() -> None:
    import torch

    matmul, cudnn = cast("Any", torch.backends.cuda.matmul), cast("Any", torch.backends.cudnn)  # untyped
    # Parts of torch still read the older switches, and fail if only the newer ones are set.
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    matmul.fp32_precision = cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"


def describe_device(device: torch.device) -> dict[str, str]:
    """Return what identifies a device, for the provenance of what it made: a GPU's model and driver too."""
    import torch

    if device.type != "cuda":
        return {"device": str(device)}
    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver_version(),
        "cuda": str(torch.version.cuda or torch.version.hip),
    }


def _driver_version() -> str:
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)*)\s", DRIVER_FILE.read_text())
    except OSError:
        found = None
    return found[1] if found else "unknown"


@contextlib.contextmanager
def explained_errors(device: torch.device, *, smaller: str) -> Iterator[None]:
    """Turn a lack of memory and the failure of a device into errors that say what to do.

    Args:
        device: Where the block computes.
        smaller: How to need less memory, such as `lower --batch-size`.

    Raises:
        DeviceError: Instead of torch's errors.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise DeviceError(
                f"{device} has too little memory ({first_line(error)}) - free it and run the same command again, "
                f"or {smaller}"
            ) from error
        if is_device_failure(error):
            raise DeviceError(
                f"{device} failed ({first_line(error)}) - run the same command again to go on from what was "
                "saved; if it fails again, look at nvidia-smi and choose another --device"
            ) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out; torch's on the CPU has no class of its own."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def is_device_failure(error: BaseException) -> bool:
    """Tell whether the device itself failed; its process can compute nothing more on it then."""
    import torch

    words = ("CUDA error", "cuDNN error", "CUDA driver error", "HIP error")
    return isinstance(error, DeviceError | torch.AcceleratorError) or str(error).startswith(words)


def choose_precision(device: torch.device, name: str = "auto") -> torch.dtype:
    """Return the dtype that a frozen network computes in; `auto` asks the device what is fast on it.

    bfloat16 on GPUs that have it and on CPUs with AMX (2.4 times as fast as float32 there), float16 on older GPUs,
    float32 elsewhere.

    Raises:
        UsageError: The name is not one of `PRECISIONS`.
    """
    import torch

    if name not in PRECISIONS:
        raise UsageError(f"unknown precision {name!r} - expected one of {', '.join(PRECISIONS)}")
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        # `torch.cuda.is_bf16_supported` would ask the current device, which need not be this one.
        return torch.bfloat16 if torch.cuda.get_device_properties(device).major >= 8 else torch.float16
    if device.type == "cpu" and _cpu_has_amx():
        return torch.bfloat16
    return torch.float32


def to_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Return a small array as a tensor on a device, without waiting for a GPU that is still computing."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def precision_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _cpu_has_amx() -> bool:
    import torch

    ask = getattr(torch.cpu, "get_capabilities", None)
    return bool(ask and ask().get("amx_bf16", False))
