"""Counting against formulas, the papers' numbers and what compiled programs multiply."""

import jax
import jax.numpy as jnp
import pytest

from configs import deep_fusion, early_fusion, encoder, late_fusion, loading, mm1, moe, quickstart, small
from configs.base import base
from nmm_jax.compilation.products import flops
from nmm_jax.models import build
from nmm_jax.models.spec import Spec
from nmm_jax.scaling.counting import count, memory, tokens_seen, tower_tokens
from nmm_jax.training import freezing
from tests.parameter_formulas import of_connector, of_pixels

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


def test_c_of_the_paper():
    """6 N D, and of late fusion 6 (N_v D_v + N_text D), from the rounded numbers of its Table 6."""
    early, late = count(early_fusion.get_config("932m")), count(late_fusion.get_config("1b"))
    assert early.paper_flops(200e9, 109e9) == early.paper_flops(200e9) == pytest.approx(6 * 931.7e6 * 200e9, rel=1e-4)
    assert late.paper_flops(200e9, 109e9) == pytest.approx(6 * (169.9e6 * 109e9 + 834.4e6 * 200e9), rel=1e-3)
    experts = count(moe.get_config("932m-8e"))
    assert experts.paper_flops(1) == early.paper_flops(1)


def test_d_by_hand():
    seen = {"captions": 5_000, "text": 3_000}
    early = tokens_seen(early_fusion.get_config("275m"), seen, 10)  # 256 positions an image, 256 patches
    assert (early.total, early.vision, early.text) == (8_000, 2_560, 5_440)
    fewer = late_fusion.get_config("289m").unlock()
    fewer.model.connector.kind, fewer.image.positions = "average", 64
    late = tokens_seen(fewer, seen, 10)  # the tower sees 256 patches and the decoder 64 positions
    assert (late.total, late.vision, late.text) == (8_000, 2_560, 7_360)
    assert tower_tokens(early_fusion.get_config("275m")) == 0
    assert tower_tokens(late_fusion.get_config("289m")) == 0.5 and tower_tokens(fewer) == 2.0


def test_mm1s_totals():
    """Billions of its language models; the paper's are 3, 7 and 30, and its mixtures' 64 and 47."""
    totals = []
    for size in mm1.SIZES:
        counts = count(mm1.get_config(size))
        totals.append(f"{(counts.parameters - counts.parts['vision_tower'] - counts.parts['connector']) / 1e9:.0f}")
    assert totals == ["3", "7", "30", "64", "47"]


# Millions, of text and vision, as reconstructed from the paper's Table 6: N = 24 (4 d^2 + 3 d h) + 2 * 50,432 d.
LATE = {
    "289m": (247.3, 42.5, 289.8),
    "493m": (411.6, 81.8, 493.4),
    "1b": (834.4, 169.9, 1004.3),
    "1.75b": (1439.7, 308.3, 1748.0),
    "2.43b": (2012.2, 418.3, 2430.5),
    "3.7b": (3027.8, 679.5, 3707.2),
}


@pytest.mark.parametrize("size", LATE)
def test_the_papers_late_fusion(size):
    counts = count(late_fusion.get_config(size))
    found = (counts.paper_text, counts.paper_vision, counts.paper_parameters)
    assert tuple(round(n / 1e6, 1) for n in found) == LATE[size]


def test_cogvlm():
    """Wang et al.: a visual expert of 32 (4 * 4096^2 + 3 * 4096 * 11008), an adapter of 140 M, 6.6 B trained."""
    counts = count(deep_fusion.get_config("cogvlm-17b"))
    assert counts.parts["visual_expert"] == 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    assert round(counts.parts["connector"] / 1e6, 1) == 142.6
    assert round(counts.trainable_parameters / 1e9, 3) == 6.619
    assert round(counts.parameters / 1e9, 1) == 17.6
    trained = {name for name, n in counts.trainable_parts.items() if n}
    assert trained == {"visual_expert", "connector", "delimiters"}
    assert memory(deep_fusion.get_config("cogvlm-17b"))["optimizer"] == 8 * counts.trainable_parameters
    fourth = count(deep_fusion.get_config("cogvlm-17b,every=4"))
    assert fourth.parts == counts.parts | {"visual_expert": counts.parts["visual_expert"] // 4}
    assert {name for name, n in fourth.trainable_parts.items() if n} == trained
    assert fourth.trainable_parts["visual_expert"] == fourth.parts["visual_expert"]


# Millions of the vision towers, from the weights that are published: of Hugging Face's openai/clip-vit-base-patch16 and
# -large-patch14, laion/CLIP-ViT-H-14, google/siglip-so400m-patch14-224 (without its head), apple/aimv2-*-patch14-224.
TOWERS = {"clip-b": 85.8, "clip-l": 303.2, "clip-h": 630.8, "siglip-so400m": 412.4, "aimv2-l": 309.2, "aimv2-h": 680.9}
# Billions, of the names that the papers give.
NAMES = {"aim-0.6b": 0.6, "aim-1b": 1, "aim-3b": 3, "aim-7b": 7, "aimv2-1b": 1, "aimv2-3b": 3}


@pytest.mark.parametrize("name", [*TOWERS, *NAMES])
def test_encoders(name):
    parts = count(encoder.get_config(name)).parts
    if name in TOWERS:
        assert round(parts["vision_tower"] / 1e6, 1) == TOWERS[name]
    else:
        assert parts["vision_tower"] / 1e9 == pytest.approx(NAMES[name], rel=0.24)
    spec = Spec.from_config(encoder.get_config(name))
    if spec.family != "contrastive":
        assert {k: v for k, v in parts.items() if k in ("projection", "pixel_head")} == of_pixels(spec)


def formula(config):
    """Parameters of a language model with a tower, written out."""
    spec = Spec.from_config(config)
    v, d, n = spec.vision, spec.width, spec.depth

    def stack(s, qk_norm):
        wide = 3 if s.ffn == "swiglu" else 2
        norms = (2 * s.width + qk_norm) * (1 + s.bias)
        biases = s.bias * (5 * s.width + (wide - 1) * s.ffn_width)
        return s.depth * (4 * s.width**2 + wide * s.width * s.ffn_width + norms + biases)

    tower = stack(v, 2 * v.width if v.qk_norm == "full" else 0)
    tower += 3 * v.patch**2 * v.width + v.patch_bias * v.width + v.class_token * v.width
    tower += (v.tokens if v.positions == "learned" else 0) * v.width
    tower += ((v.embedding_norm != "none") + v.final_norm) * v.width * (1 + v.bias)
    text = stack(spec, 2 * d) + d + 2 * spec.vocab_size * d
    own = 0
    if spec.deep:
        weights = {"qkv": 3 * d * d, "out": d * d, "ffn": 3 * d * spec.ffn_width, "norms": 2 * d + 2 * d}
        own = n // spec.deep.every * sum(weights[m] for m in spec.deep.modules) + d * ("norms" in spec.deep.modules)
    delimiters = 2 * d * spec.delimiter_vectors
    return {"vision_tower": tower, "visual_expert": own, "all": text + tower + own + delimiters} | {
        "connector": of_connector(spec.connector)
    }


@pytest.mark.parametrize(
    "file, overrides",
    [
        ("late_fusion.py:small", {}),
        ("late_fusion.py:small", {"model.connector.kind": "c_abstractor", "model.connector.width": 32}),
        ("late_fusion.py:small", {"model.connector.kind": "attention", "model.connector.depth": 2}),
        ("late_fusion.py:small,encoder=clip", {"model.vision.feature_layer": -2}),
        ("late_fusion.py:small,encoder=siglip", {}),
        ("late_fusion.py:small,encoder=aim", {}),
        ("late_fusion.py:small,encoder=aimv2", {}),
        ("deep_fusion.py:cogvlm-small", {}),
        ("deep_fusion.py:cogvlm-small", {"model.deep.every": 2}),
        ("deep_fusion.py:cogvlm-small", {"model.deep.modules": ("qkv", "out", "ffn", "norms")}),
        ("mm1.py:small", {}),
    ],
)
def test_towers_connectors_and_deep_fusion_by_formula(file, overrides):
    config = loading.load(f"configs/{file}", overrides)
    counts, expected = count(config), formula(config)
    for part in ("vision_tower", "connector", "visual_expert"):
        assert counts.parts[part] == expected[part], part
    assert counts.parameters == expected["all"] + expected["connector"]


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
        "patch_embedding": size(abstract.get("patches")),
        "vision_tower": size(abstract.get("vision")),
        "connector": size(abstract.get("connector")),
        "delimiters": 0,
        "visual_expert": 0,
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
    expected = count(c).forward_flops(rows * length, dense_pairs, rows * 2)
    assert expected < found < 1.06 * expected


def test_training_flops_are_six_per_parameter_and_position():
    counts = count(early_fusion.get_config("8b"))
    embedding = counts.parts["token_embedding"]  # looked up, not multiplied
    assert counts.training_flops(1, 0, 0) == 6 * (counts.paper_parameters - embedding)


ROWS, LENGTH = 4, 32


def products_of_training(config):
    """FLOPs of the products in the compiled program that computes a model's outputs and their gradient, dense masks."""
    model = build(config)
    trained, frozen = freezing.split(model.abstract, config.optimizer.freeze)
    shape = lambda *s: jax.ShapeDtypeStruct(s, "int32")  # noqa: E731
    names = ("tokens", "segment_ids", "attend_until", "positions", "image_index")
    batch = {k: shape(ROWS, LENGTH) for k in names}
    size, slots = config.image.size, config.image.per_row
    batch["images"] = jax.ShapeDtypeStruct((ROWS, slots, size, size, 3), "uint8")
    batch["image_mask"] = jax.ShapeDtypeStruct((ROWS, slots), "bool")

    def outputs(params, batch):
        if config.model.family == "contrastive":
            images, texts, _, _ = model.embeddings(params, batch)
            return [images @ texts.T]
        if config.model.family == "late_fusion":
            return [model.hidden(params, batch)[0] @ model.unembedding(params)]
        pixels, text = model.predictions(params, batch)
        return [pixels] if text is None else [pixels, text @ model.unembedding(params)]

    def total(trained, frozen, batch, weights):
        return sum(
            jnp.vdot(x, w) for x, w in zip(outputs(freezing.merge(trained, frozen), batch), weights, strict=True)
        )

    weights = jax.eval_shape(outputs, model.abstract, batch)
    program = jax.jit(jax.value_and_grad(total)).lower(trained, frozen, batch, weights).compile()
    return flops(program.as_text())


def narrow(file, **overrides):
    keys = {"row_length": LENGTH, "model.vocab_size": 64, "model.attention": "reference", "model.depth": 2}
    keys |= {"model.vision.depth": 3, "model.scan_layers": True, "model.remat": "none"}
    if "late" in file:
        keys |= {"image.per_row": 4}  # 16 slots in 8 parts: none is computed twice
    return loading.load(f"configs/{file}", keys | {k.replace("__", "."): v for k, v in overrides.items()})


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


FROZEN_DECODER = ("embed/*", "layers/*", "final_norm/*", "head/*")


@pytest.mark.parametrize(
    "file, overrides, tolerance",
    [
        ("late_fusion.py:quickstart", {}, 1e-6),
        slow("late_fusion.py:quickstart", {"model__vision__feature_layer": -2, "model__tie_embeddings": True}, 1e-6),
        # With a frozen tower the connector's first matrix passes no gradient on; it is counted as if it did.
        slow("late_fusion.py:quickstart", {"optimizer__freeze": ("vision/*",)}, 0.02),
        slow("late_fusion.py:quickstart", {"optimizer__freeze": ("vision/*", *FROZEN_DECODER)}, 0.02),
        slow("late_fusion.py:quickstart", {"optimizer__freeze": FROZEN_DECODER}, 1e-6),
        slow("encoder.py:clip-small", {}, 1e-6),
        slow("encoder.py:siglip-small", {}, 1e-3),
        slow("encoder.py:clip-small", {"optimizer__freeze": ("vision/*",)}, 1e-3),
        slow("encoder.py:aim-small", {}, 1e-6),
        slow("encoder.py:aimv2-small", {}, 1e-6),
    ],
)
def test_flops_of_training_equal_the_compiled_products(file, overrides, tolerance):
    config = narrow(file, batch_rows=ROWS, **overrides)
    images = ROWS * config.image.per_row
    pairs, text = ROWS * LENGTH**2, ROWS * LENGTH
    expected = count(config).training_flops(text if config.model.family != "aim" else 0, pairs, images)
    if config.model.family == "aimv2":  # the reference computes what the mask hides as well
        patches, spec = (config.image.size // config.image.patch) ** 2, Spec.from_config(config)
        hidden = ROWS * (patches * (patches - 1) / 2 + LENGTH * patches)
        expected += 3 * spec.depth * 4 * spec.width * hidden
    assert products_of_training(config) == pytest.approx(expected, rel=tolerance)


def test_deep_fusion_costs_what_the_dense_model_costs():
    dense, deep = (count(c) for c in (early_fusion.get_config("275m"), deep_fusion.get_config("mot-275m")))
    assert deep.parameters > 1.7 * dense.parameters
    assert deep.active_parameters == dense.active_parameters
    assert deep.paper_parameters == dense.paper_parameters
    for tokens, images in ((1000, 0), (1000, 3)):
        assert deep.training_flops(tokens, 1e6, images) == dense.training_flops(tokens, 1e6, images)


def test_frozen_parts_are_cheaper():
    """A frozen decoder passes gradients on to a connector that is trained, and none where nothing below it is."""
    config = late_fusion.get_config("289m").unlock()
    work = {}
    for name, patterns in {
        "all": (),
        "tower": ("vision/*",),
        "all but the connector": ("vision/*", *FROZEN_DECODER),
        "all but the head": ("vision/*", "connector/*", "embed/*", "layers/*", "final_norm/*"),
    }.items():
        config.optimizer.freeze = patterns
        work[name] = count(config).training
    counts = count(config)
    matrices = counts.paper_text - counts.parts["token_embedding"]
    assert work["all"].token == work["tower"].token == 6 * matrices
    assert work["all but the connector"].token == 4 * matrices
    assert work["all but the head"].token == 2 * matrices + 2 * counts.parts["head"]
    once = counts.image_flops
    assert work["tower"].image == once["vision_tower"] + 3 * once["connector"]
    config.optimizer.freeze = ("vison/*",)
    with pytest.raises(ValueError, match=r"'vison/\*' matches no parameter .*vision"):
        count(config)
