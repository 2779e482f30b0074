"""Does it help if a caption weighs a video's frames? `python benchmarks/query_pooling.py features captions.h5`.

A video's embedding is the mean of its frames, whatever is asked. Here it depends on the caption, in four ways:

- `zero-shot`: no training (ConSE, or CLIP). A softmax of the cosines to the caption weighs frames, divided by
  a temperature (Bain et al., *A CLIP-Hitchhiker's Guide to Long Video Retrieval*, 2022);
- `means`: heads that were trained on means, as `svb train` does it, also weighed so when they are measured;
- `weighing`, `learned`: the loss sees the weighed similarities, with temperature 0.1 or one that is learned from 1;
- `cross-attention`: projections of captions and frames give the weights, and another changes the frames. All of it
  starts as the mean (X-Pool, Gorti et al., CVPR 2022, without its multilayer perceptron).

Loss and schedule are those of `svb train`, without cross-captioning. So that a training takes seconds, heads read
256 principal components of the training frames, embeddings have 128 numbers, and there are 15 epochs. The last one
is measured on val. Each row is the mean and the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from svb.data.caption_features import read_caption_features
from svb.data.feature_store import FeatureStore
from svb.extract.text_encoders import load_text_encoder
from svb.retrieve.model.embedder import Conse, zero_shot_embedder
from svb.train.config import TrainConfig
from svb.train.heads import unpack
from svb.train.model import RetrievalModel
from svb.train.retrieval_metrics import ranks_metrics, t2v_ranks, v2t_ranks
from svb.train.training_data import SplitData, load_split, positions_of_splits

TEMPERATURES = (math.inf, 1.0, 0.3, 0.1, 0.05)
METRICS = ("t2v/R@1", "t2v/R@5", "t2v/R@10", "t2v/MedR", "v2t/R@1", "v2t/R@10")
CONFIG = TrainConfig(
    loss="info_nce", variant="none", batch_size=128, epochs=15, learning_rate=1e-3, embedding_size=128
)

NUM_COMPONENTS = 256

# Captions (B, D) and real frames (N, D) -> logits of the frames (B, N), and the frames that are weighed (N, D).
Weighing = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def similarities(
    weighing: Weighing, captions: torch.Tensor, frames: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return the cosines of captions and of the videos as each caption sees them, `(B, V)`.

    No `(B, V, D)` is made: the length of a weighted sum follows from the products of the frames with each other.

    Args:
        weighing: Weighs the frames.
        captions: `(B, D)`.
        frames: `(N, D)` of all videos, one after the other.
        mask: `(V, T)`, True on the N frames.
    """
    real = mask.flatten().nonzero().squeeze(1)
    logits, frames = weighing(captions, frames)
    empty = logits.new_full((len(captions), mask.numel()), -math.inf)
    weights = empty.index_copy(1, real, logits).unflatten(1, mask.shape).softmax(dim=-1)  # (B, V, T)
    dots = torch.zeros_like(empty).index_copy(1, real, captions @ frames.T).unflatten(1, mask.shape)
    padded = unpack(frames, real, mask)  # (V, T, D)
    gram = padded @ padded.transpose(1, 2)  # (V, T, T)
    squared = (torch.bmm(weights.transpose(0, 1), gram).transpose(0, 1) * weights).sum(dim=-1)
    return (weights * dots).sum(dim=-1) * squared.clamp_min(1e-12).rsqrt()


class Softmax(nn.Module):
    """Weights from the cosines themselves."""

    def __init__(self, temperature: float, *, is_learned: bool = False) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=is_learned)

    def forward(self, captions: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.log_scale.exp() * captions @ F.normalize(frames, dim=-1).T, frames


class CrossAttention(nn.Module):
    """Weights from learned projections. At the start all weights are equal and frames stay as they are."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        nn.init.eye_(self.key.weight)
        for layer in (self.query, self.value):
            nn.init.zeros_(layer.weight)
        for layer in (self.query, self.key, self.value):
            nn.init.zeros_(layer.bias)

    def forward(self, captions: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        held = F.layer_norm(frames, frames.shape[-1:])
        # A normalised caption has entries of about 1 / sqrt(D), those of a held frame are about 1.
        return self.query(captions) @ self.key(held).T, frames + self.value(held)


WAYS: dict[str, Callable[[], nn.Module]] = {
    "means": lambda: Softmax(math.inf),
    "weighing": lambda: Softmax(0.1),
    "cross-attention": lambda: CrossAttention(CONFIG.embedding_size),
    "learned": lambda: Softmax(1.0, is_learned=True),
}


def frame_embeddings(model: RetrievalModel, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return each real frame's own embedding, `(N, D)`; their normalised mean is the video head's output."""
    head, real = model.video_head, mask.flatten().nonzero().squeeze(1)
    embeddings: torch.Tensor = head.project_out(head.project_in(features.flatten(0, 1).index_select(0, real)))
    return embeddings


def train(split: SplitData, weighing: nn.Module, seed: int) -> RetrievalModel:
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    sizes = [split.frames.features.shape[1]], split.caption_features.shape[1]
    model = RetrievalModel(CONFIG, *sizes, shared_part=None)
    model.train()
    held = [one for one in [*model.parameters(), *weighing.parameters()] if one.requires_grad]
    groups = [
        {"params": [one for one in held if one.ndim > 1], "weight_decay": CONFIG.weight_decay},
        {"params": [one for one in held if one.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.learning_rate, fused=True)
    captions_of = np.split(np.arange(len(split.captions)), np.cumsum(np.bincount(split.caption_video.numpy()))[:-1])
    steps = math.ceil(split.num_videos / CONFIG.batch_size) * CONFIG.epochs
    warmup = CONFIG.warmup * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup))
        ),
    )
    for _ in range(CONFIG.epochs):
        order = random.permutation(split.num_videos)
        for videos in np.array_split(order, math.ceil(len(order) / CONFIG.batch_size)):
            rows = [int(random.choice(captions_of[video])) for video in videos]
            captions = model.text_head(split.caption_features[rows].float())
            features, mask = split.frames.gather(torch.from_numpy(videos))
            frames = frame_embeddings(model, features, mask)
            logits = model.logit_scale * similarities(weighing, captions, frames, mask)
            own = torch.arange(len(rows))
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            model.limit_scales()
    return model.eval()


@torch.inference_mode()
def measure(
    embed_captions: Callable[[torch.Tensor], torch.Tensor],
    embed_frames: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    weighing: Weighing,
    split: SplitData,
) -> dict[str, float]:
    """Return the metrics of a split, and the CPU-seconds of its similarities as `seconds`."""
    features, mask = split.frames.gather(torch.arange(split.num_videos))
    captions, frames = embed_captions(split.caption_features.float()), embed_frames(features, mask)
    begin = time.process_time()
    similarity = torch.cat([similarities(weighing, part, frames, mask) for part in captions.split(256)]).numpy()
    seconds = time.process_time() - begin
    caption_video = split.caption_video.numpy()
    metrics = ranks_metrics(t2v_ranks(similarity, caption_video), v2t_ranks(similarity, caption_video, "set"))
    return {**metrics, "seconds": seconds}


def show(name: str, found: Sequence[dict[str, float]]) -> None:
    cells = []
    for metric in METRICS:
        values = np.array([one[metric] for one in found])
        cells.append(f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""))
    costs = [np.mean([one[cost] for one in found]) if cost in found[0] else 0 for cost in ("training", "seconds")]
    print(f"| {name} | {' | '.join(cells)} | {costs[0]:.0f} | {costs[1]:.1f} |", flush=True)


def principal_components(train: SplitData) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of the training frames, `(F,)`, and their first directions, `(F, NUM_COMPONENTS)`."""
    rows = train.frames.features.float()
    mean = rows.mean(dim=0)
    directions = torch.linalg.eigh(torch.cov((rows - mean).T)).eigenvectors
    return mean, directions[:, -NUM_COMPONENTS:]


def zero_shot(store: FeatureStore, backbone: str, text_encoder: str, val: SplitData) -> None:
    device = torch.device("cpu")
    embedder = zero_shot_embedder(store.video_settings(backbone), load_text_encoder(text_encoder, device), device)
    head = embedder.video_head

    def embed_frames(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        features = features[mask]
        if not isinstance(head, Conse):
            return F.normalize(features, dim=-1)
        # A video's place is the mean of its frames' probabilities: the mean of the places of its frames.
        logits = F.linear(features, head.weight, head.bias)
        return (logits / 2).softmax(dim=-1) @ head.class_embeddings

    for temperature in TEMPERATURES:
        show(
            f"zero-shot, {name_of(temperature)}",
            [measure(embedder.text_head, embed_frames, Softmax(temperature), val)],
        )


def name_of(temperature: float) -> str:
    return "mean" if math.isinf(temperature) else f"weighed, temperature {temperature:g}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=["zero-shot", *WAYS], choices=["zero-shot", *WAYS])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store, captions = FeatureStore(arguments.store), read_caption_features(arguments.captions)
    backbone = next(iter(store.backbones))
    positions = positions_of_splits(captions, val_fraction=CONFIG.val_fraction)
    splits = {
        split: load_split(
            store, backbone, captions, positions[split], max_frames=CONFIG.max_frames, device=torch.device("cpu")
        )
        for split in ("train", "val")
    }
    print("| | " + " | ".join(METRICS) + " | CPU-seconds of training | of all similarities |")
    print("|---|" + "---|" * (len(METRICS) + 2))
    if "zero-shot" in arguments.ways:
        zero_shot(store, backbone, captions.settings["text_encoder"]["name"], splits["val"])
    mean, directions = principal_components(splits["train"])
    for split, held in splits.items():
        frames = replace(held.frames, features=(held.frames.features.float() - mean) @ directions)
        splits[split] = replace(held, frames=frames)
    trained: dict[str, list[dict[str, float]]] = {}
    for name, make in WAYS.items():
        if name not in arguments.ways:
            continue
        for seed in range(arguments.seeds):
            weighing, begin = make(), time.process_time()
            model = train(splits["train"], weighing, seed)
            seconds = time.process_time() - begin

            def embed_frames(
                features: torch.Tensor, mask: torch.Tensor, model: RetrievalModel = model
            ) -> torch.Tensor:
                return frame_embeddings(model, features, mask)

            found = measure(model.text_head, embed_frames, weighing.eval(), splits["val"])
            trained.setdefault(name, []).append({**found, "training": seconds})
            print(f"seed {seed} of {name}: {found}", file=sys.stderr, flush=True)
            if name == "means":
                for temperature in TEMPERATURES[1:]:
                    at_end = measure(model.text_head, embed_frames, Softmax(temperature), splits["val"])
                    trained.setdefault(f"trained on means, {name_of(temperature)} at the end", []).append(at_end)
        for shown in [row for row in trained if len(trained[row]) == arguments.seeds]:
            show(f"trained: {shown}" if shown in WAYS else shown, trained.pop(shown))


if __name__ == "__main__":
    main()
