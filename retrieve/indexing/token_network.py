"""A text encoder taken apart for the export: its tokenizer as JSON of `tokenizers`, its network without the text.

Each family is built in its own way. An encoder of another family works too, but only with torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn

from svb.extract.text_encoders.t5 import LENGTHS
from svb.extract.text_encoders.text_encoder import TextEncoder

# open_clip's functions that clean a text, by the names that its configurations give them.
_CLEANINGS = {"_clean_whitespace": "whitespace", "_clean_lower": "lower", "_clean_canonicalize": "canonicalize"}
# CLIP's words: each token around a text, contractions, letters, single digits, and runs of anything else.
_CLIP_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)"


@dataclass(frozen=True)
class TokenNetwork:
    """What turns text into tokens, and tokens into features; it shares the encoder's weights.

    Attributes:
        network: `(1, L)` int64 tokens -> `(1, F)`, the features that the encoder gives.
        tokenizer: Turns a cleaned text into its tokens, with those that the network wants around them, as JSON of
            the `tokenizers` library; it neither cuts nor pads.
        token_ids: Turns a text into the tokens that the encoder itself gives its network, cut but not padded.
        cleaning: What is done to a text first, a name in `svb.retrieve.model.text_tower.CLEANINGS`.
        padded_to: L of every text where padding changes the features; None where any L will do.
        padding: The token to pad with.
    """

    network: nn.Module
    tokenizer: str
    token_ids: Callable[[str], list[int]]
    cleaning: str = "none"
    padded_to: int | None = None
    padding: int = 0


def take_apart(encoder: TextEncoder) -> TokenNetwork | None:
    """Take a text encoder apart; None where its family is not known here.

    Raises:
        ValueError: The model is not built as its family usually is.
        Exception: It differs in another way: models differ in more ways than their families know.
    """
    family = encoder.name.partition(":")[0]
    return FAMILIES[family](encoder.module, encoder.tokenizer) if family in FAMILIES else None


def _take_sentence_encoder_apart(module: Any, tokenizer: Any) -> TokenNetwork:
    preprocess = getattr(module, "preprocess", None) or module.tokenize  # its name before version 6
    return TokenNetwork(
        _ModulesInTurn(module),
        _bare_tokenizer(tokenizer),
        lambda text: preprocess([text])["input_ids"][0].tolist(),
    )


class _ModulesInTurn(nn.Module):
    """`(1, L)` tokens of one caption, all of them its own -> `(1, F)`, through a model's modules in turn.

    Raises:
        ValueError: A module is not of a plain sentence encoder, or texts get a prompt.
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


def _take_t5_apart(module: Any, tokenizer: Any) -> TokenNetwork:
    return TokenNetwork(
        _MeanOfTokens(module),
        _bare_tokenizer(tokenizer),
        lambda text: list(tokenizer(text, truncation=True, max_length=LENGTHS[-1], padding=False)["input_ids"]),
    )


class _MeanOfTokens(nn.Module):
    """`(1, L)` tokens of one caption, all of them its own -> `(1, F)`."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        mean: torch.Tensor = hidden.mean(dim=1)
        return mean


def _take_clip_apart(module: Any, tokenizer: Any) -> TokenNetwork:
    """Take apart the text tower of an open_clip model.

    A tower that looks only back gets a text without its padding, a tenth of the tokens; one that looks both ways
    was trained on padding and reads it.
    """
    cleaning = _CLEANINGS.get(getattr(getattr(tokenizer, "clean_fn", None), "__name__", ""))
    if cleaning is None:
        raise ValueError(f"its tokenizer is a {type(tokenizer).__name__} that cleans texts in a way of its own")
    if hasattr(tokenizer, "bpe_ranks"):
        if tokenizer.reduction_fn is not None:
            raise ValueError("its tokenizer leaves out tokens at random")
        as_json, padding = _clip_tokenizer(tokenizer), 0
    else:
        if tokenizer.tokenizer_mode or tokenizer.strip_sep_token:
            raise ValueError("its tokenizer moves tokens about after the tokenizer that it wraps")
        as_json, padding = _bare_tokenizer(tokenizer.tokenizer), int(tokenizer.tokenizer.pad_token_id)
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


def _bare_tokenizer(tokenizer: Any) -> str:
    """Return a tokenizer of transformers as JSON, without the cutting and padding that it may hold.

    Raises:
        ValueError: It does not come from the `tokenizers` library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(f"its tokenizer is a {type(tokenizer).__name__}, which is written in Python")
    bare = Tokenizer.from_str(backend.to_str())
    bare.no_padding()
    bare.no_truncation()
    return str(bare.to_str())


def _clip_tokenizer(tokenizer: Any) -> str:
    """Return open_clip's own tokenizer (byte-pair encoding, Radford et al. 2021) as JSON; text comes cleaned."""
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    special = [tokenizer.decoder[token] for token in tokenizer.all_special_ids]
    merges = list(tokenizer.bpe_ranks)
    built = Tokenizer(models.BPE(vocab=tokenizer.encoder, merges=merges, end_of_word_suffix="</w>"))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    names = [tokenizer.decoder[token] for token in (start, end)]
    built.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A {names[1]}", special_tokens=list(zip(names, (start, end), strict=True))
    )
    return str(built.to_str())


FAMILIES: dict[str, Callable[[Any, Any], TokenNetwork]] = {
    "offline": _take_sentence_encoder_apart,
    "open_clip": _take_clip_apart,
    "sentence_transformers": _take_sentence_encoder_apart,
    "t5": _take_t5_apart,
}
