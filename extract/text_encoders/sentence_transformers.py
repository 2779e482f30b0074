"""Any sentence-transformers model in a local folder: `sentence_transformers:<folder>`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from svb.errors import InputError
from svb.extract.text_encoders.text_encoder import TextEncoder, TokenNetwork
from svb.extract.text_encoders.tokenizer_json import bare_tokenizer


def load(name: str, model: str, weights: str, device: torch.device) -> TextEncoder:
    """Load a model from a folder that sentence-transformers saved.

    Raises:
        InputError: The folder is missing or holds no such model.
    """
    return load_folder(name, Path(model), device)


def load_folder(name: str, folder: Path, device: torch.device) -> TextEncoder:
    """Load the model in `folder` under `name`; see `load`."""
    if not (folder / "config_sentence_transformers.json").is_file():
        raise InputError(f"{folder} holds no sentence-transformers model - expected a folder that its save() wrote")
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    try:
        disable_progress_bar()
        module = SentenceTransformer(str(folder), device=str(device), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the sentence-transformers model in {folder} is damaged ({reason})") from error

    def encode_batch(captions: list[str]) -> torch.Tensor:
        return module.encode(captions, batch_size=len(captions), convert_to_tensor=True, show_progress_bar=False)

    def num_tokens(caption: str) -> int:
        return len(module.tokenizer(caption, truncation=False)["input_ids"])

    def take_apart() -> TokenNetwork:
        preprocess = getattr(module, "preprocess", None) or module.tokenize  # its name before version 6
        return TokenNetwork(
            _Modules(module),
            bare_tokenizer(module.tokenizer),
            lambda text: preprocess([text])["input_ids"][0].tolist(),
        )

    return TextEncoder(
        name,
        module,
        feature_size=encode_batch(["size"]).shape[1],
        encode_batch=encode_batch,
        num_tokens=num_tokens,
        max_tokens=int(module.max_seq_length or 512),
        take_apart=take_apart,
    )


class _Modules(nn.Module):
    """`(1, L)` tokens of one caption, all of them its own -> `(1, F)`, through a model's modules in turn.

    Raises:
        ValueError: A module is of another kind than those of a plain sentence encoder, or texts get a prompt.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        kinds = [type(module).__name__ for module in model]
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            raise ValueError(
                f"it is made of {', '.join(kinds)} - expected Transformer, Pooling and at most Normalize"
            )
        if model.default_prompt_name is not None:
            raise ValueError(f"it puts its prompt {model.default_prompt_name!r} before every text")
        self.modules_in_turn = nn.ModuleList(model)
        self.wants = [name for name in model.tokenizer.model_input_names if name == "token_type_ids"]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        features: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        features |= {name: torch.zeros_like(tokens) for name in self.wants}
        for module in self.modules_in_turn:
            features = module(features)
        embedding: torch.Tensor = features["sentence_embedding"]
        return embedding
