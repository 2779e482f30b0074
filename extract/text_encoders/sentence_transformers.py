"""Any sentence-transformers model in a local folder: `sentence_transformers:<folder>`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from svb.errors import InputError

if TYPE_CHECKING:
    import torch

    from svb.extract.text_encoders.text_encoder import TextEncoder


def absolute_model(model: str) -> str:
    """Return the folder's absolute path."""
    return str(Path(model).absolute())


def load(name: str, model: str, device: torch.device) -> TextEncoder:
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

    from svb.extract.text_encoders.text_encoder import TextEncoder

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

    return TextEncoder(
        name,
        module,
        feature_size=encode_batch(["size"]).shape[1],
        encode_batch=encode_batch,
        num_tokens=num_tokens,
        max_tokens=int(module.max_seq_length or 512),
        tokenizer=module.tokenizer,
    )
