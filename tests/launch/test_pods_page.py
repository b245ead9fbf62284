"""Every launch command of docs/pods.md is one that the scripts take, with the settings that the page exports before."""

import os
import pathlib
import shlex
import subprocess

from configs.targets import TARGETS

ROOT = pathlib.Path(__file__).parent.parent.parent


def commands(page):
    """The logical lines of code blocks that launch: with their continuations, and quotes that go over several."""
    for block in page.split("\n```")[1::2]:
        if "launch/" not in block:
            continue
        pending = ""
        for line in block.partition("\n")[2].split("\n"):
            pending += line
            if pending.endswith("\\") and not line.strip().startswith("#"):
                pending += "\n"
                continue
            try:
                shlex.split(pending, comments=True)
            except ValueError:
                pending += "\n"
                continue
            yield pending
            pending = ""
        assert not pending, f"unclosed quote: {pending}"


def dry(command):
    """With --dry-run: after the subcommand, where there is one."""
    script, _, rest = command.partition(" ")
    first, _, others = rest.partition(" ")
    return f"{script} --dry-run {rest}" if first.startswith("-") else f"{script} {first} --dry-run {others}"


def test_every_launch_command_of_the_page_is_taken():
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NMM_")}
    settings, tried, staged = "image=some/image:1\n", [], []
    for command in commands((ROOT / "docs" / "pods.md").read_text()):
        command = command.strip()
        if command.split("=")[0].rstrip("+") in ("export NMM_PROJECT", "image", "command"):
            settings += command + "\n"
        elif command.startswith("launch/"):
            done = subprocess.run(
                ["bash", "-c", settings + dry(command)], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            if "nmm_jax.train" in done.stdout and "data.root=/tmp" in done.stdout:  # a disk of each host's own
                assert "data.plans=gs://" in done.stdout, f"{command}\nonly the first host would have row plans"
                staged.append(command.split()[0])
            tried.append(command.split()[0])
    assert {"launch/tpu_vm.sh", "launch/gke.sh", "launch/xpk.sh"} <= set(tried) & set(staged)


def test_all_configs_of_the_table_fit():
    page = (ROOT / "docs" / "pods.md").read_text()
    rows = [row.strip("| ").split(" | ") for row in page.partition("<!-- targets -->\n")[2].splitlines()]
    header, _, *rows = rows[: next(i for i, row in enumerate(rows) if len(row) == 1)]
    found = {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in rows}
    for where, facts in found.items():
        peak, capacity = facts["memory, GiB"].split(" of ")
        assert float(peak) <= float(capacity), where
    assert float(found["early_fusion:hw-8b", "v5p:4x4x4"]["over count"]) <= 1.15
    assert set(found) == {
        (target.config, f"{target.slices} x {target.topology}" if target.slices > 1 else target.topology)
        for target in TARGETS
    }
