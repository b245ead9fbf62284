"""The recorded dry runs of launch/tpu_vm.sh, given to the gcloud that is installed: it must know every flag and value.

It has no account here, and says so only once it has understood the command.
"""

import os
import pathlib
import shutil
import subprocess

import pytest

TRANSCRIPTS = sorted((pathlib.Path(__file__).parent / "transcripts").glob("tpu_vm-*.txt"))


@pytest.mark.slow  # seconds a command
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not here")
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda path: path.stem)
def test_gcloud_understands_what_would_run(transcript, tmp_path):
    done = subprocess.run(
        ["bash", "-c", 'git() { :; }; mkdir() { :; }; source "$1"', "bash", transcript],
        env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    if any("group installed" in line for line in errors):
        pytest.skip("gcloud alpha is not here")
    assert errors and all("active account" in line for line in errors), done.stderr
