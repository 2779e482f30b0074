"""`svb ablate`: what a config file asks for, what is run and what is kept, and what the tables say."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from conftest import RunSvb, assert_refused
from matplotlib.image import imread
from messages import heard
from runs import as_of_an_older_svb, change_config, without_features

from svb import cli
from svb.data.publish import lock_folder
from svb.errors import InputError, MismatchError, StoreError
from svb.retrieve import ablate as ablate_module
from svb.retrieve.ablate import ablate
from svb.retrieve.evaluate import evaluate
from svb.retrieve.measure.ablation_config import FIELDS, Ablation, read_ablation
from svb.retrieve.measure.ablation_plan import PlannedRun, plan_runs
from svb.retrieve.measure.ablation_report import AblationReport
from svb.retrieve.measure.paired import RECALLS, paired_differences
from svb.retrieve.measure.query_ranks import read_ranks
from svb.train.config import TrainConfig
from svb.train.epoch_log import CPU_SECONDS, read_cpu_seconds
from svb.train.retrieval_metrics import ranks_metrics

# Small heads that learn the task within a second.
COMMON = """
[config]
embedding_size = 32
decoder_size = 16
batch_size = 16
epochs = 4
learning_rate = 5e-3
rebuild = "embedding"
"""
GRID = """
[grid]
variant = ["none", "cross"]
"""


@dataclass
class Task:
    """A folder with a store, captions and a config file."""

    folder: Path
    store: Path
    captions: Path

    @classmethod
    def make(cls, folder: Path, **task: Any) -> Task:
        folder.mkdir(exist_ok=True)
        return cls(folder, *synthetic.make_task(folder, **task))

    @property
    def config(self) -> Path:
        return self.folder / "ablation.toml"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def write(self, text: str = GRID, top: str = "seeds = [0, 1]", common: str = COMMON) -> None:
        paths = f'store = "{self.store}"\ncaptions = "{self.captions}"\n'
        self.config.write_text(f"{paths}{top}\n{common}{text}", "utf-8")

    def plan(self) -> list[PlannedRun]:
        return plan_runs(read_ablation(self.config), self.out)[0]

    def run_here(self) -> None:
        """Run the commands of `ablate` in this process: starting processes takes seconds."""
        for run in self.plan():
            if not run.is_trained:
                assert cli.run(run.train_command[1:]) == 0
            if not run.is_finished:
                assert cli.run(run.evaluate_command[1:]) == 0

    def finished(self) -> dict[str, Path]:
        """Return the folders of finished runs by their names."""
        return {run.name: run.folder for run in self.plan() if run.is_finished}


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task.make(tmp_path, num_train=30, num_val=20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A grid of two cells and two seeds, all of it trained; only to be read."""
    task = Task.make(tmp_path_factory.mktemp("whole"), num_train=60, num_val=60, captions_a_video=3)
    task.write()
    task.run_here()
    return task


@pytest.fixture
def own(whole: Task, tmp_path: Path) -> Task:
    """A copy of `whole` that the test may change."""
    folder = Path(shutil.copytree(whole.folder, tmp_path / "own"))
    task = Task(folder, folder / "features", folder / "captions.h5")
    task.write()
    return task


def read(tmp_path: Path, text: str) -> Ablation:
    (tmp_path / "ablation.toml").write_text(text, "utf-8")
    return read_ablation(tmp_path / "ablation.toml")


class TestConfig:
    def test_a_grid_is_a_product_named_by_what_differs(self, tmp_path: Path) -> None:
        text = '[config]\nepochs = 7\n[grid]\nvariant = ["none", "cross"]\nloss = ["max_margin"]\nmargin = [0.1, 1]'
        ablation = read(tmp_path, text)
        assert [cell.name for cell in ablation.cells] == [
            *("variant=none margin=0.1", "variant=none margin=1"),
            *("variant=cross margin=0.1", "variant=cross margin=1"),
        ]
        assert ablation.baseline == ablation.cells[0]
        last = ablation.cells[-1].config
        assert last == TrainConfig(epochs=7, variant="cross", loss="max_margin", margin=1.0)
        assert isinstance(last.margin, float)
        assert ablation.seeds == (0, 1, 2) and (ablation.split, ablation.checkpoint) == ("val", "last")
        assert (ablation.cells[0].store, ablation.cells[0].captions) == (Path("features"), Path("captions.h5"))

    def test_cells_and_inputs(self, tmp_path: Path) -> None:
        text = """
        store = "a"
        backbone = "x+y"
        baseline = "plain"
        split = "test"
        [[cells]]
        name = "all of it"
        variant = "cross"
        memory_bank = 64
        learn_logit_scale = false
        [[cells]]
        [[cells]]
        store = "b"
        backbone = "y"
        """
        ablation = read(tmp_path, text)
        assert [cell.name for cell in ablation.cells] == ["all of it", "plain", "store=b backbone=y"]
        inputs = [(str(cell.store), cell.backbone) for cell in ablation.cells]
        assert inputs == [("a", "x+y"), ("a", "x+y"), ("b", "y")]
        assert ablation.cells[0].config == TrainConfig(memory_bank=64, learn_logit_scale=False)
        assert ablation.baseline.name == "plain" and ablation.checkpoint == "best"

    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ('variant = "none"\n[grid]\nbatch_size = [32, 64]', ["variant=none", "batch_size=32", "batch_size=64"]),
            (f'variant = "cross"\n{GRID}', ["variant=none", "variant=cross"]),  # it is that cell
        ],
    )  # fmt: skip
    def test_a_baseline_of_its_own(self, tmp_path: Path, text: str, names: list[str]) -> None:
        ablation = read(tmp_path, f"[baseline]\n{text}")
        assert [cell.name for cell in ablation.cells] == names
        assert ablation.baseline.name == "variant=" + text.split('"')[1]

    def test_every_option_can_be_set(self, tmp_path: Path) -> None:
        text = "".join(f"{name} = {json.dumps(getattr(TrainConfig(), name))}\n" for name in FIELDS)
        assert read(tmp_path, f"[[cells]]\n{text}").cells[0].config == TrainConfig()

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("[config]\nbatch-size = 4\n" + GRID, "an unknown option 'batch-size' (did you mean 'batch_size'?)"),
            ("[grid]\nvarient = ['none']", "[grid] has an unknown option 'varient' (did you mean 'variant'?)"),
            ("[[cells]]\nepoch = 4", "[[cells]] number 1 has an unknown option 'epoch' (did you mean 'epochs'?)"),
            ("[baseline]\nlos = 'x'\n" + GRID, "[baseline] has an unknown option 'los' (did you mean 'loss'?)"),
            ("seed = [0]\n" + GRID, "the top sets the seed - every cell runs with all seeds"),
            ("variant = 'none'\n" + GRID, "variant is at the top - put options of all cells below [config]"),
            ("seeds = [0]", "there are no cells - add lists of values below [grid]"),
            ("[grid]\nvariant = []", "[grid] variant is [] - expected a list of values"),
            ("[grid]\nvariant = 'none'", "[grid] variant is 'none' - expected a list of values"),
            ("[config]\nepochs = 4.5\n" + GRID, "[config] epochs is 4.5 - expected a whole number"),
            ("[config]\nepochs = true\n" + GRID, "[config] epochs is True - expected a whole number"),
            ("[config]\nlearn_logit_scale = 1\n" + GRID, "learn_logit_scale is 1 - expected true or false"),
            ("store = 3\n" + GRID, "store is 3 - expected a string"),
            ("config = 3\n" + GRID, "config is 3 - expected a table"),
            ("cells = [3]", "[[cells]] number 1 is 3 - expected a table"),
            ("[grid]\nvariant = ['none', 'crosss']", "cell 'variant=crosss': variant is 'crosss' - expected"),
            ("baseline = 'cros'\n" + GRID, "the baseline 'cros' is not a cell"),
            ("baseline = 3\n" + GRID, "baseline is 3 - expected a cell's name"),
            ("[grid]\nvariant = ['none', 'none']", "two cells are named 'variant=none'"),
            (GRID + "[[cells]]\nname = 'x'\nvariant = 'none'", "the cells 'variant=none' and 'x' are the same"),
            ("[[cells]]\nname = ' '", "[[cells]] number 1 is named ' ' - expected one or more words"),
            ("[[cells]]\nname = 3", "[[cells]] number 1 name is 3 - expected a string"),
            ("seeds = []\n" + GRID, "seeds is empty - expected whole numbers"),
            ("seeds = ['a']\n" + GRID, "a seed is 'a' - expected a whole number"),
            ("seeds = [-1]\n" + GRID, "a seed is -1 - expected 0 to"),
            ("seeds = [1, 2, 1]\n" + GRID, "seeds lists 1 twice"),
            ("[grid]\nseed = [0, 1]", "[grid] sets the seed"),
            ("split = 'dev'\n" + GRID, "split is 'dev' - expected one of train, val, test"),
            ("checkpoint = 'newest'\n" + GRID, "checkpoint is 'newest' - expected one of best, last"),
            ("jobs = 0\n" + GRID, "jobs is 0 - expected at least 1"),
            ("allow_missing = 'yes'\n" + GRID, "allow_missing is 'yes' - expected true or false"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_is_refused(self, tmp_path: Path, run_svb: RunSvb, text: str, words: str) -> None:
        (tmp_path / "bad.toml").write_text(text, "utf-8")
        ran = run_svb("ablate", tmp_path / "bad.toml", "-o", tmp_path / "out")
        assert_refused(ran, words)
        assert f"svb: {tmp_path / 'bad.toml'}: " in ran.stderr and not (tmp_path / "out").exists()

    def test_the_projects_own_configs_can_be_read(self) -> None:
        for path in (Path(__file__).resolve().parents[1] / "benchmarks" / "ablations").glob("*.toml"):
            assert len(read_ablation(path).cells) > 1, path

    def test_no_toml_is_refused_with_its_line(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"ablation\.toml is not TOML \(.*line 2, column .*\) - correct that"):
            read(tmp_path, "seeds = [0]\nvariant = none\n")
        with pytest.raises(InputError, match=r"no config file at .*nowhere\.toml"):
            read_ablation(tmp_path / "nowhere.toml")


class TestData:
    @pytest.mark.parametrize(
        ("text", "top", "words"),
        [
            ('[grid]\nstore = ["features", "nowhere"]', "", "no feature store at nowhere - make one with"),
            ('[grid]\ncaptions = ["captions.h5", "none.h5"]', "", "no caption features at none.h5"),
            ('[[cells]]\nbackbone = "synthetic:none"', "", "holds no features of 'synthetic:none'"),
            (GRID, 'split = "test"', "has no test split - expected one of train, val"),
            ("[[cells]]\n[[cells]]\nstore = 'other/features'\ncaptions = 'other/captions.h5'", "",
             "the first extra one is '100' of 'clip050'"),
        ],
    )  # fmt: skip
    def test_what_is_missing_is_refused_before_anything_runs(
        self, task: Task, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch, text: str, top: str, words: str
    ) -> None:
        monkeypatch.chdir(task.folder)
        Task.make(task.folder / "other", num_train=30, num_val=21)
        task.write(text, top)
        assert_refused(run_svb("ablate", task.config, "-o", task.out), words)
        assert not task.out.exists()

    def test_a_val_that_is_held_out_is_the_same_for_all(self, tmp_path: Path) -> None:
        task = Task.make(tmp_path, has_split=False, num_train=20)
        task.write(top="seeds = [0]")
        messages = heard()
        task.run_here()
        assert sum("holding out" in message for message in messages) == 5  # the plan, and two commands per run
        report = ablate(task.config, task.out)
        assert not report.failed and len(set(report.queries.video_ids)) == len(report.queries.video_ids) > 1
        task.config.write_text(task.config.read_text() + '[[cells]]\nname = "more"\nval_fraction = 0.3\n')
        with pytest.raises(MismatchError, match=r"val_fraction 0\.1, .* val_fraction 0\.3"):
            ablate(task.config, task.out)

    def test_videos_without_features_are_refused_or_left_out(self, task: Task) -> None:
        task.store = without_features(task.store, task.folder / "fewer", "clip031")
        task.write()
        with pytest.raises(InputError, match=r"1 videos of the val split .* 'clip031' .* allow_missing = true"):
            ablate(task.config, task.out)
        task.write(top="allow_missing = true")
        _, queries = plan_runs(read_ablation(task.config), task.out)
        assert "clip030" in queries.video_ids and "clip031" not in queries.video_ids


@pytest.fixture(scope="module")
def report(whole: Task) -> AblationReport:
    return ablate(whole.config, whole.out)


class TestReport:
    def test_rows_are_what_the_runs_ranks_say(self, whole: Task, report: AblationReport) -> None:
        assert [row.cell.name for row in report.rows] == ["variant=none", "variant=cross"]
        ranks = []
        for row in report.rows:
            ranks.append([read_ranks(run.folder / "ranks.npz") for run in row.runs.values()])
            metrics = [ranks_metrics(held.t2v, held.v2t) for held in ranks[-1]]
            for name in metrics[0]:
                values = [held[name] for held in metrics]
                assert row.mean(name) == pytest.approx(np.mean(values))
                assert row.deviation(name) == pytest.approx(np.std(values, ddof=1))
            assert len(row.seconds) == 2 and all(seconds > 0 for seconds in row.seconds)
            assert row.num_at_chance == 0
        assert report.rows[0].differences == []
        assert report.rows[1].differences == paired_differences(*ranks)
        assert not report.failed and not report.is_collapsed

    def test_the_tables_and_the_plot_hold_it(self, whole: Task, report: AblationReport) -> None:
        text = (whole.out / "ablation.md").read_text("utf-8")
        assert text.startswith("180 captions of the val split against 60 videos, last checkpoint.")
        base, cross = report.rows
        r1 = f"{cross.mean('t2v/R@1'):.1f} ± {cross.deviation('t2v/R@1'):.1f}"
        assert f"| variant=cross | 2 | {r1} |" in text and "| **variant=none** | 2 |" in text
        first = cross.differences[0]
        assert first.over_seeds is not None
        for number in (first.difference, first.over_videos.low, first.over_seeds.high):
            assert f"{number:+.2f}" in text
        assert sum(line.startswith("| variant=cross | ") for line in text.splitlines()) == 1 + len(RECALLS)
        assert f"--store {whole.store} --captions {whole.captions} --split val --checkpoint last --v2t set" in text
        cells, runs = ([*csv.DictReader((whole.out / f"{name}.csv").open())] for name in ("cells", "runs"))
        assert [cell["baseline"] for cell in cells] == ["True", "False"]
        assert float(cells[1]["t2v/R@1 p over videos"]) == first.over_videos.p
        assert float(cells[0]["t2v/R@5 mean"]) == base.mean("t2v/R@5") and cells[0]["t2v/R@1 difference"] == ""
        assert [run["cell"] + run["seed"] for run in runs] == [
            f"variant={v}{seed}" for v in ("none", "cross") for seed in (0, 1)
        ]
        assert float(runs[3]["t2v/R@1"]) == cross.metrics[1]["t2v/R@1"]
        assert all(f"- `{run['command']}`" in text for run in runs)
        pixels = imread(whole.out / "ablation.png")[..., :3]
        for colour in ((0x1F, 0x5F, 0xA8), (0xC8, 0x64, 0x1E)):
            assert (np.abs(pixels - np.array(colour) / 255).max(axis=-1) < 0.01).sum() > 100

    def test_the_command_prints_it(self, whole: Task, run_svb: RunSvb) -> None:
        command = ("ablate", whole.config, "-o", whole.out)
        ran = run_svb(*command)
        assert ran.exit_code == 0 and ran.stdout == (whole.out / "ablation.md").read_text("utf-8")
        assert "4 runs: 2 cells, 2 seeds; 4 are finished already" in ran.stderr
        held = json.loads(run_svb(*command, "--json").stdout)
        assert held["baseline"] == "variant=none" and held["failed"] == {} and held["split"] == "val"
        assert [cell["name"] for cell in held["cells"]] == ["variant=none", "variant=cross"]
        assert held["cells"][1]["differences"][0]["metric"] == "t2v/R@1"
        assert run_svb(*command, "--dry-run").stdout.splitlines() == [
            "baseline: variant=none; last checkpoint on val",
            *(f"variant={variant} seed {seed}: finished" for seed in (0, 1) for variant in ("none", "cross")),
        ]
        assert "jobs is 0" in run_svb(*command, "--jobs", 0).stderr


class TestKept:
    """What is run again, and what is not."""

    def test_a_dry_run_writes_nothing(self, task: Task, run_svb: RunSvb) -> None:
        options = 'learn_logit_scale = false\nlearn_support_temperature = true\nbackbone = "synthetic:frames"'
        task.write(f"[[cells]]\n{options}", "allow_missing = true")
        command = ("ablate", task.config, "-o", task.out, "--device", "cuda:0", "--dry-run")
        train, measure = run_svb(*command).stdout.splitlines()[1].split(" && ")
        assert f": svb train {task.store} {task.captions} -o {task.out}/runs/" in train
        for words in ("--backbone synthetic:frames", "--no-learn-logit-scale", "--learn-support-temperature"):
            assert words in train
        assert "--device cuda:0" in train and "--device cuda:0" in measure and "--allow-missing" in measure
        assert [row["finished"] for row in json.loads(run_svb(*command, "--json").stdout)] == [False] * 3
        assert not task.out.exists()

    def test_cells_keep_their_runs_when_the_config_changes_around_them(self, own: Task) -> None:
        """A new axis gives cells other names, and a new seed or cell adds runs: what is asked for still is kept."""
        own.write('[grid]\nvariant = ["none", "cross"]\nbatch_size = [16, 8]', top="seeds = [1, 2]")
        assert own.finished() == {
            f"variant={variant} batch_size=16 seed 1": own.out / "runs" / f"variant={variant}" / "seed-1"
            for variant in ("none", "cross")
        }

    def test_runs_with_other_settings_are_kept_beside(self, own: Task) -> None:
        own.write(common=COMMON.replace("epochs = 4", "epochs = 1"), top="seeds = [0]")
        messages = heard()
        planned = own.plan()
        assert not any(run.is_finished for run in planned)
        assert [run.folder.parent.name.rpartition("-")[0] for run in planned] == ["variant=none", "variant=cross"]
        assert "holds a run with other settings, which is kept; this run goes to" in messages[0]
        assert messages[-1].startswith("4 other runs in ") and " are kept, first " in messages[-1]
        own.run_here()
        assert len(own.finished()) == 2
        own.write()
        assert len(own.finished()) == 4

    def test_what_stopped_saw_other_data_or_is_being_made_is_not_finished(self, own: Task) -> None:
        shutil.rmtree(own.out / "runs" / "variant=none" / "seed-0" / "last")
        assert len(own.finished()) == 3 and "variant=none seed 0" not in own.finished()
        own.store = without_features(own.store, own.folder / "fewer", "clip000")  # a training video
        own.write()
        assert own.finished() == {}
        lock = lock_folder(own.out)
        with pytest.raises(StoreError, match="another process is writing to it"):
            ablate(own.config, own.out)
        os.close(lock)

    def test_ranks_of_something_else_are_measured_again(self, own: Task) -> None:
        none, cross = (own.out / "runs" / f"variant={variant}" for variant in ("none", "cross"))
        evaluate(none / "seed-0", split="train")
        evaluate(none / "seed-1", checkpoint="last", v2t_convention="best")
        shutil.copy(none / "seed-1" / "ranks.npz", cross / "seed-0")
        (cross / "seed-1" / "ranks.npz").write_bytes(b"no ranks")
        assert own.finished() == {}
        weights = none / "seed-0" / "last" / "model.safetensors"
        before = weights.stat().st_mtime_ns
        own.run_here()
        assert len(own.finished()) == 4 and weights.stat().st_mtime_ns == before

    def test_a_run_of_an_older_svb_is_known_by_its_options(self, own: Task) -> None:
        """Options that came later have their defaults in it, and one had another name."""
        folder = own.out / "runs" / "variant=none" / "seed-0"
        change_config(folder, as_of_an_older_svb)
        evaluate(folder, checkpoint="last")
        assert own.finished()["variant=none seed 0"] == folder
        change_config(folder, lambda held: held["config"].pop("memory_bank"))
        assert "variant=none seed 0" not in own.finished()
        own.run_here()  # measures it again; training would refuse it
        assert own.finished()["variant=none seed 0"] == folder

    @pytest.mark.parametrize("name", ["decoder", "caption_decoder"])
    def test_a_decoder_in_a_folder_is_the_same_from_anywhere(
        self, own: Task, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        folder = own.out / "runs" / "variant=none" / "seed-0"
        (own.folder / "t5").mkdir()
        change_config(folder, lambda held: held["config"].pop("caption_decoder"))
        options = {name: f"t5:{own.folder / 't5'}", "rebuild": "tokens", "support_values": "frames"}
        options |= {"soft_label_weight": 0.0, "cross_captioning_weight": 0.1}
        change_config(folder, lambda held: held["config"].update(options))
        evaluate(folder, checkpoint="last")
        monkeypatch.chdir(own.folder)
        own.write(common=COMMON.replace('rebuild = "embedding"', 'rebuild = "tokens"\ncaption_decoder = "t5:t5"'))
        assert own.finished() == {"variant=none seed 0": folder}

    def test_odd_names_stay_within_the_folder(self, task: Task) -> None:
        names = ("..", "a/../../b", "é ü", "x" * 300, "a b", "a,b")
        cells = [f"[[cells]]\nname = {json.dumps(name)}\nepochs = {e}\n" for e, name in enumerate(names, start=1)]
        task.write("".join(cells), top="seeds = [0]")
        folders = [run.folder for run in task.plan()]
        assert len(set(folders)) == len(folders)
        for folder in folders:
            folder.mkdir(parents=True)
            assert folder.resolve().parent.parent == (task.out / "runs").resolve()


def test_an_epoch_that_was_trained_again_counts_once(tmp_path: Path) -> None:
    lines = [(1, 5.0), (2, 1.0), (2, 3.0), (3, 1.0)]
    text = "".join(json.dumps({"epoch": epoch, "cpu_seconds": seconds}) + "\n" for epoch, seconds in lines)
    (tmp_path / CPU_SECONDS).write_text(text + '{"epoch": 3, "cpu_sec')
    assert read_cpu_seconds(tmp_path, 3) == 9.0
    assert read_cpu_seconds(tmp_path, 4) is None
    assert read_cpu_seconds(tmp_path / "nowhere", 1) is None


class TestFailures:
    @pytest.mark.slow
    def test_a_failed_run_does_not_stop_the_others(self, task: Task, run_svb: RunSvb) -> None:
        task.write(
            '[[cells]]\nname = "good"\n[[cells]]\nname = "diverges"\nlearning_rate = 1e30', top="seeds = [0]"
        )
        ran = run_svb("ablate", task.config, "-o", task.out, "--jobs", "2", "--device", "cpu")
        assert ran.exit_code == 1 and "Traceback" not in ran.stderr, ran
        assert "1 runs failed, first diverges seed 0: the loss is" in ran.stderr.splitlines()[-1]
        assert "diverges seed 0 FAILED: the loss is" in ran.stdout and "| **good** | 1 |" in ran.stdout
        assert list(task.finished()) == ["good seed 0"]
        log = (task.out / "logs" / "good,seed-0.log").read_text("utf-8")
        assert f"- `{next(line for line in log.splitlines() if line.startswith('$ '))[2:]}`" in ran.stdout
        assert "epoch   4  loss" in log and "20 captions against" not in log

    @pytest.mark.parametrize(
        ("program", "words"),
        [
            ("raise MemoryError('too much')", "ended with status 1 and last said 'MemoryError: too much'"),
            ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9, see LOG - if memory ran out"),
            ("import sys; print('svb: x is 3 - use 4', file=sys.stderr); sys.exit(1)", "x is 3 - use 4"),
            ("import sys, os; assert os.environ['OMP_NUM_THREADS'] == '3'; sys.exit('svb: '+sys.argv[1])", "train"),
        ],
    )  # fmt: skip
    def test_if_all_fail_the_error_says_how(
        self, task: Task, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch, program: str, words: str
    ) -> None:
        monkeypatch.setattr(ablate_module, "_SVB", program)
        monkeypatch.setenv("OMP_NUM_THREADS", "6")
        task.write(top="seeds = [0]")
        ran = run_svb("ablate", task.config, "-o", task.out, "--jobs", "2")
        assert_refused(ran, "all 2 runs failed, the first with: ")
        logs = [str(task.out / "logs" / f"variant={variant},seed-0.log") for variant in ("none", "cross")]
        assert any(words.replace("LOG", log) in ran.stderr for log in logs)
        assert not (task.out / "ablation.md").exists()

    def test_a_collapsed_grid_fails(self, own: Task, run_svb: RunSvb) -> None:
        """Heads that map everything to one place: R@1 means nothing, whatever the table's differences say."""
        own.write(top="seeds = [0]")
        for folder in own.finished().values():
            with np.load(folder / "ranks.npz") as file:
                held = dict(file)
            held["t2v"][:], held["v2t"][:] = 30.5, 30.5  # 60 videos, all equally near
            np.savez(folder / "ranks.npz", **held)
        ran = run_svb("ablate", own.config, "-o", own.out)
        assert ran.exit_code == 1 and "no run can be told from guessing" in ran.stderr.splitlines()[-1]
        assert "variant=cross† | 1 | 0.0 |" in ran.stdout
        assert "1 of 1 runs of variant=cross cannot be told from guessing" in ran.stdout


def command(task: Task) -> list[str]:
    words = [sys.executable, "-m", "svb", "ablate", str(task.config), "-o", str(task.out), "--jobs", "2"]
    return [*words, "--device", "cpu"]


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    until = time.monotonic() + 400  # starting processes is what takes long where the machine is busy
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.02)


def trainers(task: Task) -> Iterator[int]:
    """Yield the processes that train for a task; on Linux, by what they were started with."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes()
            if b"end_with_stdin" in words and str(task.out).encode() in words:
                yield int(place.name)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_ablation_goes_on_to_the_same_numbers(tmp_path: Path, sign: signal.Signals) -> None:
    killed, whole = (Task.make(tmp_path / name, num_train=60, num_val=40) for name in ("killed", "whole"))
    for task in (killed, whole):
        common = COMMON.replace("epochs = 4", "epochs = 400")  # it must not end before the signal
        task.write(GRID.replace('"cross"', '"cross", "full"'), "seeds = [0]", common)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(killed), **pipes, start_new_session=True) as process:  # as a shell does
        try:
            wait_for(process, killed.out / "runs" / "variant=full" / "seed-0" / "metrics.jsonl")
            process.send_signal(sign)
            _, said = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == (-sign if sign == signal.SIGKILL else 130)
    assert sign == signal.SIGKILL or "run the same command again to go on" in said
    until = time.monotonic() + 300
    while any(trainers(killed)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not list(trainers(killed)), "a run outlived the ablation that started it"
    before = killed.finished()
    assert 1 <= len(before) < 3
    kept = {path: path.stat().st_mtime_ns for folder in before.values() for path in folder.rglob("*.safetensors")}
    again = subprocess.run(command(killed), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{len(before)} are finished already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole.run_here()
    for name, folder in whole.finished().items():
        twin = killed.finished()[name]
        for file in ("last/model.safetensors", "best/model.safetensors"):
            assert (folder / file).read_bytes() == (twin / file).read_bytes(), name
    assert "| variant=full | 1 |" in again.stdout
