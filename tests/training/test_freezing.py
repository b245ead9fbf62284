"""Frozen parameters: no bit of them changes, and neither gradient nor optimizer knows them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import loading
from nmm_jax import models
from nmm_jax.compilation.products import flops
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.training import compatibility, freezing
from nmm_jax.training.checkpoints import Checkpoints, open_run
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.schedule import ends
from nmm_jax.training.state import abstract_state, trainable
from nmm_jax.training.step import jit_step
from tests.fake_batches import fake_batch, tiny_config

LATE = {
    "model__family": "late_fusion",
    "model__patch_positions": False,
    "model__vision__width": 16,
    "model__vision__depth": 1,
    "model__vision__heads": 2,
    "model__vision__ffn_width": 32,
    "model__depth": 1,
    "model__remat": "none",
}
MOE = {"model__remat": "none", "model__moe__experts": 4, "model__moe__balance": "bias", "model__depth": 1}
KINDS = {
    "late fusion": LATE | {"optimizer__freeze": ("vision/*", "layers/attention*"), "optimizer__weight_decay": 0.01},
    "experts, accumulated": MOE | {"optimizer__freeze": ("layers/ffn/*", "embed/tokens"), "gradient_accumulation": 2},
}


def one_device():
    return mesh_of({}, jax.devices()[:1])


def begin(config):
    """Model, optimizer, a state of random numbers and the compiled step."""
    model, optimizer = models.build(config), make_optimizer(config)
    params = some_params(model)
    opt_state = optimizer.init(trainable(model, params))
    state = jax.device_put({"step": np.int32(0), "params": params, "opt_state": opt_state})
    return (
        model,
        optimizer,
        state,
        fast(jit_step(model, optimizer, config, one_device()), state, fake_batch(config), ends(config)),
    )


def some_params(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), model.abstract)


def fast(jitted, *arguments):
    """Compiled in half the time, to run slower."""
    return jitted.lower(*arguments).compile({"xla_backend_optimization_level": 0})


def flat(tree):
    return {name: np.asarray(x) for name, x in flatten_dict(tree, sep="/").items()}


def zeroed_reference(config, frozen, steps):
    """Gradients of all parameters, from whole logits; of frozen ones set to zero, and what decay does to them undone.

    The optimizer is the same, but knows nothing of freezing.
    """
    with config.copy_and_resolve_references().unlocked() as free:
        free.optimizer.freeze = ()
    model, optimizer = models.build(free), make_optimizer(free)
    params = some_params(model)
    opt_state = optimizer.init(params)

    def loss(params, batch):
        hidden, _ = model.hidden(params, batch)
        log_p = jax.nn.log_softmax(hidden @ model.unembedding(params))
        ce = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        return (batch["loss_mask"] * ce).sum() / batch["loss_mask"].sum()

    def step(params, opt_state, batch):
        grads = flatten_dict(jax.grad(loss)(params, batch), sep="/")
        grads = unflatten_dict({n: g * (n not in frozen) for n, g in grads.items()}, sep="/")
        updates, opt_state = optimizer.update(grads, opt_state, params)
        moved, old = (flatten_dict(t, sep="/") for t in (optax.apply_updates(params, updates), params))
        return unflatten_dict({n: old[n] if n in frozen else x for n, x in moved.items()}, sep="/"), opt_state

    step = fast(jax.jit(step), params, opt_state, fake_batch(config))
    for t in range(steps):
        params, opt_state = step(params, opt_state, fake_batch(config, seed=t % 4))
    return flat(params)


@pytest.mark.parametrize("kind", [k if k == "late fusion" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_a_hundred_steps(kind):
    config = tiny_config(**KINDS[kind], steps=100)
    model, _, state, step = begin(config)
    before = flat(state["params"])
    frozen = freezing.frozen_names(before, config.optimizer.freeze)
    for t in range(100):
        state, metrics = step(state, fake_batch(config, seed=t % 4), ends(config))
        if t == 4:
            fifth, grad_norm = flat(state["params"]), float(metrics["grad_norm"])
    after = flat(state["params"])

    assert 0 < len(frozen) < len(before)
    for name in before:
        assert (before[name].tobytes() == after[name].tobytes()) == (name in frozen), name
    trained = {n: x.shape for n, x in before.items() if n not in frozen}
    adam = state["opt_state"][1]
    assert {n: x.shape for n, x in flat(adam.mu).items()} == {n: x.shape for n, x in flat(adam.nu).items()} == trained
    sizes = sum(x.size for x in jax.tree.leaves(state["opt_state"]))
    assert sizes == 2 * sum(map(math.prod, trained.values())) + 2  # and two counters
    assert 0 < grad_norm < 10
    if kind == "late fusion":
        want = zeroed_reference(config, frozen, 5)
        for name in before:
            np.testing.assert_allclose(fifth[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)


def products(**overrides):
    """FLOPs of the matrix products of a compiled step, dense early fusion of two layers."""
    config = tiny_config(model__remat="none", **overrides)
    *_, state, step = begin(config)
    # Frozen or not, a weight is given back in its own memory.
    assert step.memory_analysis().alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state))
    return flops(step.as_text())


def test_the_compiled_step_has_no_gradient_of_what_is_frozen():
    """A frozen matrix spares its product with the gradient; what is behind it still gets its own through it."""
    whole, tokens = products(), 8 * 48
    layer = 2 * tokens * 32 * 64  # one product with a matrix of the feed-forward layer, d_model 32
    assert whole - products(optimizer__freeze=("layers/ffn/*",)) == 2 * 3 * layer
    assert whole - products(optimizer__freeze=("layers/ffn/up", "head/*")) == 2 * layer + 2 * tokens * 32 * 64
    # With all layers and what is before them frozen the backward pass ends at the head.
    forward_and_head = products(optimizer__freeze=("layers/*", "embed/*", "patches/*"))
    pairs = 8 * 48 * 48 * 32
    attention = 2 * (4 * 2 * tokens * 32 * 32 + 2 * 2 * pairs)  # two layers: q, k, v, out; scores and values
    patches = 2 * 8 * 2 * 4 * 48 * 32  # rows, slots, patches, pixels
    head = 2 * tokens * 32 * 64
    assert forward_and_head == attention + 2 * 3 * layer + patches + 3 * head


def test_patterns_that_match_nothing_or_all():
    names = ["vision/layers/ffn/up", "vision/positions", "layers/ffn/up", "embed/tokens"]
    with pytest.raises(
        ValueError, match=r"'visoin/\*' matches no parameter \(did you mean vision/\*.*there are embed/t"
    ):
        freezing.frozen_names(names, ("embed/*", "visoin/*"))
    with pytest.raises(ValueError, match="freezes every parameter"):
        freezing.frozen_names(names, ("*",))
    assert freezing.frozen_names(names, ("layers/*",)) == {"layers/ffn/up"}
    assert freezing.frozen_names(names, ()) == set()
    config = tiny_config(optimizer__freeze=("vision/*",))
    with pytest.raises(ValueError, match=r"optimizer.freeze: 'vision/\*' matches no parameter.*patches/kernel"):
        abstract_state(models.build(config), make_optimizer(config), one_device())


def test_a_checkpoint_of_a_frozen_run(tmp_path):
    """It is restored whole, and opened for evaluation; another `optimizer.freeze` is refused by name."""
    config = tiny_config(optimizer__freeze=("layers/*", "head/*"))
    model, optimizer = models.build(config), make_optimizer(config)
    params = some_params(model)
    opt_state = optimizer.init(trainable(model, params))
    state = jax.device_put({"step": np.int32(3), "params": params, "opt_state": opt_state})
    meta = {"config": loading.to_json(config), "data": {}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, meta)
    checkpoints.close()
    restored, _ = Checkpoints(tmp_path).restore(None, abstract_state(model, optimizer, one_device()))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    jax.tree.map(np.testing.assert_array_equal, open_run(str(tmp_path), mesh=one_device()).params, state["params"])
    assert not compatibility.check(meta, config, {}, "here")
    with pytest.raises(
        compatibility.IncompatibleCheckpoint, match=r"optimizer.freeze was \('layers/\*', 'head/\*'\), is"
    ):
        compatibility.check(meta, tiny_config(), {}, "here")
