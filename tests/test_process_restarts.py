"""Four processes of two devices that are killed, one by one and all together, and started again by the same command."""

import os
import pathlib
import signal
import subprocess
import tempfile
import time

import numpy as np
import pytest

from tests.data_pipelines import small_corpus
from tests.training_runs import ROOT, command, environment, lines, timeless, train

pytestmark = pytest.mark.slow  # seven starts of four processes

PROCESSES, STEPS, EVERY = 4, 40, 7  # the last two are tests/tiny.py's


class Local:
    """launch/local.sh with the training; what it says goes to a file, as a pipe that nobody reads stops its writer."""

    def __init__(self, corpus, workdir):
        training = command(corpus, workdir)
        self.said = tempfile.TemporaryFile("w+")
        self.running = subprocess.Popen(
            ["launch/local.sh", f"--processes={PROCESSES}", "--devices=2", "--", *training],
            cwd=ROOT,
            env=environment(),
            stdout=self.said,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all can be killed together
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.running.poll() is None:
            os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait()

    def wait(self) -> str:
        """Until it ends; gives what it said."""
        self.running.wait()
        self.said.seek(0)
        return self.said.read()

    def process(self, number: int) -> int:
        """The id of process `number`."""
        children = pathlib.Path(f"/proc/{self.running.pid}/task/{self.running.pid}/children").read_text().split()
        own = f"NMM_PROCESS_ID={number}".encode()
        (found,) = [
            int(child) for child in children if own in pathlib.Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ]
        return found

    def wait_for_step(self, workdir, step: int) -> None:
        path = workdir / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < step:
            assert self.running.poll() is None, self.wait()[-5000:]
            time.sleep(0.01)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    small_corpus.write(root)
    return root


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The run of one process with one device."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    train(corpus, workdir)
    return workdir


@pytest.fixture(scope="module")
def uninterrupted(corpus, alone, tmp_path_factory):
    """The run of four processes; it comes after `alone`, which made the plans."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    with Local(corpus, workdir) as run:
        said = run.wait()
    assert run.running.returncode == 0, said[-5000:]
    return workdir


def test_losses_are_those_of_one_process(alone, uninterrupted):
    one, four = ([line["loss"] for line in lines(run)] for run in (alone, uninterrupted))
    np.testing.assert_allclose(four[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(four[1:21], one[1:21], rtol=1e-4)


@pytest.mark.timeout(900)  # six starts, on a machine that may have other work
def test_killed_one_by_one_and_all_together(corpus, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    for start, killed in enumerate((*range(PROCESSES), "all"), 1):
        with Local(corpus, workdir) as run:
            run.wait_for_step(workdir, start * EVERY + 2)  # the checkpoint before may be on its way
            if killed == "all":
                os.killpg(run.running.pid, signal.SIGKILL)
            else:
                os.kill(run.process(killed), signal.SIGKILL)
            said = run.wait()
        assert run.running.returncode == (-signal.SIGKILL if killed == "all" else 128 + signal.SIGKILL), said[-5000:]
        assert killed == "all" or "a process ended with exit code 137; stopping the others" in said
    with Local(corpus, workdir) as run:
        said = run.wait()
    assert run.running.returncode == 0 and "going on from" in said, said[-5000:]
    assert [line["step"] for line in lines(workdir)] == list(range(1, STEPS + 1))
    assert timeless(workdir) == timeless(uninterrupted)
