"""Training commands in processes of their own, and what they left in their run directories."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from nmm_jax.parallel.collective_threads import enough

ROOT = pathlib.Path(__file__).parent.parent


def _simulated(devices):
    """XLA_FLAGS. Without optimization it compiles twice as fast; collectives of a busy machine may take minutes."""
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    )


def command(corpus, workdir, *overrides):
    keys = [f"--config.{o}" for o in (f"data.root={corpus}", *overrides)]
    return [sys.executable, "-m", "nmm_jax.train", "--config=tests/tiny.py", *keys, f"--workdir={workdir}"]


def environment(devices=1):
    """Of a process with so many simulated devices."""
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": _simulated(devices)}
    return os.environ | variables | ({"NPROC": str(enough(devices))} if devices > 1 else {})


def start(*args, devices=1, **of_process):
    """A process; what it says goes to the file `said`, as a pipe that nobody reads stops its writer when it is full."""
    said = tempfile.TemporaryFile("w+")
    running = subprocess.Popen(
        args, cwd=ROOT, env=environment(devices), stderr=said, stdout=subprocess.DEVNULL, **of_process
    )
    running.said = said
    return running


def finish(running):
    """Waits for it; returns what it said."""
    running.wait()
    running.said.seek(0)
    return running.said.read()


def train(corpus, workdir, *overrides, devices=1):
    """Runs to the end; returns what it said on stderr."""
    running = start(*command(corpus, workdir, *overrides), devices=devices)
    said = finish(running)
    assert running.returncode == 0, said[-4000:]
    return said


def fails(corpus, workdir, *overrides):
    running = start(*command(corpus, workdir, *overrides))
    said = finish(running)
    assert running.returncode != 0, said[-4000:]
    return said


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(workdir):
    """The lines without what depends on the machine."""
    machine = ("time/", "speed/", "memory/")
    return [{k: v for k, v in line.items() if not k.startswith(machine)} for line in lines(workdir)]


def passes_on_eight_devices(file, beside, *arguments):
    """Runs tests of a file beside another one, on simulated devices, in a process of their own."""
    tests = pathlib.Path(beside).with_name(file)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", *arguments, tests], env=environment(8), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
