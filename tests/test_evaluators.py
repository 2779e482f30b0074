"""What docs/evaluation.md says of other evaluators."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from svb.retrieve.measure.hub_normalisation import CLIP_LOGIT_SCALE, METHODS, QB_NORM_SCALE
from svb.train.retrieval_metrics import RECALL_AT, TIE_RULE, V2T_CONVENTIONS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
PUBLISHED = ROOT.parent / "shared" / "fixtures" / "msrvtt_1kA_similarity.npy"
# Where the order of a sort decides between equals, another torch may give another number.
BY_SORT = ("open_clip", "torchmetrics")


spec = importlib.util.spec_from_file_location("evaluators", ROOT / "benchmarks" / "evaluators.py")
assert spec is not None and spec.loader is not None
evaluators = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluators)


def rules(*, has_ties: bool) -> dict[str, Callable[..., dict[str, float]]]:
    return {name: rule for name, rule in evaluators.ONE_CAPTION.items() if not (has_ties and name in BY_SORT)}


def test_without_ties_all_evaluators_agree() -> None:
    for seed in range(3):
        random = np.random.default_rng(seed)
        similarity = random.normal(size=(31, 31)) + np.eye(31)  # an odd number: a median needs no half
        reports = [rule(similarity, np.arange(31)) for rule in evaluators.ONE_CAPTION.values()]
        for report in reports[1:]:
            assert report == pytest.approx({name: reports[0][name] for name in report})


def test_without_ties_evaluators_of_several_captions_agree_by_convention() -> None:
    similarity, owners = evaluators.matrices_with_siblings()["random"], np.repeat(np.arange(40), 5)
    reports = evaluators.several_captions(similarity, owners)
    assert reports["CLIP4Clip"] == pytest.approx(reports["svb `set`"])
    for name in ("collaborative-experts", "MMT"):
        assert reports[name] == pytest.approx(reports["svb `best`"])
    hit_rate = reports["torchmetrics hit rate"]
    assert hit_rate == pytest.approx({name: reports["svb `best`"][name] for name in hit_rate})
    # Five captions cannot all be first.
    assert reports["torchmetrics recall"]["R@1"] == pytest.approx(hit_rate["R@1"] / 5)


@pytest.mark.slow  # the import takes seconds
def test_the_rule_of_open_clip_is_what_it_does() -> None:
    train = pytest.importorskip("open_clip_train.train")
    names = {"R@1": "R@1", "R@5": "R@5", "R@10": "R@10", "MedR": "median_rank", "MeanR": "mean_rank"}
    for similarity in evaluators.square_matrices().values():
        texts = torch.eye(len(similarity))
        metrics = train.get_clip_metrics(torch.from_numpy(similarity.T.copy()), texts, 1.0)
        row = evaluators.as_sorted(similarity, np.arange(len(similarity)))
        expected = {ours: metrics[f"text_to_image_{theirs}"] for ours, theirs in names.items()}
        assert {name: row[name] / (100 if "R@" in name else 1) for name in names} == pytest.approx(expected)


def test_the_page_holds_the_tables_that_the_benchmark_prints() -> None:
    tables = []
    for name, similarity in evaluators.square_matrices().items():
        held = rules(has_ties=name != "random").items()
        tables.append((name, {evaluator: rule(similarity, np.arange(len(similarity))) for evaluator, rule in held}))
    for name, similarity in evaluators.matrices_with_siblings().items():
        rows = evaluators.several_captions(similarity, np.repeat(np.arange(40), 5))
        tables.append((name, {e: row for e, row in rows.items() if name == "random" or not e.startswith(BY_SORT)}))
    for name, rows in tables:
        assert all(line in PAGE for line in evaluators.lines(name, rows))


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"the published similarity matrix is not at {PUBLISHED}")
def test_the_page_holds_the_published_matrix() -> None:
    published = np.load(PUBLISHED)
    for name, similarity in (("1k-A", published), ("1k-A rounded", published.round(2))):
        for direction, matrix in (("t2v", similarity), ("v2t", similarity.T)):
            rows = {evaluator: rule(matrix, np.arange(1000)) for evaluator, rule in rules(has_ties=True).items()}
            assert all(line in PAGE for line in evaluators.lines(f"{name}, {direction}", rows))


def test_the_page_names_what_the_code_does() -> None:
    for name in (*METHODS, *V2T_CONVENTIONS, *(f"R@{k}" for k in RECALL_AT), "MedR", "MeanR"):
        assert f"`{name}`" in PAGE
    for words in (TIE_RULE, f"scale {QB_NORM_SCALE:g}", f"CLIP's {CLIP_LOGIT_SCALE:g}"):
        assert words in PAGE
    example = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    assert set(json.loads(example.group(1))) == {"captions", "of_captions", "videos", "of_videos"}
