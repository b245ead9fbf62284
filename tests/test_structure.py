"""Imports point one way: entry points -> training, evaluation, scaling -> models -> parallel; data stands beside."""

import ast
import collections
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# package -> prefixes of our own packages that it must not import
FORBIDDEN = {
    "configs": ("nmm_jax", "data_pipelines", "jax", "numpy"),
    "data_pipelines": ("nmm_jax", "jax", "flax"),
    "nmm_jax/parallel": ("nmm_jax.models", "nmm_jax.training", "nmm_jax.evaluation", "nmm_jax.scaling"),
    "nmm_jax/models": ("nmm_jax.training", "nmm_jax.evaluation", "nmm_jax.scaling", "data_pipelines"),
    "nmm_jax/scaling": ("nmm_jax.evaluation", "data_pipelines"),
    "nmm_jax/training": ("nmm_jax.evaluation", "nmm_jax.train", "nmm_jax.evaluate"),
    "nmm_jax/compilation": ("nmm_jax.evaluation", "nmm_jax.train", "nmm_jax.evaluate", "nmm_jax.compile"),
    "nmm_jax/interop": ("nmm_jax.evaluation", "nmm_jax.train", "nmm_jax.evaluate", "nmm_jax.generate"),
    "nmm_jax/evaluation": ("nmm_jax.train", "nmm_jax.evaluate", "nmm_jax.generate", "nmm_jax.report"),
}


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} holds no Python file"
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imported(file)
        for forbidden in FORBIDDEN[package]
        if name == forbidden or name.startswith(forbidden + ".")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_pickle():
    wrong = [
        str(f.relative_to(ROOT))
        for package in ("configs", "data_pipelines", "nmm_jax")
        for f in (ROOT / package).rglob("*.py")
        if imported(f) & {"pickle", "dill", "cloudpickle"} or "allow_pickle=True" in f.read_text()
    ]
    assert not wrong


def test_test_files_have_names_of_their_own():
    """pytest imports them by name: of two alike it runs one, and processes that a test starts import the other."""
    names = collections.Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]
