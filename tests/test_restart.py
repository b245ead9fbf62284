"""Killed and started again with the same command, a run tells the same numbers to the bit."""

import os
import pathlib
import random
import shutil
import signal
import time

import pytest

from nmm_jax.training import goodput
from tests.data_pipelines import small_corpus
from tests.training_runs import command, finish, lines, start, timeless, train


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


def wait_until(running, condition):
    while not condition():
        assert running.poll() is None, "the run ended before it was to be stopped"
        time.sleep(0.001)


def send_when(running, condition, what):
    wait_until(running, condition)
    running.send_signal(what)
    return running.wait()


def wait_until_gone(group):
    """Until no process of the group is alive."""
    until = time.monotonic() + 30
    while alive := [stat for stat in map(stat_of, pathlib.Path("/proc").glob("[0-9]*")) if stat[2:3] == [str(group)]]:
        assert time.monotonic() < until, alive
        time.sleep(0.1)


def stat_of(process):
    """State, parent, group, ... of a process (proc(5)); nothing of one that is dead."""
    try:
        stat = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if stat[0] == "Z" else stat


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
    began = time.time()

    send_when(start(*again), lambda: logged(workdir, first), signal.SIGKILL)
    for leftover in (workdir / "checkpoints").glob("*tmp*"):  # or the next one would be killed before it has begun
        shutil.rmtree(leftover)
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

    account = goodput.account_of(workdir)
    assert f"goodput {account.goodput:.1%}" in said and "in 4 attempts" in said
    assert began - 1 < account.attempts[0].started < account.attempts[-1].seen < time.time()
    assert account.wall == pytest.approx(account.attempts[-1].seen - account.attempts[0].started, abs=1e-3)
    assert (account.attempts[-1].step, account.attempts[-1].ended) == (40, "finished")


def test_sigterm_saves_and_the_run_goes_on(corpus, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    running = start(*command(corpus, workdir))
    assert send_when(running, lambda: logged(workdir, 9), signal.SIGTERM) == 143
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert saved == lines(workdir)[-1]["step"] >= 9
    assert f"{saved}" in train(corpus, workdir)
    account = goodput.account_of(workdir)
    assert [(a.restored, a.step, a.ended) for a in account.attempts] == [(0, saved, "stopped"), (saved, 40, "finished")]
    assert account.lost_steps == 0 and account.seconds["steps"] > 0
    assert timeless(workdir) == timeless(uninterrupted)


def test_sigterm_before_the_first_step_ends_the_run(corpus, tmp_path):
    running = start(*command(corpus, tmp_path / "run"))
    assert send_when(running, lambda: (tmp_path / "run" / "goodput.json").exists(), signal.SIGTERM) == 143
    assert "SIGTERM before the first step: there is nothing to save" in finish(running)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.slow  # worker processes take seconds to start
def test_sigterm_for_the_whole_process_group_saves(corpus, tmp_path):
    """As schedulers send it. Nothing of the group is left afterwards, nor when its first process is killed."""
    workdir = tmp_path / "run"
    again = command(corpus, workdir, "data.worker_kind=processes", "data.workers=2", "steps=1000")

    running = start(*again, start_new_session=True)
    wait_until(running, lambda: logged(workdir, 9))
    os.killpg(running.pid, signal.SIGTERM)
    assert running.wait() == 143, finish(running)[-4000:]
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert saved == lines(workdir)[-1]["step"] >= 9
    wait_until_gone(running.pid)

    running = start(*again, start_new_session=True)
    assert send_when(running, lambda: logged(workdir, saved + 2), signal.SIGKILL) == -signal.SIGKILL
    wait_until_gone(running.pid)


def test_a_finished_run_has_nothing_to_do(corpus, uninterrupted):
    before = [(uninterrupted / name).read_bytes() for name in ("metrics.jsonl", "goodput.json")]
    assert "at step 40 of 40: there is nothing to do" in train(corpus, uninterrupted)
    assert [(uninterrupted / name).read_bytes() for name in ("metrics.jsonl", "goodput.json")] == before


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
