"""What a user did wrong is told in one message by every command; a defect keeps its traceback."""

import concurrent.futures
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys

import pytest

from configs import command_line, loading
from tests.training_runs import ROOT

CONFIG = "--config=tests/tiny.py"
NO_DATA = "--config.data.root=nowhere"
SMALL = "--captions=4 --interleaved=4 --text=4 --held_out=2 --questions=8"

# command -> what to do wrong (in a folder where nothing is), and the message
WRONG = {
    "data_pipelines.convert --format=text --input=nowhere/* --output=out": r"nowhere/\*",
    "data_pipelines.recaption --input=nowhere --captions=nowhere.jsonl --output=out": "nowhere",
    f"data_pipelines.plan {CONFIG} {NO_DATA}": "nowhere",
    f"data_pipelines.preview {CONFIG} {NO_DATA}": "nowhere",
    "data_pipelines.tokenizer train --input=nowhere --output=tokenizer.json": "nowhere",
    f"data_pipelines.scenes --output=out {SMALL} --preview=nowhere/a.png": "--preview=nowhere/a.png",
    "data_pipelines.stage --input=nowhere --output=out": "nowhere is not in a bucket",
    f"nmm_jax.compile {CONFIG} --topology=v9:4x4": "v9:4x4",
    f"nmm_jax.train {CONFIG} {NO_DATA} --workdir=run": "nowhere",
    f"nmm_jax.describe {CONFIG} --config.optimizer.freeze=('vison/*',)": r"'vison/\*' matches no parameter",
    "nmm_jax.compilation.targets --only=nowhere --output=out": "'nowhere' matches none",
    "nmm_jax.evaluate --workdir=nowhere": "nowhere is no run",
    "nmm_jax.generate --workdir=nowhere --prompt=a": "nowhere is no run",
    "nmm_jax.report --workdir=nowhere": "nowhere",
    "nmm_jax.routing --workdir=nowhere": "nowhere is no run",
    "nmm_jax.sweep --config=nowhere.py": "nowhere.py",
    "nmm_jax.goodput --workdir=nowhere": "nowhere",
    "nmm_jax.profile --workdir=nowhere": "nowhere/profile has no trace",
    "nmm_jax.scaling.fit --runs=nowhere.csv --n=n --d=d --loss=loss --output=fit.json": "nowhere.csv",
    "nmm_jax.scaling.plan --flops=1e21 --fit=nowhere.json": "nowhere.json",
    "nmm_jax.scaling.plot --fit=nowhere.json --output=figures": "nowhere.json",
    "nmm_jax.scaling.report --runs=nowhere.csv --fit=nowhere.json --output=report.html": "nowhere.json",
    "nmm_jax.scaling.sweep --config=tests/tiny_study.py --folder=study --runs=nowhere": "no run is called 'nowhere'",
    "nmm_jax.trunk --config=tests/tiny_study.py --folder=study --trunk=nowhere": "nowhere is none of the study's",
    "nmm_jax.interop.import_weights --input=nowhere --workdir=run": "nowhere",
    "nmm_jax.interop.export_weights --workdir=nowhere --output=out": "nowhere is no run",
}


def run(folder, command):
    os.makedirs(folder / "tests", exist_ok=True)
    for name in ("tiny.py", "tiny_study.py"):
        if not (folder / "tests" / name).exists():
            (folder / "tests" / name).symlink_to(ROOT / "tests" / name)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", *command.split()]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize("command", WRONG)
def test_the_message_alone(command, tmp_path):
    done = run(tmp_path, command)
    said = [line for line in done.stderr.splitlines() if not re.match(r"[IW]\d{4} ", line)]  # absl's log
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    name = command.split()[0].rsplit(".")[-1]
    assert said[-1].startswith(f"{name}: ") and re.search(WRONG[command], said[-1]), done.stderr


def test_every_command_is_here():
    commands = set()
    for package in ("configs", "data_pipelines", "nmm_jax"):
        for file in (ROOT / package).rglob("*.py"):
            if '\nif __name__ == "__main__"' in file.read_text():
                assert "command_line.run(" in file.read_text(), file
                module = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                commands.add(module.removesuffix(".__main__"))
    assert commands == {command.split()[0] for command in WRONG}


def test_the_traceback_is_there_for_the_asking(tmp_path):
    done = run(tmp_path, "data_pipelines.tokenizer train --input=nowhere --output=tokenizer.json --verbosity=1")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_words_that_are_no_flags_are_refused(tmp_path):
    done = run(tmp_path, "data_pipelines.tokenizer train prepare --input=x --output=y")
    assert done.returncode == 1 and "give a command" in done.stdout + done.stderr
    done = run(tmp_path, "data_pipelines.scenes out --output=out")
    assert done.returncode == 1 and "unexpected argument 'out'; all settings are flags" in done.stdout + done.stderr


def error_of(function, *args):
    try:
        function(*args)
    except Exception as error:
        return error


def test_a_defect_is_not_told_as_if_it_were_the_users():
    assert command_line.told(error_of(loading.load, "nowhere.py"))
    assert command_line.told(error_of(pathlib.Path("nowhere").read_text))
    assert not command_line.told(error_of(int, "x"))  # a ValueError, of whatever went wrong in between
    assert not command_line.told(error_of({}.__getitem__, "x"))


def test_errors_of_worker_processes():
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert command_line.told(pool.submit(loading.load, "nowhere.py").exception())
        assert not command_line.told(pool.submit(int, "x").exception())
