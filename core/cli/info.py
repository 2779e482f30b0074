"""`svb info` and `svb verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from svb.cli.output import print_json, print_table, say
from svb.errors import InputError, StoreError


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--failures", is_flag=True, help="List the videos of a store that did not end as ok, and why.")
@click.option("--all", "everything", is_flag=True, help="Print every value that is stored, one a line.")
@click.option("--json", "as_json", is_flag=True, help="Print every value that is stored as JSON.")
@click.option(
    "--card",
    type=click.Path(path_type=Path),
    metavar="FILE.md",
    help="Write a page about a run: options, data hashes, selection, metrics, commands.",
)
def info(path: Path, failures: bool, everything: bool, as_json: bool, card: Path | None) -> None:
    """Say what PATH holds: a feature store, a caption features file, a run or an index.

    \b
    svb info features/
    svb info features/ --failures
    svb info runs/x --json
    svb info runs/x --card card.md
    """
    kind = _kind(path)
    if card is not None:
        if kind != "run":
            raise InputError(f"{path} is a {kind} - --card goes with a run")
        _write_card(path, card)
        return
    if failures:
        if kind != "feature store":
            raise InputError(f"{path} is a {kind} - --failures goes with a feature store")
        _print_failures(path, as_json)
        return
    held = {"path": str(path), "kind": kind, **_DESCRIBE[kind](path)}
    if as_json:
        print_json(held)
    elif everything:
        for name, value in _flat(held):
            click.echo(f"{name}: {value}")
    else:
        _print_summary(path, kind, held)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--recompute", type=int, help="Extract or embed this many videos again, and compare.")
@click.option("--device", default="auto", show_default=True, help="Device to recompute on: auto, cpu, cuda:0, ...")
def verify(path: Path, recompute: int | None, device: str) -> None:
    """Check that PATH is whole: a feature store, a caption features file, a run or an index.

    Exits with status 1 and prints every problem if it is not.

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
        raise StoreError(f"{path} has {len(problems)} problems - restore what is damaged, or make it again")
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
    raise InputError(f"{path} was not written by svb - expected a feature store, captions file, run or index")


def _print_failures(path: Path, as_json: bool) -> None:
    from svb.data.feature_store import FeatureStore

    records = [record for record in FeatureStore(path).records.values() if record.status != "ok"]
    if as_json:
        names = ("video_id", "status", "error", "source_path", "tries", "elapsed_seconds")
        print_json([{name: getattr(record, name) for name in names} for record in records])
    elif records:
        rows = [[r.status, str(r.tries), f"{r.elapsed_seconds:.1f}", repr(r.video_id), r.error] for r in records]
        print_table(["status", "tries", "seconds", "video", "error"], rows)
    else:
        say("every video ended as ok")


def _write_card(run: Path, card: Path) -> None:
    from svb.cli.run_card import run_card
    from svb.data.publish import published_file

    text = run_card(run)
    with published_file(card) as aside:
        aside.write_text(text, "utf-8")
    click.echo(card)


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
    from svb.data.description import read_description
    from svb.train.config import selection_note

    description = read_description(path / "config.json", kind="a run", make=f"svb train -o {path}")
    note = selection_note(description["config"].get("select_on", "val"))
    checkpoints = {}
    for name in ("best", "last"):
        if (path / name).is_dir():  # its JSON says what is printed; the weights would need torch
            held = read_description(path / name / "checkpoint.json", kind="a whole checkpoint", make="svb train")
            checkpoints[name] = {"epoch": held["epoch"], **held["metrics"]}
    stamp = {"note": note} if note else {}
    return {
        **stamp,
        **{key: description[key] for key in ("config", "data", "video", "text", "paths")},
        "provenance": description.get("provenance", {}),
        **checkpoints,
    }


def _describe_index(path: Path) -> dict[str, Any]:
    from svb.errors import StoreError
    from svb.retrieve.stored.ivf_file import read_decision
    from svb.retrieve.stored.manifest import describe_index

    held = describe_index(path)
    try:
        decision = read_decision(path) if held["vectors"] is None else None
    except StoreError as error:  # it is a cache, which the next `svb index` makes again
        return {**held, "scan": str(error)}
    told = ["rows", "exact_seconds", "budget_seconds", "reason"]
    told += ["nlist", "nprobe", "seconds", "recall", "recall_videos"]  # these are there if it is approximate
    return {**held, "scan": decision and {name: decision[name] for name in told if name in decision}}


def _verify_store(path: Path) -> list[str]:
    from svb.data.feature_store import FeatureStore, verify_store
    from svb.extract.decode.options import words_of_older_reader

    problems = verify_store(path)
    if not problems and (words := words_of_older_reader(path, FeatureStore(path).description)):
        say(words)
    return problems


def _verify_captions(path: Path) -> list[str]:
    from svb.data.caption_features import verify_caption_features

    return verify_caption_features(path)


def _verify_run(path: Path) -> list[str]:
    from svb.train.checkpoint import load_checkpoint

    held = _describe_run(path)
    missing = [name for name in ("best", "last") if name not in held]
    for name in ("best", "last"):
        if name in held:
            load_checkpoint(path / name)  # reads every file against its hash
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


def _print_summary(path: Path, kind: str, held: dict[str, Any]) -> None:
    """Print what a person wants to know first, and the command to go on with."""
    lines, next_steps = _SUMMARIES[kind](path, held)
    click.echo(f"{path}: {'an' if kind[0] in 'aeiou' else 'a'} {kind}")
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"  {name.ljust(width)}  {value}".rstrip())
    click.echo()
    for step in next_steps:
        click.echo(f"next: {step}")
    click.echo(f"more: svb info {path} --all")


Summary = tuple[list[tuple[str, str]], list[str]]


def _summary_of_store(path: Path, held: dict[str, Any]) -> Summary:
    videos: dict[str, int] = held["videos"]
    lines = [("videos", _counts(videos))]
    for name, backbone in held["backbones"].items():
        size, precision = backbone["feature_size"], backbone.get("precision", "")
        lines.append((name, f"{held['rows'][name]} rows of {size} numbers, {precision}"))
    lines.append(("frames", _pairs(held["sampling"])))
    lines.append(("decoder", f"{held['decoder']['name']} {held['decoder']['version']}"))
    lines += _device(held["provenance"])
    lines.append(("fingerprint", held["fingerprint"]))
    steps = [f"svb train {path} captions.h5"] if set(videos) & {"ok", "partial"} else []
    if set(videos) - {"ok"}:
        steps.append(f"svb info {path} --failures")
    return lines, steps


def _summary_of_captions(path: Path, held: dict[str, Any]) -> Summary:
    encoder = held["text_encoder"]
    lines = [("captions", f"{held['captions']} of {held['videos']} videos")]
    if dataset := held.get("dataset"):
        lines.append(("data set", f"{dataset['name']}, protocol {dataset['protocol']}"))
    for split, count in held["splits"].items():
        lines.append((split, _pairs(count) if isinstance(count, dict) else f"{count} captions"))
    lines.append(("text encoder", encoder["name"]))
    lines.append(("features", f"{encoder['feature_size']} numbers, from at most {encoder['max_tokens']} tokens"))
    return lines, [f"svb train features/ {path}"]


def _summary_of_run(path: Path, held: dict[str, Any]) -> Summary:
    config, video, text = held["config"], held["video"], held["text"]
    lines = [("note", held["note"])] if "note" in held else []
    lines += [("videos by", video["backbone"]), ("captions by", text["text_encoder"]["name"])]
    lines.append(
        ("model", f"variant {config['variant']}, loss {config['loss']}, {config['embedding_size']} numbers")
    )
    for split, data in held["data"].items():
        if data:
            lines.append((split, f"{data['videos']} videos, {data['captions']} captions"))
    for name in ("best", "last"):
        if name in held:
            shown = {key: value for key, value in held[name].items() if key.endswith(("R@1", "R@10", "MedR"))}
            lines.append((name, f"epoch {held[name]['epoch']} of {config['epochs']}  {_pairs(shown)}".rstrip()))
    lines += [*_device(held["provenance"]), *held["paths"].items()]
    return lines, [f"svb evaluate {path}", f"svb index {path} -o index/"]


def _summary_of_index(path: Path, held: dict[str, Any]) -> Summary:
    moments, model = held["moments"], held["model"]
    lines = [("videos", f"{held['videos']}, and {held['deleted']['videos']} that were deleted")]
    if moments:
        every = f"{moments['seconds']:g} s, every {moments['stride_seconds']:g} s"
        lines.append(("windows", f"{held['moments_total']} of {every}"))
    lines.append(("embeddings", f"{held['embedding_size']} numbers, in {held['segments']} segments"))
    epoch = f", checkpoint {model['checkpoint']}, epoch {model['epoch']}" if "checkpoint" in model else ""
    lines.append(("model", f"{model['kind']}{epoch}"))
    if "video" in model:
        lines.append(("videos by", model["video"]["backbone"]))
    if "text_encoder" in (model.get("text") or {}):
        lines.append(("captions by", model["text"]["text_encoder"]["name"]))
    if held["captions"]:
        lines.append(("captions", ", ".join(f"{count} in {name}" for name, count in held["captions"].items())))
    if (speech := held["speech"]) and speech["cues"]:
        languages = f", in {', '.join(speech['languages'])}" if speech["languages"] else ""
        lines.append(("speech", f"{speech['cues']} lines that are said, in {speech['windows']} windows{languages}"))
    lines += _confidences(held["confidence"])
    if held["metadata"]:
        lines.append(("metadata", ", ".join(held["metadata"])))
    scan = held["scan"]
    if isinstance(scan, dict):
        lines.append(("search", f"approximate, {scan['nlist']} lists" if "nlist" in scan else "exact"))
    lines.append(("store", held["store"]))
    return lines, [f'svb search "a dog runs" --index {path}', f"svb serve --index {path}"]


def _confidences(calibration: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return a line for each confidence that says what it was measured to mean, or one that says why none does."""
    from svb.retrieve.stored.calibration import meanings_of

    if calibration is None:
        return [("confidence", "not measured: an older version made it - run `svb index` on it again")]
    if not calibration:
        return [
            ("confidence", "not measured: run `svb index` on it again, which needs a video and the text encoder")
        ]
    meanings = meanings_of({"confidence": [calibration]}).items()
    return [("" if row else "confidence", f"{level}: {meaning}") for row, (level, meaning) in enumerate(meanings)]


_SUMMARIES: dict[str, Callable[[Path, dict[str, Any]], Summary]] = {
    "feature store": _summary_of_store,
    "caption features file": _summary_of_captions,
    "run": _summary_of_run,
    "index": _summary_of_index,
}


def _device(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the line of the device that made it, none where nothing is known of it."""
    told = [
        provenance.get("device"),
        provenance.get("gpu"),
        provenance.get("driver") and f"driver {provenance['driver']}",
    ]
    return [("device", ", ".join(part for part in told if part))] if told[0] else []


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _pairs(held: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in held.items()
    )
