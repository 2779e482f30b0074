"""CLIP models through open_clip: the image backbone and the text encoder load them by this one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svb.data.weights import OFFLINE_HINT, hub, load_state, unavailable
from svb.errors import InputError, UsageError


@dataclass(frozen=True)
class ClipModel:
    """A CLIP model: both towers, tokenizer, and how its images are prepared.

    Attributes:
        module: Has `visual` and `encode_text`.
        tokenizer: Texts to `(C, L)` int64 tokens.
        embedding_size: D of the space both towers share.
        preprocess: What open_clip says of how images are prepared, by the names of its `PreprocessCfg`.
    """

    module: nn.Module
    tokenizer: Callable[[list[str]], torch.Tensor]
    embedding_size: int
    preprocess: dict[str, Any]


def load_clip(name: str, model: str, weights: str) -> ClipModel:
    """Load `<model>/<tag>` from a hub or its cache, `<model>/<file>`, or `local-dir:<folder>`.

    Raises:
        UsageError: open_clip does not know the model or tag, or no weights are named.
        InputError: A local checkpoint is missing, unreadable or of another model.
        ModelUnavailableError: No hub can be reached and its cache does not hold the weights.
    """
    import open_clip

    local_folder = model.startswith("local-dir:")
    if local_folder:
        folder = Path(model.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise InputError(f"{folder} holds no open_clip_config.json - expected a model saved by open_clip")
    else:
        _require_known(name, model, weights)
    try:
        with hub():
            module = open_clip.create_model(model, pretrained=weights or None, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # a hub client's errors have no common root
        if local_folder or Path(weights).is_file():
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"the weights of {name} do not fit ({reason}) - name their own model") from error
        raise unavailable(name, error) from error
    return ClipModel(
        module,
        tokenizer,
        embedding_size=int(module.text_projection.shape[-1])
        if isinstance(getattr(module, "text_projection", None), torch.Tensor)
        else int(open_clip.get_model_config(model)["embed_dim"]),
        preprocess=dict(open_clip.get_model_preprocess_cfg(module)),
    )


def _require_known(name: str, model: str, weights: str) -> None:
    import open_clip

    if model not in open_clip.list_models():
        near = ", ".join(known for known in open_clip.list_models() if known[:5] == model[:5])
        raise UsageError(f"open_clip knows no model {model!r} - similar ones: {near or 'none'}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not weights:
        raise UsageError(f"{name} names no weights - add a tag ({', '.join(tags)}) or a local checkpoint")
    if weights in tags:
        return
    if not Path(weights).is_file():
        raise InputError(
            f"{weights!r} is neither a file nor weights that open_clip knows for {model} "
            f"({', '.join(tags)}) - {OFFLINE_HINT}"
        )
    load_state(Path(weights))  # names a damaged file before open_clip meets it
