"""Trains and evaluates the runs of a config file, one after another, and lays their numbers side by side.

    python -m nmm_jax.sweep [--config=configs/ablations.py] [--folder=runs/ablations] [--runs='base,connector-*']

The file has RUNS (a name for each run, which get_config takes), GROUPS (which are compared, by title; those of the
first differ by their seeds) and perhaps LABELS. A run is the two commands that are printed, in processes of their own:
train and evaluate, in FOLDER/NAME. What is finished is skipped, what was killed goes on from its checkpoint, and what
fails is reported while the others go on. In the end all that is there becomes

    FOLDER/results.json   parameters, FLOPs and evaluation of every run
    FOLDER/tables.md      a table for each group, and what the seeds alone do
    FOLDER/figure.png     the groups that share a run with the first, as dots
"""

import fnmatch
import importlib.util
import json
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from configs import loading
from nmm_jax.describe import describe
from nmm_jax.evaluation import comparison, results
from nmm_jax.training.progress import say

Outcome = dict[str, Any]


def load_sweep(path: str) -> ModuleType:
    """The config file as a module.

    Raises:
      ConfigError: it has no RUNS or GROUPS, or a group names another run.
    """
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    if spec is None or spec.loader is None or not pathlib.Path(path).is_file():
        raise loading.ConfigError(f"there is no config file {path!r}")
    sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sweep)
    for name in ("RUNS", "GROUPS"):
        if not hasattr(sweep, name):
            raise loading.ConfigError(f"{path} has no {name}: it is no sweep, only the config of a run")
    for title, names in sweep.GROUPS.items():
        if unknown := set(names) - set(sweep.RUNS):
            raise loading.ConfigError(f"{path}: group {title!r} has runs that are not in RUNS: {sorted(unknown)}")
    return sweep


def select(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The runs that a pattern names, in their own order.

    Raises:
      ConfigError: a pattern that names none.
    """
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise loading.ConfigError(f"--runs: no run is called {pattern!r}; there are {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


class Sweep:
    """The runs of a config file, in a folder."""

    def __init__(self, path: str, folder: str, steps: int = 0):
        """steps: of every run, for a trial that is evaluated on a few rows; 0 leaves all as it is."""
        self.module = load_sweep(path)
        self.path = path
        self.folder = pathlib.Path(folder)
        self.steps = steps

    def overrides(self, name: str) -> dict[str, Any]:
        """What the command line says besides the file: where other runs are, and a trial's steps."""
        config = loading.load(f"{self.path}:{name}")
        found: dict[str, Any] = {}
        for key in ("vision", "decoder", "connector"):
            if begins_with := config.start[key]:
                found[f"start.{key}"] = str(self.folder / pathlib.Path(begins_with).name)
        if self.steps:
            found |= {"steps": self.steps, "schedule.warmup": 0, "schedule.cooldown": 0}
        return found

    def config(self, name: str) -> ConfigDict:
        return loading.load(f"{self.path}:{name}", self.overrides(name))

    def commands(self, name: str) -> list[list[str]]:
        """Train and evaluate, as one would type them."""
        keys = [f"--config.{key}={value}" for key, value in self.overrides(name).items()]
        workdir = f"--workdir={self.folder / name}"
        return [
            ["python", "-m", "nmm_jax.train", f"--config={self.path}:{name}", *keys, workdir],
            ["python", "-m", "nmm_jax.evaluate", workdir, *(["--rows=8"] if self.steps else [])],
        ]

    def outcome(self, name: str) -> Outcome | None:
        """What came of a run; None until it is evaluated."""
        config = self.config(name)
        evaluation = results.read(str(self.folder / name), config.steps)
        if evaluation is None:
            return None
        about = describe(config)
        return {
            "parameters": about["parameters"],
            "flops": about["flops"],
            "positions": about["positions"],
            "evaluation": evaluation,
        }

    def outcomes(self) -> dict[str, Outcome]:
        """Of all runs that are finished."""
        found = {name: self.outcome(name) for name in self.module.RUNS}
        return {name: outcome for name, outcome in found.items() if outcome}

    def run(self, names: Sequence[str]) -> list[str]:
        """Makes what is not there; returns the names of those that failed."""
        failed = []
        for n, name in enumerate(names, 1):
            if self.outcome(name):
                say(f"{n}/{len(names)} {name}: finished before")
                continue
            began = time.perf_counter()
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            for command in self.commands(name):
                say(f"{n}/{len(names)} {shlex.join(command)}")
                with open(self.folder / name / "log.txt", "a") as log:
                    done = subprocess.run([sys.executable, *command[1:]], stdout=log, stderr=subprocess.STDOUT)
                if done.returncode:
                    failed.append(name)
                    say(f"{name} failed (exit code {done.returncode}); its last words are in {log.name}")
                    break
            else:
                say(f"{name}: {time.perf_counter() - began:.0f} s")
        return failed

    def write(self) -> str:
        """Writes what there is; returns the tables."""
        found, labels = self.outcomes(), getattr(self.module, "LABELS", {})
        groups: dict[str, Sequence[str]] = self.module.GROUPS
        seeds = next(iter(groups.values()))
        noise = comparison.spread(seeds, found)
        parts = []
        for title, names in groups.items():
            if any(name in found for name in names):
                parts.append(f"### {title}\n\n{comparison.table(names, found, labels)}")
        if noise:
            lines = [f"| {column} | {mean:.3f} ± {sd:.3f} |" for column, (mean, sd) in noise.items()]
            parts.append("### seeds: mean ± standard deviation\n\n| | |\n|---|---|\n" + "\n".join(lines))
        tables = "\n\n".join(parts) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
        (self.folder / "tables.md").write_text(tables)
        if noise:
            related = {title: names for title, names in groups.items() if set(names) & set(seeds)}
            drawn = comparison.figure(related, found, labels, noise, list(noise))
            drawn.savefig(self.folder / "figure.png", dpi=130)
        return tables


if __name__ == "__main__":
    CONFIG = flags.DEFINE_string("config", "configs/ablations.py", "config file with RUNS and GROUPS")
    FOLDER = flags.DEFINE_string("folder", "runs/ablations", "of the runs")
    PATTERNS = flags.DEFINE_list("runs", ["*"], "which of RUNS, as patterns")
    STEPS = flags.DEFINE_integer("steps", 0, "of every run, for a trial; 0 is as the file has it", 0)

    def main(_: list[str]) -> None:
        try:
            sweep = Sweep(CONFIG.value, FOLDER.value, STEPS.value)
            failed = sweep.run(select(sweep.module.RUNS, PATTERNS.value))
        except loading.ConfigError as e:
            sys.exit(f"sweep: {e}")
        print(sweep.write())
        if failed:
            sys.exit(f"sweep: {len(failed)} runs failed: {', '.join(failed)}; the same command tries them again")

    app.run(main)
