"""ConSE: a classifier's frames in the space of a text encoder (Norouzi et al., ICLR 2014), without training.

A video is placed at the mean of its classes' name embeddings, weighted by their probabilities (the paper's
equation 3). Three things differ, each measured on galleries of 244 training videos: the softmax is flatter,
all classes take part rather than the likeliest ten, and names are embedded in several sentences with their
common mean subtracted, since it is the same in all and carries no information.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from svb.extract.backbones.backbone import Classifier
from svb.extract.text_encoders.text_encoder import TextEncoder
from svb.train.heads import masked_mean

# A classifier is too sure of one class for a video that shows several things.
TEMPERATURE = 2.0
PROMPTS = ("a {} is shown", "someone with a {}", "a video of a {}", "there is a {}")


class Conse(nn.Module):
    """Frame features to video embeddings through class names.

    Args:
        weight: `(C, F)`, a classifier's last layer: from F features to the logits of C classes.
        bias: `(C,)` of the same layer.
        class_embeddings: `(C, D)` of the class names, see `embed_class_names`.

    Shape:
        frame_features `(B, T, F)`, frame_mask `(B, T)` bool -> `(B, D)`, L2-normalised.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    class_embeddings: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, class_embeddings: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("class_embeddings", class_embeddings)

    def forward(self, frame_features: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        logits = F.linear(frame_features, self.weight, self.bias)  # (B, T, C)
        probabilities = masked_mean((logits / TEMPERATURE).softmax(dim=-1), frame_mask)  # (B, C)
        return F.normalize(probabilities @ self.class_embeddings, dim=-1)


def embed_class_names(classifier: Classifier, text_encoder: TextEncoder) -> torch.Tensor:
    """Return `(C, D)` embeddings of a classifier's class names: over several sentences, centred, L2-normalised."""
    names = classifier.class_names
    features = torch.from_numpy(
        text_encoder.encode([prompt.format(name) for prompt in PROMPTS for name in names])
    ).view(len(PROMPTS), len(names), -1)
    embeddings = F.normalize(F.normalize(features, dim=-1).sum(dim=0), dim=-1)
    return F.normalize(embeddings - embeddings.mean(dim=0), dim=-1)
