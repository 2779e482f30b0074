"""How sure an answer to a text is: fitted to an index's own captions, measured, and told."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import indexes
import numpy as np
import pytest
from conftest import RunSvb
from indexes import Kept, edit_manifest, files_of, index

from svb.retrieve.answer import SearchRequest
from svb.retrieve.indexing import calibrate
from svb.retrieve.indexing.calibrate import (
    NUM_RANDOM_TEXTS,
    Asked,
    auc,
    calibration_error,
    fit,
    levels_of,
    random_texts,
)
from svb.retrieve.indexing.verify_index import verify_index
from svb.retrieve.searching.searcher import Searcher
from svb.retrieve.server.search_routes import describe_index
from svb.retrieve.stored.calibration import LEAST_CHANCES, Calibration, Rule, level_of
from svb.retrieve.stored.manifest import read_manifest


@pytest.fixture
def calibrated(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Return an index that was calibrated with the 40 val captions of the made-up world."""
    monkeypatch.setattr(calibrate, "MIN_CAPTIONS", 40)
    edit_manifest(kept.out, finished=None)
    kept.update()
    return kept


@pytest.mark.usefixtures("words_encoder")
def test_an_index_measures_its_levels_and_says_what_they_mean(
    calibrated: Kept, tmp_path: Path, run_svb: RunSvb
) -> None:
    (entry,) = read_manifest(calibrated.out)["confidence"]
    levels = entry["levels"]
    assert entry["captions"] == 40 == sum(level["answers"] for level in levels.values())
    told = run_svb("info", calibrated.out).stdout
    assert "confidence" in told and "first answers, measured with 40 captions" in told
    assert [*describe_index(Searcher(calibrated.out))["confidence"]] == ["strong", "fair", "weak"]
    ran = run_svb("search", "a dog", "--index", calibrated.out, "--no-server", "--json")
    answer = json.loads(ran.stdout)
    calibration = Searcher(calibrated.out)._opened.calibration
    assert calibration is not None
    known = calibration.query(["a dog"], [Searcher(calibrated.out).embed_text("a dog")])
    best = answer["results"][0]["score"]
    for result in answer["results"]:
        assert result["confidence"] == calibration.confidence(result["score"], known, best)

    again = index(calibrated.run, tmp_path / "again", store=calibrated.store, **indexes.MOMENTS)
    assert read_manifest(again)["confidence"] == [entry]
    made = [
        {name: held for name, (_, held) in files_of(out / "confidence").items()} for out in (again, calibrated.out)
    ]
    assert made[0] == made[1]


@pytest.mark.usefixtures("words_encoder")
def test_an_index_of_before_opens_and_is_calibrated_by_the_next_run(kept: Kept, run_svb: RunSvb) -> None:
    manifest = {**read_manifest(kept.out), "finished": "as older versions noted it"}
    del manifest["confidence"]
    for path in (kept.out / "confidence").glob("*/*"):
        path.unlink()
    (kept.out / "manifest.json").write_text(
        json.dumps({**manifest, "checksum": indexes.fingerprint(manifest)}), "utf-8"
    )
    assert Searcher(kept.out).search(SearchRequest(text="a dog")).results
    assert "an older version made it - run `svb index` on it again" in run_svb("info", kept.out).stdout
    kept.update()
    (entry,) = read_manifest(kept.out)["confidence"]  # 40 val captions are too few
    assert entry["random_texts"] == NUM_RANDOM_TEXTS
    told = run_svb("info", kept.out).stdout
    assert "strong: scores higher than the best answers to 99 % of 400 random texts" in told
    searcher = Searcher(kept.out)
    best = [searcher.search(SearchRequest(text=text, k=1)) for text in random_texts()]
    counts = Counter(answer.confidence for answer in best)
    assert counts["strong"] == 4 and counts["fair"] == 36


@pytest.mark.usefixtures("words_encoder")
def test_random_texts_are_embedded_once_unless_they_are_damaged(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_manifest(kept.out, finished=None)
    kept.update()  # the session's index was made without a text encoder
    before = read_manifest(kept.out)["confidence"]
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "random_texts", lambda: pytest.fail("the index holds their embeddings"))
        edit_manifest(kept.out, finished=None)
        kept.update()
    assert read_manifest(kept.out)["confidence"] == before != []
    (path,) = (kept.out / "confidence").glob("*/known.npy")
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    edit_manifest(kept.out, finished=None)
    kept.update()
    assert read_manifest(kept.out)["confidence"] == before


def test_a_damaged_calibration_is_made_again(calibrated: Kept) -> None:
    before = read_manifest(calibrated.out)["confidence"]
    (path,) = (calibrated.out / "confidence").glob("*/words.json")
    path.write_text("{}")
    assert verify_index(calibrated.out)
    calibrated.update()
    assert read_manifest(calibrated.out)["confidence"] == before


def made_up(number: int, seed: int) -> Asked:
    """Return captions whose answers are right by a chance that score, words, closeness and gap tell."""
    random = np.random.default_rng(seed)
    scores = -np.sort(-random.uniform(0.1, 0.5, (number, 5)), axis=1)
    queries = np.stack([random.uniform(-4, -1, number), random.uniform(0.5, 1, number)], axis=1)
    rule = Rule(-2.0, 8.0, 1.0, 3.0, 5.0)
    features = [np.c_[scores[:, rank], queries, scores[:, 0] - scores[:, rank]] for rank in range(5)]
    chances = np.stack([rule.chances(each) for each in features], axis=1)
    right = (random.uniform(size=chances.shape) < chances).astype(np.int64)
    best, none = scores[:, 0].astype(np.float32), np.full(number, np.nan, np.float32)
    return Asked(scores.astype(np.float32), queries, best, right, none, np.arange(number) // 2)


EMPTY = Calibration(Rule(0.0, 0.0, 0.0, 0.0, 0.0), 0, {}, np.empty((0, 4), np.float16))


def test_the_rule_finds_what_tells_right_from_wrong() -> None:
    calibration, measured = fit(made_up(4000, 0), EMPTY)
    found = np.array([*vars(calibration.rule).values()])
    np.testing.assert_allclose(found, [-2.0, 8.0, 1.0, 3.0, 5.0], rtol=0.3)
    rights = [measured["levels"][level]["right"] for level in ("strong", "fair", "weak")]
    assert rights == sorted(rights, reverse=True) and rights[0] >= LEAST_CHANCES["strong"]
    assert measured["error"] < 0.03 and measured["auc"] > measured["score_auc"]


def test_no_chance_is_0_or_1_where_all_answers_are_right_or_none() -> None:
    asked = made_up(200, 1)
    for right, level in ((1, "strong"), (0, "weak")):
        held = replace(asked, right=np.full_like(asked.right, right))
        calibration, measured = fit(held, EMPTY)
        assert all(np.isfinite(value) for value in vars(calibration.rule).values())
        assert calibration.confidence(0.3, (-2.0, 0.7), 0.3) == level
        assert measured["auc"] is None and measured["levels"][level]["answers"] == 200


def test_captions_without_an_answer_teach_what_a_low_score_means() -> None:
    """Where every first answer is right, only wrong ones tell what a score is worth."""
    asked = replace(made_up(400, 2), right=np.ones((400, 5), np.int64))
    calibration, _ = fit(replace(asked, left_out=asked.scores[:, 0] - 0.2), EMPTY)
    levels = [calibration.confidence(score, (-2.5, 0.75), score) for score in (0.5, 0.0)]
    assert levels == ["strong", "weak"]


def test_common_words_are_known_and_unheard_ones_are_not() -> None:
    embeddings = np.eye(4, dtype=np.float16)[:1]
    held = Calibration(Rule(0.0, 1.0, 1.0, 1.0, 1.0), 100, {"dog": 50, "beach": 5}, embeddings)
    assert held.commonness(["a dog"]) > held.commonness(["a dog on the beach"]) > held.commonness(["tax law"])
    assert held.commonness(["the"]) == held.commonness(["zebra"])
    queries = [np.eye(4, dtype=np.float32)[row] for row in (0, 1)]
    assert [held.query(["a dog"], [query])[1] for query in queries] == [1.0, 0.0]
    assert held.query(["a dog", "a beach"], queries)[1] == 0.5


def test_levels_and_figures_are_counted_as_defined() -> None:
    chances, right = np.array([0.9, 0.8, 0.5, 0.1]), np.array([True, False, True, False])
    counted = levels_of(chances, right)
    assert [(counted[level]["answers"], counted[level]["right"]) for level in counted] == [(2, 0.5), (1, 1), (1, 0)]
    assert auc(chances, right) == 0.75
    assert calibration_error(chances, right) == pytest.approx((0.1 + 0.8 + 0.5 + 0.1) / 4)
    assert [level_of(chance) for chance in (0.7, 0.6999, 0.3, 0.2999)] == ["strong", "fair", "fair", "weak"]
