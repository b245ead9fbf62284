"""Jobs in processes of their own: side by side, and how they end."""

import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from nmm_jax import runner
from nmm_jax.runner import Job, Runner

ROOT = os.path.dirname(os.path.dirname(__file__))


def job(folder, name, program, finished=lambda: False):
    return Job(name, epath.Path(folder) / name, [["python", "-c", program]], finished)


def test_shares_of_the_cores():
    assert runner.shares([0, 1, 4, 5], 2) == [{0, 1}, {4, 5}]
    assert runner.shares([0, 1, 2], 2) == [{0}, {1, 2}]
    assert runner.shares([0, 1], 1) == [set()] and runner.shares([0, 1], 3) == [set()] * 3


def test_jobs_run_side_by_side_and_a_failure_stops_no_other(tmp_path, capsys):
    """Each waits for the other's file, so that one after another they would never end."""
    waits = (
        "import pathlib, time; pathlib.Path({0!r}).touch()\nwhile not pathlib.Path({1!r}).exists(): time.sleep(0.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    jobs = [
        job(tmp_path, "first", waits.format(a, b)),
        job(tmp_path, "second", waits.format(b, a) + "\nraise SystemExit('no more')"),
        job(tmp_path, "third", "assert False", finished=lambda: True),
        job(tmp_path, "fourth", "import os; print(len(os.sched_getaffinity(0)))"),
    ]
    assert Runner(2).run(jobs) == ["second"]
    said = capsys.readouterr().err
    assert "second failed (exit code 1)" in said and "3/4 third: finished before" in said and "fourth: " in said
    assert "no more" in (tmp_path / "second" / "log.txt").read_text()
    cores = len(os.sched_getaffinity(0))
    assert int((tmp_path / "fourth" / "log.txt").read_text()) in ({cores // 2, -(-cores // 2)} if cores > 1 else {1})


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_those_that_run_and_those_that_wait(tmp_path, sent):
    program = f"""
import signal
from etils import epath
from nmm_jax.runner import Job, Runner
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells ignore for what they start behind
def job(name):
    commands = [["python", "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]]
    return Job(name, epath.Path({str(tmp_path)!r}) / name, commands, lambda: False)
Runner(2).run([job(name) for name in "abc"])
"""
    running = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    logs = [tmp_path / name / "log.txt" for name in "ab"]
    until = time.monotonic() + 60
    while not all(log.exists() and log.read_text().endswith("\n") for log in logs):
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    running.send_signal(sent)
    _, said = running.communicate(timeout=60)
    assert running.returncode == (143 if sent == signal.SIGTERM else -signal.SIGINT), said
    assert not (tmp_path / "c").exists()
    for log in logs:
        with pytest.raises(ProcessLookupError):
            os.kill(int(log.read_text()), 0)
