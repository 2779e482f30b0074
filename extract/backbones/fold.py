"""Batch norms folded into the convolutions before them: in a frozen network each is one more pass over memory."""

from __future__ import annotations

from typing import TypeAlias

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

Convolution: TypeAlias = nn.Conv2d | nn.Conv3d
BatchNorm: TypeAlias = nn.BatchNorm2d | nn.BatchNorm3d
# Only these very classes: what a subclass adds would be lost.
FOLDABLE = (nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)


@torch.no_grad()
def fold_batch_norms(module: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Fold each batch norm that reads one convolution's output, and nothing else does, into that convolution.

    Which these are is seen from one run: modules do not tell what they read. What another part of the network
    reads too would be changed by folding, so the outputs before and after are compared, and where they differ
    by more than rounding the network stays as it was.

    Args:
        module: A frozen network in float32, in evaluation mode; changed in place.
        image_shape: The shape of one input, `(3, S, S)` or `(3, clip_frames, S, S)`.

    Returns:
        How many were folded.
    """
    if not any(type(part) in FOLDABLE for part in module.modules()):
        return 0
    images = torch.randn(1, *image_shape, generator=torch.Generator().manual_seed(0))
    pairs, expected = _run_and_watch(module, images)
    if not pairs:
        return 0
    kept = [(norm, convolution, convolution.weight, convolution.bias) for norm, convolution in pairs]
    paths = {norm: path for path, norm in module.named_modules()}
    for norm, convolution in pairs:
        _fold(norm, convolution)
        _replace(module, paths[norm], _what_follows(norm))
    if torch.allclose(module(images), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        return len(pairs)
    for norm, convolution, weight, bias in kept:
        convolution.weight, convolution.bias = weight, bias
        _replace(module, paths[norm], norm)
    return 0


def _run_and_watch(
    module: nn.Module, images: torch.Tensor
) -> tuple[list[tuple[BatchNorm, Convolution]], torch.Tensor]:
    """Return each batch norm with the convolution whose very output it was given, and the network's output."""
    # The outputs are kept, so that no later tensor can have the identity of one.
    made_by: dict[int, tuple[torch.Tensor, Convolution]] = {}
    pairs: list[tuple[BatchNorm, Convolution]] = []

    def after_convolution(convolution: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(convolution, Convolution)
        made_by[id(output)] = output, convolution

    def before_norm(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(norm, BatchNorm)
        if id(inputs[0]) in made_by:
            pairs.append((norm, made_by[id(inputs[0])][1]))

    hooks = [
        *(m.register_forward_hook(after_convolution) for m in module.modules() if isinstance(m, Convolution)),
        *(m.register_forward_pre_hook(before_norm) for m in module.modules() if type(m) in FOLDABLE),
    ]
    try:
        output: torch.Tensor = module(images)
    finally:
        for hook in hooks:
            hook.remove()
    once = [norm for norm, _ in pairs], [convolution for _, convolution in pairs]
    return [(n, c) for n, c in pairs if once[0].count(n) == 1 and once[1].count(c) == 1], output


def _fold(norm: BatchNorm, convolution: Convolution) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if convolution.bias is not None:
        shift = shift + convolution.bias.double() * scale
    weight = convolution.weight.double() * scale.view(-1, *[1] * (convolution.weight.ndim - 1))
    convolution.weight = nn.Parameter(weight.float(), requires_grad=False)
    convolution.bias = nn.Parameter(shift.float(), requires_grad=False)


def _what_follows(norm: BatchNorm) -> nn.Module:
    """Return what is left of a folded batch norm: nothing, or timm's activation within it."""
    return norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()


def _replace(module: nn.Module, path: str, by: nn.Module) -> None:
    parent = module.get_submodule(path.rpartition(".")[0])
    setattr(parent, path.rpartition(".")[2], by)
