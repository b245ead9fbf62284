"""A run that begins with the weights of others: bit for bit where they fit, explained where they do not."""

import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import loading
from nmm_jax import models
from nmm_jax.models.vision import resize_positions
from nmm_jax.parallel.mesh import mesh_of
from nmm_jax.training import start
from nmm_jax.training.checkpoints import CheckpointError, Checkpoints
from nmm_jax.training.optimizer import make_optimizer
from nmm_jax.training.state import initial_state, jit_initial_state
from tests import training_runs
from tests.data_pipelines import small_corpus
from tests.fake_batches import tiny_config

TOWER = {
    "model__patch_positions": False,
    "model__vision__width": 16,
    "model__vision__depth": 2,
    "model__vision__heads": 2,
    "model__vision__ffn_width": 32,
    "model__vision__class_token": True,
}
LATE = TOWER | {"model__family": "late_fusion"}
ENCODER = TOWER | {
    "model__family": "contrastive",
    "model__contrastive__width": 8,
    "data__rows": "pairs",
    "image__positions": 0,
    "image__per_row": 1,
}


def one_device():
    return mesh_of({}, jax.devices()[:1])


def save_run(workdir, config, *steps, seed=0):
    """A run with checkpoints of random weights; those of the last step, by name."""
    model, rng = models.build(config), np.random.default_rng(seed)
    checkpoints = Checkpoints(workdir, keep=9)
    for step in steps:
        params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), model.abstract)
        state = jax.device_put({"step": np.int32(step), "params": params, "opt_state": np.zeros(3)})
        checkpoints.save(step, state, {"config": loading.to_json(config), "data": {}})
    checkpoints.close()
    return flat(params)


def load(config):
    return flat(start.load(config, models.build(config), one_device()))


def flat(tree):
    return {name: np.asarray(x) for name, x in flatten_dict(tree, sep="/").items()}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Images of 8 pixels in patches of 4, of the steps 3 and 5."""
    workdir = tmp_path_factory.mktemp("runs") / "encoder"
    return workdir, save_run(workdir, tiny_config(**ENCODER), 3, 5)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Four layers and 40 tokens of text, early fusion."""
    workdir = tmp_path_factory.mktemp("runs") / "decoder"
    return workdir, save_run(workdir, tiny_config(model__depth=4, model__vocab_size=40), 7)


def test_an_encoder_at_another_resolution(encoder, capsys):
    workdir, saved = encoder
    config = tiny_config(**LATE, image__size=16, image__positions=16, start__vision=str(workdir))
    loaded = load(config)
    assert loaded.keys() == {name for name in saved if name.startswith("vision/")}
    positions = saved.pop("vision/positions")
    assert loaded["vision/positions"].shape == (1 + 16, 16) and positions.shape == (1 + 4, 16)
    np.testing.assert_array_equal(loaded["vision/positions"][0], positions[0])  # the class token's
    want = resize_positions(positions, 2, 4, class_token=True)
    np.testing.assert_allclose(loaded.pop("vision/positions"), want, rtol=1e-6, atol=1e-6)
    for name, x in loaded.items():
        np.testing.assert_array_equal(x, saved[name], err_msg=name)
    said = capsys.readouterr().err
    size = sum(x.size for x in loaded.values()) + 17 * 16
    assert f"start.vision = {workdir}/checkpoints/5: {size:,} parameters; positions interpolated from 2 x 2" in said


def test_a_step_of_a_run(encoder):
    workdir, saved = encoder
    third = load(tiny_config(**LATE, start__vision=f"{workdir}@3"))
    fifth = load(tiny_config(**LATE, start__vision=f"{workdir}@5"))
    name = "vision/layers/ffn/up"
    assert np.array_equal(fifth[name], saved[name]) and not np.array_equal(third[name], saved[name])


def test_a_deep_model_begins_with_a_dense_decoder(decoder, capsys):
    """Its layers are grouped in twos, its vocabulary is larger, and images' weights are copies of the text's."""
    workdir, saved = decoder
    deep = {"model__deep__modules": ("qkv", "ffn"), "model__deep__every": 2, "model__deep__initial": "copy"}
    config = tiny_config(**deep, model__depth=4, start__decoder=str(workdir))
    model, optimizer, mesh = models.build(config), make_optimizer(config), one_device()
    loaded = start.load(config, model, mesh)
    assert "40 of 64 tokens in embed/tokens; 40 of 64 tokens in head/kernel" in capsys.readouterr().err
    params = flat(initial_state(model, optimizer, mesh, config.seed, loaded)["params"])

    for j in (0, 1):
        for name in ("ffn/up", "attention/query", "attention_norm/scale"):
            np.testing.assert_array_equal(params[f"layers/block_{j}/{name}"], saved[f"layers/{name}"][j::2])
    for name in ("ffn/up", "ffn/down", "attention/query", "attention/value"):
        np.testing.assert_array_equal(params[f"layers/block_1/image/{name}"], saved[f"layers/{name}"][1::2])
    np.testing.assert_array_equal(params["embed/tokens"][:40], saved["embed/tokens"])
    np.testing.assert_array_equal(params["head/kernel"][:, :40], saved["head/kernel"])
    fresh = params["embed/tokens"][40:]
    assert 0 < np.abs(fresh).max() < 0.2 and fresh.std() > 0.01  # as they begin
    assert not np.array_equal(params["patches/kernel"], saved["patches/kernel"])


def test_what_images_have_for_themselves_is_taken_where_both_have_it(tmp_path):
    """So a run goes on from a deep one, and the decoder inside a deep one is a dense one's beginning."""
    deep = {"model__deep__modules": ("ffn", "norms")}
    saved = save_run(tmp_path, tiny_config(**deep), 1)
    both, dense = (load(tiny_config(**kind, start__decoder=str(tmp_path))) for kind in (deep, {}))
    decoder = {name for name in saved if not name.startswith("patches/")}
    images = {name for name in decoder if name.startswith(("layers/image/", "image_final_norm/"))}
    assert images and both.keys() == decoder and dense.keys() == decoder - images
    for name, x in both.items():
        np.testing.assert_array_equal(x, saved[name], err_msg=name)


def test_random_values_that_are_replaced_are_never_made():
    config = tiny_config()
    model = models.build(config)
    jitted = jit_initial_state(model, make_optimizer(config), one_device(), config.seed)

    def draws(loaded):  # the generator's rounds are xors
        return "xor(" in jitted.lower(loaded, {}).compile({"xla_backend_optimization_level": 0}).as_text()

    assert draws({}) and not draws(flatten_dict(model.abstract, sep="/"))


def test_another_decoder_and_a_connector(tmp_path):
    late = tiny_config(**LATE)
    saved = save_run(tmp_path, late, 1)
    config = tiny_config(**LATE, start__decoder=str(tmp_path), start__connector=str(tmp_path))
    loaded = load(config)
    assert loaded.keys() == {name for name in saved if not name.startswith("vision/")}
    for name, x in loaded.items():
        np.testing.assert_array_equal(x, saved[name], err_msg=name)


@pytest.mark.parametrize(
    "overrides, messages",
    [
        (
            {"model__vision__width": 32},
            [
                "does not fit this config",
                r"trained with model.vision.width = 16 \(here 32\)\.",
                r"of another shape: .*vision/class_token \(16,\) there, \(32,\) here",
                "here and 6 more$",
            ],
        ),
        (
            {"image__patch": 2, "image__positions": 16},
            [r"image.patch = 4 \(here 2\)", r"vision/patches/kernel \(48, 16\) there, \(12, 16\) here"],
        ),
        (
            {"model__vision__class_token": False, "model__vision__bias": True},
            [
                "model.vision.bias = False .here True.; model.vision.class_token = True",
                "not there: .*vision/layers/attention",
            ]
            + ["left over: vision/class_token$"],
        ),
    ],
)
def test_an_encoder_that_does_not_fit(encoder, overrides, messages):
    config = tiny_config(**LATE | overrides, start__vision=str(encoder[0]))
    with pytest.raises(start.StartError) as error:
        load(config)
    for message in messages:
        assert error.match("(?m)" + message)


def test_runs_that_are_not_there_and_parts_that_are_not_asked_for(encoder, decoder, tmp_path):
    def fails(kind, message, **overrides):
        with pytest.raises(kind, match=message):
            load(tiny_config(**overrides))

    fails(CheckpointError, "start.vision = 'nowhere': nowhere is no run", **LATE, start__vision="nowhere")
    fails(CheckpointError, r"no checkpoint of step 4; it has \[3, 5\]", **LATE, start__vision=f"{encoder[0]}@4")
    fails(start.StartError, r"model of this config has no connector \(no", start__connector=str(decoder[0]))
    fails(start.StartError, "not there: vision/class_token", **LATE, start__vision=str(decoder[0]))
    deep = {"model__deep__modules": ("ffn",), "model__deep__every": 2}
    fails(start.StartError, "of another depth: 4 layers there, 6 here", model__depth=6, start__decoder=str(decoder[0]))
    save_run(tmp_path, tiny_config(model__depth=5), 1)
    fails(
        start.StartError,
        r"of another depth: 5 layers there, 4 here\nGive",
        **deep,
        model__depth=4,
        start__decoder=str(tmp_path),
    )
    fails(start.StartError, "model.vocab_size = 40 .here 39", model__vocab_size=39, start__decoder=str(decoder[0]))


def test_what_computes_otherwise_is_said(encoder, capsys):
    load(tiny_config(**LATE | {"model__vision__norm_eps": 1e-6}, start__vision=str(encoder[0])))
    assert "was trained with model.vision.norm_eps = 1e-05 (here 1e-06)" in capsys.readouterr().err


@pytest.mark.slow  # two training commands
def test_a_run_goes_on_without_what_it_began_with(tmp_path):
    corpus, base, whole, stopped = (tmp_path / name for name in ("corpus", "base", "whole", "stopped"))
    corpus.mkdir()
    small_corpus.write(corpus)
    config = loading.load("tests/tiny.py", {"image.size": 8, "image.positions": 16})
    save_run(base, config, 9)
    command = ("steps=6", "checkpoint.every=3", "schedule.warmup=1", f"start.decoder={base}")
    said = training_runs.train(corpus, whole, *command)
    assert f"start.decoder = {base}/checkpoints/9: " in said
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "6")
    shutil.rmtree(base)
    assert "checkpoints/3" in training_runs.train(corpus, stopped, *command)
    assert training_runs.timeless(stopped) == training_runs.timeless(whole)
