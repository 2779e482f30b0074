"""Cross-captioning: the loss of rebuilding each caption from other videos (Patrick et al. 2021, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# Logits per chunk: 16 MB in float32, whatever the vocabulary and the number of words.
CHUNK_LOGITS = 2**22


def cross_captioning(
    hidden: torch.Tensor, output_weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the summed negative log-likelihood of words.

    The logits of all words together would be by far the largest tensor of a training. They are computed in chunks,
    each with its gradient, so that nothing is computed twice.

    Args:
        hidden: `(N, H)`, the decoder's state at the N places that a word follows.
        output_weight: `(vocabulary, H)`.
        targets: `(N,)` int64, the words.
        dtype: The type of the matrix products; sums and softmax use at least float32.

    Returns:
        Scalar.
    """
    total: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, output_weight, targets, dtype)
    return total


def embedding_distance(predicted: torch.Tensor, caption_features: torch.Tensor) -> torch.Tensor:
    """Return the distance of each caption's rebuilt embedding from its frozen one.

    Shape:
        `(B, F)` and `(B, F)` -> `(B,)`: 1 minus their cosine.
    """
    return 1 - F.cosine_similarity(predicted, caption_features, dim=1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        cast = weight.to(dtype)
        total = torch.zeros((), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        rows = max(1, CHUNK_LOGITS // len(weight))
        for begin in range(0, len(hidden), rows):
            chunk, words = hidden[begin : begin + rows].to(dtype), targets[begin : begin + rows, None]
            log_likelihood = (chunk @ cast.T).to(total.dtype).log_softmax(dim=1)  # (chunk, vocabulary)
            total -= log_likelihood.gather(1, words).sum()
            if needs_gradient:
                # d total / d logits is the softmax minus one at the word itself.
                gradient = log_likelihood.exp_().scatter_add_(1, words, -torch.ones_like(words, dtype=total.dtype))
                gradient = gradient.to(dtype)
                hidden_gradient[begin : begin + rows] = gradient @ cast
                weight_gradient += gradient.T @ chunk
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * upstream, weight_gradient * upstream, None, None
