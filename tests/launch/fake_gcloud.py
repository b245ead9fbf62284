"""A gcloud for tests. $FAKE_CLOUD is the cloud: `state` is the queued resource's, `hosts/*` are the homes of its hosts.

What ssh is given runs in a shell in each of them, as it would there; a host is not reached as often as its file `dead`
says. `nodes/*` are, as JSON, the nodes of this queued resource and of others. `next` is the state that a request comes
to, ACTIVE unless it is there. Every call is one line of `calls`.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])
STATE = CLOUD / "state"
HOSTS_A_SLICE = 2


def hosts():
    return sorted((CLOUD / "hosts").glob("*"))


def wanted(resource, flags):
    """Whether --filter=FIELD~PATTERN takes it."""
    field, _, pattern = flags["filter"].partition("~")
    return re.search(pattern, resource[field])


def add_nodes(name, flags):
    """The slices of a queued resource: one node of --node-id, or --node-count of them after --node-prefix."""
    (CLOUD / "nodes").mkdir(exist_ok=True)
    count = int(flags.get("node-count", 0))
    for node in [f"{flags['node-prefix']}-{i}" for i in range(count)] or [flags["node-id"]]:
        place = "projects/p/locations/z"
        described = {
            "name": f"{place}/nodes/{node}",
            "queuedResource": f"{place}/queuedResources/{name}",
            "state": "READY",
        }
        (CLOUD / "nodes" / node).write_text(json.dumps(described))


def answer(host, command):
    """The exit code of a command on a host."""
    dead = host / "dead"
    if dead.exists() and (times := int(dead.read_text())):
        dead.write_text(str(times - 1))
        print(f"ssh: connect to host {host.name} port 22: Connection timed out", file=sys.stderr)
        return 255
    return subprocess.run(["bash", "-c", command], cwd=host, env=os.environ | {"HOME": str(host)}).returncode


def main(words):
    with open(CLOUD / "calls", "a") as calls:
        calls.write(json.dumps(words) + "\n")
    words = words[words[0] == "alpha" :]
    group, verb = words[2:4]
    flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    if group == "tpu-vm":
        for path in sorted((CLOUD / "nodes").glob("*")):
            if wanted(node := json.loads(path.read_text()), flags):
                print(f"{node['state']}\t{HOSTS_A_SLICE}")
    elif verb == "list":
        print(STATE.read_text() if STATE.exists() else "", end="")
    elif verb == "create":
        if STATE.exists():
            return 1
        add_nodes(words[4], flags)
        for i in range(int(flags.get("node-count", 1)) * HOSTS_A_SLICE):
            programs = CLOUD / "hosts" / str(i) / ".local" / "bin"
            programs.mkdir(parents=True)
            uv = programs / "uv"
            uv.write_text('#!/bin/sh\nmkdir -p environment/bin\necho "$@" >>"$HOME/uv"\n')
            uv.chmod(0o755)
        coming = CLOUD / "next"
        STATE.write_text(coming.read_text() if coming.exists() else "ACTIVE")
    elif verb == "delete":
        for host in hosts():
            if (host / "nmm" / "group").exists():
                try:
                    os.killpg(int((host / "nmm" / "group").read_text()), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            shutil.rmtree(host)
        for path in (CLOUD / "nodes").glob("*"):
            if json.loads(path.read_text())["queuedResource"].endswith(f"/queuedResources/{words[4]}"):
                path.unlink()
        STATE.unlink()
    elif verb == "scp":
        for host in hosts():
            shutil.copy(words[4], host / words[5].split(":")[1])
    elif verb == "ssh":
        return max([answer(host, flags["command"]) for host in hosts()])
    return 0


sys.exit(main(sys.argv[1:]))
