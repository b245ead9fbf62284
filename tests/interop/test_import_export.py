"""Import, export, import: bit for bit. Folders that cannot be meant are refused with what is wrong."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fake_folders import AIMV2, CLIP, LLAMA, LLAVA, MIXTRAL, OLMO2, QWEN3, SIGLIP, make_folder
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from configs import loading
from nmm_jax import models
from nmm_jax.interop import their_config
from nmm_jax.interop.errors import InteropError
from nmm_jax.interop.export_weights import export_weights
from nmm_jax.interop.import_weights import import_weights
from nmm_jax.models.spec import Spec
from nmm_jax.training.checkpoints import CheckpointError, Checkpoints, open_run
from tests.tiny import get_config
from tests.training_runs import environment

KINDS = {"clip": CLIP, "siglip": SIGLIP, "aimv2": AIMV2, "llama": LLAMA, "olmo2": OLMO2, "qwen3": QWEN3}
KINDS |= {"mixtral": MIXTRAL, "llava": LLAVA}


def parameters(workdir):
    checkpoints = Checkpoints(workdir, read_only=True)
    params = checkpoints.restore_some(0, checkpoints.abstract_params(0))
    return {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype and x.tobytes() == b[name].tobytes(), name


# Llama is in the default tests by LLaVA, and by those below.
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "llama" else k for k in KINDS])
def test_import_export_import(tmp_path, kind):
    theirs = make_folder(tmp_path / "theirs", KINDS[kind])
    import_weights(tmp_path / "theirs", tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "back", max_shard=5_000)
    import_weights(tmp_path / "back", tmp_path / "again")

    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 1
    back = {name: x for file in files for name, x in load_file(file).items()}
    if kind == "aimv2":  # whose pooling we have no counterpart of
        theirs = {name: x for name, x in theirs.items() if not name.startswith("head.")}
    same(back, theirs)
    first, second = parameters(tmp_path / "run"), parameters(tmp_path / "again")
    same(first, second)
    assert all(x.dtype == np.float32 for x in first.values())
    configs = [loading.from_json((tmp_path / name / "config.json").read_text()) for name in ("run", "again")]
    assert Spec.from_config(configs[0]) == Spec.from_config(configs[1])
    assert configs[0].image == configs[1].image and configs[0].row_length == configs[1].row_length


def test_bfloat16_is_widened_and_narrowed_without_loss(tmp_path):
    theirs = make_folder(tmp_path / "theirs", LLAMA | dict(dtype="bfloat16"), ml_dtypes.bfloat16)
    import_weights(tmp_path / "theirs", tmp_path / "run")
    assert open_run(tmp_path / "run").config.model.dtype == "bfloat16"
    export_weights(tmp_path / "run", tmp_path / "back", dtype="bfloat16")
    same(load_file(tmp_path / "back" / "model.safetensors"), theirs)


def test_an_imported_run_can_be_opened(tmp_path, capfd):
    make_folder(tmp_path / "theirs", QWEN3)
    import_weights(tmp_path / "theirs", tmp_path / "run")
    run = open_run(tmp_path / "run")
    model = run.config.model
    assert (model.family, model.qk_norm, model.head_dim, model.tie_embeddings) == ("early_fusion", "head", 6, True)
    assert run.step == 0 and "head" not in run.params
    assert not np.any(run.params["patches"]["kernel"])
    assert "zeros here: patches/bias, patches/kernel" in capfd.readouterr().err


def test_an_imported_tower_is_no_whole_model(tmp_path):
    make_folder(tmp_path / "theirs", CLIP)
    import_weights(tmp_path / "theirs", tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds vision and no .*name it in --config.start.vision of a run"):
        open_run(tmp_path / "run")


NAMES = {  # of other versions of the library, or of parts of a model alone
    "llava": lambda n: (
        n.replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head", "lm_head")
        .replace("vision_tower.vision_model.", "model.vision_tower.")
        .replace("multi_modal", "model.multi_modal")
    ),
    "clip": lambda n: n.removeprefix("vision_model."),
    "qwen3": lambda n: n.removeprefix("model."),
}


@pytest.mark.parametrize("kind", ["llava", *(pytest.param(k, marks=pytest.mark.slow) for k in ("clip", "qwen3"))])
def test_names_of_newer_and_older_versions(tmp_path, kind):
    """The same tensors under other names."""
    theirs = make_folder(tmp_path / "theirs", KINDS[kind])
    import_weights(tmp_path / "theirs", tmp_path / "run")
    renamed = {NAMES[kind](name): x for name, x in theirs.items()}
    assert renamed.keys() != theirs.keys()
    save_file(renamed, tmp_path / "theirs" / "model.safetensors")
    import_weights(tmp_path / "theirs", tmp_path / "again")
    same(parameters(tmp_path / "run"), parameters(tmp_path / "again"))


def test_what_is_left_out_is_said(tmp_path, capfd):
    """The vision part of a whole CLIP."""
    whole = dict(model_type="clip", vision_config=CLIP, text_config={})
    tensors = make_folder(tmp_path / "theirs", CLIP)
    tensors |= {f"text_model.encoder.layers.{i}.mlp.fc1.weight": np.ones((3, 3), np.float32) for i in range(4)}
    tensors |= {"logit_scale": np.ones((), np.float32), "vision_model.embeddings.position_ids": np.arange(5)}
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(whole))
    import_weights(tmp_path / "theirs", tmp_path / "run")
    said = capfd.readouterr().err
    assert "left out: text_model.encoder.layers.*.mlp.fc1.weight (4 of them)" in said
    assert "left out: logit_scale" in said and "left out: vision_model.embeddings.position_ids" in said


def test_missing_and_left_over_tensors_are_listed(tmp_path):
    tensors = make_folder(tmp_path, LLAMA)
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.q_proj.bias"] = np.ones(16, np.float32)
        del tensors[f"model.layers.{i}.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InteropError) as e:
        import_weights(tmp_path, tmp_path / "run")
    assert "  missing: model.layers.*.mlp.up_proj.weight (2 of them)" in str(e.value)
    assert "  left over: model.layers.*.self_attn.q_proj.bias (2 of them)" in str(e.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_tensor_of_another_shape(tmp_path):
    tensors = make_folder(tmp_path, LLAMA)
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((16, 16), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        InteropError, match=r"layers.1.self_attn.k_proj.weight has shape \(16, 16\); .* makes it \(8, 16\)"
    ):
        import_weights(tmp_path, tmp_path / "run")


REFUSED = {
    "unknown layout: {'model_type': 'qwen2'}": LLAMA | dict(model_type="qwen2"),
    "attention_bias = True has no counterpart here; only False has": LLAMA | dict(attention_bias=True),
    "hidden_act = 'gelu' has no counterpart": LLAMA | dict(hidden_act="gelu"),
    "rotary positions scaled by 'llama3'": LLAMA | dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    "rotary positions scaled by 'yarn'": LLAMA | dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}),
    "partial_rotary_factor = 0.5": LLAMA | dict(partial_rotary_factor=0.5),
    "num_experts_per_tok = 1": MIXTRAL | dict(num_experts_per_tok=1),
    "hidden_act = 'relu' has no counterpart here": CLIP | dict(hidden_act="relu"),
    r"image.size = \[8, 12\]; only squares": CLIP | dict(image_size=[8, 12]),
    "qkv_bias = True": AIMV2 | dict(qkv_bias=True),
    "text_config.model_type = 'gemma' is an unknown layout": LLAVA | dict(text_config={"model_type": "gemma"}),
    r"vision_feature_layer = \[-2, -1\]; one layer": LLAVA | dict(vision_feature_layer=[-2, -1]),
    "vision_feature_select_strategy = 'full' with this tower": LLAVA | dict(vision_feature_select_strategy="full"),
    "model.width = 18 is no multiple of model.heads": LLAMA | dict(hidden_size=18),
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_without_a_counterpart(tmp_path, message):
    (tmp_path / "config.json").write_text(json.dumps(REFUSED[message]))
    with pytest.raises(InteropError, match=message) as e:
        import_weights(tmp_path, tmp_path / "run")
    assert "config.json" in str(e.value)


LAST_LAYER = {"clip": CLIP, "siglip": SIGLIP, "aimv2": AIMV2}


@pytest.mark.parametrize("tower", ["clip", *(pytest.param(k, marks=pytest.mark.slow) for k in ("siglip", "aimv2"))])
def test_llava_from_the_last_layer(tmp_path, capfd, tower):
    """Features from before the tower's last norm, which is left out; with it the layout is refused."""
    strategy = "default" if tower == "clip" else "full"
    last = dict(vision_config=LAST_LAYER[tower], vision_feature_layer=-1, vision_feature_select_strategy=strategy)
    theirs = make_folder(tmp_path / "theirs", LLAVA | last)
    import_weights(tmp_path / "theirs", tmp_path / "run")
    config = loading.from_json((tmp_path / "run" / "config.json").read_text())
    assert (config.model.vision.feature_layer, config.model.vision.final_norm) == (-1, False)
    export_weights(tmp_path / "run", tmp_path / "back")
    assert "not there: the tower's norm behind its last layer" in capfd.readouterr().err
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vision_feature_layer"] == -1
    unused = ("post_layernorm", "vision_tower.rms_norm", ".head.")
    kept = {name: x for name, x in theirs.items() if not any(part in name for part in unused)}
    same(load_file(tmp_path / "back" / "model.safetensors"), kept)

    config = config.unlock()
    config.model.vision.final_norm = True
    save_run(tmp_path / "ours", config)
    with pytest.raises(
        InteropError, match=r"model.vision.final_norm = True \(needs False: with model.vision.feature_l"
    ):
        export_weights(tmp_path / "ours", tmp_path / "out")


SILENT = {k: v for k, v in LLAMA.items() if not k.endswith("_token_id")}
IDS = {  # text_config, config.json of LLaVA around it, generation_config.json, what is found
    "llama": (SILENT, {}, None, (1, 2, None)),
    "mixtral": (SILENT | dict(model_type="mixtral", num_local_experts=4), {}, None, (1, 2, None)),
    "olmo2": (SILENT | dict(model_type="olmo2"), {}, None, (None, 50_279, 1)),
    "qwen3": (SILENT | dict(model_type="qwen3"), {}, None, (None, None, None)),
    "as llava-1.5-7b": (SILENT, dict(pad_token_id=38), None, (1, 2, 38)),
    "generation": (SILENT, {}, dict(bos_token_id=5, eos_token_id=[7, 8]), (5, 7, None)),
    "both": (LLAMA, {}, dict(bos_token_id=5, pad_token_id=6), (1, 2, 6)),
    "none is said": (SILENT | dict(bos_token_id=None), {}, None, (None, 2, None)),
}


@pytest.mark.parametrize("case", IDS)
def test_special_tokens_that_are_not_in_config(tmp_path, case):
    text, around, generation, expected = IDS[case]
    for name, config in (("alone", text | around), ("llava", LLAVA | around | dict(text_config=text))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if generation:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        source = their_config.read(folder)
        assert tuple(source.tokens[name] for name in ("bos", "eos", "pad")) == expected
        for name in ("bos", "eos"):
            warned = [note for note in source.notes if note.startswith(f"WARNING: there is no {name}_token_id")]
            assert len(warned) == (source.tokens[name] is None)


def test_a_sliding_window_limits_rows_and_is_told(tmp_path, capfd):
    make_folder(tmp_path / "theirs", MIXTRAL | dict(sliding_window=32))
    import_weights(tmp_path / "theirs", tmp_path / "run")
    assert open_run(tmp_path / "run").config.row_length == 32
    assert "each position sees the last 32 only" in capfd.readouterr().err


def test_nothing_is_overwritten(tmp_path):
    make_folder(tmp_path / "theirs", LLAMA)
    import_weights(tmp_path / "theirs", tmp_path / "run")
    with pytest.raises(InteropError, match="has checkpoints already"):
        import_weights(tmp_path / "theirs", tmp_path / "run")
    with pytest.raises(InteropError, match="holds a model already"):
        export_weights(tmp_path / "run", tmp_path / "theirs")


def test_pixels_are_the_processors(tmp_path):
    make_folder(tmp_path / "theirs", CLIP)
    said = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(said))
    import_weights(tmp_path / "theirs", tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert {key: back[key] for key in said} == said


def save_run(workdir, config):
    """A run of random weights."""
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), models.build(config).abstract)
    meta = {"config": loading.to_json(config), "data": {}, "seen": {}}
    checkpoints = Checkpoints(str(workdir))
    checkpoints.save(7, {"step": jnp.asarray(7), "params": params}, meta)
    checkpoints.close()


def test_a_config_that_fits_no_layout_is_refused_with_the_keys(tmp_path):
    save_run(tmp_path / "run", get_config())  # norms of queries and keys over all heads, norms before the sublayers
    with pytest.raises(InteropError) as e:
        export_weights(tmp_path / "run", tmp_path / "out")
    assert "olmo2: model.norm_position = 'pre' (needs 'post')" in str(e.value)
    assert "llama: model.qk_norm = 'full' (needs 'none')" in str(e.value)


def test_our_own_run_is_exported_without_its_patches(tmp_path, capfd):
    config = get_config()
    config.model.qk_norm = "none"
    save_run(tmp_path / "run", config)
    export_weights(tmp_path / "run", tmp_path / "out")
    assert "left out: patches/kernel" in capfd.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert "model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.slow
def test_on_eight_devices(tmp_path):
    """The shards of eight devices are the same parameters, each value read from the file about once; and back."""
    theirs = make_folder(tmp_path / "theirs", MIXTRAL)
    done = subprocess.run(
        [sys.executable, pathlib.Path(__file__).with_name("eight_devices.py"), tmp_path],
        env=environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    same(load_file(tmp_path / "back" / "model.safetensors"), theirs)
