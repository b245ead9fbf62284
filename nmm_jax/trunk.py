"""Trains a trunk of a study and the runs that branch off it, and evaluates these: what scaling/sweep.py starts.

    python -m nmm_jax.trunk --config=configs/study.py:generated --folder=runs/study --trunk=early-w32-45-45-10-s0

The trunk is trained at a constant rate up to where its first run cools down, and its checkpoint kept; then that run is
made, then the trunk goes on to the next. All in one process, on however many machines: nothing is started or compiled
twice that need not be. Restarted it goes on where it was; what is killed is killed between two saves.

    FOLDER/early-w32-45-45-10-s0/              the trunk, a run directory
    FOLDER/early-w32-45-45-10-s0-128/          a run of 128 steps, another; in it
        row.json                               its row of the table, when it is finished or has diverged
    FOLDER/study.json                          the study
    FOLDER/compiled/                           compiled steps

A run that diverges is a row that says so, and so are those that would have branched off a trunk after it diverged.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from configs import command_line
from data_pipelines import paths
from data_pipelines.locking import locked
from nmm_jax.evaluate import evaluate, held_out_plans
from nmm_jax.evaluation import restored, results
from nmm_jax.parallel import host_memory, processes
from nmm_jax.parallel.compiler_options import keep_compiled
from nmm_jax.scaling import results_table, study
from nmm_jax.train import train
from nmm_jax.training import preemption
from nmm_jax.training.checkpoints import Checkpoints
from nmm_jax.training.metrics import Diverged
from nmm_jax.training.progress import say


def make(trunk: study.Trunk, folder: epath.Path) -> None:
    """Makes what is not there; ends the process where SIGTERM ends the training."""
    stem, alive = folder / trunk.name, True
    with _alone(folder / f"{trunk.name}.lock"):
        for branch in trunk.branches:
            own = folder / branch.name
            if (own / results_table.ROW).exists():
                continue
            config = trunk.cooled(branch, str(stem))
            row = results_table.row(trunk, branch, config, _commit(), _device())
            alive = alive and _trained(trunk.leg(branch), stem)
            if alive and _trained(config, own):
                row = _evaluated(row, config, stem, own, branch)
            if jax.process_index() == 0:
                own.mkdir(parents=True, exist_ok=True)
                paths.write_text(own / results_table.ROW, json.dumps(row, indent=2) + "\n")


def _trained(config: ConfigDict, workdir: epath.Path) -> bool:
    """False if it diverged."""
    try:
        finished = train(config, str(workdir))
    except Diverged as e:
        say(f"{workdir} diverged: {e}")
        return False
    if not finished:
        sys.exit(preemption.EXIT_CODE)
    preemption.end_without_saving()  # again: what comes next has nothing to save
    return True


def _evaluated(
    row: results_table.Row, config: ConfigDict, stem: epath.Path, own: epath.Path, branch: study.Branch
) -> results_table.Row:
    run, tokenizer = restored.restore(str(own))
    found = evaluate(run, tokenizer, ("held_out",), config.evaluation.rows)
    if jax.process_index() == 0:
        results.save(found, str(own))
    held_out = {source: plan.fingerprint for source, plan in held_out_plans(run).items()}
    meta = Checkpoints(str(own), read_only=True).meta(branch.steps)
    lines = [line for line in _lines(stem) if line["step"] <= branch.at] + _lines(own)
    return results_table.finished(row, config, meta, lines, found["held_out"], held_out)


def _lines(workdir: epath.Path) -> list[results_table.Line]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def _alone(lock: epath.Path) -> Iterator[None]:
    """One process of a machine at a time; a bucket has no locks, there it is up to who starts the pods."""
    if paths.is_remote(lock) or jax.process_index() > 0:
        yield
    else:
        with locked(pathlib.Path(lock)):
            yield


def _commit() -> str:
    here = pathlib.Path(__file__).parent
    ask = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(ask, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _device() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


if __name__ == "__main__":
    CONFIG = study.define_flag()
    FOLDER = flags.DEFINE_string("folder", None, "of the study's runs", required=True)
    TRUNK = flags.DEFINE_string("trunk", None, "its name; `sweep --print` lists them", required=True)

    def main(_: list[str]) -> None:
        preemption.end_without_saving()
        processes.initialize()
        host_memory.keep_freed()
        trunks, folder = study.expand(CONFIG.value), paths.reach(FOLDER.value)
        if TRUNK.value not in trunks:
            raise ValueError(f"--trunk={TRUNK.value} is none of the study's: {', '.join(trunks)}")
        if jax.process_index() == 0:
            study.claim(folder, CONFIG.value.name, trunks)
        if not os.environ.get(
            "JAX_COMPILATION_CACHE_DIR"
        ):  # legs of a trunk are one program, evaluations of a size another
            keep_compiled(str(folder / "compiled"))
        make(trunks[TRUNK.value], folder)

    command_line.run(main)
