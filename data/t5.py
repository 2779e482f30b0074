"""T5 checkpoints (Raffel et al. 2020), loaded for the text encoder and for the caption decoder."""

from __future__ import annotations

import contextlib
import importlib.util
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svb.data.weights import hub
from svb.errors import InputError, ModelUnavailableError


@dataclass(frozen=True)
class T5:
    """A pretrained T5 in float32, on the CPU, and its tokenizer.

    Attributes:
        network: A `T5EncoderModel` or `T5ForConditionalGeneration` of transformers.
        tokenizer: The tokenizer of transformers that belongs to it.
    """

    network: Any
    tokenizer: Any


def load_t5_encoder(name: str) -> T5:
    """Load the encoder alone; see `load_t5_with_decoder`."""
    return _load(name, "T5EncoderModel", "--text-encoder offline:minilm-l6 (installed with svb)")


def load_t5_with_decoder(name: str) -> T5:
    """Load encoder and decoder of a T5, T5 v1.1, Flan-T5 or the like.

    The weights are float32 whatever the file holds: T5 overflows in float16.

    Args:
        name: A folder that transformers saved, or a model on a hub, such as `google/t5-v1_1-base`.

    Raises:
        InputError: It is not a T5, is incomplete, or is damaged.
        ModelUnavailableError: The hub has no such model or cannot be reached, or the packages that read a
            sentencepiece vocabulary are missing.
    """
    return _load(name, "T5ForConditionalGeneration", "--caption-decoder transformer")


def absolute_t5_name(name: str) -> str:
    """Return the name of a T5; a local folder is made absolute, so that the name is valid everywhere."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _load(name: str, network: str, instead: str) -> T5:
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source: dict[str, Any] = {"local_files_only": Path(name).is_dir()}
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(f"{name} holds no config.json - expected a folder that transformers saved a T5 to")
    with _errors_named(name, instead):
        config: Any = transformers.AutoConfig.from_pretrained(name, **source)
    if config.model_type != "t5":
        raise InputError(f"t5:{name} holds a {config.model_type!r} model - expected a T5, T5 v1.1 or Flan-T5")
    tokenizer = _load_tokenizer(name, instead, config.vocab_size, source)
    with _errors_named(name, instead):
        loaded, info = getattr(transformers, network).from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, **source
        )
    # transformers would fill what a checkpoint lacks with random numbers.
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"t5:{name} lacks {len(missing)} tensors of a {network}, first {missing[0]} - expected a whole T5; "
            "some checkpoints hold the encoder alone"
        )
    return T5(loaded, tokenizer)


def _load_tokenizer(name: str, instead: str, vocabulary_size: int, source: dict[str, Any]) -> Any:
    import transformers

    try:
        with _errors_named(name, instead):
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name, **source)
    except (InputError, ModelUnavailableError) as error:
        lacking = [package for package in ("sentencepiece", "google.protobuf") if not _is_installed(package)]
        if not lacking:
            raise
        raise ModelUnavailableError(
            f"the tokenizer of t5:{name} is a sentencepiece model, and {' and '.join(lacking)} is not installed - "
            f"pip install '.[t5]' in svb's folder, or choose {instead}"
        ) from error
    # If transformers finds no vocabulary it makes one of special tokens and a space.
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if len(words) < 2:
        raise InputError(
            f"t5:{name} has no vocabulary - expected a tokenizer.json or a spiece.model beside the model"
        )
    if len(tokenizer) > vocabulary_size:
        raise InputError(
            f"the tokenizer of t5:{name} has {len(tokenizer)} tokens, its model {vocabulary_size} - expected a "
            "tokenizer and a model that belong together"
        )
    return tokenizer


@contextlib.contextmanager
def _errors_named(name: str, instead: str) -> Iterator[None]:
    """Turn whatever goes wrong in loading from a folder or a hub into svb's errors."""
    try:
        with hub():
            yield
    except Exception as error:  # the errors of hub clients and of damaged files have no common root
        reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
        if Path(name).is_dir():
            raise InputError(
                f"the folder {name} holds no T5 that can be read ({reason}) - expected what transformers saved "
                "with save_pretrained, or a hub model's files"
            ) from error
        raise ModelUnavailableError(
            f"{name!r} is no folder, and no hub serves it here ({reason}) - name a folder that holds a T5 "
            f"(t5:PATH), or choose {instead}"
        ) from error


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not installed
        return False
