"""MSR-VTT (Xu et al., CVPR 2016): 10,000 clips with 20 captions each.

Protocols: `full` is the official division. `1k-A` (Yu et al., "JSFusion", ECCV 2018) tests on 1,000 clips of the
official test split with one given caption each and trains on the 9,000 others; `1k-A-7k` trains on the official
train and val splits alone. Neither 1k-A protocol has a val split: training holds out some of the training videos
to choose a checkpoint, never test queries.
"""

from __future__ import annotations

from collections.abc import Sequence

from svb.data.datasets.official import Annotations, Document, KnownSplit, OfficialFile, select

# MSRVTT_data.json has the captions of both official files in the same form.
TRAIN_VAL = OfficialFile(
    ("train_val_videodatainfo.json", "MSRVTT_data.json"),
    "in train_val_annotation.zip, which Microsoft Research published for its MSR Video to Language Challenge",
)
TEST = OfficialFile(
    ("test_videodatainfo.json", "MSRVTT_data.json"),
    "Microsoft Research published it for its MSR Video to Language Challenge",
)
_LISTS = "with the split files of JSFusion's 1k-A protocol, which CLIP4Clip and others pass on as msrvtt_data.zip"
TRAIN_LISTS = {
    "1k-A": OfficialFile(("MSRVTT_train.9k.csv",), _LISTS),
    "1k-A-7k": OfficialFile(("MSRVTT_train.7k.csv",), _LISTS),
}
QUERIES = OfficialFile(("MSRVTT_JSFUSION_test.csv",), _LISTS)

_QUERIES = KnownSplit(1000, "64462f74c95235d6", 1000, "d69752e478073bce")
PROTOCOLS = {
    "1k-A": {"train": KnownSplit(9000, "12e456ceab25905f", 180_000), "test": _QUERIES},
    "1k-A-7k": {"train": KnownSplit(7010, "e63825a66cb7194c", 140_200, "0be4aaa81ddd3079"), "test": _QUERIES},
    "full": {
        "train": KnownSplit(6513, "3824b98b962a5965", 130_260, "974b41fc9e421d6f"),
        "val": KnownSplit(497, "e58250844311d232", 9940, "d098bc8395087bfe"),
        "test": KnownSplit(2990, "e033df45731e025a", 59_800),
    },
}
# The readme in train_val_annotation.zip gives the official splits as ranges of numbers.
_FULL = {"train": range(6513), "val": range(6513, 7010), "test": range(7010, 10_000)}


def read(annotations: Annotations, protocol: str, splits: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return each split's videos with their captions; see `svb.data.datasets.Dataset.read`."""
    found: dict[str, dict[str, list[str]]] = {}
    for split in splits:
        if protocol == "full":
            video_ids = [f"video{number}" for number in _FULL[split]]
            found[split] = _captions_of(annotations, video_ids)
            continue
        document = annotations.get(QUERIES if split == "test" else TRAIN_LISTS[protocol])
        columns = ("video_id", "sentence") if split == "test" else ("video_id",)
        rows = document.csv_rows(*columns)
        video_ids = [row["video_id"] for row in rows]
        PROTOCOLS[protocol][split].require_ids(video_ids, split, document)
        if split == "test":
            found[split] = {row["video_id"]: [row["sentence"]] for row in rows}
        else:
            found[split] = _captions_of(annotations, video_ids)
    return found


def other_names(split: str, video_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return none: MSR-VTT's files are called `videoNNNN.mp4` everywhere."""
    return {}


def _captions_of(annotations: Annotations, video_ids: Sequence[str]) -> dict[str, list[str]]:
    is_test = {int(video_id.removeprefix("video")) in _FULL["test"] for video_id in video_ids}
    documents = [annotations.get(TEST if test else TRAIN_VAL) for test in sorted(is_test)]
    captions: dict[str, list[str]] = {}
    for document in {document.place: document for document in documents}.values():
        for video_id, caption in _sentences(document):
            captions.setdefault(video_id, []).append(caption)
    return select(video_ids, captions, documents)


def _sentences(document: Document) -> list[tuple[str, str]]:
    held = document.json()
    sentences = held.get("sentences") if isinstance(held, dict) else None
    if not isinstance(sentences, list):
        raise document.error("no list of sentences in it")
    try:
        pairs = [(sentence["video_id"], sentence["caption"]) for sentence in sentences]
    except (KeyError, TypeError) as error:
        raise document.error("a sentence has no video_id or no caption") from error
    if not all(isinstance(video_id, str) and isinstance(caption, str) for video_id, caption in pairs):
        raise document.error("a video_id or caption is not a string")
    return pairs
