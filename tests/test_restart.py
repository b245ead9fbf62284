"""Killed and started again with the same command, a run tells the same numbers to the bit."""

import random
import signal
import time

import pytest

from tests.data_pipelines import small_corpus
from tests.training_runs import command, lines, start, timeless, train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    small_corpus.write(root)
    return root


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(corpus, workdir)
    return workdir


def send_when(running, condition, what):
    while not condition():
        assert running.poll() is None, "the run ended before it was to be stopped"
        time.sleep(0.001)
    running.send_signal(what)
    return running.wait()


def logged(workdir, step):
    """Whether the line of `step` is in the file."""
    path = workdir / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= step


def saving(workdir):
    return next((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp/*"), None) is not None


def test_kill_9_at_three_steps_one_of_them_in_a_save(corpus, uninterrupted, tmp_path):
    seed = random.randrange(1 << 30)
    print("seed", seed)  # shown by pytest when the test fails
    rng = random.Random(seed)
    first, last = rng.randint(2, 12), rng.randint(24, 34)
    workdir = tmp_path / "run"
    again = command(corpus, workdir)

    send_when(start(*again), lambda: logged(workdir, first), signal.SIGKILL)
    send_when(start(*again), lambda: saving(workdir), signal.SIGKILL)
    assert list((workdir / "checkpoints").glob("*tmp*")), "the kill came after the save"
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "lo')  # what a power cut leaves
    send_when(start(*again), lambda: logged(workdir, last), signal.SIGKILL)
    said = train(corpus, workdir)

    assert "going on from" in said
    assert timeless(workdir) == timeless(uninterrupted)
    assert [line["step"] for line in lines(workdir)] == list(range(1, 41))
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def test_sigterm_saves_and_the_run_goes_on(corpus, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    running = start(*command(corpus, workdir))
    assert send_when(running, lambda: logged(workdir, 9), signal.SIGTERM) == 143
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert saved == lines(workdir)[-1]["step"] >= 9
    assert f"{saved}" in train(corpus, workdir)
    assert timeless(workdir) == timeless(uninterrupted)


def test_a_finished_run_has_nothing_to_do(corpus, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert "at step 40 of 40: there is nothing to do" in train(corpus, uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_trunk_and_its_cooldown_are_the_uninterrupted_run(corpus, tmp_path):
    """The trunk has no cooldown; started from its step 21, the cooldown's run equals one made in one go."""
    cooled = ("steps=30", "schedule.cooldown=9")
    train(corpus, tmp_path / "trunk", "checkpoint.keep_every=21", "steps=28")
    start_there = (f"trunk.workdir={tmp_path / 'trunk'}", "trunk.step=21")
    train(corpus, tmp_path / "end", *start_there, *cooled)
    train(corpus, tmp_path / "whole", *cooled)
    whole = timeless(tmp_path / "whole")
    assert timeless(tmp_path / "end") == whole[21:] and len(whole) == 30
    assert whole[29]["learning_rate"] < 0.1 * whole[20]["learning_rate"]
