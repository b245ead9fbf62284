"""launch/slurm.sh on a real Slurm that is started for it on this machine."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from tests.data_pipelines import small_corpus
from tests.launch import slurm_cluster
from tests.training_runs import ROOT, command, environment, lines

pytestmark = [
    pytest.mark.slow,  # minutes: a job that is requeued waits
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
]
SETTINGS = ("--nodes=1", "--tasks-per-node=2", "--time=10")


class Slurm:
    """Submits by launch/slurm.sh and looks after the jobs, whose output is in `folder`/<job>.txt."""

    def __init__(self, variables: dict[str, str], folder: pathlib.Path):
        self._environment = environment() | variables | {"SBATCH_OUTPUT": f"{folder}/%j.txt"}
        self._folder = folder

    def call(self, *words) -> str:
        done = subprocess.run(words, env=self._environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, settings, training) -> str:
        """The number of the job."""
        return self.call("launch/slurm.sh", *settings, "--", *training).split()[-1]

    def field(self, job: str, name: str) -> str:
        fields = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)[name]

    def said(self, job: str) -> str:
        path = self._folder / f"{job}.txt"
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, condition, what: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"job {job}: not {what} in {seconds} s\n{self.said(job)[-5000:]}"
            time.sleep(0.2)

    def wait_until_ended(self, job: str) -> str:
        """The state it ended in."""
        self.wait(job, lambda: self.field(job, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"), "ended")
        return self.field(job, "JobState")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_cluster.cluster(folder) as variables:
        yield Slurm(variables, folder)


def test_two_tasks_train_are_told_to_end_go_on_and_are_evaluated(slurm, tmp_path):
    corpus, workdir = tmp_path / "corpus", tmp_path / "run"
    small_corpus.write(corpus, counts=(60, 40, 40), held_out=12)
    training = command(corpus, workdir, "steps=120", "checkpoint.every=1000", "data.window=64")

    job = slurm.submit(SETTINGS, training)
    slurm.wait(job, lambda: (workdir / "metrics.jsonl").exists() and len(lines_so_far(workdir)) > 8, "at step 9")
    slurm.call(
        "scancel", "--signal=TERM", job
    )  # what Slurm sends `--notice` seconds before the limit, to the same tasks
    slurm.wait(job, lambda: slurm.field(job, "Restarts") == "1", "requeued")
    (saved,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert 9 <= saved < 120
    assert slurm.wait_until_ended(job) == "COMPLETED", slurm.said(job)[-5000:]

    said = slurm.said(job)
    assert "0: process 0 of 2 has 1 of 2 devices" in bare(said) and "1: process 1 of 2 has" in bare(said)
    assert f"going on from {workdir}/checkpoints/{saved}" in said
    assert [line["step"] for line in lines(workdir)] == list(range(1, 121))

    evaluation = [sys.executable, "-m", "nmm_jax.evaluate", f"--workdir={workdir}", "--rows=8"]
    job = slurm.submit(("--nodes=1", "--time=10"), evaluation)
    assert slurm.wait_until_ended(job) == "COMPLETED", slurm.said(job)[-5000:]
    found = json.loads((workdir / "evaluation" / "120.json").read_text())
    assert found["step"] == 120 and set(found["held_out"]) == set(small_corpus.SOURCES)


def test_a_cancelled_job_does_not_come_back(slurm):
    job = slurm.submit((*SETTINGS, "--job-name=idle"), ["sleep", "600"])
    slurm.wait(job, lambda: slurm.field(job, "JobState") == "RUNNING", "started")
    slurm.call("scancel", job)
    assert slurm.wait_until_ended(job) == "CANCELLED"
    assert slurm.field(job, "Restarts") == "0" and slurm.field(job, "JobName") == "idle"


# As training: saves at SIGTERM and exits with 143; the second start has little left to do.
TRAINING = ("sh", "-c", "trap 'exit 143' TERM; echo begun; [ $SLURM_RESTART_COUNT ] || while :; do sleep 0.1; done")
HALF = ("--nodes=1", "--tasks-per-node=2", "--cpus-per-task=1", "--time=10")  # of the node


def test_a_more_urgent_job_goes_first(slurm):
    job = slurm.submit(SETTINGS, TRAINING)
    slurm.wait(job, lambda: slurm.said(job).count("begun") == 2, "begun")
    urgent = slurm.submit((*SETTINGS, "--partition=urgent"), ["true"])
    assert slurm.wait_until_ended(urgent) == "COMPLETED" and slurm.field(job, "JobState") == "PENDING"
    assert slurm.wait_until_ended(job) == "COMPLETED" and slurm.field(job, "Restarts") == "1"


def test_a_lost_node(slurm):
    job = slurm.submit(SETTINGS, TRAINING)
    slurm.wait(job, lambda: slurm.said(job).count("begun") == 2, "begun")
    slurm.call("scontrol", "update", "nodename=localhost", "state=down", "reason=lost")
    slurm.wait(job, lambda: slurm.field(job, "JobState") == "PENDING", "requeued")
    slurm.call("scontrol", "update", "nodename=localhost", "state=resume")
    assert slurm.wait_until_ended(job) == "COMPLETED" and slurm.field(job, "Restarts") == "1"


def test_time_limit_and_failures(slurm):
    """A job at its limit comes back; one whose task fails ends, and does not; neither does one with --requeue=no."""
    limited = slurm.submit((*HALF, "--time=1", "--notice=5"), TRAINING)
    failing = slurm.submit(HALF, ["sh", "-c", '[ "$SLURM_PROCID" = 1 ] && exit 3; exec sleep 600'])
    told = slurm.submit((*HALF, "--requeue=no"), ["sh", "-c", "exit 143"])
    assert slurm.wait_until_ended(limited) == "COMPLETED" and slurm.field(limited, "Restarts") == "1"
    for job, code in ((told, 143), (failing, 137)):
        assert slurm.wait_until_ended(job) == "FAILED", slurm.said(job)
        assert slurm.field(job, "ExitCode") == f"{code}:0" and slurm.field(job, "Restarts") == "0"
    assert "task 1: Exited with exit code 3" in slurm.said(failing)


@pytest.mark.parametrize(
    "settings, gpus",
    [
        (("--gpus-per-node=4",), [[0], [1], [2], [3]]),
        (("--gpus-per-node=4", "--tasks-per-node=2", "--cpus-per-task=2"), [[0, 1], [2, 3]]),
        (("--gpus-per-node=3", "--tasks-per-node=1"), [[0, 1, 2]]),
    ],
)
def test_tasks_share_the_gpus_of_their_node(slurm, settings, gpus):
    program = "from nmm_jax.parallel import processes as p; x = p.find(); print(x.process, x.count, x.devices)"
    job = slurm.submit(("--nodes=1", "--time=10", *settings), [sys.executable, "-c", program])
    assert slurm.wait_until_ended(job) == "COMPLETED", slurm.said(job)
    for task, own in enumerate(gpus):
        assert f"{task}: {task} {len(gpus)} {own}\n" in slurm.said(job)


def test_a_command_that_srun_does_not_start_is_told_so(slurm):
    program = "import os; os.environ['NMM_COORDINATOR'] = 'auto'; from nmm_jax.parallel import processes as p; p.find()"
    job = slurm.call("sbatch", "--parsable", f'--wrap={sys.executable} -c "{program}"').strip()
    assert slurm.wait_until_ended(job) == "FAILED"
    assert f"Slurm's job {job} without being a task of srun" in slurm.said(job)


def lines_so_far(workdir):
    return (workdir / "metrics.jsonl").read_bytes().splitlines()


def bare(said: str) -> str:
    """Without what the logger writes before a message."""
    return "\n".join(line.split(": ", 1)[0] + ": " + line.rsplit("] ", 1)[-1] for line in said.splitlines())
