"""`svb captions`: a caption table -> frozen text encoder -> a caption features file."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svb.config import canonical_json, require_same
from svb.data.caption_features import CaptionFeatures, read_caption_features, write_caption_features
from svb.data.caption_table import CaptionTable, read_caption_table, split_contents
from svb.data.datasets import read_dataset, with_names_of
from svb.data.feature_store import FeatureStore
from svb.data.publish import one_writer, published_file
from svb.device import choose_device
from svb.errors import InputError, UsageError
from svb.extract.text_encoders import DEFAULT_TEXT_ENCODER, absolute_name, load_text_encoder

if TYPE_CHECKING:
    from svb.extract.text_encoders.text_encoder import TextEncoder

logger = logging.getLogger(__name__)

# Captions in a block, the most that a killed run loses.
BLOCK = 4096


def captions(
    table: Path | str,
    out: Path | str,
    *,
    text_encoder: str = DEFAULT_TEXT_ENCODER,
    device: str = "auto",
    drop_empty: bool = False,
    dataset: str | None = None,
    protocol: str | None = None,
    splits: Collection[str] = (),
    store: Path | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Encode the captions of a table; a caption that appears several times is encoded once.

    Finished blocks are kept beside `out` until it is whole: a killed run continues where it stopped.

    Args:
        table: CSV, JSON lines or Parquet with `video_id, caption` and optionally `caption_id, split`; with
            `dataset` the folder that holds its official annotation files.
        out: The HDF5 file to write.
        text_encoder: `family:model[/weights]`.
        device: `auto`, `cpu`, `cuda:0`, ...
        drop_empty: Leave out rows with an empty caption rather than refuse the table.
        dataset: A name in `svb.data.datasets.DATASETS`.
        protocol: How the data set is divided; by default its first protocol.
        splits: The splits of the protocol to encode; all if there are none here.
        store: A feature store: the videos of the data set are called what they are called there.
        on_progress: Called with how many distinct captions are done, and how many there are.

    Returns:
        `out`.

    Raises:
        InputError: The table, or an annotation file, cannot be used.
        UsageError: The data set has no such protocol or split, or no data set is named.
        MismatchError: `out` holds another table or text encoder.
        StoreError: Another process is writing `out`, or it is damaged.
        ModelUnavailableError: The text encoder's weights cannot be had.
    """
    table, out, text_encoder = Path(table), Path(out), absolute_name(text_encoder)
    read, contents = _read(table, drop_empty, dataset, protocol, splits, store)
    if out.is_dir():
        raise InputError(f"{out} is a folder - name the file to write with -o, such as {out / 'captions.h5'}")
    if _is_done(out, text_encoder, contents):
        return out
    with one_writer(out, "blocks") as blocks:
        if _is_done(out, text_encoder, contents):  # by whoever had the lock until now
            return out
        encoder = load_text_encoder(text_encoder, choose_device(device))
        distinct = list(dict.fromkeys(read.captions))
        features = _encode_in_blocks(encoder, distinct, blocks, on_progress)
        cut = [caption for caption in distinct if encoder.num_tokens(caption) > encoder.max_tokens]
        if cut:
            logger.info(
                f"{len(cut)} captions are longer than the {encoder.max_tokens} tokens that {text_encoder} reads; "
                f"the rest of each was not seen, first of {cut[0][:60]!r}"
            )
        row_of = {caption: row for row, caption in enumerate(distinct)}
        rows = [row_of[caption] for caption in read.captions]
        settings = {"text_encoder": encoder.settings(), **contents}
        write_caption_features(out, CaptionFeatures(read, features[rows], settings))
    return out


def _is_done(out: Path, text_encoder: str, contents: Mapping[str, Any]) -> bool:
    """Return whether `out` is there and holds what it is to hold.

    Raises:
        MismatchError: It holds another table or text encoder.
    """
    if not out.exists():
        return False
    existing = read_caption_features(out)
    settings = existing.settings
    require_same(
        {
            "text_encoder": settings["text_encoder"]["name"],
            "captions": settings["table_hash"],
            "dataset": settings.get("dataset"),
        },
        {"text_encoder": text_encoder, "captions": contents["table_hash"], "dataset": contents.get("dataset")},
        what=f"{out}",
        do_next="Write to another file with -o, or remove this one.",
    )
    logger.info(f"nothing to do: {out} holds these {len(existing.table)} captions")
    return True


def _read(
    table: Path,
    drop_empty: bool,
    dataset: str | None,
    protocol: str | None,
    splits: Collection[str],
    store: Path | str | None,
) -> tuple[CaptionTable, dict[str, Any]]:
    """Return the captions, and what the settings of their file say of them."""
    if dataset is None:
        for name, value in (("protocol", protocol), ("split", splits), ("store", store)):
            if value:
                raise UsageError(f"--{name} goes with --dataset - name the data set, or leave --{name} away")
        read = read_caption_table(table, drop_empty=drop_empty)
        return read, {"table_hash": _hash_table(read), "splits": split_contents(read)}
    if drop_empty:
        raise UsageError("--drop-empty goes with a table - a data set has no empty captions; leave it away")
    official = read_dataset(dataset, table, protocol=protocol, splits=splits)
    if store is not None:
        official = with_names_of(official, FeatureStore(Path(store)).records)
    return official.table, {
        "table_hash": _hash_table(official.table),
        "dataset": {"name": dataset, "protocol": official.protocol},
        "splits": official.splits,
    }


def _encode_in_blocks(
    encoder: TextEncoder, distinct: Sequence[str], folder: Path, on_progress: Callable[[int, int], None]
) -> NDArray[np.float16]:
    features = np.empty((len(distinct), encoder.feature_size), np.float16)
    for begin in range(0, len(distinct), BLOCK):
        block = distinct[begin : begin + BLOCK]
        key = hashlib.sha256(canonical_json([encoder.settings(), list(block)]).encode()).hexdigest()[:16]
        path = folder / f"{key}.npy"
        if not path.exists():
            with published_file(path) as aside, aside.open("wb") as file:
                np.save(file, _as_stored(encoder.encode(block), block))
        features[begin : begin + len(block)] = np.load(path)
        on_progress(begin + len(block), len(distinct))
    return features


def _as_stored(features: NDArray[np.float32], captions: Sequence[str]) -> NDArray[np.float16]:
    with np.errstate(over="ignore", invalid="ignore"):
        stored = features.astype(np.float16)
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1))
    if bad.size:
        raise InputError(
            f"the text encoder gave {captions[bad[0]]!r} a value of {np.abs(features[bad[0]]).max():g} - float16 "
            "holds finite values up to 65504; choose another text encoder"
        )
    return stored


def _hash_table(table: CaptionTable) -> str:
    columns = [table.caption_ids, table.video_ids, table.captions, table.splits]
    if table.groups:  # a table without them keeps the hash that it always had
        columns.append(table.groups)
    return hashlib.sha256(canonical_json(columns).encode()).hexdigest()[:16]
