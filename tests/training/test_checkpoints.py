"""Checkpoints: exact, complete or absent, kept by rule, and clear when something is wrong."""

import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import loading
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.training import checkpoints as module
from nmm_jax.training import compatibility
from nmm_jax.training.checkpoints import CheckpointError, Checkpoints, open_run
from tests.fake_batches import tiny_config


def small_state(step=0):
    params = {"w": jnp.arange(6.0).reshape(2, 3) + step, "b": jnp.full(3, 0.1)}
    return {"step": jnp.asarray(step, jnp.int32), "params": params, "opt_state": (jnp.zeros((), jnp.int32), params)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(workdir, *steps, **rules):
    checkpoints = Checkpoints(workdir, **rules)
    for step in steps:
        checkpoints.save(step, small_state(step), {"seen": {"images": step}})
    checkpoints.close()


def test_what_is_saved_comes_back(tmp_path):
    save(tmp_path, 5)
    state, meta = Checkpoints(tmp_path).restore(None, abstract(small_state()))
    jax.tree.map(np.testing.assert_array_equal, state, small_state(5))
    assert jax.tree.structure(state) == jax.tree.structure(small_state())
    assert meta == {"step": 5, "seen": {"images": 5}}


def test_the_last_and_the_multiples_are_kept(tmp_path):
    save(tmp_path, 5, 10, 15, 20, 25, 30, keep=2, keep_every=10)
    assert Checkpoints(tmp_path, keep=2, keep_every=10).steps() == [10, 20, 25, 30]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "20", "25", "30"]


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path):
    save(tmp_path, 5)
    half = tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp-1"
    (half / "params").mkdir(parents=True)
    assert Checkpoints(tmp_path, read_only=True).steps() == [5] and half.exists()
    assert Checkpoints(tmp_path).steps() == [5] and not half.exists()


def test_parameters_alone(tmp_path):
    save(tmp_path, 5, 10, keep=3)
    params, meta, step = Checkpoints(tmp_path, read_only=True).restore_params(5, abstract(small_state()["params"]))
    assert step == meta["step"] == 5
    jax.tree.map(np.testing.assert_array_equal, params, small_state(5)["params"])


def test_missing_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="is no run: it has no folder `checkpoints`"):
        open_run(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint yet"):
        open_run(str(tmp_path))
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 6; it has \[5\]"):
        Checkpoints(tmp_path).meta(6)


def test_another_shape_and_damaged_files(tmp_path):
    save(tmp_path, 5)
    wrong = small_state() | {"params": {"w": jnp.zeros((2, 4)), "b": jnp.zeros(3)}}
    with pytest.raises(CheckpointError, match="checkpoints/5 could not be read into this model"):
        Checkpoints(tmp_path).restore(5, abstract(wrong))
    for file in (tmp_path / "checkpoints" / "5" / "params").rglob("d/*"):
        os.truncate(file, 10)
    with pytest.raises(CheckpointError, match="remove that folder to go on from the one before"):
        Checkpoints(tmp_path).restore(5, abstract(small_state()))


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_up(tiny_disk):
    """On a real file system of 2 MB: the message says so, and what was saved before is whole."""
    save(tiny_disk, 5)
    big = small_state(10)
    big["params"]["w"] = jax.random.normal(jax.random.key(0), (1024, 1024))  # 4 MB that do not compress
    checkpoints = Checkpoints(tiny_disk, keep=3)
    with pytest.raises(
        CheckpointError, match=r"disk is full: checkpoint 10 .*checkpoints/10; .*\[5\] before it are intact"
    ):
        checkpoints.save(10, big, {})
        checkpoints.wait()
    restored, _ = Checkpoints(tiny_disk).restore(None, abstract(small_state()))
    jax.tree.map(np.testing.assert_array_equal, restored, small_state(5))


def test_a_disk_that_is_full_is_recognised_through_other_errors(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def fail(*args, **kwargs):
        try:
            raise OSError(28, "No space left on device")
        except OSError as e:
            raise ValueError("could not write a shard") from e

    monkeypatch.setattr(checkpoints._checkpointer, "save_checkpointables_async", fail)
    with pytest.raises(CheckpointError, match="the disk is full: checkpoint 3 .* there is none before it. Make room"):
        checkpoints.save(3, small_state(), {})


def meta_of(config, **data):
    return {"config": loading.to_json(config), "data": data}


def test_how_a_run_is_carried_out_may_change():
    saved = meta_of(tiny_config(), plans="abc")
    now = tiny_config(steps=40, log__every=1, mesh__tensor=2, checkpoint__keep=9, data__root="elsewhere")
    lines = compatibility.check(saved, now, {"plans": "abc"}, "here")
    assert "steps was 20, is 40" in lines and len(lines) == 5


def test_another_model_is_refused():
    with pytest.raises(
        compatibility.IncompatibleCheckpoint, match="here holds another model: model.width was 32, is 64"
    ):
        compatibility.check(meta_of(tiny_config()), tiny_config(model__width=64), {}, "here")


@pytest.mark.parametrize(
    "change, fingerprints, message",
    [
        ({}, {"plan of text": "new"}, "plan of text differs"),
        ({"batch_rows": 16}, {"plan of text": "old"}, "batch_rows was 8, is 16"),
        ({"data__weights": (0.5, 0.4, 0.1)}, {"plan of text": "old"}, "data.weights was .*, is "),
        ({"seed": 3}, {"plan of text": "old"}, "seed was 0, is 3"),
    ],
)
def test_other_data_is_refused_unless_asked_for(change, fingerprints, message):
    saved = meta_of(tiny_config(), **{"plan of text": "old"})
    with pytest.raises(compatibility.IncompatibleCheckpoint, match=f"{message}.*accept_changed_plans=true"):
        compatibility.check(saved, tiny_config(**change), fingerprints, "here")
    accepted = tiny_config(**change, data__accept_changed_plans=True)
    assert compatibility.check(saved, accepted, fingerprints, "here")


def test_open_run_gives_the_model_and_its_parameters(tmp_path):
    config = tiny_config()
    model = module.models.build(config)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), model.abstract)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(
        7, {"step": jnp.asarray(7), "params": params, "opt_state": {"count": jnp.zeros(3)}}, meta_of(config)
    )
    checkpoints.close()
    run = open_run(str(tmp_path), mesh=mesh_of({}, jax.devices()[:1]))
    assert run.step == 7 and run.config == config and run.config.is_locked
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    stored = json.loads((pathlib.Path(tmp_path) / "checkpoints" / "7" / "_CHECKPOINT_METADATA").read_text())
    assert "custom_metadata" in stored


def test_files_are_mapped_while_a_checkpoint_is_read_and_no_longer():
    from orbax.checkpoint._src.serialization import tensorstore_utils

    def mode():
        resources = tensorstore_utils.get_ts_context().spec.to_json()
        return resources.get("file_io_mode", {}).get("mode")

    assert mode() is None
    with module._mapped_files():
        assert mode() == "memmap"
    assert mode() is None
