"""Embeds videos and captions into one space: by a trained run, or zero-shot by a store's backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from svb.config import fingerprint
from svb.data.fusion import parts_of, shared_part
from svb.data.weights import hash_tensors
from svb.errors import InputError, MismatchError, StoreError
from svb.extract.backbones import load_classifier
from svb.extract.backbones.backbone import Classifier
from svb.extract.text_encoders import load_text_encoder
from svb.extract.text_encoders.text_encoder import TextEncoder
from svb.retrieve.model.media_model import TEMPERATURE
from svb.retrieve.stored.manifest import HEADS, heads_file, part_folder
from svb.train.checkpoint import load_checkpoint, load_weights
from svb.train.heads import masked_mean, mean_of_frames
from svb.train.model import embed_in_batches
from svb.train.run import build_model, read_run
from svb.train.training_data import FrameTable

# Zero-shot embeddings are means of any number of frames; this limits a batch's memory.
ZERO_SHOT_MAX_FRAMES = 256
# Weights of a run that only its losses use.
SCALES = ("log_logit_scale", "log_support_temperature")


@dataclass(frozen=True)
class Embedder:
    """Turns features of videos and captions into embeddings.

    Attributes:
        model: The model's description, as stored in an index: `kind`, `video` and `text` settings, weights.
        video_head: `(B, T, F)` float32, `(B, T)` bool -> `(B, D)`, L2-normalised.
        text_head: `(B, F)` float32, on any device -> `(B, D)`, L2-normalised.
        weights: The weights of the heads or of ConSE by name; empty if backbone and text encoder need no others.
    """

    model: dict[str, Any]
    video_head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    text_head: Callable[[torch.Tensor], torch.Tensor]
    weights: dict[str, torch.Tensor]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    @property
    def backbone(self) -> str:
        name: str = self.model["video"]["backbone"]
        return name

    @property
    def text_encoder(self) -> str:
        name: str = self.model["text"]["text_encoder"]["name"]
        return name

    @property
    def max_frames(self) -> int:
        frames: int = self.model["max_frames"]
        return frames

    def embed_videos(self, frames: FrameTable) -> NDArray[np.float32]:
        """Return `(V, D)` float32, L2-normalised."""

        def embed(rows: torch.Tensor) -> torch.Tensor:
            return self.video_head(*frames.gather(rows))

        return embed_in_batches(embed, torch.arange(len(frames.begins), device=frames.begins.device))

    def embed_captions(self, caption_features: torch.Tensor) -> NDArray[np.float32]:
        """Return `(C, D)` float32, L2-normalised, of `(C, F)` features."""
        return embed_in_batches(lambda batch: self.text_head(batch.float()), caption_features)


class OneVideo(nn.Module):
    """A run's video head for one video on the CPU, `(1, T, F)` to `(1, D)`: what is exported."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.head = heads_embedder(embedder.model, embedder.weights, Path("heads"), torch.device("cpu")).video_head

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.head(frames, torch.ones(frames.shape[:2], dtype=torch.bool))


class TorchTower:
    """A text encoder with its text head, for an index without an exported text tower. Loading it takes seconds."""

    def __init__(self, text_encoder: TextEncoder, embedder: Embedder) -> None:
        self._encoder = text_encoder
        self._embedder = embedder

    @property
    def max_tokens(self) -> int:
        return self._encoder.max_tokens

    def num_tokens(self, text: str) -> int:
        """Return how many tokens a text has, those that the encoder adds included."""
        return self._encoder.num_tokens(text)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return `(n, D)` float32, L2-normalised."""
        return self._embedder.embed_captions(torch.from_numpy(self._encoder.encode(list(texts))))


def run_embedder(run: Path, checkpoint: str, device: torch.device) -> Embedder:
    """Load a run's heads from one of its checkpoints, `best` or `last`.

    Raises:
        InputError: The folder is not a run, or lacks the checkpoint.
        StoreError: A file is damaged, or the weights belong to another model.
    """
    description = read_run(run)
    loaded = load_checkpoint(run / checkpoint)
    heads = {name: value for name, value in loaded.model.items() if not name.startswith("decoder.")}
    model = {
        "kind": "run",
        "checkpoint": checkpoint,
        "epoch": loaded.epoch,
        "max_frames": description["config"]["max_frames"],
        **{key: description[key] for key in ("config", "shared_space", "video", "text")},
    }
    return heads_embedder(model, heads, run / checkpoint, device)


def heads_embedder(
    model: dict[str, Any], weights: Mapping[str, torch.Tensor], source: Path, device: torch.device
) -> Embedder:
    """Return the embedder of trained heads, from their description and weights."""
    module = build_model(model)
    # Only training uses the scales, and runs of different versions hold different ones.
    heads = torch.nn.ModuleDict({"video_head": module.video_head, "text_head": module.text_head})
    load_weights(heads, {name: value for name, value in weights.items() if name not in SCALES}, source)
    module.eval().requires_grad_(False).to(device)
    return Embedder(
        {**model, "weights": hash_tensors(weights)},
        lambda features, mask: module.video_head(features, mask).video_embeddings,
        lambda features: module.text_head(features.to(device)),
        dict(weights),
    )


def index_embedder(
    folder: Path,
    manifest: Mapping[str, Any],
    device: torch.device,
    text_encoder: Callable[[], TextEncoder] | None = None,
) -> Embedder:
    """Return the embedder that an index was made with; neither backbone nor text encoder is loaded for it.

    Only an index that was made without its class names' embeddings needs the text encoder.

    Args:
        folder: The index's.
        manifest: The index's manifest.
        device: Where to compute.
        text_encoder: Returns the queries' encoder, if the caller may have loaded it.

    Raises:
        StoreError: The heads' file is damaged.
        MismatchError: The weights here differ from those that made the index.
    """
    model = manifest["model"]
    weights = load_heads(folder, manifest)
    if model["kind"] == "run":
        path = part_folder(folder, "heads", manifest["heads"][0]) / HEADS
        embedder = heads_embedder(model, weights, path, device)
    elif model["kind"] == "zero-shot CLIP":
        embedder = Embedder(model, mean_of_frames, _normalise, {})
    elif weights:
        embedder = _conse_embedder(model, weights, device)
    else:
        settings = model["text"]["text_encoder"]
        encoder = text_encoder() if text_encoder else load_matching_text_encoder(settings, device)
        embedder = zero_shot_embedder(model["video"], encoder, device)
    if embedder.fingerprint != manifest["model_fingerprint"]:
        raise MismatchError(
            f"{folder} was made with model {manifest['model_fingerprint']}, not {embedder.fingerprint} - "
            "install the package versions that made it, or make the index again with `svb index --rebuild`"
        )
    return embedder


def load_heads(folder: Path, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return `Embedder.weights` of an index by name; empty if it keeps none.

    Raises:
        StoreError: The file's hash is not that of the manifest.
    """
    path = heads_file(folder, manifest)
    if path is None:
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{path} is damaged ({error}) - restore it, or make the index again with `svb index --rebuild`"
        ) from error


def zero_shot_embedder(
    video: Mapping[str, Any],
    text_encoder: TextEncoder,
    device: torch.device,
    made_before: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]] = lambda model: {},
) -> Embedder:
    """Return the embedder of a backbone without any training.

    A CLIP backbone with its own text tower averages its frames; a classifier with any text encoder places
    its frames among its class names (ConSE).

    Args:
        video: Settings of the backbone and its rows, as `FeatureStore.video_settings` gives them.
        text_encoder: The queries' encoder.
        device: Where to compute.
        made_before: Returns the weights of an earlier embedder of the same model, which saves embedding a thousand
            class names again; empty if there is none.

    Raises:
        InputError: The backbone is neither, is fused of several, or has imported features.
    """
    require_zero_shot(video)
    backbone: str = video["backbone"]
    model = {
        "max_frames": ZERO_SHOT_MAX_FRAMES,
        "video": dict(video),
        "text": {"text_encoder": text_encoder.settings()},
    }
    if shared_part(video, text_encoder.settings()) is not None:
        return Embedder({"kind": "zero-shot CLIP", **model}, mean_of_frames, _normalise, {})
    model = {"kind": "zero-shot ConSE", **model}
    if weights := made_before(model):
        return _conse_embedder(model, weights, device)
    classifier = load_classifier(backbone)
    if classifier is None:
        raise InputError(
            f"{backbone} with {text_encoder.name} cannot be searched without training: they share no space and "
            "the backbone has no named classes - train heads with `svb train`, or use a CLIP backbone with its "
            "own text tower"
        )
    weights = {
        "weight": torch.from_numpy(classifier.weight),
        "bias": torch.from_numpy(classifier.bias),
        "class_embeddings": embed_class_names(classifier, text_encoder),
    }
    return _conse_embedder(model, weights, device)


def _conse_embedder(model: dict[str, Any], weights: Mapping[str, torch.Tensor], device: torch.device) -> Embedder:
    held = {name: weights[name].contiguous() for name in ("weight", "bias", "class_embeddings")}
    return Embedder(model, Conse(**held).to(device), _normalise, held)


def require_zero_shot(video: Mapping[str, Any]) -> None:
    """Refuse fused backbones and imported features: only trained heads bring them into one space with captions.

    Raises:
        InputError: The backbone is one of them.
    """
    parts = parts_of(video)
    if _imported(video):
        raise InputError(
            f"the features of {video['backbone']} were imported, and we do not know which weights made them: they "
            "cannot be searched without training - train heads with `svb train`, or extract with `svb extract`"
        )
    if len(parts) > 1:
        raise InputError(
            f"{video['backbone']} is fused of several backbones and cannot be searched without training - train "
            f"heads with `svb train`, or name one of {', '.join(parts)}"
        )


def load_matching_text_encoder(settings: Mapping[str, Any], device: torch.device) -> TextEncoder:
    """Load the text encoder that made some features.

    Raises:
        MismatchError: The weights found under its name differ.
    """
    encoder = load_text_encoder(settings["name"], device)
    if encoder.weights_hash != settings["weights_hash"]:
        raise MismatchError(
            f"{settings['name']} has weights {encoder.weights_hash} here, but {settings['weights_hash']} made the "
            "features - install the package versions that made them, or make captions and index again"
        )
    return encoder


def _imported(video: Mapping[str, Any]) -> bool:
    return any(settings.get("imported", False) for settings in parts_of(video).values())


def _normalise(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features, dim=-1)


# --- ConSE

PROMPTS = ("a {} is shown", "someone with a {}", "a video of a {}", "there is a {}")


class Conse(nn.Module):
    """ConSE: a classifier's frames in the space of a text encoder (Norouzi et al., ICLR 2014), without training.

    A video is placed at the mean of its classes' name embeddings, weighted by their probabilities (the paper's
    equation 3). Three things differ, each measured on galleries of 244 training videos: the softmax is flatter,
    all classes take part rather than the likeliest ten, and names are embedded in several sentences with their
    common mean subtracted, since it is the same in all and carries no information.

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
