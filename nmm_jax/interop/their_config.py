"""config.json of a model of Hugging Face's library, and ours: each says what the other does, or the weights do not fit.

forms.py has what each layout's keys mean.
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.base import base
from configs.loading import ConfigError, validate
from nmm_jax.interop.errors import InteropError
from nmm_jax.interop.forms import (
    ARCHITECTURES,
    DECODER_FORMS,
    ENCODERS,
    LAYOUTS,
    LLAVA,
    LLAVA_TOWERS,
    PAIRS,
    PROCESSORS,
    TEXT_ALONE,
    TOWER_FORMS,
    TOWER_PIXELS,
    WHOLE,
    Form,
)
from nmm_jax.interop.layouts import DECODERS, TOWERS, Layout, llava
from nmm_jax.interop.tensors import read_json
from nmm_jax.models.spec import Spec

Json = dict[str, Any]
GENERATION = "generation_config.json"
LONGEST_ROW = 4_096  # of an imported config: the length that a model allows, up to this


@dataclasses.dataclass(frozen=True)
class Source:
    """What a folder's JSON says."""

    kind: str
    config: ConfigDict  # ours
    layout: Layout
    tokens: Mapping[str, int | None]  # ids of special tokens: bos, eos, pad, image
    notes: tuple[str, ...]  # what is not the same in ours


def read(folder: pathlib.Path) -> Source:
    """Our config of the model in a folder.

    Raises:
      InteropError: an unknown layout, or something that we have no counterpart of; names the file and the key.
    """
    path = folder / "config.json"
    theirs = read_json(path)
    kind = _kind(theirs, path)
    values: dict[str, Any] = {}
    notes: list[str] = []
    text, decoder = theirs, kind
    if kind in (*WHOLE, *TOWER_FORMS):
        tower = WHOLE.get(kind, kind)
        own = theirs.get("vision_config", {}) if kind in WHOLE else theirs
        values = _tower(tower, own, path) | ENCODERS[tower] | PAIRS | _pixels(folder, tower)
        if tower == "siglip_vision_model":
            values["model.contrastive.pooling"] = "attention" if own.get("vision_use_head", True) else "mean"
        layout = TOWERS[tower]
    elif kind == "llava":
        tower, decoder = (_part(theirs, name, default, path) for name, default in _LLAVA_PARTS.items())
        vision, text = theirs.get("vision_config") or {}, theirs.get("text_config") or {}
        values = _decoder_values(decoder, text, path, notes) | _tower(tower, vision, path) | _pixels(folder, tower)
        values |= _llava(theirs, values, path)
        layout = llava(tower, decoder)
    else:
        values, layout = _decoder_values(kind, theirs, path, notes) | TEXT_ALONE, DECODERS[kind]
    values["model.dtype"] = _dtype(theirs, text)

    config = base()
    config.data.tokenizer = "tokenizer.json"
    try:
        config.update_from_flattened_dict(values)
        validate(config)
    except (ConfigError, TypeError) as e:
        raise InteropError(f"{path} makes no config of ours: {e}") from e
    ids = _special_ids(folder, decoder, text, theirs)
    if kind == "llava":
        ids["image"] = theirs.get(
            "image_token_index", theirs.get("image_token_id", LLAVA.defaults["image_token_index"])
        )
    if decoder in DECODER_FORMS:
        notes += [
            f"WARNING: there is no {name}_token_id, nor in {GENERATION}, so {what} with a token that this model has "
            "never seen; if it has one, write its id there and import again"
            for name, what in (("bos", "texts begin"), ("eos", "texts end"))
            if ids[name] is None
        ]
    return Source(kind, config, layout, ids, tuple(notes))


def _special_ids(folder: pathlib.Path, decoder: str, *places: Json) -> dict[str, int | None]:
    """Of bos, eos and pad: what config.json says, else generation_config.json; where both are silent, the default."""
    defaults = DECODER_FORMS[decoder].defaults if decoder in DECODER_FORMS else {}
    if (folder / GENERATION).is_file():
        places = (*places, read_json(folder / GENERATION))
    ids = {}
    for name in ("bos", "eos", "pad"):
        key = f"{name}_token_id"
        said = [_first(place[key]) for place in places if key in place] or [defaults.get(key)]
        ids[name] = next((i for i in said if i is not None), None)
    return ids


def _first(token: Any) -> int | None:
    """Of several ids that end a text, the first."""
    token = token[0] if isinstance(token, list) and token else token
    return token if isinstance(token, int) else None


def _kind(theirs: Json, path: pathlib.Path) -> str:
    kind = theirs.get("model_type")
    if kind is None:
        kind = next((ARCHITECTURES[a] for a in theirs.get("architectures") or () if a in ARCHITECTURES), None)
    if kind not in LAYOUTS:
        said = {key: theirs[key] for key in ("model_type", "architectures") if key in theirs}
        near = difflib.get_close_matches(str(kind), LAYOUTS, n=1)
        raise InteropError(
            f"{path} is of an unknown layout: {said or 'it has neither model_type nor architectures'}; known are "
            f"{', '.join(LAYOUTS)}" + (f" (the nearest is {near[0]})" if near else "")
        )
    return kind


def _values(form: Form, theirs: Json, path: pathlib.Path) -> dict[str, Any]:
    said = {**form.defaults, **theirs}
    for key, wanted in form.theirs.items():
        if key in said and said[key] != wanted:
            raise InteropError(f"{path}: {key} = {said[key]!r} has no counterpart here; only {wanted!r} has")
    values = dict(form.ours)
    for ours, key in form.same.items():
        value = said[key]
        if ours in form.words:
            words = {word: mine for mine, word in form.words[ours].items()}
            if value not in words:
                raise InteropError(f"{path}: {key} = {value!r} has no counterpart here; {list(words)} have")
            value = words[value]
        elif value is None:
            value = 0  # derived from the others, here as there
        values[ours] = value
    return values


def _tower(kind: str, theirs: Json, path: pathlib.Path) -> dict[str, Any]:
    values = _values(TOWER_FORMS[kind], theirs, path)
    for key in ("image.size", "image.patch"):
        if not isinstance(values[key], int):  # [height, width]
            sides = set(values[key])
            if len(sides) != 1:
                raise InteropError(f"{path}: {key} = {values[key]}; only squares have a counterpart here")
            values[key] = sides.pop()
    return values


def _decoder_values(kind: str, theirs: Json, path: pathlib.Path, notes: list[str]) -> dict[str, Any]:
    form = DECODER_FORMS[kind]
    values = _values(form, theirs, path)
    longest = theirs.get("max_position_embeddings", form.defaults["max_position_embeddings"])
    values["model.rope_theta"] = _rope_theta(theirs, form, path)
    window = theirs.get("sliding_window") if theirs.get("use_sliding_window", kind != "qwen3") else None
    if window and window < longest:
        notes.append(
            f"there each position sees the last {window} only, here all before it: rows of more than {window} "
            "positions (row_length) would differ"
        )
        longest = window
    values["row_length"] = min(longest, LONGEST_ROW)
    if kind == "mixtral" and values["model.moe.top_k"] < 2:
        raise InteropError(f"{path}: num_experts_per_tok = 1 with a gate of always 1 has no counterpart here")
    return values


def _rope_theta(theirs: Json, form: Form, path: pathlib.Path) -> float:
    """Refuses rotary positions that are scaled."""
    given = theirs.get("rope_parameters") or {}
    scaling = theirs.get("rope_scaling") or given
    how = scaling.get("rope_type", scaling.get("type", "default"))
    if how not in (None, "default"):
        raise InteropError(
            f"{path}: rotary positions scaled by {how!r} (rope_scaling, rope_parameters) have no counterpart here; "
            "only 'default' has"
        )
    if (turned := theirs.get("partial_rotary_factor", given.get("partial_rotary_factor", 1))) not in (None, 1, 1.0):
        raise InteropError(f"{path}: partial_rotary_factor = {turned} has no counterpart here; only 1 has")
    return float(given.get("rope_theta", theirs.get("rope_theta", form.defaults["rope_theta"])))


_LLAVA_PARTS = {"vision_config": "clip_vision_model", "text_config": "llama"}


def _part(theirs: Json, name: str, default: str, path: pathlib.Path) -> str:
    known = TOWER_FORMS if name == "vision_config" else DECODER_FORMS
    kind = (theirs.get(name) or {}).get("model_type", default)
    if kind not in known:
        raise InteropError(f"{path}: {name}.model_type = {kind!r} is an unknown layout; known are {', '.join(known)}")
    return kind


def _llava(theirs: Json, values: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """What LLaVA is besides its tower and decoder."""
    said = {**LLAVA.defaults, **theirs}
    layer, depth = said["vision_feature_layer"], values["model.vision.depth"]
    if not isinstance(layer, int):
        raise InteropError(
            f"{path}: vision_feature_layer = {layer!r}; one layer has a counterpart here, several do not"
        )
    found = _values(LLAVA, theirs, path)
    found["model.vision.feature_layer"] = layer = layer if layer < 0 else layer - depth - 1
    if layer == -1:
        found["model.vision.final_norm"] = False  # features of a layer, also the last, are those before the norm
    strategy, wanted = (
        said["vision_feature_select_strategy"],
        "default" if values["model.vision.class_token"] else "full",
    )
    if strategy != wanted:
        raise InteropError(
            f"{path}: vision_feature_select_strategy = {strategy!r} with this tower has no counterpart here; all "
            f"patches go on and no class token, which is {wanted!r}"
        )
    if theirs.get("tie_word_embeddings"):
        found["model.tie_embeddings"] = True
    found["image.positions"] = (values["image.size"] // values["image.patch"]) ** 2
    return found


def _pixels(folder: pathlib.Path, tower: str) -> dict[str, Any]:
    """Mean and standard deviation of pixels, of the folder's image processor or the layout's own."""
    said: Json = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            said = read_json(folder / name)
            said = said.get("image_processor", said)
            break
    if said.get("do_normalize", True) is False:
        return {"image.mean": (0.0, 0.0, 0.0), "image.std": (1.0, 1.0, 1.0)}
    mean, std = (
        tuple(float(x) for x in said.get(key) or plain)
        for key, plain in zip(("image_mean", "image_std"), TOWER_PIXELS[tower], strict=True)
    )
    return {"image.mean": mean, "image.std": std}


def _dtype(*places: Json) -> str:
    """Of the computation: float32 where the weights say so, else bfloat16."""
    said = next((str(p[key]) for p in places for key in ("dtype", "torch_dtype") if p.get(key)), "bfloat16")
    return "float32" if said.removeprefix("torch.") == "float32" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class Target:
    """The layout that a config of ours fits."""

    kind: str
    layout: Layout
    config: Json  # theirs
    processor: Json  # preprocessor_config.json; {} for a model without images
    notes: tuple[str, ...] = ()  # what is not there and no tensor of ours tells


def write(config: ConfigDict, tokens: Mapping[str, int | None], dtype: str) -> Target:
    """The layout of a config of ours, and its config.json.

    Args:
      tokens: ids of special tokens, as far as they are known: bos, eos, pad, image.

    Raises:
      InteropError: none fits; names the keys in the way of each.
    """
    spec = Spec.from_config(config)
    family = config.model.family
    known = {name: i for name, i in tokens.items() if i is not None and i < spec.vocab_size}
    ids: Json = {f"{name}_token_id": known.get(name) for name in ("bos", "eos", "pad")}
    general: Json = {"dtype": dtype, "torch_dtype": dtype}
    if family == "early_fusion":
        kind = _fitting(_decoders(config), config, spec)
        own = {"architectures": [_architecture(kind)], **_their_decoder(kind, config, spec), **ids, **general}
        return Target(kind, DECODERS[kind], own, {})
    if family != "late_fusion":
        kind = _fitting(TOWER_FORMS, config, spec)
        own = {"architectures": [_architecture(kind)], **_their_tower(kind, config, spec), **general}
        return Target(kind, TOWERS[kind], own, _processor(kind, config))
    tower, decoder = _fitting(LLAVA_TOWERS, config, spec), _fitting(_decoders(config), config, spec)
    assert spec.vision
    problems = _in_the_way(LLAVA, config, spec)
    if spec.vision.final_norm and spec.vision.layers_used == spec.vision.depth:
        problems.append(
            f"model.vision.final_norm = True (needs False: with model.vision.feature_layer = "
            f"{config.model.vision.feature_layer} the features there are those before that norm)"
        )
    if spec.connector and spec.connector.width != spec.width:
        problems.append(f"model.connector.width = {spec.connector.width} (needs model.width = {spec.width})")
    if problems:
        raise InteropError(f"this config does not fit the layout llava: {'; '.join(problems)}")
    own = {
        "architectures": [_architecture("llava")],
        "model_type": "llava",
        "vision_config": _their_tower(tower, config, spec),
        "text_config": _their_decoder(decoder, config, spec) | ids,
        "vision_feature_layer": config.model.vision.feature_layer,
        "vision_feature_select_strategy": "default" if spec.vision.class_token else "full",
        "image_seq_length": spec.image_positions,
        "image_token_index": tokens.get("image", LLAVA.defaults["image_token_index"]),
        "tie_word_embeddings": spec.tie_embeddings,
        **LLAVA.theirs,
        **general,
    }
    notes = (
        () if spec.vision.final_norm else ("the tower's norm behind its last layer, which is used for nothing there",)
    )
    return Target("llava", llava(tower, decoder), own, _processor(tower, config), notes)


def _architecture(kind: str) -> str:
    return next(name for name, own in ARCHITECTURES.items() if own == kind)


def _decoders(config: ConfigDict) -> dict[str, Form]:
    return {k: f for k, f in DECODER_FORMS.items() if (k == "mixtral") == bool(config.model.moe.experts)}


def _fitting(forms: Mapping[str, Form], config: ConfigDict, spec: Spec) -> str:
    problems = {kind: _in_the_way(form, config, spec) for kind, form in forms.items()}
    fitting = [kind for kind, found in problems.items() if not found]
    if not fitting:
        lines = [f"  {kind}: {'; '.join(found)}" for kind, found in sorted(problems.items(), key=lambda x: len(x[1]))]
        raise InteropError("\n".join(["this config fits no layout. In the way are, of each:", *lines]))
    return fitting[0]


def _in_the_way(form: Form, config: ConfigDict, spec: Spec) -> list[str]:
    found = {key: (_value(key, config, spec), wanted) for key, wanted in form.ours.items()}
    lines = [f"{key} = {value!r} (needs {wanted!r})" for key, (value, wanted) in found.items() if value != wanted]
    lines += [f"{key} = 0 (needs more)" for key in form.not_zero if not _value(key, config, spec)]
    for key, words in form.words.items():
        if (value := _value(key, config, spec)) not in words:
            lines.append(f"{key} = {value!r} (needs {' or '.join(map(repr, words))})")
    return lines


def _value(key: str, config: ConfigDict, spec: Spec) -> Any:
    """Of our key, with zeros that mean "choose" resolved."""
    name = key.rsplit(".", 1)[-1]
    if key.startswith("model.vision."):
        return getattr(spec.vision, name, config.model.vision[name])
    if key.count(".") == 1 and key.startswith("model.") and hasattr(spec, name):
        return getattr(spec, name)
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return tuple(value) if isinstance(value, list | tuple) else value


def _written(form: Form, config: ConfigDict, spec: Spec) -> Json:
    found: Json = dict(form.theirs)
    for ours, theirs in form.same.items():
        value = _value(ours, config, spec)
        found[theirs] = form.words[ours][value] if ours in form.words else value
    return found


def _their_tower(kind: str, config: ConfigDict, spec: Spec) -> Json:
    found = {"model_type": kind, **_written(TOWER_FORMS[kind], config, spec)}
    if kind == "siglip_vision_model":
        found["vision_use_head"] = (
            config.model.family == "contrastive" and config.model.contrastive.pooling == "attention"
        )
    elif kind == "aimv2_vision_model":
        found["use_head"] = False
    return found


def _their_decoder(kind: str, config: ConfigDict, spec: Spec) -> Json:
    theta = spec.rope_theta
    return {
        "model_type": kind,
        **_written(DECODER_FORMS[kind], config, spec),
        "max_position_embeddings": config.row_length,
        "rope_theta": theta,  # read by transformers 4, the next by 5
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def _processor(tower: str, config: ConfigDict) -> Json:
    """Images are resized to squares without cropping, as our pipeline does."""
    side = {"height": config.image.size, "width": config.image.size}
    return {
        "image_processor_type": PROCESSORS.get(tower, "CLIPImageProcessor"),
        "do_resize": True,
        "size": side,
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image.mean),
        "image_std": list(config.image.std),
    }
