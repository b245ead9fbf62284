"""The option surface is pinned: a key is added or removed on purpose, here too."""

import pytest
from ml_collections import ConfigDict

from configs import deep_fusion, early_fusion, encoder, late_fusion, mm1, moe, quickstart, small, validation
from configs.base import base
from configs.validation import validate
from nmm_jax.models import decoder

KEYS = """
batch_rows checkpoint.every checkpoint.keep checkpoint.keep_every compiler.cache compiler.options
data.accept_changed_plans data.caption_order data.image_attention data.image_delimiters data.image_rotary data.plans
data.prefetch data.root data.rows data.sources data.tokenizer data.weights data.window data.worker_kind data.workers
evaluation.batch_rows evaluation.questions evaluation.rows gradient_accumulation image.augment image.crop_scale
image.flip image.mean image.patch image.per_row image.positions image.size image.std log.every log.progress
log.tensorboard log.wandb mesh.expert mesh.fsdp mesh.replica mesh.tensor model.aim.head_depth model.aim.head_width
model.aim.pixel_weight model.attention model.bias model.connector.depth model.connector.downsample model.connector.heads
model.connector.kind model.connector.width model.contrastive.bias model.contrastive.loss model.contrastive.max_scale
model.contrastive.pooling model.contrastive.scale model.contrastive.text_attention model.contrastive.width
model.deep.every model.deep.initial model.deep.modules model.deep.qkv_bias model.delimiter_vectors
model.delimiter_weights model.depth model.dtype model.family model.ffn model.ffn_width model.head_dim model.heads
model.init model.kv_heads model.moe.balance model.moe.balance_loss model.moe.bias_rate model.moe.buffer_factor
model.moe.every model.moe.experts model.moe.granularity model.moe.grouped_matmul model.moe.image_experts
model.moe.modality model.moe.renormalise model.moe.shared model.moe.top_k model.moe.transport model.moe.z_loss
model.norm model.norm_eps model.norm_position model.patch_positions model.qk_norm model.remat model.rope_theta
model.scan_layers model.tie_embeddings model.vision.bias model.vision.class_token model.vision.depth
model.vision.embedding_norm model.vision.feature_layer model.vision.ffn model.vision.ffn_width model.vision.final_norm
model.vision.heads model.vision.norm model.vision.norm_eps model.vision.norm_position model.vision.patch_bias
model.vision.positions model.vision.qk_norm model.vision.width model.vocab_chunks model.vocab_size model.width
optimizer.beta1 optimizer.beta2 optimizer.clip_norm optimizer.decay_exclude optimizer.eps optimizer.freeze
optimizer.learning_rate optimizer.vision_scale optimizer.weight_decay optimizer.z_loss profile.start profile.steps
row_length schedule.cooldown schedule.cooldown_shape schedule.final_ratio schedule.kind schedule.warmup seed
start.connector start.decoder start.vision steps trunk.step trunk.workdir
""".split()


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    found = []
    for name, value in config.items():
        found += keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return sorted(found)


def test_option_surface():
    assert keys(base()) == KEYS


@pytest.mark.parametrize(
    "config",
    [
        *(early_fusion.get_config(size) for size in early_fusion.SIZES),
        quickstart.get_config(),
        quickstart.get_config("long"),
        small.get_config(),
        *(moe.get_config(f"{size}-{variant}") for size in moe.SIZES for variant in moe.VARIANTS),
        *(mm1.get_config(argument) for argument in (*mm1.SIZES, "small", "small,encoder=aim-small,size=96,tokens=36")),
        *(late_fusion.get_config(size) for size in (*late_fusion.SIZES, *late_fusion.CPU)),
        *(late_fusion.get_config(f"small,encoder={kind}") for kind in encoder.KINDS),
        *(deep_fusion.get_config(name) for name in (*deep_fusion.NAMES, "cogvlm-17b,size=490,every=4")),
        *(encoder.get_config(name) for name in encoder.TOWERS),
    ],
)
def test_shipped_configs_have_the_same_keys_are_locked_and_valid(config):
    assert keys(config) == KEYS
    assert config.is_locked
    validate(config)


def test_an_encoders_tower_is_that_of_the_late_fusion_that_starts_from_it():
    for kind in encoder.KINDS:
        trained, used = encoder.get_config(f"{kind}-small"), late_fusion.get_config(f"small,encoder={kind}")
        assert trained.model.vision == used.model.vision
        assert mm1.get_config(f"small,encoder={kind}-small").model.vision == used.model.vision
        for key in ("size", "patch", "mean", "std"):
            assert trained.image[key] == used.image[key]


def test_modules_of_deep_fusion_are_those_that_the_decoder_has():
    assert validation.DEEP_MODULES == decoder.MODULES


def test_mm1s_recipe_and_choices():
    c = mm1.get_config("3b,1000,encoder=clip-l,size=336,connector=average,tokens=64")
    assert (c.steps, c.image.size, c.image.positions, c.model.connector.kind) == (1_000, 336, 64, "average")
    assert (c.model.vision.width, c.image.patch, c.image.per_row) == (1024, 14, 16)
    rates = [mm1.get_config(size).optimizer.learning_rate for size in ("3b", "7b", "30b")]
    assert [f"{rate:.0e}" for rate in rates] == ["6e-05", "4e-05", "2e-05"]  # the paper's, rounded
    with pytest.raises(ValueError, match="connector = 'perceiver'; expected one of linear, mlp"):
        mm1.get_config("3b,connector=perceiver")
    with pytest.raises(ValueError, match="'resolution=336' is neither .* its options: encoder"):
        mm1.get_config("3b,resolution=336")
    with pytest.raises(ValueError, match="tokens = 'many'; expected a number"):
        mm1.get_config("3b,tokens=many")


def test_every_key_is_read():
    """A key that no code reads is a promise nobody keeps."""
    import pathlib

    root = pathlib.Path(__file__).parent.parent
    code = "\n".join(
        f.read_text()
        for p in ("nmm_jax", "data_pipelines", "configs/validation.py")
        for f in ([root / p] if p.endswith(".py") else (root / p).rglob("*.py"))
    )
    unread = [k for k in KEYS if f".{k.rsplit('.', 1)[-1]}" not in code]
    assert not unread
