"""ConSE: a classifier's frames in the space of a text encoder (Norouzi et al., ICLR 2014), without training.

A frame is placed at the mean of its likeliest classes' name embeddings, weighted by their probabilities.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from svb.extract.backbones.backbone import Classifier
from svb.extract.text_encoders.text_encoder import TextEncoder

# T of the paper's equation 3, whose experiments use 1, 10 and 1,000.
TOP_CLASSES = 10


class Conse(nn.Module):
    """Frame features to video embeddings through class names.

    Args:
        classifier: From F features to the logits of C classes.
        class_embeddings: `(C, D)` text features of the class names.

    Shape:
        frame_features `(B, T, F)`, frame_mask `(B, T)` bool -> `(B, D)`, L2-normalised.
    """

    def __init__(self, classifier: Classifier, class_embeddings: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(classifier.weight))
        self.register_buffer("bias", torch.from_numpy(classifier.bias))
        self.register_buffer("class_embeddings", F.normalize(class_embeddings, dim=-1))

    def forward(self, frame_features: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        probabilities = F.linear(frame_features, self.weight, self.bias).softmax(dim=-1)  # (B, T, C)
        probabilities = probabilities * frame_mask[..., None]
        video = probabilities.sum(dim=1) / frame_mask.sum(dim=1, keepdim=True)  # (B, C)
        top = video.topk(TOP_CLASSES, dim=-1)
        weights = top.values / top.values.sum(dim=-1, keepdim=True)
        placed = torch.einsum("bk,bkd->bd", weights, self.class_embeddings[top.indices])
        return F.normalize(placed, dim=-1)


def class_name_features(classifier: Classifier, text_encoder: TextEncoder) -> torch.Tensor:
    """Return the `(C, D)` text features of a classifier's class names."""
    return torch.from_numpy(text_encoder.encode(classifier.class_names))
