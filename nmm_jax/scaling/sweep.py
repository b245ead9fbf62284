"""Makes the runs of a study, which scaling laws are fitted to; the same command goes on where it was interrupted.

    python -m nmm_jax.scaling.sweep --config=configs/study.py:generated --folder=runs/study [--jobs=2 --runs='early-*']
    python -m nmm_jax.scaling.sweep --config=configs/study.py:generated --folder=runs/study --status
    python -m nmm_jax.scaling.sweep --config=configs/study.py:paper --folder=gs://bucket/study --print

Of every trunk (scaling/study.py) it starts one process, `python -m nmm_jax.trunk`, and when all have ended it writes

    FOLDER/table.csv, table.parquet    a row each finished run (scaling/results_table.py)

--status says what is done, running, failed and waiting, and writes the same table of what there is; it may be asked
while runs are made, here or on pods. --print makes nothing: it prints the commands of the trunks, on pods behind the
launch script that the study has for them. A run that diverges is a row that says so.
"""

import dataclasses
import fnmatch
import json
import shlex
import statistics
import sys
from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from configs import command_line
from nmm_jax.runner import Job, Runner, select
from nmm_jax.scaling import results_table, study
from nmm_jax.scaling.counting import count, tower_tokens
from nmm_jax.scaling.study import Branch, Trunk
from nmm_jax.training import goodput

DONE, DIVERGED, RUNNING, TRAINED, FAILED, WAITING = "done", "diverged", "running", "trained", "failed", "waiting"
QUIET = 120.0  # seconds without a sign of life, after which a run is taken for dead
LOOKED_AT = 5  # lines of metrics.jsonl, for the seconds of a step


@dataclasses.dataclass(frozen=True)
class Progress:
    """Of a run: `step` of its steps are done, the trunk's among them; `left` are to be made for it alone."""

    branch: Branch
    state: str
    step: int
    left: int
    loss: float | None = None


class Sweep:
    """The runs of a study in a folder."""

    def __init__(self, config: ConfigDict, folder: epath.Path):
        self.study, self.folder = config, folder
        self.trunks = study.expand(config)

    def command(self, trunk: str, flag: Sequence[str]) -> list[str]:
        """What makes a trunk and its runs, as one would type it. `flag`: --config and its overrides."""
        return ["python", "-m", "nmm_jax.trunk", *flag, f"--folder={self.folder}", f"--trunk={trunk}"]

    def on_pods(self, trunk: str, flag: Sequence[str]) -> str:
        """The same, behind the launch script that the study has for it."""
        command = shlex.join(self.command(trunk, flag))
        for pattern, launch in self.study.launch:
            if fnmatch.fnmatchcase(trunk, pattern):
                name = trunk.replace(".", "-").lower()  # of cloud resources: small letters, digits and dashes
                return f"{launch.format(name=name)} -- {command}"
        return command

    def run(self, names: Sequence[str], flag: Sequence[str], side_by_side: int = 1) -> list[str]:
        """Makes what is not there; returns the trunks that failed. The longest come first: the last to end is short."""
        work = {name: self.trunks[name].steps * _flops_of_step(self.trunks[name]) for name in names}

        def job(name: str) -> Job:
            branches = self.trunks[name].branches
            return Job(name, self.folder / name, [self.command(name, flag)], lambda: all(map(self.row, branches)))

        return Runner(side_by_side).run([job(name) for name in sorted(names, key=lambda name: -work[name])])

    def row(self, branch: Branch) -> results_table.Row | None:
        """None until it is finished, or has diverged."""
        path = self.folder / branch.name / results_table.ROW
        return json.loads(path.read_text()) if path.exists() else None

    def write(self) -> list[epath.Path]:
        """The table of what there is; returns its files, none if there is nothing."""
        rows = [row for trunk in self.trunks.values() for branch in trunk.branches if (row := self.row(branch))]
        return results_table.write(rows, self.folder / "table") if rows else []

    def progress(self, trunk: Trunk) -> list[Progress]:
        """Of its runs."""
        stem = _last(self.folder / trunk.name)
        at = (stem.step or 0) if stem else 0
        found = []
        for branch in trunk.branches:
            row, own = self.row(branch), _last(self.folder / branch.name)
            if row:
                state = DIVERGED if row["diverged"] else DONE
                found.append(Progress(branch, state, branch.steps, 0, row.get("loss")))
            elif own:
                state = TRAINED if own.ended == goodput.FINISHED else _alive(own)
                step = branch.at if own.step is None else own.step
                found.append(Progress(branch, state, step, branch.steps - step))
            else:
                next_up = not any(p.left for p in found)
                state = _alive(stem) if stem and next_up and at < branch.at else WAITING
                before = max([at, *(p.branch.at for p in found)])
                found.append(Progress(branch, state, min(at, branch.at), branch.steps - min(before, branch.at)))
        return found

    def status(self) -> str:
        """A table for a reader."""
        seconds = self.seconds_of_step()
        lines = [f"{'run':<44}{'state':<10}{'steps':>16}{'loss':>9}{'left':>10}"]
        states: dict[str, int] = {}
        total = 0.0
        for name, trunk in self.trunks.items():
            for p in self.progress(trunk):
                states[p.state] = states.get(p.state, 0) + 1
                left = p.left * seconds.get(name, 0.0)
                total += left
                told = _duration(left) if p.left and seconds else ""
                loss = f"{p.loss:.4f}" if p.loss is not None else ""
                steps = f"{p.step:,}/{p.branch.steps:,}"
                lines.append(f"{p.branch.name:<44}{p.state:<10}{steps:>16}{loss:>9}{told:>10}")
        summary = ", ".join(f"{n} {state}" for state, n in states.items())
        rest = f"; {_duration(total)} of steps left, one run after another" if total else ""
        return "\n".join([*lines, f"{sum(states.values())} runs: {summary}{rest}"])

    def seconds_of_step(self) -> dict[str, float]:
        """Of each trunk: as its last lines tell, or else as others of its study tell, by FLOPs. {} if none tells."""
        told: dict[str, float] = {}
        for name in self.trunks:
            path = self.folder / name / "metrics.jsonl"
            if path.exists():
                whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
                times = [json.loads(line)["time/step"] for line in whole[-LOOKED_AT:]]
                told |= {name: statistics.median(times)} if times else {}
        if not told:
            return {}
        flops = {name: _flops_of_step(trunk) for name, trunk in self.trunks.items()}
        of_flop = statistics.median(told[name] / flops[name] for name in told)
        return {name: told.get(name, of_flop * flops[name]) for name in self.trunks}


def _flops_of_step(trunk: Trunk) -> float:
    config = trunk.leg(trunk.branches[0])
    return config.batch_rows * config.row_length * count(config).paper_flops(1, tower_tokens(config))


def _last(workdir: epath.Path) -> goodput.Attempt | None:
    attempts = goodput.read(workdir)
    return attempts[-1] if attempts else None


def _alive(attempt: goodput.Attempt) -> str:
    """State of a run that has not come to its end."""
    if attempt.ended:
        return WAITING
    return RUNNING if goodput.now() - attempt.seen < QUIET else FAILED


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes > 9 else f"{minutes}:{rest:02d} min"


if __name__ == "__main__":
    CONFIG = study.define_flag()
    FOLDER = flags.DEFINE_string("folder", None, "of the study's runs, here or in a bucket", required=True)
    PATTERNS = flags.DEFINE_list("runs", ["*"], "which of its trunks, as patterns")
    JOBS = flags.DEFINE_integer("jobs", 1, "trunks at a time, each on its share of the cores", 1)
    PRINT = flags.DEFINE_bool("print", False, "print the commands, and make nothing")
    STATUS = flags.DEFINE_bool(
        "status", False, "say how far the runs are, write the table of what there is, and make nothing"
    )

    def main(_: list[str]) -> None:
        sweep, flag = Sweep(CONFIG.value, epath.Path(FOLDER.value)), study.typed()
        names = select(sweep.trunks, PATTERNS.value)
        if PRINT.value:
            print("\n".join(sweep.on_pods(name, flag) for name in names))
            return
        study.claim(sweep.folder, sweep.study.name, sweep.trunks)
        failed = [] if STATUS.value else sweep.run(names, flag, JOBS.value)
        print(sweep.status())
        if written := sweep.write():
            print("wrote " + ", ".join(map(str, written)))
        if failed:
            sys.exit(f"sweep: {len(failed)} trunks failed: {', '.join(failed)}; the same command tries them again")

    command_line.run(main)
