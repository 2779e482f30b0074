"""Tokenizers as JSON of the `tokenizers` library, which reads it without torch and transformers."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

# CLIP's words: each token around a text, contractions, letters, single digits, and runs of anything else.
_CLIP_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)"


def bare_tokenizer(tokenizer: Any) -> str:
    """Return a tokenizer of transformers as JSON, without the cutting and padding that it may hold.

    Raises:
        ValueError: It is none of the `tokenizers` library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(f"its tokenizer is a {type(tokenizer).__name__}, which is written in Python")
    bare = Tokenizer.from_str(backend.to_str())
    bare.no_padding()
    bare.no_truncation()
    return str(bare.to_str())


def clip_tokenizer(tokenizer: Any) -> str:
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
