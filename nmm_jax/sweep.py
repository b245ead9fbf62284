"""Trains and evaluates the runs of a config file, one after another, and lays their numbers side by side.

    python -m nmm_jax.sweep [--config=configs/ablations.py] [--folder=runs/ablations] [--runs='base,connector-*']
        [--jobs=2]

The file has RUNS (a name for each run, which get_config takes), GROUPS (which are compared, by title; those of the
first differ by their seeds) and perhaps LABELS. A run is the two commands that are printed, in processes of their own:
train and evaluate, in FOLDER/NAME. What is finished is skipped, what was killed goes on from its checkpoint, and what
fails is reported while the others go on. With --jobs, runs that begin with another's encoder wait for nobody: make that
one first. In the end all that is there becomes

    FOLDER/results.json   parameters, FLOPs and evaluation of every run
    FOLDER/tables.md      a table for each group, and what the seeds alone do
    FOLDER/figure.png     the groups that share a run with the first, as dots
"""

import importlib.util
import io
import json
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from configs import command_line, loading
from data_pipelines import paths
from nmm_jax.describe import describe
from nmm_jax.evaluation import comparison, results
from nmm_jax.runner import Job, Runner, select

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


class Sweep:
    """The runs of a config file, in a folder."""

    def __init__(self, path: str, folder: str, steps: int = 0):
        """steps: of every run, for a trial that is evaluated on a few rows; 0 leaves all as it is."""
        self.module = load_sweep(path)
        self.path = path
        paths.reach(folder)
        self.folder = epath.Path(folder)
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

    def run(self, names: Sequence[str], side_by_side: int = 1) -> list[str]:
        """Makes what is not there; returns the names of those that failed."""

        def job(name: str) -> Job:
            return Job(name, self.folder / name, self.commands(name), lambda: self.outcome(name) is not None)

        return Runner(side_by_side).run([job(name) for name in names])

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
            png = io.BytesIO()
            drawn.savefig(png, dpi=130)
            (self.folder / "figure.png").write_bytes(png.getvalue())
        return tables


if __name__ == "__main__":
    CONFIG = flags.DEFINE_string("config", "configs/ablations.py", "config file with RUNS and GROUPS")
    FOLDER = flags.DEFINE_string("folder", "runs/ablations", "of the runs")
    PATTERNS = flags.DEFINE_list("runs", ["*"], "which of RUNS, as patterns")
    JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time, each on its share of the cores", 1)
    STEPS = flags.DEFINE_integer("steps", 0, "of every run, for a trial; 0 is as the file has it", 0)

    def main(_: list[str]) -> None:
        sweep = Sweep(CONFIG.value, FOLDER.value, STEPS.value)
        failed = sweep.run(select(sweep.module.RUNS, PATTERNS.value), JOBS.value)
        print(sweep.write())
        if failed:
            sys.exit(f"sweep: {len(failed)} runs failed: {', '.join(failed)}; the same command tries them again")

    command_line.run(main)
