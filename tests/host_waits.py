"""Counts where the host would wait for a GPU, on a machine that has none."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What gives a number to the host, or a tensor whose size depends on numbers that only the device knows.
_OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2"}
_COPIES = {torch.Tensor.cpu, torch.Tensor.tolist}
_BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}


class HostWaits(TorchDispatchMode):
    """Within it, every operation of torch that makes the host wait is put into `seen`.

    What a program keeps on the host it must compute in numpy, because on the CPU the two cannot be told apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._copies = _Copies(self.seen)

    def __enter__(self) -> HostWaits:
        super().__enter__()
        self._copies.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._copies.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name in _BY_MASK else []
        if name in _OPERATORS or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Copies to the host, which do nothing on the CPU and are no operations there."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COPIES:
            self._seen.append(func.__name__)
        return func(*args, **(kwargs or {}))
