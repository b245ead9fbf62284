"""What `auto` makes of the environment of each kind of cluster, asked of JAX itself, and what is said when it fails."""

import os
import re
import socket
import subprocess
import sys

import pytest
from jax._src.clusters import cloud_tpu_cluster, cluster

from nmm_jax.parallel import processes
from nmm_jax.parallel.processes import Place
from tests.training_runs import ROOT

FOREIGN = re.compile("NMM_|SLURM_|OMPI_|TPU_|MEGASCALE_|KUBERNETES_|CUDA_VISIBLE|JAX_LOCAL|JAX_COORDINATOR")
TASK = {  # what Slurm 22.05 sets for the fourth of eight tasks on two nodes of four GPUs
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_GPUS_ON_NODE": "4",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets NMM_COORDINATOR=auto and what it is given; nothing else tells of a cluster."""
    for name in filter(FOREIGN.match, tuple(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("NMM_COORDINATOR", "auto")
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu[07-08]", "gpu07"),
        ("gpu[2,7-9]", "gpu2"),
        ("login,gpu[1-2]", "login"),
        ("rack-1-gpu[001-128]", "rack-1-gpu001"),
    ],
)
def test_slurm(environment, nodes, first):
    environment(TASK | {"SLURM_STEP_NODELIST": nodes})
    assert processes.find() == Place(f"{first}:61441", 8, 3, [3])  # the port is of the job: 61440 + 4097 modulo 4096


@pytest.mark.parametrize(
    "differently, gpus",
    [
        ({}, [3]),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, [2, 3]),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, [0, 1, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "3"}, [0]),  # --gpus-per-task=1: none but its own, which is its first
        ({"CUDA_VISIBLE_DEVICES": "GPU-a5,GPU-b6"}, [0, 1]),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),  # a CPU node
        ({"JAX_LOCAL_DEVICE_IDS": "2"}, None),  # which JAX reads
    ],
)
def test_gpus_of_a_slurm_task(environment, differently, gpus):
    environment(TASK | differently)
    assert processes.find().devices == gpus


def test_gpus_that_do_not_divide(environment):
    environment(TASK | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"})
    with pytest.raises(ValueError, match="6 GPUs do not divide over 4 tasks a node; make --tasks-per-node a divisor"):
        processes.find()


SLICE = {"TPU_WORKER_HOSTNAMES": "job-0-0.net,job-0-1.net", "TPU_WORKER_ID": "1"}
SECOND = {"MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.net:8080", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}


@pytest.fixture
def tpu(environment, monkeypatch):
    """A host with TPUs, whose network knows every name; gives what sets the environment, and the metadata."""
    for module in (cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    metadata = {}
    monkeypatch.setattr(
        cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200) if key in metadata else ("", 404)
    )
    return environment, metadata


def test_gke_slices(tpu):
    environment, _ = tpu
    environment(SLICE)
    assert processes.find() == Place("job-0-0.net:8482", 2, 1)
    environment(SECOND | {"TPU_WORKER_HOSTNAMES": "job-1-0.net,job-1-1.net"})
    assert processes.find() == Place("job-0-0.net:8482", 4, 3)


def test_cloud_tpu_vms(tpu):
    _, metadata = tpu
    metadata |= {"agent-worker-number": "1", "worker-network-endpoints": "a:b:10.1.0.2,a:b:10.1.0.3", "tpu-env": ""}
    assert processes.find() == Place("10.1.0.2:8482", 2, 1)
    metadata["tpu-env"] = "\n".join(f"{name}: '{value}'" for name, value in SECOND.items())
    assert processes.find() == Place("job-0-0.net:8482", 4, 3)


def test_slices_that_do_not_know_of_each_other(tpu):
    environment, _ = tpu
    environment(SLICE | {"NMM_PROCESS_COUNT": "4"})
    message = "NMM_PROCESS_COUNT=4, but the cluster tells process 1 at job-0-0.net:8482 of 2 .*MEGASCALE_NUM_SLICES"
    with pytest.raises(ValueError, match=message):
        processes.find()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({}, "JAX finds no cluster to ask"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, "in Slurm's job 7 without being a task of srun"),
        ({"NMM_COORDINATOR": "node1"}, "NMM_COORDINATOR='node1' has no port"),
        (TASK | {"NMM_PROCESS_COUNT": "1"}, "NMM_PROCESS_COUNT=1, but the cluster tells process 3 at gpu07:61441 of 8"),
    ],
)
def test_environments_that_are_not_whole(environment, variables, message):
    environment(variables)
    with pytest.raises(ValueError, match=message):
        processes.find()


@pytest.mark.parametrize(
    "coordinator, why", [("localhost:9", "Connection refused"), ("node001.invalid:62000", "Name or service not known")]
)
def test_a_coordinator_that_does_not_answer(environment, coordinator, why):
    environment({"NMM_COORDINATOR": coordinator, "NMM_PROCESS_COUNT": "2", "NMM_PROCESS_ID": "1"})
    message = f"process 1 of 2 could not reach process 0 at {coordinator} in 0 s: .*{why}.* Has process 0 started"
    with pytest.raises(TimeoutError, match=message):
        processes.initialize(timeout=0)


PROGRAM = "from nmm_jax.parallel import processes; processes.initialize(timeout=3)"


def test_others_that_do_not_come(environment):
    """JAX ends the process without an exception; what is wrong is said before."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment({"NMM_COORDINATOR": f"localhost:{port}", "NMM_PROCESS_COUNT": "2", "NMM_PROCESS_ID": "0"})
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode
    assert f"process 0 of 2 waits for the others at localhost:{port}, and ends soon: not all 2 came" in done.stderr


def test_processes_that_count_differently():
    """Process 1 hears from JAX what process 0 counts."""
    program = (
        "import os; os.environ['NMM_PROCESS_COUNT'] = str(2 + int(os.environ['NMM_PROCESS_ID']))\n"
        "from nmm_jax.parallel import processes; processes.initialize(timeout=20)"
    )
    done = subprocess.run(
        [ROOT / "launch/local.sh", "--processes=2", "--", sys.executable, "-c", program], capture_output=True, text=True
    )
    assert done.returncode
    assert re.search(
        r"\[1\] ValueError: process 1 of 3, but process 0 at localhost:\d+ counts 2 processes", done.stderr
    )
