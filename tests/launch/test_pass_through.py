"""The launch scripts with stand-ins for gcloud, kubectl and xpk: what these get, and how the command arrives."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent.parent
WORDS = ['--config.note=it\'s "two  words"', "--config.a=$(HOME) $HOME `x` \\ {{name}}", "*", "", "--x='q'", "a\tb"]
CLOUD = ("--project=p", "--zone=z", "--name=run1")
# Says what it got, then does as it is told the first time, and ends well the next.
TRAIN = """
import json, os, pathlib, signal, sys, time
cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
host = pathlib.Path.home().name
with open(cloud / f"started-{host}", "a") as started:
    started.write(json.dumps([sys.argv[2:], os.environ["NMM_COORDINATOR"], os.getcwd(), os.environ["PATH"]]) + "\\n")
first = len(open(cloud / f"started-{host}").readlines()) == 1
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("hello from", host, flush=True)
if sys.argv[1] == "fail" or (sys.argv[1] == "143" and first):
    sys.exit(1 if sys.argv[1] == "fail" else 143)
if sys.argv[1] == "preempted" and first:
    (cloud / "state").write_text("SUSPENDED")
if sys.argv[1] == "sleep" or (sys.argv[1] == "preempted" and first):
    time.sleep(600)
"""


@pytest.fixture
def cloud(tmp_path):
    """A folder of stand-ins, first on the PATH of `launch`."""
    if not shutil.which("flock") or not shutil.which("setsid") or not shutil.which("git"):
        pytest.skip("needs git, flock and setsid")
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "train.py").write_text(TRAIN)
    fakes = {
        "gcloud": f'exec {sys.executable} {ROOT}/tests/launch/fake_gcloud.py "$@"',
        "kubectl": 'printf "%s\\n" "$*" >>"$FAKE_CLOUD/calls"\n'
        'case "$*" in *get*) cat "$FAKE_CLOUD/jobset" ;; *apply*) cat >"$FAKE_CLOUD/manifest" ;; esac; true',
        "xpk": f'{sys.executable} -c \'import json, sys; print(json.dumps(sys.argv[1:]))\' "$@" >"$FAKE_CLOUD/xpk"',
    }
    for name, text in fakes.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    # A small checkout of its own: what `install` sends is committed.
    shutil.copytree(ROOT / "launch", tmp_path / "checkout" / "launch")
    shutil.copy(ROOT / "requirements.txt", tmp_path / "checkout")
    for step in ("init --quiet", "add .", "-c user.name=n -c user.email=e commit --quiet --message=m"):
        subprocess.run(["git", *step.split()], cwd=tmp_path / "checkout", check=True)
    yield tmp_path
    if (tmp_path / "state").exists():
        launch(tmp_path, "tpu_vm.sh", "delete", *CLOUD)


def launch(cloud, script, *words, timeout=120):
    variables = os.environ | {"PATH": f"{cloud / 'bin'}:{os.environ['PATH']}", "FAKE_CLOUD": str(cloud)}
    return subprocess.run(
        [cloud / "checkout" / "launch" / script, *words], env=variables, capture_output=True, text=True, timeout=timeout
    )


def watch(cloud, kind, *settings):
    return launch(
        *(cloud, "tpu_vm.sh", "watch", *CLOUD, "--topology=v5e:2x4", "--poll-seconds=0.2"),
        *(*settings, "--", sys.executable, cloud / "train.py", kind, *WORDS),
    )


def started(cloud):
    """By host: what each start of it got."""
    return {
        path.name.split("-")[1]: [json.loads(line) for line in path.read_text().splitlines()]
        for path in cloud.glob("started-*")
    }


def calls(cloud, verb):
    return [call for line in open(cloud / "calls") if verb in (call := json.loads(line))[:4]]


def test_watch_brings_a_run_up_on_two_slices_and_ends_with_it(cloud):
    done = watch(cloud, "end", "--slices=2")
    assert done.returncode == 0, done.stderr
    hosts = started(cloud)
    assert sorted(hosts) == ["0", "1", "2", "3"]
    for host, [[words, coordinator, folder, path]] in hosts.items():
        assert words == WORDS and coordinator == "auto"
        assert folder == f"{cloud}/hosts/{host}/nmm/code" and path.startswith(
            f"{cloud}/hosts/{host}/nmm/environment/bin:"
        )
    home = cloud / "hosts" / "3"
    assert (home / "nmm/run1.log").read_text() == "hello from 3\n"
    assert "--requirement code/requirements.txt jax[tpu]" in (home / "uv").read_text()
    [create] = calls(cloud, "create")
    assert "--node-count=2" in create and "--accelerator-type=v5litepod-8" in create


def test_a_preempted_slice_is_made_anew_and_the_run_started_again(cloud):
    done = watch(cloud, "preempted", "--capacity=spot")
    assert done.returncode == 0, done.stderr
    assert "recreate" in done.stdout
    assert len(calls(cloud, "create")) == 2 and len(calls(cloud, "delete")) == 1
    assert all("--spot" in call for call in calls(cloud, "create"))
    assert all([words for words, *_ in starts] == [WORDS, WORDS] for starts in started(cloud).values())


def test_a_run_of_a_longer_name_is_another(cloud):
    place = "projects/p/locations/z"
    node = {"name": f"{place}/nodes/run1-2", "queuedResource": f"{place}/queuedResources/run1-2", "state": "PREEMPTED"}
    (cloud / "nodes").mkdir()
    (cloud / "nodes" / "run1-2").write_text(json.dumps(node))
    done = watch(cloud, "end")
    assert done.returncode == 0, done.stderr
    assert "recreate" not in done.stdout and not calls(cloud, "delete")


@pytest.mark.parametrize("state, said", [("SUSPENDED", "delete run1"), ("FAILED", "describe run1"), ("", "no request")])
def test_create_ends_when_no_slices_will_come(cloud, state, said):
    (cloud / "next").write_text(state)
    done = launch(cloud, "tpu_vm.sh", "create", *CLOUD, "--topology=v5e:2x4", "--poll-seconds=0.1")
    assert done.returncode == 2 and said in done.stderr


def test_watch_says_again_that_a_host_is_dead_and_what_to_do(cloud):
    assert not launch(cloud, "tpu_vm.sh", "create", *CLOUD, "--topology=v5e:2x4", "--poll-seconds=0.1").returncode
    (cloud / "hosts" / "1" / "dead").write_text("12")
    done = watch(cloud, "end")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 of 2 do") == 2 and done.stdout.count("launch/tpu_vm.sh delete") == 1
    assert "connect to host 1 port 22" in done.stderr


def test_a_run_ended_by_sigterm_is_started_again_and_not_counted(cloud):
    done = watch(cloud, "143", "--max-restarts=0")
    assert done.returncode == 0, done.stderr
    assert [len(starts) for starts in started(cloud).values()] == [2, 2]


def test_a_failing_run_is_not_started_again_for_ever(cloud):
    done = watch(cloud, "fail", "--max-restarts=1")
    assert done.returncode == 2 and "failed 2 times" in done.stderr
    assert [len(starts) for starts in started(cloud).values()] == [2, 2]


def test_start_is_refused_while_a_run_is_going_on_and_stop_lets_it_save(cloud):
    sleep = ("--", sys.executable, cloud / "train.py", "sleep")
    steps = [("create", "--topology=v5e:2x4", "--poll-seconds=0.1"), ("install",)]
    for step in steps:
        done = launch(cloud, "tpu_vm.sh", *step, *CLOUD)
        assert done.returncode == 0, done.stderr
    assert launch(cloud, "tpu_vm.sh", "status", *CLOUD).stdout.count("absent") == 2
    assert launch(cloud, "tpu_vm.sh", "start", *CLOUD, *sleep).returncode == 0
    assert launch(cloud, "tpu_vm.sh", "status", *CLOUD).stdout.count("running") == 2
    for step in (("start", *sleep), ("install",)):
        done = launch(cloud, "tpu_vm.sh", step[0], *CLOUD, *step[1:])
        assert done.returncode and "a run is going on" in done.stderr
    while len(started(cloud)) < 2:  # SIGTERM before Python is up ends it with another code
        time.sleep(0.1)
    time.sleep(0.5)
    assert launch(cloud, "tpu_vm.sh", "stop", *CLOUD).returncode == 0
    assert launch(cloud, "tpu_vm.sh", "status", *CLOUD).stdout.count("exit 143") == 2


def kubernetes_reads(words):
    """What Kubernetes makes of a container's command: $$ is $, and $(NAME) a variable, of which there must be none."""
    plain = [word.replace("$$", "\0") for word in words]
    assert not any("$(" in word for word in plain)
    return [word.replace("\0", "$") for word in plain]


@pytest.mark.parametrize(
    "kind, replicas, hosts, coordinator",
    [
        (("--topology=v5p:4x4x8", "--slices=2"), 2, 32, "auto"),
        (("--topology=tpu7x:1x1x1",), 1, 1, ""),
        (("--gpu=nvidia-h100-mega-80gb", "--nodes=4"), 1, 4, "run1-nodes-0-0.run1:8476"),
    ],
)
def test_gke_applies_a_jobset(cloud, kind, replicas, hosts, coordinator):
    words = ["python", "a\nb", *WORDS]
    done = launch(cloud, "gke.sh", "start", "--name=run1", "--image=i", "--max-restarts=7", *kind, "--", *words)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load((cloud / "manifest").read_text())
    assert manifest["metadata"]["name"] == "run1" and manifest["kind"] == "JobSet"
    [replicated] = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (replicas, hosts, hosts)
    [container] = job["template"]["spec"]["containers"]
    assert kubernetes_reads(container["command"]) == words
    assert {"name": "NMM_COORDINATOR", "value": coordinator} in container["env"]
    # Exit code 143 and preemption fail the Job for PodFailurePolicy, which restarts without being counted.
    assert {rule["action"] for rule in job["podFailurePolicy"]["rules"]} == {"FailJob"}
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {
        **{"containerName": container["name"], "operator": "In", "values": [143]}
    }
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"


@pytest.mark.parametrize(
    "name, accelerator, chips, hosts",
    [  # by hand from https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5p:4x4x8", "tpu-v5p-slice", 4, 32),
        ("v6e:16x16", "tpu-v6e-slice", 4, 64),
        ("tpu7x:4x4x4", "tpu7x", 4, 16),
    ],
)
def test_topologies_in_the_words_of_gke(cloud, name, accelerator, chips, hosts):
    done = launch(cloud, "gke.sh", "start", "--name=a", "--image=i", f"--topology={name}", "--", "true")
    assert done.returncode == 0, done.stderr
    job = yaml.safe_load((cloud / "manifest").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == hosts
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": name.split(":")[1],
    }


@pytest.mark.parametrize(
    "name, product",
    [  # https://cloud.google.com/tpu/docs/v5p and its neighbours: v4 and v5p count cores, v5e and v6e chips
        ("v4:2x2x4", "v4-32"),
        ("v5e:4x4", "v5litepod-16"),
        ("v5p:4x4x8", "v5p-256"),
        ("v5p:16x16x24", "v5p-12288"),
        ("v6e:16x16", "v6e-256"),
    ],
)
def test_create_says_the_name_of_the_product(cloud, name, product):
    done = launch(cloud, "tpu_vm.sh", "create", *CLOUD, "--dry-run", f"--topology={name}")
    assert f" {product} " in done.stdout


def test_gke_replaces_an_ended_jobset_and_leaves_a_running_one_alone(cloud):
    start = ("gke.sh", "start", "--name=run1", "--image=i", "--topology=v5e:4x4", "--", "true")
    (cloud / "jobset").write_text("run1//1")
    done = launch(cloud, *start)
    assert done.returncode == 2 and "has not ended" in done.stderr and not (cloud / "manifest").exists()
    (cloud / "jobset").write_text("run1/Failed/4")
    assert launch(cloud, *start).returncode == 0
    verbs = [call.split()[1] for call in (cloud / "calls").read_text().splitlines()]
    assert verbs == ["get", "get", "delete", "apply"]


@pytest.mark.parametrize("state, code", [("run1/Completed/2", 0), ("run1/Failed/4", 2), ("", 2)])
def test_gke_watch_ends_as_the_jobset_did(cloud, state, code):
    (cloud / "jobset").write_text(state)
    assert launch(cloud, "gke.sh", "watch", "--name=run1").returncode == code


def test_xpk_gets_a_command_that_its_shell_reads_back(cloud):
    words = ["printf", "%s\\n", *WORDS]
    done = launch(
        *(cloud, "xpk.sh", "start", *CLOUD, "--cluster=c", "--image=i", "--topology=v6e:16x16", "--slices=2"),
        *("--", *words),
    )
    assert done.returncode == 0, done.stderr
    got = json.loads((cloud / "xpk").read_text())
    assert got[:2] == ["workload", "create"] and "--tpu-type=v6e-16x16" in got and "--num-slices=2" in got
    assert "--env=NMM_COORDINATOR=auto" in got
    [command] = [word.removeprefix("--command=") for word in got if word.startswith("--command=")]
    [command] = kubernetes_reads([command])
    assert shlex.split(command) == ["exec", *words]
    done = subprocess.run(["bash", "-c", f"({command}) & wait"], capture_output=True, text=True)
    assert done.stdout == "".join(f"{word}\n" for word in WORDS)
