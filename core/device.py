"""The device that networks run on, and the precision that it does best. Imports torch only when asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from svb.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def choose_device(name: str = "auto") -> torch.device:
    """Return the named device; `auto` takes the first GPU where there is one.

    Raises:
        UsageError: torch does not know the device, or it is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise UsageError(f"cannot use device {name!r} ({first_line}) - try auto, cpu or cuda:0") from error
    return device


def choose_precision(device: torch.device, name: str = "auto") -> torch.dtype:
    """Return the dtype that a frozen network computes in; `auto` asks the device what is fast on it.

    bfloat16 on GPUs that have it and on CPUs with AMX (2.4 times float32 there), float16 on older GPUs,
    float32 elsewhere.

    Raises:
        UsageError: The name is none of `PRECISIONS`.
    """
    import torch

    if name not in PRECISIONS:
        raise UsageError(f"unknown precision {name!r} - expected one of {', '.join(PRECISIONS)}")
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and _cpu_has_amx():
        return torch.bfloat16
    return torch.float32


def to_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Return a small array of the host as a tensor; the host does not wait for a GPU that is still computing."""
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
