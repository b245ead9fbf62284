"""Counting against the real parameter tree, the paper's numbers and brute force."""

import jax
import pytest

from configs import early_fusion, mm1, moe, quickstart, small
from configs.base import base
from nmm_jax.models import build
from nmm_jax.scaling.counting import count, memory

PAPER = {"275m": 274.8, "464m": 464.0, "932m": 931.7, "1.6b": 1626.8, "2.3b": 2279.9, "3.4b": 3354.2, "8b": 8129.1}


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_ladder(size):
    assert round(count(early_fusion.get_config(size)).paper_parameters / 1e6, 1) == PAPER[size]


# Billions, of the paper's mixtures of 8 experts and of MM1's.
TOTALS = {"275m": "1.20", "464m": "2.15", "932m": "4.51", "1.6b": "8.18", "2.3b": "11.76", "3.4b": "17.53"}


@pytest.mark.parametrize("size", TOTALS)
def test_the_papers_mixtures(size):
    counts = count(moe.get_config(f"{size}-8e"))
    assert f"{counts.paper_total / 1e9:.2f}" == TOTALS[size]
    assert round(counts.paper_parameters / 1e6, 1) == PAPER[size]


def test_mm1s_mixtures():
    assert [f"{count(mm1.get_config(size)).parameters / 1e9:.0f}" for size in ("3b-64e", "7b-32e")] == ["64", "47"]


def changed(experts=None, **model):
    c = base()
    c.model.update(model)
    c.model.moe.update(experts or {})
    return c


CONFIGS = [
    quickstart.get_config(),
    small.get_config(),
    *(early_fusion.get_config(size) for size in early_fusion.SIZES),
    changed(tie_embeddings=True),
    changed(kv_heads=4, qk_norm="full"),
    changed(kv_heads=2, qk_norm="head", head_dim=40, patch_positions=True),
    changed(qk_norm="none", norm="layernorm", ffn_width=1000, norm_position="post", scan_layers=False),
    moe.get_config("275m-8e"),
    moe.get_config("275m-aware"),
    mm1.get_config("7b-32e"),
    changed(dict(experts=6, top_k=2, granularity=2, shared=1, every=3, modality="grouped", balance="bias")),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_counts_equal_the_parameter_tree(config):
    abstract = build(config).abstract
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    counts = count(config)
    layers = abstract["layers"]
    blocks = [layers] if "attention" in layers else list(layers.values())
    norms = [[v for k, v in b["attention"].items() if k.endswith("norm")] for b in blocks]
    experts = size([b["ffn"].get("experts") for b in blocks])
    routers = size([b["ffn"].get("router") for b in blocks])
    assert counts.parts == {
        "token_embedding": size(abstract["embed"]),
        "patch_embedding": size(abstract["patches"]),
        "attention": size([b["attention"] for b in blocks]) - size(norms),
        "ffn": size([b["ffn"] for b in blocks]) - experts - routers,
        "experts": experts,
        "routers": routers,
        "norms": size([norms, *((b["attention_norm"], b["ffn_norm"]) for b in blocks), abstract["final_norm"]]),
        "head": size(abstract.get("head")),
    }
    assert counts.parameters == size(abstract)
    c = config.model.moe
    unused = experts * (1 - c.top_k / c.experts) if c.experts else 0
    assert counts.active_parameters == size(abstract) - unused
    assert memory(config)["parameters"] == 4 * size(abstract)


def test_flops_of_products_equal_xlas():
    """XLA counts one unrolled layer right; norms and softmax it counts too, hence the few percent."""
    c = base()
    c.image.size, c.image.patch, c.image.positions, c.image.per_row = 32, 8, 16, 2
    c.model.update(dict(depth=1, width=256, heads=4, vocab_size=1024, dtype="float32", scan_layers=False, remat="none"))
    c.model.attention = "reference"
    model, rows, length = build(c), 2, 128
    ints = jax.ShapeDtypeStruct((rows, length), "int32")
    batch = {k: ints for k in ("tokens", "segment_ids", "attend_until", "positions", "image_index")}
    batch["images"] = jax.ShapeDtypeStruct((rows, 2, 32, 32, 3), "uint8")
    logits = lambda p, b: model.hidden(p, b)[0] @ model.unembedding(p)  # noqa: E731
    found = jax.jit(logits).lower(model.abstract, batch).compile().cost_analysis()["flops"]
    dense_pairs = rows * length**2  # the reference computes all of them
    expected = count(c).forward_flops(rows * length, dense_pairs, rows * 2 * 16)
    assert expected < found < 1.06 * expected


def test_training_flops_are_six_per_parameter_and_position():
    counts = count(early_fusion.get_config("8b"))
    embedding = counts.parts["token_embedding"]  # looked up, not multiplied
    assert counts.training_flops(1, 0, 0) == 6 * (counts.paper_parameters - embedding)
