"""Configs: names are checked, values keep their types, contradictions are explained."""

import subprocess
import sys

import pytest

from configs import loading
from configs.base import base

QUICKSTART = "configs/quickstart.py"


def test_overrides_and_json_round_trip():
    config = loading.load(QUICKSTART, {"optimizer.learning_rate": 1, "data.sources": ["a"], "data.weights": (1.0,)})
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert config.data.sources == ("a",)
    again = loading.from_json(loading.to_json(config))
    assert again == config
    assert isinstance(again.image.crop_scale, tuple) and again.is_locked


def test_json_of_an_older_version_gets_defaults_and_unknown_keys_are_refused():
    assert loading.from_json('{"steps": 7}').steps == 7
    assert loading.from_json('{"steps": 7}').batch_rows == base().batch_rows
    with pytest.raises(loading.ConfigError, match="no key 'model.widht'; did you mean 'model.width'"):
        loading.from_json('{"model": {"widht": 7}}')


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("optimizer.lerning_rate", "optimizer.learning_rate"),
        ("stps", "steps"),
        ("mesh.fdsp", "mesh.fsdp"),
        ("checkpoint.evry", "checkpoint.every"),
    ],
)
def test_misspelt_key_names_the_nearest(wrong, right):
    with pytest.raises(loading.ConfigError, match=f"no key '{wrong}'; did you mean '{right}'"):
        loading.load(QUICKSTART, {wrong: 1})


def test_misspelt_key_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs.base import base\ndef get_config():\n  c = base()\n  c.optimizer.lerning_rate = 1.\n  return c\n"
    )
    with pytest.raises(
        loading.ConfigError, match="mine.py: .*'optimizer.lerning_rate'; did you mean 'optimizer.learning"
    ):
        loading.load(str(file))


def test_groups_types_and_missing_files():
    with pytest.raises(loading.ConfigError, match="'optimizer' is a group"):
        loading.load(QUICKSTART, {"optimizer": 3})
    with pytest.raises(loading.ConfigError, match="steps = 'many' is a str; expected int"):
        loading.load(QUICKSTART, {"steps": "many"})
    with pytest.raises(loading.ConfigError, match="no config file 'configs/nope.py'"):
        loading.load("configs/nope.py")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"data.weights": (0.5, 0.5)}, "3 names and data.weights 2"),
        ({"data.weights": (0.5, 0.5, 0.0)}, "all be positive"),
        ({"data.sources": ("text", "text", "a")}, "names a source twice"),
        ({"image.size": 30}, "image.size = 30 is no multiple of image.patch = 8; the next one is 32"),
        ({"image.positions": 9}, r"image.positions = 9; in early fusion it is .* = 16"),
        ({"row_length": 15}, "an image takes 16 positions"),
        ({"row_length": 17, "data.image_delimiters": True}, "an image takes 18 positions"),
        ({"gradient_accumulation": 3}, "batch_rows = 8 does not divide"),
        ({"model.norm": "rmsnom"}, "did you mean 'rmsnorm'"),
        ({"model.heads": 3}, "model.width = 128 is no multiple of model.heads = 3"),
        ({"model.kv_heads": 3}, "model.heads = 4 is no multiple of model.kv_heads = 3"),
        ({"mesh.tensor": -2}, r"sizes are positive, or -1 \(chosen by the devices"),
        ({"mesh.tensor": 0}, "sizes are positive"),
        ({"steps": 100}, "longer than the run, steps = 100"),
        ({"checkpoint.every": 0}, "checkpoint.every = 0; it must be at least 1"),
        ({"optimizer.beta2": 1.0}, "from 0 to below 1"),
        ({"image.crop_scale": (0.9, 0.5)}, "0 < low <= high <= 1"),
        ({"schedule.final_ratio": float("nan")}, "schedule.final_ratio = nan"),
        ({"start.decoder": "a", "trunk.workdir": "b"}, "start.decoder and trunk.workdir are both given"),
        ({"optimizer.vision_scale": 0.0}, "trains nothing at full cost"),
        ({"optimizer.vision_scale": 0.1}, "'early_fusion' has no vision tower"),
        ({"optimizer.freeze": ("",)}, r"freeze = \(''\,\); expected patterns"),
    ],
)  # fmt: skip
def test_contradictions(overrides, message):
    with pytest.raises(loading.ConfigError, match=message):
        loading.load(QUICKSTART, overrides)


MOE = "model.moe."


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"mesh.expert": 3}, r"8 experts .* do not divide over mesh.expert = 3; make mesh.expert a divisor"),
        ({"mesh.expert": 3, MOE + "granularity": 2}, "16 experts .* do not divide over mesh.expert = 3"),
        ({MOE + "top_k": 9}, "model.moe.top_k = 9 is more than model.moe.experts, 8"),
        ({MOE + "top_k": 0}, "model.moe.top_k = 0; it must be at least 1"),
        ({MOE + "modality": "grouped", MOE + "top_k": 5}, "top_k = 5 is more than the smaller group of experts, 4"),
        ({MOE + "modality": "grouped", MOE + "image_experts": 8}, "image_experts = 8 of model.moe.experts = 8 leaves"),
        ({MOE + "modality": "grouped", MOE + "experts": 1}, "model.moe.experts = 1 leaves an empty group"),
        ({MOE + "modality": "fixed"}, "one expert for text and one for images: experts = 2, .* not 8, 1 and 1"),
        ({MOE + "every": 4}, "model.depth = 2 is no multiple of model.moe.every = 4"),
        ({MOE + "image_experts": 4}, "image_experts = 4 with model.moe.modality = 'agnostic'; only 'grouped'"),
        ({MOE + "renormalise": True}, "with one choice makes every gate 1, and the router's gradient 0"),
        ({MOE + "buffer_factor": 0.5}, "buffer_factor = 0.5 has no room for the mean load"),
        ({MOE + "balance": "los"}, "did you mean 'loss'"),
        ({MOE + "transport": "raged"}, "did you mean 'ragged'"),
    ],
)  # fmt: skip
def test_contradictions_of_experts(overrides, message):
    with pytest.raises(loading.ConfigError, match=message):
        loading.load(QUICKSTART, {MOE + "experts": 8} | overrides)


LATE, DEEP, ENCODER = (
    f"configs/{name}" for name in ("late_fusion.py:small", "deep_fusion.py:cogvlm-small", "encoder.py:clip-small")
)
VISION, DEEP_KEY, CONNECTOR = "model.vision.", "model.deep.", "model.connector."


@pytest.mark.parametrize(
    "file, overrides, message",
    [
        (LATE, {VISION + "heads": 3}, "model.vision.width = 128 is no multiple of model.vision.heads = 3"),
        (LATE, {VISION + "feature_layer": 0}, r"feature_layer = 0; .* from -1 \(the last\) to -4"),
        (LATE, {VISION + "feature_layer": -5}, "feature_layer = -5"),
        (LATE, {VISION + "width": 126, VISION + "heads": 2, VISION + "positions": "sincos"}, "needs a multiple of 4"),
        (LATE, {VISION + "ffn": "gelo"}, "did you mean 'gelu'"),
        (LATE, {"model.patch_positions": True}, "model.patch_positions is of early fusion"),
        (LATE, {"image.positions": 12}, "image.positions = 12; a connector of kind 'average' makes a square"),
        (LATE, {"image.positions": 81}, "makes a square number of the 8 x 8 patches, such as 16"),
        (LATE, {CONNECTOR + "kind": "mlp"}, "image.positions = 16; a connector of kind 'mlp' makes 64 of 8 x 8"),
        (LATE, {CONNECTOR + "downsample": 2}, "downsample = 2 is of kind 'glu' alone"),
        (LATE, {CONNECTOR + "kind": "attention", CONNECTOR + "heads": 3}, "width = 128 is no multiple of .*heads = 3"),
        (LATE, {"image.positions": 0}, "image.positions = 0; an image in a row has at least one position"),
        (LATE, {"image.per_row": 0}, "image.per_row = 0 leaves the vision tower nothing to see"),
        (LATE, {"data.rows": "pairs"}, "data.rows = 'pairs' is for encoders .*; 'late_fusion' takes 'packed'"),
        (DEEP, {CONNECTOR + "downsample": 3}, "downsample = 3 does not divide the 8 patches"),
        (DEEP, {DEEP_KEY + "modules": ("qvk",)}, "'qvk' is none of qkv, out, ffn, norms; did you mean 'qkv'"),
        (DEEP, {DEEP_KEY + "modules": ("qkv", "qkv")}, "names one twice"),
        (DEEP, {DEEP_KEY + "every": 3}, "model.depth = 4 is no multiple of model.deep.every = 3"),
        (DEEP, {DEEP_KEY + "modules": ("ffn",), DEEP_KEY + "qkv_bias": True}, "qkv_bias is of the images' own qkv"),
        (DEEP, {"data.image_delimiters": False}, "delimiter_vectors .* turn data.image_delimiters on"),
        (
            DEEP,
            {"data.image_delimiters": False, "model.delimiter_vectors": False},
            "delimiter_weights = 'boi_image' .* turn data.image_delimiters on",
        ),
        (DEEP, {MOE + "experts": 4}, "names 'ffn' in layers that have experts"),
        (DEEP, {MOE + "experts": 4, MOE + "every": 2, DEEP_KEY + "every": 4}, "names 'ffn' in layers that have"),
        (QUICKSTART, {MOE + "experts": 4, "model.ffn": "gelu"}, "experts are SwiGLU without biases"),
        (QUICKSTART, {MOE + "experts": 4, "model.bias": True}, "experts are SwiGLU without biases"),
        (QUICKSTART, {"model.rope_theta": 0.5}, "model.rope_theta = 0.5; it is more than 1, or 0"),
        (ENCODER, {"data.rows": "packed"}, "image.positions = 0; an image in a row"),
        (ENCODER, {"image.positions": 16}, "takes pairs of an image and a text: .* not 'pairs', 16, 1 and False"),
        (ENCODER, {"image.per_row": 2}, "takes pairs of an image and a text"),
        (ENCODER, {VISION + "class_token": False}, "pooling = 'class' takes the class token's features"),
        (ENCODER, {VISION + "feature_layer": -2}, "an encoder is trained with all of its layers"),
        (ENCODER, {"gradient_accumulation": 2}, "negatives of a pair are all the others of the global batch"),
        (ENCODER, {"model.contrastive.scale": 200.0}, "from 1 to max_scale"),
        (ENCODER, {"model.family": "aim"}, "has no place for a class token"),
        (ENCODER, {DEEP_KEY + "modules": ("qkv",)}, "has text alone in its decoder"),
    ],
)  # fmt: skip
def test_contradictions_of_architectures(file, overrides, message):
    with pytest.raises(loading.ConfigError, match=message):
        loading.load(file, overrides)


def test_flags(tmp_path):
    """In a process of its own: absl's flags are global, and ml_collections reads sys.argv."""
    program = tmp_path / "program.py"
    program.write_text(
        "from absl import app\n"
        "from configs import loading\n"
        "CONFIG = loading.define_config_flag()\n"
        "app.run(lambda _: print(CONFIG.value.steps, CONFIG.value.data.sources))\n"
    )

    def run(*args):
        done = subprocess.run([sys.executable, program, *args], capture_output=True, text=True, env={"PYTHONPATH": "."})
        return done.stdout + done.stderr

    assert run(f"--config={QUICKSTART}", "--config.steps=4000").startswith("4000 ('captions'")
    misspelt = run(f"--config={QUICKSTART}", "--config.optimizer.lerning_rate=1")
    assert "no key 'optimizer.lerning_rate'; did you mean 'optimizer.learning_rate'" in misspelt
    contradiction = run(f"--config={QUICKSTART}", "--config.gradient_accumulation=3")
    assert "Flags parsing error: batch_rows = 8 does not divide" in contradiction
    assert "Traceback" not in misspelt + contradiction
