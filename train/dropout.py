"""Dropout that draws one byte per element; on a CPU, drawing floats would take a sixth of a training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Dropout(nn.Module):
    """Zero elements at random and scale up the others, while training (Srivastava et al. 2014).

    Args:
        probability: Probability that an element is zeroed, on the CPU rounded to the nearest 256th.

    Shape:
        Any -> the same.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def extra_repr(self) -> str:
        return f"{self.probability}"

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        dropped = min(255, round(256 * self.probability))
        if not self.training or not dropped:
            return values
        if values.device.type != "cpu":
            return F.dropout(values, self.probability)
        words = torch.empty((values.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        is_kept = words.view(torch.uint8)[: values.numel()].view(values.shape) >= dropped
        return values * is_kept.to(values.dtype).mul_(256 / (256 - dropped))
