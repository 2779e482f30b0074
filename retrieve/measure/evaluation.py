"""What an evaluation found, with all that a reader must know to repeat it."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Missing:
    """What of a split was left out because videos have no features, of how much."""

    captions: int
    of_captions: int
    videos: int
    of_videos: int


@dataclass(frozen=True)
class Normalised:
    """Metrics of normalised similarities, and what they were normalised with.

    Attributes:
        description: The method and its paper.
        needs_all_queries: It looked at all queries of the split at once, which no search can.
        scale: The inverse temperature.
        scale_source: Where it comes from; never from the split that is measured.
        bank_split: Whose captions (t2v) and videos (v2t) were the query bank; empty where there is none.
        bank_captions: How many captions the bank holds.
        bank_videos: How many videos the bank holds.
        metrics: As of `Evaluation`.
    """

    description: str
    needs_all_queries: bool
    scale: float
    scale_source: str
    bank_split: str
    bank_captions: int
    bank_videos: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, with all that a reader must know to repeat it.

    Attributes:
        source: The run or store.
        model: `run` or the kind of zero-shot model.
        model_fingerprint: Of all that shapes an embedding, weights included.
        checkpoint: `best` or `last`; empty for a store.
        epoch: Of the checkpoint; 0 for a store.
        split: Which captions were queries.
        num_captions: Queries of t2v.
        num_videos: Candidates of t2v.
        missing: What of the split was left out.
        tie_rule: How equal similarities count.
        v2t_convention: How a video with several captions counts in v2t.
        selected_on_split: The checkpoint was chosen by this very split, so its numbers flatter it.
        selected_on: The split by which the run chose its best checkpoint; empty for a store.
        metrics: `t2v/R@1` and so on, in percent where they are recalls; of the plain similarities.
        normalised: The same by each method of `svb.retrieve.measure.normalise` that was asked for.
    """

    source: str
    model: str
    model_fingerprint: str
    checkpoint: str
    epoch: int
    split: str
    num_captions: int
    num_videos: int
    missing: Missing
    tie_rule: str
    v2t_convention: str
    selected_on_split: bool
    selected_on: str
    metrics: dict[str, float]
    normalised: dict[str, Normalised]

    def as_json(self) -> dict[str, object]:
        return asdict(self)
