"""A study from end to end: trunks and their runs, killed and gone on with, and the table."""

import csv
import json
import sys
import time

import numpy as np
import pytest
from etils import epath

from data_pipelines.stream import Stream
from nmm_jax import trunk as making
from nmm_jax.scaling import results_table, study
from nmm_jax.scaling.counting import count
from nmm_jax.scaling.sweep import Sweep
from nmm_jax.training import goodput
from nmm_jax.training.metrics import Diverged
from tests import tiny_study
from tests.data_pipelines import small_corpus
from tests.training_runs import finish, start

NAME = "early-w16-45-45-10-s0"


class Faked:
    """Trains in no time, as told, and tells what it was asked."""

    def __init__(self, monkeypatch, fails=None):
        self.asked, self.fails = [], fails or {}
        monkeypatch.setattr(making, "train", self.train)
        monkeypatch.setattr(making, "_evaluated", lambda row, *_: row | {"diverged": False, "loss": 1.0})

    def train(self, config, workdir):
        name = epath.Path(workdir).name
        self.asked.append((name, config.steps))
        what = self.fails.get((name, config.steps))
        if isinstance(what, Exception):
            raise what
        return what is None


@pytest.fixture
def trunk():
    return study.expand(tiny_study.get_config())[NAME]


def test_legs_and_cooldowns_take_turns_and_what_is_there_is_not_made_again(trunk, tmp_path, monkeypatch):
    faked, folder = Faked(monkeypatch), epath.Path(tmp_path)
    making.make(trunk, folder)
    expected = [(NAME, 8), (f"{NAME}-10", 10), (NAME, 16), (f"{NAME}-20", 20)]
    assert faked.asked == expected
    making.make(trunk, folder)
    assert faked.asked == expected
    (folder / f"{NAME}-20" / results_table.ROW).unlink()
    making.make(trunk, folder)
    assert faked.asked[4:] == expected[2:]


def test_a_run_that_diverges_is_a_row_and_the_others_go_on(trunk, tmp_path, monkeypatch):
    faked, folder = Faked(monkeypatch, {(f"{NAME}-10", 10): Diverged("loss is nan at step 9")}), epath.Path(tmp_path)
    making.make(trunk, folder)
    assert len(faked.asked) == 4
    rows = [json.loads((folder / b.name / results_table.ROW).read_text()) for b in trunk.branches]
    assert [row["diverged"] for row in rows] == [True, False] and "loss" not in rows[0]


def test_a_trunk_that_diverges_ends_those_behind_it(trunk, tmp_path, monkeypatch):
    faked, folder = Faked(monkeypatch, {(NAME, 8): Diverged("loss is nan at step 3")}), epath.Path(tmp_path)
    making.make(trunk, folder)
    assert faked.asked == [(NAME, 8)]
    sweep = Sweep(tiny_study.get_config(), folder)
    assert [p.state for p in sweep.progress(trunk)] == ["diverged", "diverged"]
    sweep.write()
    with open(tmp_path / "table.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(row["run"], row["diverged"], row["steps"]) for row in rows] == [
        (f"{NAME}-10", "True", "10"),
        (f"{NAME}-20", "True", "20"),
    ]


def test_sigterm_ends_the_process_and_nothing_is_lost(trunk, tmp_path, monkeypatch):
    Faked(monkeypatch, {(NAME, 16): "stopped"})
    folder = epath.Path(tmp_path)
    with pytest.raises(SystemExit) as e:
        making.make(trunk, folder)
    assert e.value.code == 143
    assert [(folder / b.name / results_table.ROW).exists() for b in trunk.branches] == [True, False]


def attempt(folder, step, ended, ago=0.0):
    folder.mkdir(parents=True, exist_ok=True)
    seconds = dict.fromkeys(goodput.MEASURED, 0.0)
    record = {"started": goodput.now() - ago, "seconds": seconds, "restored": 0, "step": step, "ended": ended}
    (folder / goodput.NAME).write_text(json.dumps({"attempts": [record]}))


def test_status(trunk, tmp_path):
    sweep = Sweep(tiny_study.get_config(), epath.Path(tmp_path))

    def seen():
        return [(p.state, p.step, p.left) for p in sweep.progress(trunk)]

    # the trunk's steps to where a run begins are left for the first that needs them
    assert seen() == [("waiting", 0, 10), ("waiting", 0, 12)]
    attempt(tmp_path / NAME, 5, "")
    assert seen() == [("running", 5, 5), ("waiting", 5, 12)]
    attempt(tmp_path / NAME, 5, "", ago=600)
    assert seen()[0] == ("failed", 5, 5)
    attempt(tmp_path / NAME, 5, "stopped")
    assert seen()[0] == ("waiting", 5, 5)
    attempt(tmp_path / NAME, 8, "finished")
    assert seen() == [("waiting", 8, 2), ("waiting", 8, 12)]
    attempt(tmp_path / f"{NAME}-10", 9, "")
    assert seen() == [("running", 9, 1), ("waiting", 8, 12)]
    attempt(tmp_path / f"{NAME}-10", 10, "finished")
    assert seen() == [("trained", 10, 0), ("waiting", 8, 12)]
    (tmp_path / f"{NAME}-10" / results_table.ROW).write_text('{"diverged": false, "loss": 2.5}')
    assert seen() == [("done", 10, 0), ("waiting", 8, 12)]

    other = tmp_path / "early-w32-45-45-10-s0"
    assert "left" in sweep.status() and " min" not in sweep.status()
    (tmp_path / NAME / "metrics.jsonl").write_text('{"step": 1, "time/step": 60.0}\n{"step": 2, "time/st')
    assert not other.exists()
    seconds = sweep.seconds_of_step()
    flops = [count(t.leg(t.branches[0])).paper_parameters for t in sweep.trunks.values()]
    assert seconds[NAME] == 60 and seconds[other.name] == pytest.approx(60 * flops[1] / flops[0])
    lines = {line.split()[0]: line.split()[1:] for line in sweep.status().splitlines()}
    assert lines[f"{NAME}-20"] == ["waiting", "8/20", "12", "min"] and lines[f"{NAME}-10"][:2] == ["done", "10/10"]
    assert "4 runs: 1 done, 3 waiting; " in sweep.status()


def study_on(corpus):
    c = tiny_study.get_config().unlock()
    c.run.data.root = str(corpus)
    return c.lock()


def command(module, corpus, folder, *flags):
    config = ("--config=tests/tiny_study.py", f"--config.run.data.root={corpus}", f"--folder={folder}")
    return start(sys.executable, "-m", module, *config, *flags)


def table(folder):
    with open(folder / "table.csv") as f:
        return {row["run"]: row for row in csv.DictReader(f)}


def pairs_of(batch):
    """(query, key) pairs that attention needs."""
    segments, until = batch["segment_ids"], batch["attend_until"]
    total = 0
    for row, ends in zip(segments, until, strict=True):
        for segment in np.unique(row[row > 0]):
            here = np.flatnonzero(row == segment)
            total += (ends[here] - here[0]).sum()
    return int(total)


@pytest.mark.slow
def test_killed_in_the_middle_a_study_ends_with_the_same_table(tmp_path):
    corpus = tmp_path / "corpus"
    small_corpus.write(corpus, held_out=12)
    whole = command("nmm_jax.scaling.sweep", corpus, tmp_path / "whole", "--jobs=2")
    said = finish(whole)
    assert whole.returncode == 0, said

    killed = tmp_path / "killed"
    one_trunk = ("nmm_jax.trunk", corpus, killed, f"--trunk={NAME}")
    running = command(*one_trunk)
    while not (killed / f"{NAME}-10" / results_table.ROW).exists():
        assert running.poll() is None, finish(running)
        time.sleep(0.01)
    running.kill()  # while it prolongs the trunk, or trains the second run
    finish(running)
    assert not (killed / f"{NAME}-20" / results_table.ROW).exists()
    again = command(*one_trunk)
    said = finish(again)
    assert again.returncode == 0, said
    Sweep(study_on(corpus), epath.Path(killed)).write()
    check_tables(corpus, tmp_path / "whole", killed)


def check_tables(corpus, whole, killed):
    rows, others = table(whole), table(killed)
    trunks = study.expand(study_on(corpus))
    assert list(rows) == [b.name for t in trunks.values() for b in t.branches]
    assert set(others) == {f"{NAME}-10", f"{NAME}-20"}
    for name, other in others.items():
        for key in set(other) - {"seconds", "flops"}:
            assert other[key] == rows[name][key], (name, key)
        assert float(other["flops"]) == pytest.approx(float(rows[name]["flops"]))
    for trunk in trunks.values():
        for branch in trunk.branches:
            check_against_counting(rows[branch.name], trunk, branch, whole)


def check_against_counting(row, trunk, branch, folder):
    config = trunk.cooled(branch, "trunk")
    counts = count(config)
    batch = Stream.open(config).batch(range(config.batch_rows * branch.steps))
    real, images = batch["segment_ids"] > 0, int(batch["image_mask"].sum())
    n, d = int(row["n"]), int(real.sum())
    assert int(row["d"]) == d and int(row["d_text"]) == d - 4 * images  # 4 positions an image
    assert int(row["d_vision"]) == 4 * images == (batch["image_index"] >= 0).sum()
    for k, source in enumerate(small_corpus.SOURCES):
        assert int(row[f"tokens_{source}"]) == (real & (batch["source"] == k)).sum()
        assert float(row[f"h_{source}"]) == int(row[f"tokens_{source}"]) / d
    assert n == counts.paper_parameters == int(row["n_total"]) and float(row["c"]) == 6 * n * d
    exact = counts.training_flops(d, pairs_of(batch), images)
    assert float(row["flops"]) == pytest.approx(exact, rel=1e-5)
    found = json.loads((folder / branch.name / "evaluation" / f"{branch.steps}.json").read_text())["held_out"]
    losses = [float(row[f"loss_{s}"]) for s in small_corpus.SOURCES]
    assert losses == [found[s]["loss"] for s in small_corpus.SOURCES]
    assert float(row["loss"]) == pytest.approx(sum(losses) / 3)
    assert row["trunk_step"] == str(branch.at) and row["diverged"] == "False" and float(row["sparsity"]) == 0
