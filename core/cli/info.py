"""`svb info` and `svb verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from svb.cli.output import print_json, print_table, say
from svb.errors import InputError, StoreError


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--failures", is_flag=True, help="List the videos of a store that did not end as ok, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(path: Path, failures: bool, as_json: bool) -> None:
    """Say what PATH holds: a feature store, a caption features file, a run or an index.

    \b
    svb info features/
    svb info features/ --failures
    """
    kind = _kind(path)
    if failures:
        if kind != "feature store":
            raise InputError(f"{path} is a {kind} - --failures goes with a feature store")
        _print_failures(path, as_json)
        return
    held = {"path": str(path), "kind": kind, **_DESCRIBE[kind](path)}
    if as_json:
        print_json(held)
    else:
        for name, value in _flat(held):
            click.echo(f"{name}: {value}")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--recompute",
    type=int,
    help="Make so many videos of a feature store or an index again, and compare: extract them, or embed them.",
)
@click.option("--device", default="auto", show_default=True, help="Where to recompute: auto, cpu, cuda:0, ...")
def verify(path: Path, recompute: int | None, device: str) -> None:
    """Check that PATH is whole: a feature store, a caption features file, a run or an index.

    Exits with 1 and says what is wrong where something is.

    \b
    svb verify features/
    svb verify features/ --recompute 5
    svb verify index/ --recompute 5
    """
    kind = _kind(path)
    if recompute is not None and kind not in _RECOMPUTE:
        raise InputError(f"{path} is a {kind} - --recompute goes with a feature store or an index")
    problems = _VERIFY[kind](path)
    if recompute is not None and not problems:
        problems = _RECOMPUTE[kind](path, recompute, device)
    for problem in problems:
        click.echo(problem)
    if problems:
        raise StoreError(f"{path}: {len(problems)} problems - what is damaged must be restored or made again")
    click.echo(f"{path}: a whole {kind}")


def _kind(path: Path) -> str:
    for kind, mark in (("feature store", "store.json"), ("run", "config.json"), ("index", "manifest.json")):
        if (path / mark).is_file():
            return kind
    if path.is_file():
        import h5py

        if not h5py.is_hdf5(path):
            raise InputError(f"{path} is not HDF5 - expected something that svb wrote")
        with h5py.File(path, "r") as file:
            return "feature store" if "videos" in file else "caption features file"
    raise InputError(f"{path} is nothing that svb wrote - expected a store, captions file, run or index")


def _print_failures(path: Path, as_json: bool) -> None:
    from svb.data.feature_store import FeatureStore

    records = [record for record in FeatureStore(path).records.values() if record.status != "ok"]
    if as_json:
        print_json(
            [
                {
                    **{"video_id": r.video_id, "status": r.status, "error": r.error, "source_path": r.source_path},
                    **{"tries": r.tries, "elapsed_seconds": r.elapsed_seconds},
                }
                for r in records
            ]
        )
    elif records:
        rows = [[r.status, str(r.tries), f"{r.elapsed_seconds:.1f}", repr(r.video_id), r.error] for r in records]
        print_table(["status", "tries", "seconds", "video", "error"], rows)
    else:
        say("every video ended as ok")


def _describe_store(path: Path) -> dict[str, Any]:
    from svb.data.feature_store import FeatureStore

    store = FeatureStore(path)
    rows = {name: sum(int(shard.offsets(name)[-1]) for shard in store.shards) for name in store.backbones}
    return {
        "fingerprint": store.fingerprint,
        "videos": dict(store.status_counts()),
        "rows": rows,
        "shards": len(store.shards),
        **store.settings,
        "provenance": store.description["provenance"],
    }


def _describe_captions(path: Path) -> dict[str, Any]:
    from collections import Counter

    from svb.data.caption_features import read_caption_features

    captions = read_caption_features(path)
    return {
        "captions": len(captions.table),
        "videos": len(set(captions.table.video_ids)),
        "splits": dict(Counter(captions.table.splits)),
        **captions.settings,
    }


def _describe_run(path: Path) -> dict[str, Any]:
    from svb.train.checkpoint import load_checkpoint
    from svb.train.config import selection_note
    from svb.train.run import read_run

    description = read_run(path)
    note = selection_note(description["config"].get("select_on", "val"))
    held = {name: load_checkpoint(path / name) for name in ("best", "last") if (path / name).is_dir()}
    checkpoints = {name: {"epoch": c.epoch, **c.metrics} for name, c in held.items()}
    stamp = {"note": note} if note else {}
    return {
        **stamp,
        **{key: description[key] for key in ("config", "data", "video", "text", "paths")},
        **checkpoints,
    }


def _describe_index(path: Path) -> dict[str, Any]:
    from svb.errors import StoreError
    from svb.retrieve.stored.ivf_file import read_decision
    from svb.retrieve.stored.manifest import describe_index

    held = describe_index(path)
    try:
        decision = read_decision(path) if held["vectors"] is None else None
    except StoreError as error:  # of a cache, which the next `svb index` makes again
        return {**held, "scan": str(error)}
    told = ["rows", "exact_seconds", "budget_seconds", "reason"]
    told += ["nlist", "nprobe", "seconds", "recall", "recall_videos"]  # of an approximate index
    return {**held, "scan": decision and {name: decision[name] for name in told if name in decision}}


def _verify_store(path: Path) -> list[str]:
    from svb.data.feature_store import verify_store

    return verify_store(path)


def _verify_captions(path: Path) -> list[str]:
    from svb.data.caption_features import verify_caption_features

    return verify_caption_features(path)


def _verify_run(path: Path) -> list[str]:
    held = _describe_run(path)  # reads every file against its hash
    missing = [name for name in ("best", "last") if name not in held]
    return [f"{path / name} is missing: the training has not got that far, or it was removed" for name in missing]


def _verify_index(path: Path) -> list[str]:
    from svb.retrieve.indexing.verify_index import verify_index

    return verify_index(path)


def _extract_again(path: Path, num_videos: int, device: str) -> list[str]:
    from svb.extract.recompute import recompute

    return recompute(path, num_videos, device=device)


def _embed_again(path: Path, num_videos: int, device: str) -> list[str]:
    from svb.retrieve.indexing.verify_index import recompute_index

    return recompute_index(path, num_videos, device=device)


_DESCRIBE = {
    "feature store": _describe_store,
    "caption features file": _describe_captions,
    "run": _describe_run,
    "index": _describe_index,
}
_VERIFY = {
    "feature store": _verify_store,
    "caption features file": _verify_captions,
    "run": _verify_run,
    "index": _verify_index,
}
_RECOMPUTE = {"feature store": _extract_again, "index": _embed_again}


def _flat(held: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in held.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", f"{value:g}" if isinstance(value, float) else str(value)
