"""The same random weights in transformers' mixtures of experts and in ours give the same logits and losses on text."""

import jax
import numpy as np
import pytest
from test_against_transformers import DEPTH, FFN, SHAPE, VOCAB, WIDTH, make_config, our_params, randomize, text_batch

from nmm_jax.models import build

pytestmark = pytest.mark.extras

EXPERTS = 8


def their_experts(weights):
    """transformers' ffn of all layers in our tree: gate and up are one matrix there."""

    def stacked(name):
        return np.stack([weights[f"model.layers.{i}.mlp.{name}"] for i in range(DEPTH)]).swapaxes(-1, -2)

    gate, up = np.split(stacked("experts.gate_up_proj"), 2, axis=-1)
    return {
        "router": {"kernel": stacked("gate.weight")},
        "experts": {"gate": gate, "up": up, "down": stacked("experts.down_proj")},
    }


def moe_params(weights, fresh, dense, norms):
    """our_params with the dense ffn, of which there is none, put in as zeros and taken out again."""
    shapes = {"gate": (FFN, WIDTH), "up": (FFN, WIDTH), "down": (WIDTH, FFN)}
    no_ffn = {
        f"model.layers.{i}.mlp.{name}_proj.weight": np.zeros(shape)
        for i in range(DEPTH)
        for name, shape in shapes.items()
    }
    params = our_params(weights | no_ffn, dense, norms)
    params["layers"]["ffn"] = their_experts(weights)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)
    return params


@pytest.mark.parametrize(
    ("library", "top_k", "renormalise"),
    [("mixtral", 2, True), ("olmoe", 1, False), ("olmoe", 2, False), ("olmoe", 4, True)],
)
def test_logits_and_losses(library, top_k, renormalise):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    if library == "mixtral":
        theirs = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SHAPE, num_local_experts=EXPERTS, num_experts_per_tok=top_k)
        )
        model_options = dict(qk_norm="none", rope_theta=1e6)
    else:
        theirs = transformers.OlmoeForCausalLM(
            transformers.OlmoeConfig(
                **SHAPE, num_experts=EXPERTS, num_experts_per_tok=top_k, norm_topk_prob=renormalise, pad_token_id=None
            )
        )
        model_options = dict(qk_norm="full")
    norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    weights = randomize(torch, theirs.eval().float())
    moe = dict(experts=EXPERTS, top_k=top_k, renormalise=renormalise)
    model = build(make_config(norm_position="pre", moe=moe, **model_options))
    fresh = jax.jit(model.init)(jax.random.key(0))
    dense = jax.jit(build(make_config(norm_position="pre", **model_options)).init)(jax.random.key(0))
    params = moe_params(weights, fresh, dense, norms)

    rows, length = 2, 70
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, length))
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), output_router_logits=True)
        # Theirs is top_k times as large, and over layers multiplies means where ours is the mean of products.
        balance = np.mean([load_balancing_loss_func((x,), EXPERTS, top_k) / top_k for x in out.router_logits])
        z = np.mean([torch.logsumexp(x, -1).square().mean() for x in out.router_logits])
    expected = out.logits.numpy()
    hidden, aux = jax.jit(model.hidden)(params, text_batch(tokens))
    found = hidden @ model.unembedding(params)
    assert np.abs(expected).max() > 1  # logits worth comparing
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(aux["balance_loss"], balance, rtol=1e-5)
    np.testing.assert_allclose(aux["router_z_loss"], z, rtol=1e-5)
    assert (np.asarray(aux["expert_tokens"]).sum(axis=(1, 2)) == top_k * rows * length).all()
    assert (np.asarray(aux["expert_tokens"])[:, 0] > 0).mean() > 0.8  # most experts had something to do
