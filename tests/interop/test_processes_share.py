"""Two processes import and export together, each reading what its own devices hold."""

import pathlib
import subprocess
import sys

import pytest
from fake_folders import MIXTRAL, make_folder
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_two_processes(tmp_path):
    theirs = make_folder(tmp_path / "theirs", MIXTRAL)
    for module, *arguments in (
        ("import_weights", f"--input={tmp_path / 'theirs'}", f"--workdir={tmp_path / 'run'}"),
        ("export_weights", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'back'}"),
    ):
        done = subprocess.run(
            [ROOT / "launch" / "local.sh", "--processes=2", "--devices=4", "--"]
            + [sys.executable, "-m", f"nmm_jax.interop.{module}", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == theirs.keys()
    assert all(back[name].tobytes() == x.tobytes() for name, x in theirs.items())
