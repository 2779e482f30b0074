"""`svb index`: a run or a store -> embeddings of every video and moment -> an index folder.

manifest.json     the commit point, written last: model, segments, captions, each with its hashes
segments/<key>/   immutable arrays, see `svb.retrieve.segment`
captions/<key>/   captions.json and caption_embeddings.npy (C, D) float16: what a video query is answered with
heads/<key>/      heads.safetensors of a run
cache/            FAISS files, rebuilt when they are not there
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from svb.config import canonical_json
from svb.data.description import publish_description, read_description
from svb.data.publish import hash_file, published_folder, remove_leftovers
from svb.device import choose_device
from svb.errors import InputError, UsageError
from svb.retrieve.inputs import Inputs, open_inputs
from svb.retrieve.segment import MomentWindows, embed_segment, write_segment

# A frame is hardly shown shorter; a stride of next to nothing would make moments without end.
MIN_STRIDE_SECONDS = 0.01
PARTS = ("segments", "captions", "heads")
_KEY = re.compile(r"[0-9a-f]{16}")


def index(
    source: Path | str,
    out: Path | str,
    *,
    store: Path | str | None = None,
    captions: Path | str | None = None,
    backbone: str | None = None,
    text_encoder: str | None = None,
    checkpoint: str | None = None,
    moment_seconds: float = 4.0,
    moment_stride_seconds: float | None = None,
    device: str = "auto",
    on_message: Callable[[str], None] = lambda message: None,
) -> Path:
    """Embed all videos and moments of a store, with a run's heads or zero-shot.

    An index that is there already is replaced in one step; a search sees the old or the new one.

    Args:
        source: A run, or a feature store to be searched without training.
        out: The index's folder.
        store: A run's feature store, where it is not where the run found it.
        captions: Whose captions answer a video query; a run's own where not given.
        backbone: Of a store that holds several.
        text_encoder: Of a zero-shot search.
        checkpoint: Of a run, `best` or `last`; best where not given.
        moment_seconds: Length of a moment.
        moment_stride_seconds: From one moment to the next; half a moment where not given.
        device: `auto`, `cpu`, `cuda:0`, ...
        on_message: Called with a line that the user should see.

    Returns:
        `out`.

    Raises:
        InputError: The store has no usable video.
        UsageError: A moment has no length.
        MismatchError: Store or captions were made with other settings than the run's.
    """
    if not (math.isfinite(moment_seconds) and moment_seconds > 0):
        raise UsageError(f"moment_seconds is {moment_seconds} - expected a number above 0")
    moment_stride_seconds = moment_seconds / 2 if moment_stride_seconds is None else moment_stride_seconds
    if not MIN_STRIDE_SECONDS <= moment_stride_seconds <= moment_seconds:
        raise UsageError(
            f"moment_stride_seconds is {moment_stride_seconds} - expected {MIN_STRIDE_SECONDS} to a moment's "
            f"{moment_seconds:g} s: more would leave frames in no moment"
        )
    out, torch_device = Path(out), choose_device(device)
    inputs = open_inputs(
        Path(source),
        device=torch_device,
        store=store,
        captions=captions,
        backbone=backbone,
        text_encoder=text_encoder,
        checkpoint=checkpoint,
    )
    if not inputs.store.video_ids:
        raise InputError(f"{inputs.store.path} has no video with features - `svb info --failures` tells why")
    windows = MomentWindows(moment_seconds, moment_stride_seconds)
    segment = embed_segment(inputs.store, inputs.embedder, windows, torch_device)
    heads = inputs.embedder.weights
    parts = {
        "segments": [_publish_part(out, "segments", lambda folder: write_segment(folder, segment))],
        "captions": [],
        "heads": [],
    }
    if inputs.captions is not None:
        parts["captions"].append(_publish_part(out, "captions", lambda folder: _write_captions(folder, inputs)))
    if heads:
        parts["heads"].append(
            _publish_part(out, "heads", lambda folder: save_file(heads, folder / "heads.safetensors"))
        )
    manifest = {
        "format": "svb index",
        "model": inputs.embedder.model,
        "model_fingerprint": inputs.embedder.fingerprint,
        "moments": {"seconds": moment_seconds, "stride_seconds": moment_stride_seconds},
        "videos": len(segment.videos),
        "moments_total": len(segment.moment_seconds),
        **parts,
    }
    publish_description(out / "manifest.json", manifest)
    _remove_unnamed(out, manifest)
    on_message(
        f"{out}: {len(segment.videos)} videos, {len(segment.moment_seconds)} moments of {moment_seconds:g} s, "
        f"{inputs.embedder.model['kind']}"
    )
    return out


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return an index's manifest; errors as `svb.data.description.read_description`."""
    return read_description(folder / "manifest.json", kind="an index", make=f"svb index -o {folder}")


def verify_index(folder: Path) -> list[str]:
    """Return what is wrong with an index's files, a line each; empty when all hashes agree."""
    manifest = read_manifest(folder)
    problems = []
    for part in PARTS:
        for entry in manifest[part]:
            for name, expected in entry["files"].items():
                path = folder / part / entry["key"] / name
                if not path.is_file():
                    problems.append(f"{path} is missing")
                elif hash_file(path) != expected:
                    problems.append(f"{path} is not what was written")
    return problems


def _publish_part(out: Path, part: str, write: Callable[[Path], None]) -> dict[str, Any]:
    """Write a part's files under a name made of their content, and return its entry in the manifest."""
    (out / part).mkdir(parents=True, exist_ok=True)
    building = out / part / "building"
    with published_folder(building) as aside:
        write(aside)
    files = {path.name: hash_file(path) for path in sorted(building.iterdir())}
    key = hashlib.sha256(canonical_json(files).encode()).hexdigest()[:16]
    final = out / part / key
    if final.exists() and not _is_damaged(final, files):
        shutil.rmtree(building)
    else:
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
    return {"key": key, "files": files}


def _is_damaged(folder: Path, files: dict[str, str]) -> bool:
    return any(not (folder / name).is_file() or hash_file(folder / name) != files[name] for name in files)


def _write_captions(folder: Path, inputs: Inputs) -> None:
    import torch

    assert inputs.captions is not None
    table = inputs.captions.table
    first = {caption: position for position, caption in reversed(list(enumerate(table.captions)))}
    positions = sorted(first.values())
    features = torch.from_numpy(inputs.captions.features[positions])
    np.save(folder / "caption_embeddings.npy", inputs.embedder.embed_captions(features).astype(np.float16))
    captions = [{"caption": table.captions[p], "video_id": table.video_ids[p]} for p in positions]
    (folder / "captions.json").write_text(json.dumps(captions, ensure_ascii=False), "utf-8")


def _remove_unnamed(out: Path, manifest: dict[str, Any]) -> None:
    for part in PARTS:
        named = {entry["key"] for entry in manifest[part]}
        if (out / part).is_dir():
            remove_leftovers(out / part)
            for path in (out / part).iterdir():
                # Only what is named as parts are: the folder may have held other things before.
                if path.name not in named and _KEY.fullmatch(path.name):
                    shutil.rmtree(path)
