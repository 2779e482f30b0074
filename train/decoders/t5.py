"""A pretrained T5 decoder that rebuilds a caption from frames: `--caption-decoder t5:<name or folder>`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from svb.data.t5 import load_t5_with_decoder
from svb.data.weights import hash_tensors
from svb.device import to_device

# Longer captions are rare, and the longest caption of a batch sets its cost.
MAX_TOKENS = 32


class T5Decoder(nn.Module):
    """Predicts each token from the tokens before it and a mixture of frame sequences.

    Patrick et al. (2021) rebuild captions with T5. Here T5's pretrained decoder attends to the mixture of the
    support set's frame sequences in place of its encoder's output, through one linear projection; the encoder is
    dropped. We could not establish how the paper joins the two: the projection is our own choice. T5's decoder
    sees no positions in what it attends to, so time counts only as far as the video head encodes it.

    All weights are trained, with T5's own dropout. It must not run in float16, in which T5 overflows.

    Args:
        name: A folder that transformers saved, or a model on a hub, such as `google/t5-v1_1-base`.
        memory_size: D of the frame sequences.

    Attributes:
        padding: The token that pads short captions; it is also T5's start token.
        weights_hash: Hash of the pretrained weights.

    Raises:
        As `svb.data.t5.load_t5_with_decoder`.
    """

    def __init__(self, name: str, memory_size: int) -> None:
        super().__init__()
        t5 = load_t5_with_decoder(name)
        config, network = t5.network.config, t5.network
        self.decoder, self._tokenizer = network.decoder, t5.tokenizer
        # T5 v1.0 uses its embeddings as output weights, v1.1 has separate ones. Only separate ones are held
        # beside the decoder, since a checkpoint takes no tensor twice.
        is_tied = network.lm_head.weight is network.shared.weight
        self.output = None if is_tied else network.lm_head
        # transformers 4 has one field that says whether weights are tied and whether the output is scaled.
        is_scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        self._scale = config.d_model**-0.5 if is_scaled else 1.0
        self.weights_hash = hash_tensors(self.state_dict())
        self.project_memory = nn.Linear(memory_size, config.d_model)
        self.padding = int(config.pad_token_id)
        start = config.decoder_start_token_id
        self._start = self.padding if start is None else int(start)
        self._end = int(self._tokenizer.eos_token_id)

    @property
    def output_weight(self) -> torch.Tensor:
        """`(vocabulary, d_model)`: the product of `hidden` with this gives the logits of the next token."""
        weight: torch.Tensor = (self.decoder.embed_tokens if self.output is None else self.output).weight
        return weight

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Return each caption's tokens from the start token to the end token, at most `MAX_TOKENS`."""
        encoded = self._tokenizer(
            list(captions), add_special_tokens=False, truncation=True, max_length=MAX_TOKENS - 2, padding=False
        )
        return [[self._start, *tokens, self._end] for tokens in encoded["input_ids"]]

    def hidden(
        self,
        tokens: torch.Tensor,
        frame_sequences: torch.Tensor,
        frame_mask: torch.Tensor,
        wanted: NDArray[np.bool_],
    ) -> torch.Tensor:
        """Return the decoder's state at the wanted positions.

        Padding after a caption needs no mask, because no earlier position attends to it.

        Shape:
            tokens `(B, L)` int64, frame_sequences `(B, T, D)`, frame_mask `(B, T)` bool, wanted `(B, L)` bool,
            N times True -> `(N, d_model)`.
        """
        step = self._step(tokens, self.project_memory(frame_sequences), frame_mask)
        hidden: torch.Tensor = step.last_hidden_state  # (B, L, d_model)
        return self._scale * hidden.flatten(0, 1).index_select(0, to_device(np.flatnonzero(wanted), tokens.device))

    @torch.inference_mode()
    def write(self, frame_sequences: torch.Tensor, frame_mask: torch.Tensor) -> list[str]:
        """Return the B captions that are likeliest token by token, from `(B, T, D)` and `(B, T)` bool."""
        was_training = self.training
        self.eval()
        memory, cache = self.project_memory(frame_sequences), None
        said = torch.full((len(frame_mask), 1), self._start, device=frame_mask.device)  # (B, 1), grows
        while said.shape[1] < MAX_TOKENS:
            step = self._step(said[:, -1:], memory, frame_mask, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            logits = self._scale * step.last_hidden_state[:, -1] @ self.output_weight.T  # (B, vocabulary)
            said = torch.cat([said, logits.argmax(dim=1, keepdim=True)], dim=1)
            if (said == self._end).any(dim=1).all():
                break
        self.train(was_training)
        captions = [tokens[: (*tokens, self._end).index(self._end)] for tokens in said.tolist()]
        return [str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in captions]

    def _step(self, tokens: torch.Tensor, memory: torch.Tensor, frame_mask: torch.Tensor, **caching: Any) -> Any:
        return self.decoder(
            input_ids=tokens, encoder_hidden_states=memory, encoder_attention_mask=frame_mask, **caching
        )
