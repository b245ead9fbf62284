"""Every shipped config, compiled for the slice it is meant for (configs/targets.py): the table of docs/pods.md.

    python -m nmm_jax.compilation.targets --output=runs/targets [--only='mm1*'] [--write=docs/pods.md]

Each is a process of its own, `python -m nmm_jax.compile`; its JSON goes to the folder, with the command that made it,
and is made again only when that is another: delete those that a change of the code makes others. The table is printed,
or takes the place of the one in a page, whose rows stay where the folder has no others: hours of compiling need not be
one sitting's.
"""

import fnmatch
import functools
import json
import pathlib
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from absl import flags

from configs import command_line, loading
from configs.targets import TARGETS, Target
from nmm_jax.compilation import tables
from nmm_jax.compilation.tables import Facts

BEGIN, END = "<!-- targets -->", "<!-- /targets -->"


def command(target: Target) -> list[str]:
    """What compiles it, in the words that follow `python`."""
    return [
        "-m", "nmm_jax.compile", f"--config={_config(target)}",
        f"--topology={target.topology}", f"--slices={target.slices}", "--format=json",
        *(f"--config.{key}={value}" for key, value in target.overrides.items()),
    ]  # fmt: skip


def made(target: Target, folder: pathlib.Path) -> Facts | None:
    """Its facts; None if they are not in the folder, or those of what it was before it was edited."""
    path = folder / f"{target.name}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    same = found["command"] == command(target) if "command" in found else _alike(target, found)
    return found if same else None


def make(target: Target, folder: pathlib.Path) -> bool:
    """Compiles it, unless its facts are in the folder; False if that failed, and then says why.

    One that compiles and does not fit has its row too, which says so.
    """
    if made(target, folder):
        return True
    began = time.perf_counter()
    run = subprocess.run([sys.executable, *command(target)], capture_output=True, text=True)
    if run.returncode and not run.stdout:
        (folder / f"{target.name}.log").write_text(run.stderr)
        print(f"{target.name}: {run.stderr.strip()[-2000:]}", file=sys.stderr, flush=True)
        return False
    found = json.loads(run.stdout) | {"command": command(target)}
    (folder / f"{target.name}.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"{target.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return True


def _config(target: Target) -> str:
    file, _, argument = target.config.partition(":")
    return f"configs/{file}.py:{argument}"


def _alike(target: Target, found: Facts) -> bool:
    """Whether facts that do not say by which command, as compile itself writes them, are of this target."""
    config = loading.load(_config(target), target.overrides)
    meant = (_config(target), target.topology, target.slices, config.gradient_accumulation)
    return meant == tuple(found[key] for key in ("config", "topology", "slices", "gradient_accumulation"))


def write(page: pathlib.Path, table: str) -> None:
    """Puts the table between the marks in a page, with the rows there of targets that it has none of."""
    text = page.read_text()
    found = re.search(f"{BEGIN}\n(.*?){END}", text, flags=re.DOTALL)
    if not found:
        raise ValueError(f"{page} has no place for the table: no lines {BEGIN} and {END}")
    rows = _rows(found.group(1)) | _rows(table)
    merged = [rows[place] for target in TARGETS if (place := _place(target)) in rows]
    page.write_text(
        text[: found.start(1)] + "\n".join([*table.splitlines()[:2], *merged]) + "\n" + text[found.end(1) :]
    )


def _rows(table: str) -> dict[str, str]:
    """By the config and the slice of each."""
    return {" ".join(row.split(" | ", 2)[:2]).removeprefix("| "): row for row in table.splitlines()[2:]}


def _place(target: Target) -> str:
    times = f"{target.slices} x " if target.slices > 1 else ""
    return f"{target.config} {times}{target.topology}"


if __name__ == "__main__":
    OUTPUT = flags.DEFINE_string("output", "runs/targets", "folder of one JSON each")
    ONLY = flags.DEFINE_string("only", "*", "pattern of names, such as 'mm1*'")
    JOBS = flags.DEFINE_integer("jobs", 1, "that compile side by side; each takes a core or two and some GB", 1)
    WRITE = flags.DEFINE_string("write", "", "page to put the table into")

    def main(_: list[str]) -> None:
        folder = pathlib.Path(OUTPUT.value)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [target for target in TARGETS if fnmatch.fnmatch(target.config, ONLY.value)]
        if not chosen:
            raise ValueError(f"--only={ONLY.value!r} matches none of {', '.join(t.config for t in TARGETS)}")
        with ThreadPoolExecutor(JOBS.value) as jobs:
            there = list(jobs.map(functools.partial(make, folder=folder), chosen))
        failed = [target.name for target, done in zip(chosen, there, strict=True) if not done]
        table = tables.markdown([(t.config, facts) for t in TARGETS if (facts := made(t, folder))])
        write(pathlib.Path(WRITE.value), table) if WRITE.value else print(table)
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(chosen)} did not compile: {', '.join(failed)}")

    command_line.run(main)
