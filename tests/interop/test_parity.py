"""transformers' models with random weights, imported by our command, give the same features and logits; and back."""

import jax
import numpy as np
import pytest
from flax import nnx

from nmm_jax.interop.export_weights import export_weights
from nmm_jax.interop.import_weights import import_weights
from nmm_jax.models.contrastive import AttentionPooling
from nmm_jax.models.model import ON_ONE_DEVICE
from nmm_jax.models.vision import VisionTower
from nmm_jax.training.checkpoints import Checkpoints, open_run

pytestmark = pytest.mark.extras

VISION = dict(
    hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, image_size=20, patch_size=4
)
TEXT = dict(
    vocab_size=120, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
IMAGE_TOKEN = 119
PATCHES = 25


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def randomized(torch, model):
    """Weights of a size that makes every one of them matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if is_scale else 0.0, 0.2 if parameter.ndim < 2 else 0.12)
    return model.eval().float()


def imported(model, folder):
    """The run of a model of theirs that was saved as it usually is."""
    model.save_pretrained(folder / "theirs", safe_serialization=True)
    import_weights(folder / "theirs", folder / "run")
    return str(folder / "run")


def pixels(spec, images):
    """uint8 [N,height,width,3] as their models take them."""
    normalised = (images.astype(np.float32) / 255 - np.float32(spec.pixel_mean)) / np.float32(spec.pixel_std)
    return normalised.transpose(0, 3, 1, 2)


def some_images(n, size=20):
    return np.random.default_rng(1).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def module(make, params):
    definition, _ = nnx.split(nnx.eval_shape(make), nnx.Param)
    return nnx.merge(definition, params)


def tower_of(workdir):
    """Spec, tower and pooling (None without) of an imported encoder."""
    from configs.loading import from_json
    from nmm_jax import models

    checkpoints = Checkpoints(workdir, read_only=True)
    spec = models.build(from_json(checkpoints.meta()["config"])).spec
    params = checkpoints.restore_some(0, checkpoints.abstract_params(0))
    tower = module(lambda: VisionTower(spec.vision, rngs=nnx.Rngs(0)), params["vision"])
    pooling = None
    if "pooling" in params:
        pooling = module(lambda: AttentionPooling(spec.vision, rngs=nnx.Rngs(0)), params["pooling"])
    return spec, tower, pooling


def close(found, expected):
    assert np.abs(expected).max() > 0.5  # worth comparing
    difference = np.abs(np.asarray(found) - expected).max()
    print(f"largest difference {difference:.2e} of values to {np.abs(expected).max():.1f}")
    assert difference < 1e-4


def their_tower(transformers, kind):
    t = transformers
    small = VISION | dict(attn_implementation="eager")
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    if kind.startswith("clip"):
        act = "gelu" if kind.endswith("-gelu") else "quick_gelu"
        if kind == "clip-whole":
            return t.CLIPModel(t.CLIPConfig(vision_config=VISION, text_config=text))
        return t.CLIPVisionModel(t.CLIPVisionConfig(**small, hidden_act=act))
    if kind == "siglip-whole":
        return t.SiglipModel(t.SiglipConfig(vision_config=VISION, text_config=text))
    if kind == "siglip":
        return t.SiglipVisionModel(t.SiglipVisionConfig(**small))
    return t.Aimv2VisionModel(t.Aimv2VisionConfig(**small, is_native=kind == "aimv2-native"))


@pytest.mark.parametrize("kind", ["clip", "clip-gelu", "clip-whole", "siglip", "siglip-whole", "aimv2", "aimv2-native"])
def test_towers(torch, transformers, tmp_path, kind):
    theirs = randomized(torch, their_tower(transformers, kind))
    spec, tower, pooling = tower_of(imported(theirs, tmp_path))
    images = some_images(3)
    vision = getattr(theirs, "vision_model", theirs)
    with torch.no_grad():
        out = vision(torch.tensor(pixels(spec, images)))
    found = tower(images, ON_ONE_DEVICE)
    expected = out.last_hidden_state.numpy()
    if kind.startswith("clip"):  # whose last features are those before the norm; the class token is normalised
        close(found[:, 0], out.pooler_output.numpy())
        with torch.no_grad():
            expected = vision.post_layernorm(out.last_hidden_state).numpy()
    close(found, expected)
    if kind.startswith("siglip"):
        close(pooling(found, ON_ONE_DEVICE), out.pooler_output.numpy())


def their_decoder(transformers, kind):
    t = transformers
    shape = TEXT | dict(attn_implementation="eager")
    if kind == "olmo2":
        return t.Olmo2ForCausalLM(t.Olmo2Config(**shape))
    if kind.startswith("qwen3"):
        return t.Qwen3ForCausalLM(t.Qwen3Config(**shape, head_dim=24, tie_word_embeddings=kind.endswith("tied")))
    if kind == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(**shape, num_local_experts=8, num_experts_per_tok=2))
    theta = {"rope_type": "default", "rope_theta": 5e5}
    return t.LlamaForCausalLM(t.LlamaConfig(**shape, rope_parameters=theta))


def text_batch(tokens):
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens.astype(np.int32),
        "segment_ids": np.ones_like(place),
        "attend_until": place + 1,
        "positions": place,
        "image_index": np.full_like(place, -1),
        "images": np.zeros((len(tokens), 0, 20, 20, 3), np.uint8),
        "image_mask": np.zeros((len(tokens), 0), bool),
    }


def logits(run, batch):
    hidden, _ = jax.jit(run.model.hidden)(run.params, batch)
    return np.asarray(hidden @ run.model.unembedding(run.params))


DECODERS = ["llama", "olmo2", "qwen3", "qwen3-tied", "mixtral"]


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders(torch, transformers, tmp_path, kind):
    theirs = randomized(torch, their_decoder(transformers, kind))
    run = open_run(imported(theirs, tmp_path))
    tokens = np.random.default_rng(0).integers(0, 120, (2, 70))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    close(logits(run, text_batch(tokens)), expected)


def their_llava(transformers, tower="clip", layer=-2):
    t = transformers
    visions = {"clip": t.CLIPVisionConfig, "siglip": t.SiglipVisionConfig, "aimv2": t.Aimv2VisionConfig}
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=visions[tower](**VISION),
            text_config=t.LlamaConfig(**TEXT),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=PATCHES,
            vision_feature_layer=layer,
            vision_feature_select_strategy="default" if tower == "clip" else "full",
        )
    )


LLAVAS = {"llava": ("clip", -2)} | {
    f"llava-{tower}{layer}": (tower, layer) for tower in ("clip", "siglip", "aimv2") for layer in (-1, -2, -3)
}
LLAVAS.pop("llava-clip-2")


def image_batch():
    """A row with two images and one with one, of different lengths of text."""
    random = np.random.default_rng(0)
    text = [random.integers(0, IMAGE_TOKEN, n) for n in (3, 4, 5, 30, 7)]
    image = np.full(PATCHES, IMAGE_TOKEN)
    rows = [np.concatenate([text[0], image, text[1], image, text[2]]), np.concatenate([text[3], image, text[4]])]
    tokens = np.stack([rows[0], rows[1]])
    index = np.full(tokens.shape, -1, np.int32)
    for row in range(2):
        where = tokens[row] == IMAGE_TOKEN
        index[row, where] = np.arange(where.sum())
    images = some_images(4).reshape(2, 2, 20, 20, 3)
    batch = text_batch(tokens) | {
        "image_index": index,
        "images": images,
        "image_mask": np.array([[True, True], [True, False]]),
    }
    return tokens, batch, np.concatenate([images[0], images[1, :1]])


@pytest.mark.parametrize("kind", LLAVAS)
def test_llava(torch, transformers, tmp_path, kind):
    theirs = randomized(torch, their_llava(transformers, *LLAVAS[kind]))
    run = open_run(imported(theirs, tmp_path))
    used = VISION["num_hidden_layers"] + 1 + LLAVAS[kind][1]
    assert run.config.data.image_attention == "causal" and run.model.spec.vision.layers_used == used
    tokens, batch, images = image_batch()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), pixel_values=torch.tensor(pixels(run.model.spec.vision, images))).logits
    close(logits(run, batch), expected.numpy())


@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen3-tied", "mixtral", "clip", "siglip", "aimv2", *LLAVAS])
def test_export_is_read_by_transformers(torch, transformers, tmp_path, kind):
    """Weights that went through our run are the same in their model, and its outputs too."""
    if kind in LLAVAS:
        theirs = their_llava(transformers, *LLAVAS[kind])
    else:
        theirs = (their_decoder if kind in DECODERS else their_tower)(transformers, kind)
    theirs = randomized(torch, theirs)
    workdir = imported(theirs, tmp_path)
    export_weights(workdir, tmp_path / "back", max_shard=100_000)
    again, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    left = set(info["missing_keys"])
    if LLAVAS.get(kind, ("", 0))[1] == -1:  # the norm behind the last layer is used for nothing
        left = {name for name in left if "post_layernorm" not in name and "vision_tower.rms_norm" not in name}
    assert not left and not info["unexpected_keys"] and not info["mismatched_keys"]
    before, after = theirs.state_dict(), again.state_dict()
    there = after.keys() - info["missing_keys"]
    differing = [n for n in there if not torch.equal(before[n], after[n].float())]
    assert not differing
    with torch.no_grad():
        if kind in DECODERS:
            tokens = torch.tensor(np.random.default_rng(0).integers(0, 120, (2, 70)))
            expected, found = theirs(tokens).logits, again.eval()(tokens).logits
        elif kind in LLAVAS:
            tokens, _, images = image_batch()
            inputs = dict(
                input_ids=torch.tensor(tokens), pixel_values=torch.tensor(images.transpose(0, 3, 1, 2) / 255.0).float()
            )
            expected, found = theirs(**inputs).logits, again.eval()(**inputs).logits
        else:
            inputs = torch.tensor(some_images(2).transpose(0, 3, 1, 2) / 255.0).float()
            expected, found = (m.eval()(inputs).last_hidden_state for m in (theirs, again))
    close(found.numpy(), expected.numpy())
