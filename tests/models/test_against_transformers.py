"""The same random weights in transformers' models and in ours give the same logits on text."""

import jax
import numpy as np
import pytest

from configs.base import base
from nmm_jax.models import build

pytestmark = pytest.mark.extras

WIDTH, DEPTH, HEADS, KV_HEADS, FFN, VOCAB = 64, 3, 4, 2, 160, 120
HEAD_DIM = WIDTH // HEADS
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    intermediate_size=FFN,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    attn_implementation="eager",
)


def make_config(**model):
    c = base()
    c.image.size, c.image.patch, c.image.positions = 12, 4, 9
    c.model.update(
        dict(vocab_size=VOCAB, width=WIDTH, depth=DEPTH, heads=HEADS, kv_heads=KV_HEADS, ffn_width=FFN)
        | dict(dtype="float32", remat="none", norm="rmsnorm", norm_eps=1e-5)
        | model
    )
    return c


def randomize(torch, model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if "norm" in name else 0.12)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def text_batch(tokens):
    """Rows of one causal text each, from tokens [B,S]."""
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens.astype(np.int32),
        "segment_ids": np.ones_like(place),
        "attend_until": place + 1,
        "positions": place,
        "image_index": np.full_like(place, -1),
        "images": np.zeros((len(tokens), 1, 12, 12, 3), np.uint8),
    }


def our_params(weights, fresh, norms):
    """Foreign weights [out, in] in our tree; norms: our norm of a block -> theirs."""

    def stacked(name, shape=None):
        layers = [weights[f"model.layers.{i}.{name}.weight"].T for i in range(DEPTH)]
        return np.stack([layer if shape is None else layer.reshape(shape) for layer in layers])

    attention = {
        "query": stacked("self_attn.q_proj", (WIDTH, HEADS, HEAD_DIM)),
        "key": stacked("self_attn.k_proj", (WIDTH, KV_HEADS, HEAD_DIM)),
        "value": stacked("self_attn.v_proj", (WIDTH, KV_HEADS, HEAD_DIM)),
        "out": stacked("self_attn.o_proj", (HEADS, HEAD_DIM, WIDTH)),
    }
    if "query_norm" in fresh["layers"]["attention"]:
        attention["query_norm"] = {"scale": stacked("self_attn.q_norm", (HEADS, HEAD_DIM))}
        attention["key_norm"] = {"scale": stacked("self_attn.k_norm", (KV_HEADS, HEAD_DIM))}
    params = {
        "embed": {"tokens": weights["model.embed_tokens.weight"]},
        "patches": fresh["patches"],  # text has none
        "layers": {
            "attention": attention,
            "ffn": {ours: stacked(f"mlp.{ours}_proj") for ours in ("gate", "up", "down")},
            **{ours: {"scale": stacked(theirs)} for ours, theirs in norms.items()},
        },
        "final_norm": {"scale": weights["model.norm.weight"]},
    }
    if "head" in fresh:
        params["head"] = {"kernel": weights["lm_head.weight"].T}
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)
    return params


@pytest.mark.parametrize("library", ["llama", "llama_tied", "olmo2"])
def test_logits(library):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if library == "olmo2":
        theirs = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SHAPE, tie_word_embeddings=False))
        config = make_config(norm_position="post", qk_norm="full")
        norms = {"attention_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"}
    else:
        tied = library == "llama_tied"
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied))
        config = make_config(norm_position="pre", qk_norm="none", tie_embeddings=tied)
        norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    weights = randomize(torch, theirs.eval().float())
    model = build(config)
    params = our_params(weights, jax.jit(model.init)(jax.random.key(0)), norms)

    rows, length = 2, 70
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, length))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    hidden, _ = jax.jit(model.hidden)(params, text_batch(tokens))
    found = hidden @ model.unembedding(params)
    assert np.abs(expected).max() > 1  # logits worth comparing
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
