"""Retrieval from the batch before a contrastive loss, as CLOOB does it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def retrieved(embeddings: torch.Tensor, stored: torch.Tensor, scale: float) -> torch.Tensor:
    """Replace each embedding by what it retrieves from the stored ones (CLOOB: Fürst et al., NeurIPS 2022).

    That is the mean of the stored embeddings, weighted by a softmax of their scaled similarities to it, and scaled
    to length 1: one step of a modern Hopfield network (`ml-jku/cloob`, `src/training/methods.py`).
    What an embedding shares with its neighbours is kept, the rest is lost.

    Shape:
        `(A, D)` and `(S, D)`, L2-normalised -> `(A, D)`, L2-normalised.
    """
    weights = (scale * embeddings @ stored.T).softmax(dim=1)  # (A, S)
    return F.normalize(weights @ stored, dim=1)
