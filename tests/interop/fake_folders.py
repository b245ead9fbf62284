"""Folders as Hugging Face's library saves them, small and random, without that library."""

import json

import numpy as np
from safetensors.numpy import save_file

LLAMA = dict(
    model_type="llama", vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64, rms_norm_eps=1e-5, dtype="float32",
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CLIP = dict(
    model_type="clip_vision_model", hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
    image_size=8, patch_size=4, hidden_act="quick_gelu", dtype="float32",
)  # fmt: skip
SIGLIP = CLIP | dict(model_type="siglip_vision_model", hidden_act="gelu_pytorch_tanh")
AIMV2 = CLIP | dict(model_type="aimv2_vision_model", hidden_act="silu", use_head=True)
OLMO2 = LLAMA | dict(model_type="olmo2")
QWEN3 = LLAMA | dict(model_type="qwen3", head_dim=6, tie_word_embeddings=True)
MIXTRAL = LLAMA | dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
LLAVA = dict(
    model_type="llava", text_config=LLAMA, vision_config=CLIP, image_token_index=39, image_seq_length=4, dtype="float32"
)


def decoder_shapes(c):
    d, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    k = c.get("head_dim", d // c["num_attention_heads"])
    q, kv = k * c["num_attention_heads"], k * c["num_key_value_heads"]
    kind = c["model_type"]
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (v, d)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        own = {f"self_attn.{n}_proj": (m, d) for n, m in (("q", q), ("k", kv), ("v", kv))} | {
            "self_attn.o_proj": (d, q)
        }
        if kind == "mixtral":
            own["block_sparse_moe.gate"] = (c["num_local_experts"], d)
            for e in range(c["num_local_experts"]):
                own |= {f"block_sparse_moe.experts.{e}.{n}": (f, d) for n in ("w1", "w3")}
                own[f"block_sparse_moe.experts.{e}.w2"] = (d, f)
        else:
            own |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        first, second = ("post_attention", "post_feedforward") if kind == "olmo2" else ("input", "post_attention")
        own |= {f"{first}_layernorm": (d,), f"{second}_layernorm": (d,)}
        if kind in ("olmo2", "qwen3"):
            own |= {f"self_attn.{n}_norm": (k if kind == "qwen3" else m,) for n, m in (("q", q), ("k", kv))}
        shapes |= {f"{layer}{name}.weight": shape for name, shape in own.items()}
    return shapes


def tower_shapes(c):
    d, f, p = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    patches, kind = (c["image_size"] // p) ** 2, c["model_type"].partition("_")[0]

    def linear(name, out, inside):
        return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}

    def norm(name):
        return {f"{name}.weight": (d,), f"{name}.bias": (d,)}

    layers = [f"encoder.layers.{i}." for i in range(c["num_hidden_layers"])]
    if kind == "aimv2":
        shapes = {"embeddings.patch_embed.weight": (d, 3, p, p), "embeddings.patch_embed.bias": (d,)}
        shapes |= {"embeddings.rms_norm.weight": (d,), "embeddings.position_embedding.weight": (patches, d)}
        shapes |= {"rms_norm.weight": (d,), "head.cls_token": (1, 1, d), "head.k_proj.weight": (d, d)}
        for layer in layers:
            shapes |= {f"{layer}attention.{n}_proj.weight": (d, d) for n in ("q", "k", "v", "out")}
            shapes |= {f"{layer}ffn.{n}_proj.weight": (f, d) for n in ("gate", "up")}
            shapes |= {f"{layer}ffn.down_proj.weight": (d, f), f"{layer}rms_norm1.weight": (d,)}
            shapes |= {f"{layer}rms_norm2.weight": (d,)}
        return shapes
    shapes = {"embeddings.patch_embedding.weight": (d, 3, p, p)} | norm("post_layernorm")
    for layer in layers:
        for n in ("q", "k", "v", "out"):
            shapes |= linear(f"{layer}self_attn.{n}_proj", d, d)
        shapes |= linear(f"{layer}mlp.fc1", f, d) | linear(f"{layer}mlp.fc2", d, f)
        shapes |= norm(f"{layer}layer_norm1") | norm(f"{layer}layer_norm2")
    if kind == "clip":
        shapes |= {"embeddings.class_embedding": (d,), "embeddings.position_embedding.weight": (patches + 1, d)}
        shapes |= norm("pre_layrnorm")
    else:
        shapes |= {"embeddings.patch_embedding.bias": (d,), "embeddings.position_embedding.weight": (patches, d)}
        shapes |= {"head.probe": (1, 1, d), "head.attention.in_proj_weight": (3 * d, d)}
        shapes |= {"head.attention.in_proj_bias": (3 * d,)} | linear("head.attention.out_proj", d, d)
        shapes |= norm("head.layernorm") | linear("head.mlp.fc1", f, d) | linear("head.mlp.fc2", d, f)
    if kind != "aimv2":
        shapes = {f"vision_model.{name}": shape for name, shape in shapes.items()}
    return shapes


def shapes_of(config):
    if config["model_type"] == "llava":
        tower, text = config["vision_config"], config["text_config"]
        d = text["hidden_size"]
        shapes = {f"vision_tower.{name}": shape for name, shape in tower_shapes(tower).items()}
        shapes |= {f"language_model.{name}": shape for name, shape in decoder_shapes(text).items()}
        for i, inside in ((1, tower["hidden_size"]), (2, d)):
            name = f"multi_modal_projector.linear_{i}"
            shapes |= {f"{name}.weight": (d, inside), f"{name}.bias": (d,)}
        return shapes
    return (tower_shapes if config["model_type"].endswith("vision_model") else decoder_shapes)(config)


def make_folder(folder, config, dtype=np.float32, **others):
    """config.json and model.safetensors; `others` are tensors besides. Returns the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype(dtype) for name, shape in shapes_of(config).items()} | others
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors
