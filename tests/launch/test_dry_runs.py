"""What every launch script says it would run, compared with recorded transcripts; and what it refuses.

NMM_RECORD=1 pytest tests/launch/test_dry_runs.py      records them anew
"""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
TRANSCRIPTS = pathlib.Path(__file__).parent / "transcripts"
NOTE = '--config.note=it\'s "two words" $HOME'
TRAIN = ("--", "python", "-m", "nmm_jax.train", "--config=configs/early_fusion.py:hw-1b", NOTE)
CLOUD = ("--project=my-project", "--zone=us-east5-a", "--name=run1")
IMAGE = "--image=us-docker.pkg.dev/my-project/images/nmm:1"

# <script>-<case>: the arguments.
CASES: dict[str, tuple[str, ...]] = {
    "local-two_processes": ("--processes=2", "--devices=4", "--port=20000", *TRAIN),
    "slurm-gpu": ("--nodes=4", "--gpus-per-node=8", "--time=24:00:00", "--partition=gpu", "--account=vision", *TRAIN),
    "slurm-cpu": (
        *("--nodes=1", "--tasks-per-node=2", "--cpus-per-task=16", "--time=60", "--job-name=a b", "--notice=120"),
        *("--requeue=no", *TRAIN),
    ),
    "tpu_vm-create": ("create", *CLOUD, "--topology=v6e:16x16"),
    "tpu_vm-create_reserved": (
        *("create", *CLOUD, "--topology=v5p:4x4x8", "--slices=2", "--capacity=reserved", "--runtime-version=other"),
        *(
            "--service-account=trainer@my-project.iam.gserviceaccount.com",
            "--create-flags=--network=tpu --internal-ips",
        ),
    ),
    "tpu_vm-install_clone": ("install", *CLOUD, "--repository=https://example.com/nmm_jax.git", "--revision=v1"),
    "tpu_vm-start": ("start", *CLOUD, "--ssh-flags=--tunnel-through-iap", *TRAIN),
    "tpu_vm-watch": ("watch", *CLOUD, "--topology=v5e:4x4", "--capacity=spot", *TRAIN),
    "tpu_vm-status": ("status", *CLOUD),
    "tpu_vm-logs": ("logs", *CLOUD, "--worker=3"),
    "tpu_vm-stop": ("stop", *CLOUD),
    "tpu_vm-delete": ("delete", *CLOUD),
    "gke-start_tpu": ("start", "--name=run1", IMAGE, "--topology=tpu7x:4x4x4", "--slices=2", *TRAIN),
    "gke-start_one_host": ("start", "--name=run1", IMAGE, "--topology=v5e:2x2", *TRAIN),
    "gke-start_gpu": (
        *("start", "--name=run1", IMAGE, "--gpu=nvidia-h100-mega-80gb", "--nodes=4"),
        *("--namespace=research", "--max-restarts=10", *TRAIN),
    ),
    "gke-watch": ("watch", "--name=run1"),
    "gke-logs": ("logs", "--name=run1"),
    "gke-delete": ("delete", "--name=run1"),
    "xpk-start": ("start", *CLOUD, "--cluster=c", IMAGE, "--topology=v5p:4x4x8", "--slices=2", *TRAIN),
    "xpk-watch": ("watch", *CLOUD, "--cluster=c"),
    "xpk-list": ("list", *CLOUD, "--cluster=c"),
    "xpk-logs": ("logs", *CLOUD, "--cluster=c"),
    "xpk-delete": ("delete", *CLOUD, "--cluster=c"),
}

# <script>: the arguments, and what the refusal must name.
REFUSALS = {
    "local.sh": [(("--processes=2",), ["--"]), (("--processes=none", "--", "true"), ["--processes"])],
    "slurm.sh": [
        ((), ["--nodes", "NMM_TIME", "command"]),
        (("--nodes=1", "--time=60", "--tasks-per-node=3", "--gpus-per-node=8", *TRAIN), ["8", "--tasks-per-node=3"]),
        (("--nodes=1", "--time=60", "--notice=5min", *TRAIN), ["--notice=5min"]),
        (("--nodes=1", "--time=60", "--requeue=never", *TRAIN), ["--requeue=never"]),
        (("--nodes=1", "--time=60", "--requeue", *TRAIN), ["--requeue", "--name=value"]),
    ],
    "tpu_vm.sh": [
        ((), ["subcommand"]),
        (("watch",), ["--project", "NMM_ZONE", "--name", "--topology", "command"]),
        (("create", *CLOUD, "--topology=v5p:4x4"), ["v5p:4x4", "3 sides"]),
        (("create", *CLOUD, "--topology=h100:8"), ["h100:8", "v5p:4x4x8"]),
        (("create", *CLOUD, "--topology=v5e:3x3"), ["v5e:3x3", "9 chips"]),
        (("create", *CLOUD, "--topology=tpu7x:4x4x4"), ["gke.sh"]),
        (("create", *CLOUD, "--topology=v5e:4x4", "--capacity=cheap"), ["cheap", "spot"]),
        (("create", *CLOUD, "--topology=v5e:4x4", "--slices=0"), ["--slices=0"]),
        (("create", *CLOUD, "--topolgy=v5e:4x4"), ["--topolgy"]),
        (("create", "my-name"), ["my-name", "--name=value"]),
    ],
    "gke.sh": [
        (("start",), ["--name", "--image", "--topology", "command"]),
        (("start", "--name=a", IMAGE, "--gpu=x", "--topology=v5e:4x4", *TRAIN), ["--gpu", "--topology"]),
        (("start", "--name=a", IMAGE, "--topology=v5e:2x2", "--slices=2", *TRAIN), ["--slices=2", "several hosts"]),
        (("logs",), ["--name"]),
        (("logs", "--name=" + 41 * "a"), ["40"]),
    ],
    "xpk.sh": [
        (("start", *CLOUD), ["--cluster", "--image", "--topology", "command"]),
        (("start", *CLOUD, "--cluster=c", IMAGE, "--topology=v5e:4x4", "--", "echo", "a\nb"), ["one line"]),
    ],
}


def launch(script, *arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NMM_") and name != "XLA_FLAGS"}
    return subprocess.run(
        [ROOT / "launch" / script, *arguments], capture_output=True, text=True, env=clean | environment, timeout=60
    )


@pytest.mark.parametrize("case", CASES)
def test_dry_run_is_as_recorded(case):
    script, (first, *rest) = case.split("-")[0] + ".sh", CASES[case]
    done = launch(script, first, "--dry-run", *rest)
    assert done.returncode == 0, done.stderr
    said, transcript = done.stdout.replace(f"{ROOT}/", ""), TRANSCRIPTS / f"{case}.txt"
    if os.environ.get("NMM_RECORD"):
        transcript.write_text(said)
    assert said == transcript.read_text()


def test_every_transcript_has_a_case():
    assert {path.stem for path in TRANSCRIPTS.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("script", REFUSALS)
def test_refusals_name_what_is_wrong(script):
    for arguments, named in REFUSALS[script]:
        done = launch(script, *arguments)
        assert done.returncode == 2 and not done.stdout, arguments
        assert all(word in done.stderr for word in named), done.stderr


@pytest.mark.parametrize("script", REFUSALS)
def test_help_names_every_setting(script):
    done = launch(script, "--help")
    assert done.returncode == 0 and "--dry-run" in done.stdout
    source = (ROOT / "launch" / script).read_text()
    if "read_settings" in source:
        names = source.split("\nread_settings ")[1].split(" -- ")[0].replace("\\\n", " ").split()
        missing = [name for name in names if f"--{name.replace('_', '-')}=" not in done.stdout]
        assert not missing


def test_settings_come_from_the_environment_and_flags_win():
    done = launch("gke.sh", "logs", "--dry-run", NMM_NAME="run1", NMM_NAMESPACE="theirs")
    assert "--namespace=theirs" in done.stdout and "jobset-name=run1" in done.stdout
    done = launch("gke.sh", "logs", "--dry-run", "--namespace=mine", NMM_NAME="run1", NMM_NAMESPACE="theirs")
    assert "--namespace=mine" in done.stdout
