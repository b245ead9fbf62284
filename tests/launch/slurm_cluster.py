"""A Slurm of its own on this machine: munged, slurmctld and slurmd; configuration, keys and state are in one folder.

One node, `localhost`, of 4 CPUs and 4 GPUs, which are other devices: Slurm hands out their numbers, nothing opens them.
No systemd, no cgroups, no accounting. Needs Debian's slurm-wlm and munge, and root: slurmd starts jobs as their users.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=1
KillWait=10
GresTypes=gpu
NodeName=localhost CPUs=4 RealMemory=2000 Gres=gpu:4
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
PartitionName=all Nodes=localhost Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=localhost PriorityTier=2
"""
# ReturnToService: a node that was set down stays so until it is resumed; with 2 it would come back when it registers.
# cred_expire: how long a requeued job waits before it starts again, in seconds (slurm.conf(5); 120 by default).
# GraceTime: from the SIGTERM that a more urgent job sends to its end, in seconds.


def missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    programs = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if programs:
        return f"{', '.join(programs)} not installed (tests/launch/install_slurm.sh)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


@contextlib.contextmanager
def cluster(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Starts it; gives the variables of the environment that sbatch, srun, squeue, scancel and scontrol need."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, controller=_free_port(), node=_free_port()))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    for gpu, device in enumerate(("null", "zero", "full", "random")):
        (folder / f"gpu{gpu}").symlink_to(f"/dev/{device}")
    (folder / "gres.conf").write_text(f"NodeName=localhost Name=gpu File={folder}/gpu[0-3]\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munged += [f"--{kind}-file={folder}/munged.{kind}" for kind in ("log", "pid", "seed")]
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "localhost"]):
            with open(folder / f"{command[0]}.said", "w") as said:
                daemons.append(
                    subprocess.Popen(command, env=os.environ | environment, stdout=said, stderr=subprocess.STDOUT)
                )
            if command is munged:
                _wait(lambda: (folder / "munge.socket").exists(), daemons, folder)
        _wait(lambda: "idle" in _says(environment, "sinfo", "--noheader", "--format=%T"), daemons, folder)
        yield environment
    finally:
        _says(environment, "scancel", "--state=RUNNING")
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _says(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True).stdout


def _wait(condition, daemons: list[subprocess.Popen], folder: pathlib.Path) -> None:
    end = time.monotonic() + 60
    while not condition():
        ended = [d for d in daemons if d.poll() is not None]
        if ended or time.monotonic() > end:
            said = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in folder.glob("*.said"))
            raise RuntimeError(f"Slurm did not start ({[d.args[0] for d in ended] or 'in time'})\n{said}")
        time.sleep(0.1)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
