"""Text towers of CLIP models, through open_clip: `open_clip:<model>/<tag or local checkpoint>`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from svb.extract.names import split_weights

if TYPE_CHECKING:
    import torch

    from svb.extract.text_encoders.text_encoder import TextEncoder

TOWER_OF_BACKBONE = True


def load(name: str, model: str, device: torch.device) -> TextEncoder:
    """Load the text tower; its features lie in the space that it shares with the image tower.

    Raises:
        As `svb.extract.clip.load_clip`.
    """
    from svb.extract.clip import load_clip
    from svb.extract.text_encoders.text_encoder import TextEncoder

    clip = load_clip(name, *split_weights(model))
    # The weights serve both towers, and a hash of all of them names the pair.
    module = cast(Any, clip.module).to(device)
    tokenizer = cast(Any, clip.tokenizer)

    def encode_batch(captions: list[str]) -> torch.Tensor:
        features: torch.Tensor = module.encode_text(clip.tokenizer(captions).to(device))
        return features

    def num_tokens(caption: str) -> int:
        if hasattr(tokenizer, "encode"):
            return len(tokenizer.encode(caption)) + 2  # CLIP's own, with the start and end tokens
        return len(tokenizer.tokenizer(caption)["input_ids"])  # the tokenizer of another text tower, wrapped

    return TextEncoder(
        name,
        module,
        feature_size=clip.embedding_size,
        encode_batch=encode_batch,
        num_tokens=num_tokens,
        max_tokens=int(tokenizer.context_length),
        tokenizer=tokenizer,
    )
