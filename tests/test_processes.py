"""launch/local.sh and what it tells each process."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LOCAL = ROOT / "launch" / "local.sh"


def local(*args, **kwargs):
    return subprocess.run([LOCAL, *args], capture_output=True, text=True, cwd=ROOT, **kwargs)


def test_output_is_prefixed_and_each_process_knows_itself():
    done = local(
        "--processes=2", "--devices=3", "--", "sh", "-c", 'echo "$NMM_PROCESS_ID/$NMM_PROCESS_COUNT"; echo x >&2'
    )
    assert done.returncode == 0
    assert sorted(done.stdout.split("\n")) == ["", "[0] 0/2", "[1] 1/2"]
    assert sorted(done.stderr.split("\n")) == ["", "[0] x", "[1] x"]


def test_dry_run_tells_what_would_start():
    done = local("--processes=2", "--devices=3", "--port=7777", "--dry-run", "--", "touch", "a file")
    lines = done.stdout.strip().split("\n")
    assert len(lines) == 2 and "NMM_PROCESS_ID=1" in lines[1] and "NMM_COORDINATOR=localhost:7777" in lines[0]
    assert "--xla_force_host_platform_device_count=3" in lines[0] and "touch 'a file'" in lines[0]


def test_one_that_fails_ends_all():
    began = time.monotonic()
    done = local("--processes=3", "--", "sh", "-c", '[ "$NMM_PROCESS_ID" = 1 ] && exit 7; exec sleep 60')
    assert done.returncode == 7 and time.monotonic() - began < 20
    assert "exit code 7" in done.stderr


def test_sigterm_reaches_every_process():
    script = 'trap "echo stopping; exit 143" TERM; echo ready; while :; do sleep 0.1; done'
    running = subprocess.Popen([LOCAL, "--processes=2", "--", "bash", "-c", script], stdout=subprocess.PIPE, text=True)
    lines = [running.stdout.readline() for _ in range(2)]
    running.send_signal(signal.SIGTERM)
    rest, _ = running.communicate(timeout=20)
    assert running.returncode == 143, lines
    assert sorted(rest.split()) == ["[0]", "[1]", "stopping", "stopping"]


EARLY = """
import os, signal, time
from nmm_jax.parallel import processes
from nmm_jax.training.preemption import Preemption
processes.initialize()
if os.environ["NMM_PROCESS_ID"] == "0":
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(3)  # the step compiles
stop = Preemption()
print([stop.reached(step) for step in (1, 2)])
"""


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_while_the_step_compiles_ends_the_run_after_its_first_step(count):
    done = local(f"--processes={count}", "--", sys.executable, "-c", EARLY, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[{process}] [True, False]" for process in range(count)]


@pytest.mark.parametrize(
    "args, message",
    [(["--procs=2"], "unknown setting '--procs'"), (["--processes=2"], "missing: a training command after --")],
)
def test_mistakes(args, message):
    done = local(*args)
    assert done.returncode == 2 and message in done.stderr and "--help" in done.stderr


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"NMM_PROCESS_COUNT": "2"}, "NMM_PROCESS_ID=''; set it to a number"),
        ({"NMM_PROCESS_COUNT": "2", "NMM_PROCESS_ID": "2"}, "NMM_PROCESS_ID=2 is not below NMM_PROCESS_COUNT=2"),
    ],
)
def test_an_environment_that_is_not_whole(environment, message, monkeypatch):
    from nmm_jax.parallel import processes

    for name, value in {"NMM_COORDINATOR": "localhost:1", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        processes.initialize()


def test_each_process_builds_the_rows_its_devices_address():
    """fsdp 2 x tensor 2 over two processes of two devices: half the rows each. tensor 4: both build all."""
    program = (
        "from nmm_jax.parallel import processes; processes.initialize()\n"
        "import jax, numpy as np\n"
        "from nmm_jax.parallel.mesh import mesh_of\n"
        "from nmm_jax.parallel.batches import local_rows, to_global\n"
        "for sizes in ({'fsdp': 2, 'tensor': 2}, {'tensor': 4}):\n"
        "  mesh = mesh_of(sizes); rows = local_rows(mesh, 8)\n"
        "  whole = to_global({'x': 10 * rows}, mesh, 8)['x']\n"
        "  total = jax.jit(lambda x: (x * np.arange(8)).sum())(whole)\n"
        "  print(sizes['tensor'], rows.tolist(), int(total), flush=True)\n"
    )
    done = local("--processes=2", "--devices=2", "--", sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr[-3000:]
    total = sum(10 * b * b for b in range(8))
    lines = [line for line in done.stdout.split("\n") if "Gloo" not in line]
    everything = list(range(8))
    for line in (
        f"[0] 2 [0, 1, 2, 3] {total}",
        f"[1] 2 [4, 5, 6, 7] {total}",
        *(f"[{i}] 4 {everything} {total}" for i in (0, 1)),
    ):
        assert line in lines, done.stdout


@pytest.mark.slow  # longer than Gloo waits for a process to connect
def test_processes_meet_however_late_one_comes():
    program = (
        "from nmm_jax.parallel import processes; processes.initialize()\n"
        "import jax, time\n"
        "from jax.experimental.multihost_utils import process_allgather\n"
        "time.sleep(0 if jax.process_index() else 35)\n"
        "processes.meet('slept'); processes.meet('slept')\n"
        "print(process_allgather(jax.process_index()).tolist(), flush=True)\n"
    )
    done = local("--processes=2", "--", sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"[0] [0, 1]", "[1] [0, 1]"} <= set(done.stdout.split("\n"))
