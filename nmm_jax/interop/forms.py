"""How each layout's config.json says what our config says: tables, that their_config.py reads both ways.

A form lists the keys that mean the same, what a layout fixes in our config, and what it must not say because we have no
counterpart. Defaults are those of transformers 5.23, which leaves them out of files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs.encoder import PIXELS


@dataclasses.dataclass(frozen=True)
class Form:
    """How one kind of config.json says what our config says."""

    same: Mapping[str, str]  # our key -> theirs
    ours: Mapping[str, Any]  # what our keys are
    theirs: Mapping[str, Any]  # what theirs must be
    defaults: Mapping[str, Any]  # where a file is silent
    words: Mapping[str, Mapping[Any, Any]] = dataclasses.field(default_factory=dict)  # our key -> {our word: theirs}
    not_zero: tuple[str, ...] = ()  # our keys


_TOWER_KEYS = {
    "model.vision.width": "hidden_size",
    "model.vision.depth": "num_hidden_layers",
    "model.vision.heads": "num_attention_heads",
    "model.vision.ffn_width": "intermediate_size",
    "image.size": "image_size",
    "image.patch": "patch_size",
}
_LAYER_NORMS = {
    "model.vision.bias": True,
    "model.vision.norm": "layernorm",
    "model.vision.norm_position": "pre",
    "model.vision.qk_norm": "none",
    "model.vision.positions": "learned",
    "model.vision.final_norm": True,
}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

TOWER_FORMS = {
    "clip_vision_model": Form(
        same=_TOWER_KEYS | {"model.vision.norm_eps": "layer_norm_eps", "model.vision.ffn": "hidden_act"},
        ours=_LAYER_NORMS
        | {
            "model.vision.patch_bias": False,
            "model.vision.class_token": True,
            "model.vision.embedding_norm": "after_positions",
        },
        theirs={"num_channels": 3},
        defaults=dict(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=224,
            patch_size=32, layer_norm_eps=1e-5, hidden_act="quick_gelu", num_channels=3,
        ),
        words={"model.vision.ffn": _ACTIVATIONS},
    ),
    "siglip_vision_model": Form(
        same=_TOWER_KEYS | {"model.vision.norm_eps": "layer_norm_eps", "model.vision.ffn": "hidden_act"},
        ours=_LAYER_NORMS
        | {
            "model.vision.patch_bias": True,
            "model.vision.class_token": False,
            "model.vision.embedding_norm": "none",
        },
        theirs={"num_channels": 3},
        defaults=dict(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=224,
            patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh", num_channels=3,
        ),
        words={"model.vision.ffn": _ACTIVATIONS},
    ),
    "aimv2_vision_model": Form(
        same=_TOWER_KEYS | {"model.vision.norm_eps": "rms_norm_eps", "model.vision.positions": "is_native"},
        ours={
            "model.vision.bias": False,
            "model.vision.norm": "rmsnorm",
            "model.vision.norm_position": "pre",
            "model.vision.qk_norm": "none",
            "model.vision.final_norm": True,
            "model.vision.ffn": "swiglu",
            "model.vision.patch_bias": True,
            "model.vision.class_token": False,
            "model.vision.embedding_norm": "before_positions",
        },
        theirs={"num_channels": 3, "hidden_act": "silu", "qkv_bias": False, "mlp_bias": False},
        defaults=dict(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=8, intermediate_size=2816, image_size=224,
            patch_size=14, rms_norm_eps=1e-5, is_native=False, num_channels=3, hidden_act="silu", qkv_bias=False,
            mlp_bias=False,
        ),
        words={"model.vision.positions": {"learned": False, "sincos": True}},
    ),
}  # fmt: skip
# What a run with the tower alone is said to be: an encoder that has still to get its other half.
ENCODERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "model.family": "contrastive",
        "model.contrastive.loss": "softmax",
        "model.contrastive.pooling": "class",
    },
    "siglip_vision_model": {
        "model.family": "contrastive",
        "model.contrastive.loss": "sigmoid",
        "model.contrastive.text_attention": "bidirectional",
        "model.contrastive.scale": 10.0,
        "model.contrastive.max_scale": 0.0,
        "model.contrastive.bias": -10.0,
    },
    "aimv2_vision_model": {"model.family": "aimv2"},
}
PAIRS = {
    "data.rows": "pairs",
    "data.sources": ("captions",),
    "data.weights": (1.0,),
    "image.positions": 0,
    "image.per_row": 1,
}
TEXT_ALONE = {
    "data.sources": ("text",),
    "data.weights": (1.0,),
    "image.size": 14,
    "image.patch": 14,
    "image.positions": 1,
    "image.per_row": 0,
}
TOWER_PIXELS = {f"{kind}_vision_model": PIXELS[kind] for kind in ("clip", "siglip", "aimv2")}
PROCESSORS = {"siglip_vision_model": "SiglipImageProcessor"}

_DECODER_KEYS = {
    "model.vocab_size": "vocab_size",
    "model.width": "hidden_size",
    "model.depth": "num_hidden_layers",
    "model.heads": "num_attention_heads",
    "model.kv_heads": "num_key_value_heads",
    "model.head_dim": "head_dim",
    "model.ffn_width": "intermediate_size",
    "model.norm_eps": "rms_norm_eps",
    "model.tie_embeddings": "tie_word_embeddings",
}
_DEFAULTS = dict(
    vocab_size=32_000, hidden_size=4_096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=None,
    head_dim=None, intermediate_size=11_008, rms_norm_eps=1e-6, tie_word_embeddings=False, hidden_act="silu",
    attention_bias=False, mlp_bias=False, max_position_embeddings=2_048, rope_theta=10_000.0,
    bos_token_id=1, eos_token_id=2, pad_token_id=None,
)  # fmt: skip


def _decoder(qk_norm: str, position: str = "pre", experts: bool = False, **defaults: Any) -> Form:
    ours = {
        "model.ffn": "swiglu",
        "model.bias": False,
        "model.norm": "rmsnorm",
        "model.norm_position": position,
        "model.qk_norm": qk_norm,
        "model.deep.modules": (),
        "model.delimiter_vectors": False,
    }
    same = dict(_DECODER_KEYS)
    if experts:
        same |= {"model.moe.experts": "num_local_experts", "model.moe.top_k": "num_experts_per_tok"}
        wanted = dict(every=1, shared=0, granularity=1, modality="agnostic", balance="loss", renormalise=True)
        ours |= {f"model.moe.{key}": value for key, value in wanted.items()}
    else:
        ours["model.moe.experts"] = 0
    theirs = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    return Form(same, ours, theirs, _DEFAULTS | defaults, not_zero=("model.rope_theta",))


DECODER_FORMS = {
    "llama": _decoder("none"),
    "olmo2": _decoder(
        "full", "post", vocab_size=50_304, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=50_279, pad_token_id=1,
    ),
    "qwen3": _decoder(
        "head", vocab_size=151_936, intermediate_size=22_016, num_key_value_heads=32, head_dim=128,
        max_position_embeddings=32_768, bos_token_id=None, eos_token_id=None,
    ),
    "mixtral": _decoder(
        "none", experts=True, intermediate_size=14_336, num_key_value_heads=8, rms_norm_eps=1e-5, num_local_experts=8,
        num_experts_per_tok=2, max_position_embeddings=131_072, rope_theta=1e6,
    ),
}  # fmt: skip

LLAVA = Form(
    same={"model.vision.feature_layer": "vision_feature_layer"},
    ours={
        "model.family": "late_fusion",
        "model.connector.kind": "mlp",
        "data.image_attention": "causal",
        "data.image_rotary": "sequential",
        "data.image_delimiters": False,
    },
    theirs={"projector_hidden_act": "gelu", "multimodal_projector_bias": True},
    defaults=dict(
        vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu",
        multimodal_projector_bias=True, image_token_index=32_000,
    ),
)  # fmt: skip

# LLaVA takes features before the tower's last norm, so whether there is one is `write`'s to see.
LLAVA_TOWERS = {
    kind: dataclasses.replace(form, ours={k: v for k, v in form.ours.items() if k != "model.vision.final_norm"})
    for kind, form in TOWER_FORMS.items()
}

# Models with a tower among other things, of which the tower is taken.
WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "aimv2": "aimv2_vision_model"}
ARCHITECTURES = {
    "CLIPModel": "clip", "CLIPVisionModel": "clip_vision_model", "CLIPVisionModelWithProjection": "clip_vision_model",
    "SiglipModel": "siglip", "SiglipVisionModel": "siglip_vision_model", "Aimv2Model": "aimv2",
    "Aimv2VisionModel": "aimv2_vision_model", "LlamaForCausalLM": "llama", "Olmo2ForCausalLM": "olmo2",
    "Qwen3ForCausalLM": "qwen3", "MixtralForCausalLM": "mixtral", "LlavaForConditionalGeneration": "llava",
}  # fmt: skip
LAYOUTS = (*WHOLE, *TOWER_FORMS, *DECODER_FORMS, "llava")
