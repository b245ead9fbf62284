"""Experts that lie in two processes: the exchange crosses between them."""

import subprocess

import jax
import numpy as np
import optax
import pytest

from configs.loading import from_json
from nmm_jax import models
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.training.checkpoints import Checkpoints
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.state import abstract_state
from tests.data_pipelines import small_corpus
from tests.test_processes import ROOT
from tests.training_runs import command, environment, lines, train

KEYS = (
    "steps=6",
    "mesh.fsdp=1",
    "mesh.expert=8",
    "model.moe.experts=8",
    "model.moe.top_k=2",
    "model.init=open_lm",  # whose router tells experts apart, so that no choice is close
    "optimizer.learning_rate=1e-3",
    "optimizer.clip_norm=0",  # so that Adam's first moment after a step is (1 - beta1) times the gradient
    "checkpoint.every=1",
    "checkpoint.keep=6",
)


def first_moments(workdir):
    """After one step, restored on one device."""
    config = from_json((workdir / "config.json").read_text())
    model, optimizer = models.build(config), make_optimizer(config)
    abstract = abstract_state(model, optimizer, mesh_of({}, jax.devices()[:1]))
    state, _ = Checkpoints(workdir, read_only=True).restore(1, abstract)
    return jax.tree.map(np.asarray, optax.tree.get(state["opt_state"], "mu"))


@pytest.mark.slow  # two programs for 8 devices are compiled
def test_two_processes_of_four_devices_train_as_one(tmp_path):
    """launch/local.sh 2 x 4 with one expert a device, against one process of 8 devices."""
    corpus = tmp_path / "corpus"
    small_corpus.write(corpus)
    train(corpus, tmp_path / "one", *KEYS, devices=8)
    done = subprocess.run(
        [ROOT / "launch" / "local.sh", "--processes=2", "--devices=4", "--", *command(corpus, tmp_path / "two", *KEYS)],
        cwd=ROOT,
        env=environment() | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    got, want = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert [line["step"] for line in got] == list(range(1, 7))
    for name in ("loss", "moe/balance_loss", "moe/router_z_loss"):
        np.testing.assert_allclose([x[name] for x in got], [x[name] for x in want], rtol=1e-6, err_msg=name)
    for name in ("moe/tokens_per_expert", "moe/dropped_tokens", "tokens", "images"):
        assert [x[name] for x in got] == [x[name] for x in want], name
    moments, wanted = first_moments(tmp_path / "two"), first_moments(tmp_path / "one")
    for ours, theirs in zip(jax.tree.leaves(moments), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    assert np.abs(wanted["layers"]["ffn"]["experts"]["down"]).max((0, 2, 3)).min() > 0  # every expert learned
    assert len(want[0]["moe/tokens_per_expert"][0]) == 8 and min(map(min, want[0]["moe/tokens_per_expert"])) > 0
