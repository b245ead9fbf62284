"""A step's temporary memory is used again by the next one."""

import subprocess
import sys

from tests.training_runs import ROOT, environment

PROGRAM = """
import resource, statistics, sys
import jax, jax.numpy as jnp
from nmm_jax.parallel import host_memory

if sys.argv[1] == "kept":
    host_memory.keep_freed()

@jax.jit
def step(x):
    all_pairs = jax.lax.optimization_barrier(jnp.tanh(x[:, None] + x))  # exists: nothing fuses it away
    return (all_pairs + all_pairs[:, ::-1]).sum()

x = jnp.ones(2**12)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = statistics.median(faults() for _ in range(11))  # the first ones take the memory from the system
print(step.lower(x).compile().memory_analysis().temp_size_in_bytes // resource.getpagesize(), usual)
"""


def pages_and_faults(how: str) -> tuple[int, float]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    pages, faults = run.stdout.split()
    return int(pages), float(faults)


def test_steps_use_the_memory_of_the_step_before():
    pages, faults = pages_and_faults("kept")
    assert pages >= 2**26 / 4096 and faults < 0.02 * pages
    assert pages_and_faults("given back")[1] > 0.5 * pages
