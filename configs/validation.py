"""What can be seen wrong in a config without data and without devices: `validate` names the keys and what to do."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """A config that cannot be meant: the message names the keys at fault and what to do."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"mesh": {"fsdp": 8}} -> {"mesh.fsdp": 8}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


ENCODERS = ("contrastive", "aim", "aimv2")  # families of pairs of an image and a text

_CHOICES = {
    "data.caption_order": ("image_first", "text_first", "random"),
    "data.image_attention": ("bidirectional", "causal"),
    "data.image_rotary": ("sequential", "shared"),
    "data.rows": ("packed", "pairs"),
    "data.worker_kind": ("threads", "processes"),
    "model.family": ("early_fusion", "late_fusion", "contrastive", "aim", "aimv2"),
    "model.ffn": ("swiglu", "gelu", "gelu_tanh", "quick_gelu"),
    "model.delimiter_weights": ("text", "boi_image", "image"),
    "model.deep.initial": ("random", "copy"),
    "model.vision.ffn": ("swiglu", "gelu", "gelu_tanh", "quick_gelu"),
    "model.vision.norm": ("rmsnorm", "layernorm"),
    "model.vision.norm_position": ("pre", "post"),
    "model.vision.qk_norm": ("none", "full", "head"),
    "model.vision.positions": ("learned", "sincos"),
    "model.vision.embedding_norm": ("none", "before_positions", "after_positions"),
    "model.connector.kind": ("linear", "mlp", "average", "attention", "c_abstractor", "glu"),
    "model.contrastive.loss": ("softmax", "sigmoid"),
    "model.contrastive.pooling": ("class", "mean", "attention"),
    "model.contrastive.text_attention": ("causal", "bidirectional"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.norm_position": ("pre", "post"),
    "model.qk_norm": ("none", "full", "head"),
    "model.init": ("fan_in_depth_scaled", "open_lm", "normal"),
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "reference", "blocked", "splash", "triton"),
    "model.remat": ("none", "full", "exchanges", "minimal"),
    "model.moe.modality": ("agnostic", "grouped", "fixed"),
    "model.moe.balance": ("loss", "bias"),
    "model.moe.transport": ("auto", "ragged", "padded", "gather"),
    "model.moe.grouped_matmul": ("auto", "blocks", "megablox", "tokamax"),
    "schedule.kind": ("wsd", "cosine"),
    "schedule.cooldown_shape": ("1-sqrt", "linear"),
}

# The least value of a number; where 0 has a meaning of its own it is allowed.
_AT_LEAST = {
    "steps": 1, "batch_rows": 1, "row_length": 2, "gradient_accumulation": 1,
    "data.window": 1, "data.workers": 0, "data.prefetch": 1,
    "image.size": 1, "image.patch": 1, "image.positions": 0, "image.per_row": 0,
    "model.vocab_size": 7, "model.width": 1, "model.depth": 1, "model.heads": 1, "model.kv_heads": 0,
    "model.head_dim": 0, "model.ffn_width": 0, "model.vocab_chunks": 0, "model.rope_theta": 0.0,
    "model.deep.every": 1,
    "model.vision.width": 1, "model.vision.depth": 1, "model.vision.heads": 1, "model.vision.ffn_width": 0,
    "model.connector.width": 0, "model.connector.depth": 0, "model.connector.heads": 0,
    "model.connector.downsample": 1,
    "model.contrastive.width": 1, "model.contrastive.max_scale": 0.0,
    "model.aim.head_width": 1, "model.aim.head_depth": 1, "model.aim.pixel_weight": 0.0,
    "model.moe.experts": 0, "model.moe.top_k": 1, "model.moe.every": 1, "model.moe.shared": 0,
    "model.moe.granularity": 1, "model.moe.image_experts": 0,
    "model.moe.balance_loss": 0.0, "model.moe.z_loss": 0.0, "model.moe.bias_rate": 0.0,
    "model.moe.buffer_factor": 0.0,
    "optimizer.learning_rate": 0.0, "optimizer.weight_decay": 0.0, "optimizer.clip_norm": 0.0, "optimizer.z_loss": 0.0,
    "optimizer.vision_scale": 0.0,
    "schedule.warmup": 0, "schedule.cooldown": 0, "schedule.final_ratio": 0.0,
    "trunk.step": -1, "checkpoint.every": 1, "checkpoint.keep": 1, "checkpoint.keep_every": 0,
    "evaluation.rows": 1, "evaluation.batch_rows": 1, "evaluation.questions": 1,
    "log.every": 1, "profile.start": 0, "profile.steps": 0,
}  # fmt: skip


def validate(config: ConfigDict) -> None:
    """What can be seen wrong without data and without devices.

    Raises:
      ConfigError: names the keys, their values and what to do.
    """
    flat = flatten(config)
    for key, choices in _CHOICES.items():
        if flat[key] not in choices:
            near = difflib.get_close_matches(flat[key], choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{key} = {flat[key]!r} is none of {', '.join(choices)}{hint}")
    for key, least in _AT_LEAST.items():
        if not flat[key] >= least or math.isinf(flat[key]):
            raise ConfigError(f"{key} = {flat[key]!r}; it must be at least {least}")
    _validate_data(config)
    _validate_image(config)
    _validate_model(config)
    if config.model.family != "early_fusion":
        _validate_tower(config)
    if config.model.family in ENCODERS:
        _validate_encoder(config)
    else:
        _require(
            config.data.rows == "packed",
            f"data.rows = {config.data.rows!r} is for encoders (model.family = {', '.join(ENCODERS)}); "
            f"{config.model.family!r} takes 'packed'",
        )
    if config.model.family == "late_fusion":
        _validate_connector(config)
    if config.model.deep.modules:
        _validate_deep(config)
    if config.model.moe.experts:
        _validate_experts(config)
    _validate_training(config)
    _validate_start(config)
    for option in config.compiler.options:
        _require(
            re.fullmatch(r"[a-z]\w*=.+", option) is not None,
            f"compiler.options: {option!r}; expected NAME=VALUE such as 'xla_tpu_scoped_vmem_limit_kib=65536'",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _validate_data(config: ConfigDict) -> None:
    sources, weights, root = config.data.sources, config.data.weights, config.data.root
    _require(
        not root.startswith(("gs://", "s3://")),
        f"data.root = {root!r}: documents are read from a disk. Copy them there with python -m data_pipelines.stage "
        f"--input={root} --output=FOLDER, or mount the bucket, and set data.root to that folder (data.plans alone may "
        "stay in a bucket)",
    )
    _require(len(sources) > 0, "data.sources is empty; name at least one dataset folder under data.root")
    _require(
        len(sources) == len(weights),
        f"data.sources has {len(sources)} names and data.weights {len(weights)} numbers; give one weight per source",
    )
    _require(len(set(sources)) == len(sources), f"data.sources = {sources!r} names a source twice; add up its weights")
    _require(
        all(w > 0 and math.isfinite(w) for w in weights),
        f"data.weights = {weights!r} must all be positive; leave out of data.sources what should not be read",
    )


def _validate_image(config: ConfigDict) -> None:
    image = config.image
    _require(
        image.size % image.patch == 0,
        f"image.size = {image.size} is no multiple of image.patch = {image.patch}; "
        f"the next one is {-(-image.size // image.patch) * image.patch}",
    )
    patches = (image.size // image.patch) ** 2
    if config.model.family == "early_fusion":
        _require(
            image.positions == patches,
            f"image.positions = {image.positions}; in early fusion it is (image.size / image.patch)^2 = {patches}",
        )
    _require(
        image.positions > 0 or config.data.rows == "pairs",
        "image.positions = 0; an image in a row has at least one position (0 is for data.rows = 'pairs')",
    )
    span = image.positions + 2 * config.data.image_delimiters
    _require(
        span <= config.row_length,
        f"an image takes {span} positions (image.positions, and two delimiters where data.image_delimiters is on) "
        f"and does not fit row_length = {config.row_length}; make rows longer or images smaller",
    )
    low_high = tuple(image.crop_scale)
    _require(
        len(low_high) == 2 and 0 < low_high[0] <= low_high[1] <= 1,
        f"image.crop_scale = {image.crop_scale!r}; expected (low, high) with 0 < low <= high <= 1",
    )
    _require(0 <= image.flip <= 1, f"image.flip = {image.flip} is no probability; it must be from 0 to 1")
    for key in ("mean", "std"):
        _require(len(image[key]) == 3, f"image.{key} = {image[key]!r}; expected three numbers: red, green, blue")
    _require(all(s > 0 for s in image.std), f"image.std = {image.std!r} must all be positive")


def _validate_model(config: ConfigDict) -> None:
    model = config.model
    if not model.head_dim:
        _require(
            model.width % model.heads == 0,
            f"model.width = {model.width} is no multiple of model.heads = {model.heads}; set model.head_dim",
        )
    head_dim = model.head_dim or model.width // model.heads
    _require(
        head_dim % 2 == 0 or not model.rope_theta,
        f"the head dimension is {head_dim}; rotary positions need an even one (model.head_dim)",
    )
    _require(
        not 0 < model.rope_theta <= 1,
        f"model.rope_theta = {model.rope_theta}; it is more than 1, or 0 for no rotary positions",
    )
    delimiters = config.data.image_delimiters
    _require(
        delimiters or not model.delimiter_vectors,
        "model.delimiter_vectors are of the boi and eoi positions around an image; turn data.image_delimiters on",
    )
    _require(
        delimiters or model.delimiter_weights == "text",
        f"model.delimiter_weights = {model.delimiter_weights!r} is about the boi and eoi positions around an image; "
        "turn data.image_delimiters on",
    )
    if model.kv_heads:
        _require(
            model.heads % model.kv_heads == 0,
            f"model.heads = {model.heads} is no multiple of model.kv_heads = {model.kv_heads}",
        )


def _validate_tower(config: ConfigDict) -> None:
    model, vision = config.model, config.model.vision
    _require(
        vision.width % vision.heads == 0,
        f"model.vision.width = {vision.width} is no multiple of model.vision.heads = {vision.heads}",
    )
    _require(
        vision.positions == "learned" or vision.width % 4 == 0,
        f"model.vision.width = {vision.width}; model.vision.positions = 'sincos' needs a multiple of 4",
    )
    _require(
        -vision.depth <= vision.feature_layer <= -1,
        f"model.vision.feature_layer = {vision.feature_layer}; counted from the end it is from -1 (the last) to "
        f"-{vision.depth} (the first)",
    )
    _require(
        not model.patch_positions,
        f"model.patch_positions is of early fusion; a vision tower (model.family = {model.family!r}) has its own "
        "positions, so leave it off",
    )


def _validate_encoder(config: ConfigDict) -> None:
    family, data, image = config.model.family, config.data, config.image
    _require(
        data.rows == "pairs" and not image.positions and image.per_row == 1 and not data.image_delimiters,
        f"model.family = {family!r} takes pairs of an image and a text: data.rows = 'pairs', image.positions = 0, "
        f"image.per_row = 1 and data.image_delimiters off, not {data.rows!r}, {image.positions}, {image.per_row} and "
        f"{data.image_delimiters}",
    )
    _require(
        not config.model.deep.modules and not config.model.moe.experts,
        f"model.family = {family!r} has text alone in its decoder: leave model.deep.modules and model.moe.experts out",
    )
    vision = config.model.vision
    _require(
        vision.feature_layer == -1,
        f"model.vision.feature_layer = {vision.feature_layer}; an encoder is trained with all of its layers: -1",
    )
    if family == "contrastive":
        pooling = config.model.contrastive.pooling
        _require(
            pooling != "class" or vision.class_token,
            "model.contrastive.pooling = 'class' takes the class token's features; turn model.vision.class_token on, "
            "or pool by 'mean' or 'attention'",
        )
        scale, most = config.model.contrastive.scale, config.model.contrastive.max_scale
        _require(
            scale > 0 and (not most or 1 <= scale <= most),
            f"model.contrastive.scale = {scale} and max_scale = {most}; the scale begins positive and, where it is "
            "clamped (max_scale > 0), from 1 to max_scale",
        )
        _require(
            config.gradient_accumulation == 1,
            f"gradient_accumulation = {config.gradient_accumulation}; with model.family = 'contrastive' it is 1: the "
            "negatives of a pair are all the others of the global batch, not of a microbatch",
        )
    else:
        _require(
            not vision.class_token,
            f"model.family = {family!r} predicts patch after patch and has no place for a class token; turn "
            "model.vision.class_token off",
        )
        _require(
            image.size > image.patch,
            f"image.size = {image.size} and image.patch = {image.patch} make one patch of an image; model.family = "
            f"{family!r} predicts a patch from those before it",
        )


def _validate_connector(config: ConfigDict) -> None:
    image, connector = config.image, config.model.connector
    kind, side = connector.kind, image.size // image.patch
    _require(
        image.per_row > 0,
        "image.per_row = 0 leaves the vision tower nothing to see; make room for an image, or take model.family = "
        "'early_fusion'",
    )
    _require(
        connector.downsample == 1 or kind == "glu",
        f"model.connector.downsample = {connector.downsample} is of kind 'glu' alone; make it 1 for {kind!r}",
    )
    _require(
        side % connector.downsample == 0,
        f"model.connector.downsample = {connector.downsample} does not divide the {side} patches along an image's edge "
        "(image.size / image.patch)",
    )
    if kind in ("linear", "mlp", "glu"):
        positions = (side // connector.downsample) ** 2
        _require(
            image.positions == positions,
            f"image.positions = {image.positions}; a connector of kind {kind!r} makes {positions} of {side} x {side} "
            "patches. 'average', 'attention' and 'c_abstractor' make as many as are asked for",
        )
    if kind in ("average", "c_abstractor"):
        _require(
            math.isqrt(image.positions) ** 2 == image.positions and image.positions <= side**2,
            f"image.positions = {image.positions}; a connector of kind {kind!r} makes a square number of the {side} x "
            f"{side} patches, such as {max(side // 2, 1) ** 2}",
        )
    width, heads = connector.width or config.model.vision.width, connector.heads or config.model.vision.heads
    _require(
        kind != "attention" or width % heads == 0,
        f"model.connector.width = {width} is no multiple of model.connector.heads = {heads} (0 is the vision tower's)",
    )


DEEP_MODULES = ("qkv", "out", "ffn", "norms")


def _validate_deep(config: ConfigDict) -> None:
    model, deep, moe = config.model, config.model.deep, config.model.moe
    for name in deep.modules:
        near = difflib.get_close_matches(name, DEEP_MODULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        _require(name in DEEP_MODULES, f"model.deep.modules: {name!r} is none of {', '.join(DEEP_MODULES)}{hint}")
    _require(len(set(deep.modules)) == len(deep.modules), f"model.deep.modules = {deep.modules!r} names one twice")
    _require(
        model.depth % deep.every == 0,
        f"model.depth = {model.depth} is no multiple of model.deep.every = {deep.every}; the last layer must be one",
    )
    _require(
        "qkv" in deep.modules or not deep.qkv_bias,
        f"model.deep.qkv_bias is of the images' own qkv; add it to model.deep.modules = {deep.modules!r}",
    )
    if moe.experts and "ffn" in deep.modules:
        together = [i for i in range(model.depth) if (i + 1) % deep.every == 0 and (i + 1) % moe.every == 0]
        _require(
            not together,
            "model.deep.modules names 'ffn' in layers that have experts (model.moe.every): take it out, and give "
            "images experts of their own by model.moe.modality = 'grouped' or 'fixed'",
        )


def _validate_experts(config: ConfigDict) -> None:
    model, moe = config.model, config.model.moe
    _require(
        model.ffn == "swiglu" and not model.bias,
        f"model.moe.experts = {moe.experts}: experts are SwiGLU without biases; model.ffn must be 'swiglu' and "
        f"model.bias off, not {model.ffn!r} and {model.bias}",
    )
    _require(
        model.depth % moe.every == 0,
        f"model.depth = {model.depth} is no multiple of model.moe.every = {moe.every}; the last layer must have some",
    )
    _require(
        moe.modality == "grouped" or not moe.image_experts,
        f"model.moe.image_experts = {moe.image_experts} with model.moe.modality = {moe.modality!r}; only 'grouped' "
        "has groups",
    )
    group, which = moe.experts, "model.moe.experts"
    if moe.modality == "fixed":
        _require(
            moe.experts == 2 and moe.top_k == 1 and moe.granularity == 1,
            f"model.moe.modality = 'fixed' is one expert for text and one for images: experts = 2, top_k = 1 and "
            f"granularity = 1, not {moe.experts}, {moe.top_k} and {moe.granularity}; for more of each take 'grouped'",
        )
    elif moe.modality == "grouped":
        _require(
            moe.experts >= 2 and moe.image_experts < moe.experts,
            f"model.moe.image_experts = {moe.image_experts} of model.moe.experts = {moe.experts} leaves an empty "
            "group: text and images need at least one expert each (image_experts = 0 is half of them)",
        )
        images = moe.image_experts or moe.experts // 2
        group, which = min(images, moe.experts - images), "the smaller group of experts"
    _require(
        moe.top_k <= group,
        f"model.moe.top_k = {moe.top_k} is more than {which}, {group}; a token goes to k different ones",
    )
    _require(
        not (moe.renormalise and moe.top_k * moe.granularity == 1),
        "model.moe.renormalise with one choice makes every gate 1, and the router's gradient 0; leave it off",
    )
    _require(
        moe.buffer_factor == 0 or moe.buffer_factor >= 1,
        f"model.moe.buffer_factor = {moe.buffer_factor} has no room for the mean load; set 0 (for all) or at least 1",
    )
    experts = moe.experts * moe.granularity
    _require(
        config.mesh.expert < 1 or experts % config.mesh.expert == 0,
        f"{experts} experts (model.moe.experts * granularity) do not divide over mesh.expert = {config.mesh.expert}; "
        "make mesh.expert a divisor",
    )


def _validate_training(config: ConfigDict) -> None:
    _require(
        config.batch_rows % config.gradient_accumulation == 0,
        f"batch_rows = {config.batch_rows} does not divide into gradient_accumulation = "
        f"{config.gradient_accumulation} microbatches of whole rows",
    )
    sizes = {axis: config.mesh[axis] for axis in ("replica", "fsdp", "expert", "tensor")}
    _require(
        all(n == -1 or n >= 1 for n in sizes.values()),
        f"mesh = {sizes}; sizes are positive, or -1 (chosen by the devices there are)",
    )
    optimizer, schedule = config.optimizer, config.schedule
    for key in ("beta1", "beta2"):
        _require(0 <= optimizer[key] < 1, f"optimizer.{key} = {optimizer[key]}; it must be from 0 to below 1")
    _require(optimizer.learning_rate > 0, "optimizer.learning_rate must be positive; weight decay is relative to it")
    _require(optimizer.eps > 0, f"optimizer.eps = {optimizer.eps}; it must be positive")
    _require(
        schedule.final_ratio <= 1,
        f"schedule.final_ratio = {schedule.final_ratio} is a part of the peak; it must be from 0 to 1",
    )
    cooldown = schedule.cooldown if schedule.kind == "wsd" else 0
    _require(
        schedule.warmup + cooldown <= config.steps,
        f"schedule.warmup = {schedule.warmup} and schedule.cooldown = {cooldown} together are longer than the run, "
        f"steps = {config.steps}; shorten them or train longer",
    )


def _validate_start(config: ConfigDict) -> None:
    named = [f"start.{part}" for part, run in config.start.items() if run]
    _require(
        not (named and config.trunk.workdir),
        f"{', '.join(named)} and trunk.workdir are both given; a trunk has all weights, so leave out one of the two",
    )
    optimizer = config.optimizer
    _require(
        optimizer.vision_scale > 0,
        "optimizer.vision_scale = 0 trains nothing at full cost; to freeze the tower, optimizer.freeze = ('vision/*',)",
    )
    _require(
        optimizer.vision_scale == 1 or config.model.family != "early_fusion",
        f"optimizer.vision_scale = {optimizer.vision_scale}, but model.family = 'early_fusion' has no vision tower",
    )
    _require(
        all(isinstance(pattern, str) and pattern for pattern in optimizer.freeze),
        f"optimizer.freeze = {optimizer.freeze!r}; expected patterns of parameters' names, such as ('vision/*',)",
    )
