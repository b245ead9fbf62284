"""One program on many processes: how they find each other.

Each process is told by its environment (launch/local.sh and the cluster templates set it):

    NMM_COORDINATOR     host:port of process 0; `auto` where JAX can ask the cluster (Cloud TPU, GKE, Slurm, MPI)
    NMM_PROCESS_COUNT   how many processes there are
    NMM_PROCESS_ID      which one this is, from 0

Without NMM_COORDINATOR the program runs alone.
"""

import os

import jax
from absl import logging


def initialize() -> None:
    """Joins the other processes, if there are any. Comes before anything that touches a device.

    Raises:
      ValueError: the environment names a coordinator but not, or not sensibly, this process.
    """
    coordinator = os.environ.get("NMM_COORDINATOR", "")
    if not coordinator:
        return
    # Collectives between CPU processes; other backends do not read this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator == "auto":
        jax.distributed.initialize()
    else:
        count, process = _number("NMM_PROCESS_COUNT"), _number("NMM_PROCESS_ID")
        if not 0 <= process < count:
            raise ValueError(f"NMM_PROCESS_ID={process} is not below NMM_PROCESS_COUNT={count}; ids count from 0")
        jax.distributed.initialize(coordinator, count, process)
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"NMM_COORDINATOR is set and {name}={text!r}; set it to a number (launch/local.sh does)")
    return int(text)
