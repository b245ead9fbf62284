"""One program on many processes: how they find each other.

Each process is told by its environment (the launch scripts set it):

    NMM_COORDINATOR     host:port of process 0, or `auto`: JAX asks the cluster
    NMM_PROCESS_COUNT   how many processes there are; `auto` knows, and compares if it is set
    NMM_PROCESS_ID      which one this is, from 0; `auto` knows

Without NMM_COORDINATOR the program runs alone. `auto` takes the first of these that is there (jax/_src/clusters):

    Open MPI 4     what mpirun sets (Open MPI 5: from JAX 0.11 on, with the package `mpi4py`)
    Slurm          what srun sets for its tasks; the batch script around them is none
    GKE, TPUs      TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, which GKE sets
    Cloud TPU VM   the metadata server
    Kubernetes     without TPUs; needs the package `kubernetes`, and a service account that may read pods

On TPUs several slices are one program if MEGASCALE_COORDINATOR_ADDRESS, _NUM_SLICES and _SLICE_ID say so (JobSets and
queued resources see to it); otherwise each slice counts its own processes from 0, which NMM_PROCESS_COUNT uncovers.
"""

import contextlib
import dataclasses
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import jax
from absl import logging
from jax._src import distributed  # the public barrier is a collective of devices
from jax._src.clusters import ClusterEnv  # the public way in connects as well, and ends the process when that fails

from nmm_jax.parallel import collective_threads

TIMEOUT = 300  # seconds; JAX's own
_MEETINGS = itertools.count()


@dataclasses.dataclass(frozen=True)
class Place:
    """Who this process is. `devices` are the local GPUs it takes, all that it sees if None."""

    coordinator: str
    count: int
    process: int
    devices: Sequence[int] | None = None

    def __str__(self) -> str:
        return f"process {self.process} of {self.count}"


def initialize(timeout: int = TIMEOUT) -> None:
    """Joins the other processes, if there are any. Comes before anything that touches a device.

    Args:
      timeout: seconds that a process waits for the others.

    Raises:
      ValueError: the environment names a coordinator but not, or not sensibly, this process.
      TimeoutError: nobody answers at the coordinator's address.
    """
    place = find(timeout)
    collective_threads.provide(alone=place is None)
    if place is None:
        return
    logging.info("%s: joining the others at %s", place, place.coordinator)
    if place.process:
        _await_coordinator(place, timeout)
    with _warning_of_the_end(place, timeout):
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.process,
            place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout,
        )
    if jax.process_count() != place.count:  # JAX believes process 0
        raise ValueError(
            f"{place}, but process 0 at {place.coordinator} counts {jax.process_count()} processes: "
            "NMM_PROCESS_COUNT must be the same for all"
        )
    logging.info("%s has %d of %d devices", place, jax.local_device_count(), jax.device_count())


def meet(what: str) -> None:
    """Waits, for as long as it takes, until every process is here; `what` is what each has done.

    No collective does this: the first one between CPU processes fails when they come to it more than 30 s apart, the
    time that Gloo has to connect. While they wait, processes hear of one that dies by its missing heartbeats.
    """
    client = distributed.global_state.client
    if client is not None:
        week = 7 * 24 * 3600 * 1000  # milliseconds
        client.wait_at_barrier(f"nmm_jax {next(_MEETINGS)}: {what}", week)


def find(timeout: int = TIMEOUT) -> Place | None:
    """What the environment says of this process; None if it is alone."""
    coordinator = os.environ.get("NMM_COORDINATOR", "")
    if not coordinator:
        return None
    if coordinator == "auto":
        return _ask_cluster(timeout)
    if not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"NMM_COORDINATOR={coordinator!r} has no port; set it to host:port of process 0, or to auto")
    place = Place(coordinator, _number("NMM_PROCESS_COUNT"), _number("NMM_PROCESS_ID"))
    if not place.process < place.count:
        raise ValueError(
            f"NMM_PROCESS_ID={place.process} is not below NMM_PROCESS_COUNT={place.count}; ids count from 0"
        )
    return place


def _ask_cluster(timeout: int) -> Place:
    coordinator, count, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, timeout
    )
    if coordinator is None or count is None or process is None:
        job = os.environ.get("SLURM_JOB_ID")
        if job:
            raise ValueError(
                f"NMM_COORDINATOR=auto, but this process is in Slurm's job {job} without being a task of srun; "
                "start the command with srun (launch/slurm.sh does)"
            )
        raise ValueError(
            "NMM_COORDINATOR=auto, but JAX finds no cluster to ask: neither Open MPI, nor Slurm, nor Kubernetes, nor "
            "TPUs (with libtpu installed); set it to host:port of process 0, or unset it to run alone"
        )
    if os.environ.get("NMM_PROCESS_COUNT") and _number("NMM_PROCESS_COUNT") != count:
        raise ValueError(
            f"NMM_PROCESS_COUNT={os.environ['NMM_PROCESS_COUNT']}, but the cluster tells process {process} at "
            f"{coordinator} of {count} processes; were all started by one launcher, and is MEGASCALE_NUM_SLICES set "
            "where there are several TPU slices?"
        )
    if os.environ.get("SLURM_STEP_NUM_TASKS") == str(count):
        devices = _share_of_gpus()
    return Place(coordinator, count, process, devices)


def _share_of_gpus() -> list[int] | None:
    """The GPUs of a Slurm task: all those that were given to it alone, or its even share of those that all tasks see.

    JAX by itself takes one: of 8 GPUs a single task would leave 7 idle, and a task that sees only its own would look
    for one that is not there.
    """
    if os.environ.get("JAX_LOCAL_DEVICE_IDS") or not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return None
    visible = len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
    if visible < _number("SLURM_GPUS_ON_NODE"):
        return list(range(visible))
    tasks = _number("SLURM_STEP_NUM_TASKS") // _number("SLURM_STEP_NUM_NODES")
    if visible % tasks:
        raise ValueError(f"{visible} GPUs do not divide over {tasks} tasks a node; make --tasks-per-node a divisor")
    share = visible // tasks
    first = _number("SLURM_LOCALID") * share
    return list(range(first, first + share))


def _await_coordinator(place: Place, timeout: int) -> None:
    """Returns when somebody listens there. JAX would end the process with a stack trace that tells no address."""
    host, _, port = place.coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{place} could not reach process 0 at {place.coordinator} in {timeout} s: {error}. Has process 0 "
                    "started, and what does its log say? Does its name resolve here, and is the port open between the "
                    "hosts? (With NMM_COORDINATOR=auto, JAX_COORDINATOR_PORT chooses another for all processes.)"
                ) from error
        time.sleep(1)


@contextlib.contextmanager
def _warning_of_the_end(place: Place, timeout: int) -> Iterator[None]:
    """Says what is wrong before JAX ends the process, which it does without an exception."""
    warning = threading.Timer(
        0.9 * timeout,
        logging.error,
        (
            f"{place} waits for the others at {place.coordinator}, and ends soon: not all {place.count} came. Their "
            "logs tell why; were as many started, each with an id of its own, the same NMM_COORDINATOR and the same "
            "NMM_PROCESS_COUNT?",
        ),
    )
    warning.daemon = True
    warning.start()
    try:
        yield
    finally:
        warning.cancel()


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"NMM_COORDINATOR is set and {name}={text!r}; set it to a number (the launch scripts do)")
    return int(text)
