"""T5 encoders through transformers: `t5:<name on a hub>` or `t5:<folder>`.

A caption's features are the mean over its tokens, the end token among them, of the encoder's last hidden states:
Ni et al. (2022, Sentence-T5) found that best. They also train T5 for similarity, which a plain T5 is not.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from svb.extract.text_encoders.text_encoder import TextEncoder

# A batch always has `ROWS` captions, padded to the first of these lengths that holds them: in batches of one shape
# a caption's features are the same to the bit, whatever its neighbours. A single query costs a whole batch, so
# batches are small.
ROWS = 8
LENGTHS = (8, 16, 32, 64, 128)


def absolute_model(model: str) -> str:
    """Return the name on the hub, or a local folder's absolute path."""
    from svb.data.t5 import absolute_t5_name

    return absolute_t5_name(model)


def load(name: str, model: str, device: torch.device) -> TextEncoder:
    """Load the encoder of a T5, T5 v1.1, Flan-T5 or the like: captions to `d_model` features, 768 for a base model.

    Raises:
        As `svb.data.t5.load_t5_with_decoder`.
    """
    import torch

    from svb.data.t5 import load_t5_encoder
    from svb.extract.text_encoders.text_encoder import TextEncoder

    t5 = load_t5_encoder(model)
    network, tokenizer = t5.network.to(device), t5.tokenizer
    padding, feature_size = network.config.pad_token_id, int(network.config.d_model)

    def encode_batch(captions: list[str]) -> torch.Tensor:
        encoded = tokenizer(captions, truncation=True, max_length=LENGTHS[-1], padding=False)["input_ids"]
        of_length = defaultdict(list)
        for position, tokens in enumerate(encoded):
            of_length[next(length for length in LENGTHS if len(tokens) <= length)].append(position)
        features = torch.empty(len(captions), feature_size, device=device)
        for length, positions in of_length.items():
            for begin in range(0, len(positions), ROWS):
                chunk = positions[begin : begin + ROWS]
                features[chunk] = encode_rows([encoded[position] for position in chunk], length)[: len(chunk)]
        return features

    def encode_rows(rows: list[list[int]], length: int) -> torch.Tensor:
        """Return `(ROWS, F)`; rows that are not there repeat the last one."""
        rows = rows + [rows[-1]] * (ROWS - len(rows))
        tokens = torch.full((ROWS, length), padding)
        for row, of_caption in enumerate(rows):
            tokens[row, : len(of_caption)] = torch.tensor(of_caption)
        num_tokens = torch.tensor([len(of_caption) for of_caption in rows], device=device)[:, None]  # (ROWS, 1)
        is_token = torch.arange(length, device=device) < num_tokens  # (ROWS, length)
        hidden = network(input_ids=tokens.to(device), attention_mask=is_token.long()).last_hidden_state
        summed: torch.Tensor = (hidden * is_token[..., None]).sum(dim=1)
        return summed / num_tokens

    def num_tokens(caption: str) -> int:
        return len(tokenizer(caption, truncation=False, padding=False, verbose=False)["input_ids"])

    return TextEncoder(
        name,
        network,
        feature_size=feature_size,
        encode_batch=encode_batch,
        num_tokens=num_tokens,
        max_tokens=LENGTHS[-1],
        tokenizer=tokenizer,
    )
