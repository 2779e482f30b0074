"""The text tower of a CLIP model taken apart into tokenizer and network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from svb.extract.text_encoders.text_encoder import TokenNetwork
from svb.extract.text_encoders.tokenizer_json import bare_tokenizer, clip_tokenizer

# open_clip's functions that clean a text, by the names that its configurations give them.
_CLEANINGS = {"_clean_whitespace": "whitespace", "_clean_lower": "lower", "_clean_canonicalize": "canonicalize"}


def take_clip_apart(module: Any, tokenizer: Any) -> TokenNetwork:
    """Take apart the text tower of an open_clip model.

    A tower that looks only back gets a text without its padding, a tenth of the tokens; one that looks both ways
    was trained on padding and reads it.

    Raises:
        ValueError: Its tokenizer leaves out tokens at random, or is not plain otherwise.
    """
    cleaning = _CLEANINGS.get(getattr(getattr(tokenizer, "clean_fn", None), "__name__", ""))
    if cleaning is None:
        raise ValueError(f"its tokenizer is a {type(tokenizer).__name__} that cleans texts in a way of its own")
    if hasattr(tokenizer, "bpe_ranks"):
        if tokenizer.reduction_fn is not None:
            raise ValueError("its tokenizer leaves out tokens at random")
        as_json, padding = clip_tokenizer(tokenizer), 0
    else:
        if tokenizer.tokenizer_mode or tokenizer.strip_sep_token:
            raise ValueError("its tokenizer moves tokens about after the tokenizer that it wraps")
        as_json, padding = bare_tokenizer(tokenizer.tokenizer), int(tokenizer.tokenizer.pad_token_id)
    tower = module if hasattr(module, "token_embedding") else module.text
    looks_back = _looks_back_only(tower)
    return TokenNetwork(
        _LooksBack(tower) if looks_back else _Padded(module),
        as_json,
        lambda text: _without_padding(tokenizer([text])[0].tolist(), padding),
        cleaning=cleaning,
        padded_to=None if looks_back else int(tokenizer.context_length),
        padding=padding,
    )


def _looks_back_only(tower: Any) -> bool:
    """Return whether no token's output depends on a later one, nor the result on the last one's place."""
    return (
        isinstance(getattr(tower, "attn_mask", None), torch.Tensor)
        and not getattr(tower, "use_pad_mask", False)
        and getattr(tower, "cls_emb", None) is None
        and _pool_type(tower) in ("argmax", "eos", "first")
    )


def _pool_type(tower: Any) -> str:
    return str(getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", ""))


def _without_padding(tokens: list[int], padding: int) -> list[int]:
    length = len(tokens)
    while length > 1 and tokens[length - 1] == padding:
        length -= 1
    return tokens[:length]


class _LooksBack(nn.Module):
    """`(1, L)` tokens, L up to the tower's own -> `(1, F)`: what its `encode_text` does, with its mask cut to L."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.token_embedding, self.transformer, self.ln_final = (
            tower.token_embedding,
            tower.transformer,
            tower.ln_final,
        )
        self.positional_embedding, self.text_projection = tower.positional_embedding, tower.text_projection
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)
        self.pool_type = _pool_type(tower)
        self.end_token = getattr(tower, "text_eos_id", None) or getattr(tower, "eos_id", None)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        from open_clip.transformer import text_global_pool

        length = tokens.shape[1]
        hidden = self.token_embedding(tokens) + self.positional_embedding[:length]
        hidden = self.transformer(hidden, attn_mask=self.attn_mask[:length, :length])  # type: ignore[index]
        hidden = self.ln_final(hidden)
        features: torch.Tensor = text_global_pool(hidden, tokens, self.pool_type, eos_token_id=self.end_token)
        if isinstance(self.text_projection, nn.Linear):
            features = self.text_projection(features)
        elif self.text_projection is not None:
            features = features @ self.text_projection
        return features


class _Padded(nn.Module):
    """`(1, L)` tokens, L the tower's own -> `(1, F)`."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        if hasattr(clip, "text"):
            self.text = clip.text
        else:
            self.clip = clip

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.text(tokens) if hasattr(self, "text") else self.clip.encode_text(tokens)
        return features
