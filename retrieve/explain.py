"""`svb explain`: from which videos a run rebuilds a caption, with which weights, and with what result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage

from svb.data.caption_features import CaptionFeatures
from svb.data.feature_store import FeatureStore
from svb.data.publish import hash_file
from svb.device import choose_device
from svb.errors import InputError, UsageError
from svb.retrieve.measure.explain_page import Explanation, SupportVideo, write_page
from svb.retrieve.model.embedder import load_matching_text_encoder
from svb.retrieve.model.query_media import embed_video
from svb.retrieve.model.source import OpenedSource, open_source
from svb.retrieve.model.torch_media import TorchMedia
from svb.train.checkpoint import load_checkpoint, load_weights
from svb.train.config import VARIANTS, selection_note
from svb.train.decoders import EmbeddingDecoder
from svb.train.model import RetrievalModel
from svb.train.run import build_model, read_run, read_vocabulary
from svb.train.support_set import entropy, mix, own_mask, support_values, support_weights
from svb.train.training_data import FrameTable, SplitData, load_split, positions_of_splits

# Rows of the heat maps; a page cannot show more.
MATRIX_SIZE = 16
NEAREST_CAPTIONS = 5


def explain(
    run: Path | str,
    caption: str | None = None,
    *,
    video: str | None = None,
    out: Path | None = None,
    k: int = 5,
    support_size: int | None = None,
    store: Path | str | None = None,
    captions: Path | str | None = None,
    checkpoint: str = "best",
    device: str = "auto",
) -> Path:
    """Show the videos from which a run rebuilds a caption, or the content of a video.

    The weights are those of the cross variant. If the query is known to belong to a video, that video takes no
    part.

    Args:
        run: A run.
        caption: The query; either this or `video` is given.
        video: A video file, or the video_id of one in the store.
        out: The folder to write to; by default `explain/` in the run.
        k: Number of support videos to show.
        support_size: Number of training videos to draw as support set; by default the run's batch size, 0 for all.
        store: The run's feature store, if it was moved.
        captions: The run's caption features file, if it was moved.
        checkpoint: `best` or `last`.
        device: `auto`, `cpu`, `cuda:0`, ...

    Returns:
        The page, `out/index.html`.

    Raises:
        UsageError: Both a caption and a video are given, or neither, or a number is out of range.
        InputError: The file is not a video; store, captions or checkpoint are missing; or there are fewer than two
            training videos.
        MismatchError: Store or captions were made with other settings than the run's.
    """
    run, torch_device = Path(run), choose_device(device)
    _check(run, caption, video, k, support_size)
    inputs = open_source(run, device=torch_device, store=store, captions=captions, checkpoint=checkpoint)
    assert inputs.captions is not None
    model, epoch = _load_model(run, checkpoint, torch_device)
    positions = positions_of_splits(inputs.captions, val_fraction=inputs.config.put_aside)
    split = _load(inputs, positions["train"], torch_device)
    if split.num_videos < 2:
        raise InputError(
            f"{split.num_videos} training videos have both features and captions - expected at least 2; name the "
            "captions and the store that the run was trained on"
        )
    embedding, own_video = _embed_query(inputs, model, caption, video, torch_device)
    support = _draw_support(split, inputs.config.batch_size if support_size is None else support_size, own_video)
    with torch.inference_mode():
        embeddings, frame_sequences, frame_mask = _video_side(model, split, support)
        weights = support_weights(
            embedding[None],
            embeddings,
            torch.zeros(1, len(support), dtype=torch.bool, device=torch_device),
            variant="cross",
            temperature=model.support_temperature,
        )  # (1, S)
        mixture = mix(weights, *support_values(frame_sequences, frame_mask, inputs.config.support_values))
        heaviest = weights[0].topk(min(k, len(support)))
        matrices, matrix_captions = _matrices(model, _batch_split(inputs, positions["val"], torch_device) or split)
        explanation = Explanation(
            query=caption if caption is not None else str(video),
            own_video=own_video,
            run=str(run),
            epoch=epoch,
            variant=inputs.config.variant,
            note=selection_note(inputs.config.select_on),
            temperature=float(model.support_temperature),
            support_size=len(support),
            entropy=float(entropy(weights)),
            videos=[
                _support_video(split, inputs.store, int(support[place]), weight)
                for weight, place in zip(heaviest.values.tolist(), heaviest.indices.tolist(), strict=True)
            ],
            written=_write(model, mixture),
            nearest=_nearest_captions(model, mixture, split),
            matrices=matrices,
            matrix_captions=matrix_captions,
        )
    return write_page(explanation, out or run / "explain", inputs.store)


def _check(run: Path, caption: str | None, video: str | None, k: int, support_size: int | None) -> None:
    if (caption is None) == (video is None):
        raise UsageError("expected either a caption or --video - give exactly one of them")
    if k < 1 or (support_size is not None and support_size < 0):
        raise UsageError(f"k is {k} and support_size {support_size} - expected k of at least 1, the other of 0")
    if caption is not None and not caption.strip():
        raise UsageError("the caption is empty - expected some words")
    if (run / "store.json").is_file() or run.is_file():
        raise UsageError(f"{run} is a feature store, which has no support set - name a run of `svb train`")


def _load_model(run: Path, checkpoint: str, device: torch.device) -> tuple[RetrievalModel, int]:
    description = read_run(run)
    loaded = load_checkpoint(run / checkpoint)
    model = build_model(description, with_decoder=True, vocabulary=read_vocabulary(run))
    load_weights(model, loaded.model, run / checkpoint)
    return model.eval().requires_grad_(False).to(device), loaded.epoch


def _load(inputs: OpenedSource, positions: Sequence[int], device: torch.device) -> SplitData:
    assert inputs.captions is not None
    return load_split(
        inputs.store,
        inputs.embedder.backbone,
        inputs.captions,
        positions,
        max_frames=inputs.config.max_frames,
        device=device,
    )


def _batch_split(inputs: OpenedSource, val: Sequence[int], device: torch.device) -> SplitData | None:
    """Return the val split; None if too few of its videos have features to rebuild one from the others."""
    assert inputs.captions is not None
    with_captions = {inputs.captions.table.video_ids[position] for position in val}
    if len(with_captions & set(inputs.store.video_ids)) < 2:
        return None
    return _load(inputs, val, device)


def _embed_query(
    inputs: OpenedSource, model: RetrievalModel, caption: str | None, video: str | None, device: torch.device
) -> tuple[torch.Tensor, str | None]:
    """Return the query's `(D,)` embedding, and the video_id of its own video if that is known."""
    if caption is not None:
        assert inputs.captions is not None
        encoder = load_matching_text_encoder(inputs.captions.settings["text_encoder"], device)
        features = torch.from_numpy(encoder.encode([caption])).to(device)
        with torch.inference_mode():
            return model.text_head(features.float())[0], _video_of(inputs.captions, caption)
    assert video is not None
    if Path(video).is_file():
        embedding = torch.from_numpy(embed_video(Path(video), None, TorchMedia(inputs.embedder, device))).to(device)
        return embedding, _video_in(inputs.store, Path(video))
    if video not in inputs.store.video_ids:
        raise InputError(
            f"{video!r} is neither a video file nor a video_id in {inputs.store.path} - give the path of a file, "
            f"or a video_id such as {inputs.store.video_ids[0]!r}"
        )
    loaded = inputs.store.load(inputs.embedder.backbone, [video])
    frames = FrameTable.of(loaded, inputs.embedder.max_frames, device)
    return torch.from_numpy(inputs.embedder.embed_videos(frames)[0]).to(device), video


def _video_of(captions: CaptionFeatures, caption: str) -> str | None:
    """Return the video that has exactly this caption, if there is only one."""
    owners = {
        video_id
        for video_id, known in zip(captions.table.video_ids, captions.table.captions, strict=True)
        if known == caption
    }
    return owners.pop() if len(owners) == 1 else None


def _video_in(store: FeatureStore, file: Path) -> str | None:
    """Return the video in the store that has the content of this file, if any."""
    content_hash = hash_file(file)
    return next((v for v in store.video_ids if store.records[v].content_hash == content_hash), None)


def _draw_support(split: SplitData, size: int, own_video: str | None) -> torch.Tensor:
    """Return `(S,)` rows of training videos, drawn with a fixed seed."""
    rows = [row for row, video_id in enumerate(split.frames.video_ids) if video_id != own_video]
    drawn = np.random.default_rng(0).permutation(rows)[: size or None]
    return torch.from_numpy(np.sort(drawn)).to(split.caption_video.device)


def _video_side(
    model: RetrievalModel, split: SplitData, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return embeddings `(S, D)`, frame sequences `(S, T, D)` and their mask for some videos."""
    longest = split.frames.longest(rows.cpu().numpy())
    parts = [model.video_head(*split.frames.gather(some, longest)) for some in rows.split(512)]
    return (
        torch.cat([part.video_embeddings for part in parts]),
        torch.cat([part.frame_sequences for part in parts]),
        split.frames.mask(rows),
    )


def _support_video(split: SplitData, store: FeatureStore, row: int, weight: float) -> SupportVideo:
    first = int(torch.searchsorted(split.caption_video, row))
    video_id = split.frames.video_ids[row]
    return SupportVideo(video_id, weight, split.captions[first], Path(store.records[video_id].source_path))


def _write(model: RetrievalModel, mixture: tuple[torch.Tensor, torch.Tensor]) -> str | None:
    if model.decoder is None or isinstance(model.decoder, EmbeddingDecoder):
        return None
    written: list[str] = model.decoder.write(*mixture)
    return written[0]


def _nearest_captions(
    model: RetrievalModel, mixture: tuple[torch.Tensor, torch.Tensor], split: SplitData
) -> list[tuple[str, float]]:
    if not isinstance(model.decoder, EmbeddingDecoder):
        return []
    rebuilt = model.decoder(*mixture)
    cosines = torch.cat(
        [torch.cosine_similarity(rebuilt, some.float()) for some in split.caption_features.split(8192)]
    )
    nearest: dict[str, float] = {}
    for place in cosines.argsort(descending=True).tolist():
        nearest.setdefault(split.captions[place], float(cosines[place]))
        if len(nearest) == NEAREST_CAPTIONS:
            break
    return list(nearest.items())


def _matrices(model: RetrievalModel, split: SplitData) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Return the weights of all variants over one batch, with one caption per video, and these captions."""
    videos = np.sort(np.random.default_rng(0).permutation(split.num_videos)[:MATRIX_SIZE])
    rows = torch.from_numpy(videos).to(split.caption_video.device)
    # Similar videos stand next to each other, so those that share weight show as blocks.
    embeddings, _, _ = _video_side(model, split, rows)
    order = torch.from_numpy(leaves_list(linkage(embeddings.cpu().numpy(), "average")).astype(np.int64))
    rows, embeddings = rows[order.to(rows.device)], embeddings[order.to(rows.device)]
    positions = torch.searchsorted(split.caption_video, rows)  # the first caption of each video
    captions = model.text_head(split.caption_features[positions].float())
    matrices = {
        variant: support_weights(
            captions, embeddings, own_mask(rows, rows), variant=variant, temperature=model.support_temperature
        )
        .cpu()
        .numpy()
        for variant in VARIANTS
        if variant != "none"
    }
    return matrices, [split.captions[position] for position in positions.tolist()]
