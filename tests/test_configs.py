"""The option surface is pinned: a key is added or removed on purpose, here too."""

import pytest
from ml_collections import ConfigDict

from configs import early_fusion, mm1, moe, quickstart, small
from configs.base import base

KEYS = """
batch_rows checkpoint.every checkpoint.keep checkpoint.keep_every data.accept_changed_plans data.caption_order
data.image_attention data.image_delimiters data.image_rotary data.plans data.prefetch data.root data.sources
data.tokenizer data.weights data.window data.worker_kind data.workers evaluation.batch_rows evaluation.questions
evaluation.rows gradient_accumulation image.augment image.crop_scale image.flip image.mean image.patch image.per_row
image.positions image.size image.std log.every log.progress log.tensorboard mesh.expert mesh.fsdp mesh.replica
mesh.tensor model.attention model.depth model.dtype model.family model.ffn_width model.head_dim model.heads model.init
model.kv_heads model.moe.balance model.moe.balance_loss model.moe.bias_rate model.moe.buffer_factor model.moe.every
model.moe.experts model.moe.granularity model.moe.grouped_matmul model.moe.image_experts model.moe.modality
model.moe.renormalise model.moe.shared model.moe.top_k model.moe.transport model.moe.z_loss model.norm model.norm_eps
model.norm_position model.patch_positions model.qk_norm model.remat model.rope_theta model.scan_layers
model.tie_embeddings model.vocab_chunks model.vocab_size model.width optimizer.beta1 optimizer.beta2
optimizer.clip_norm optimizer.decay_exclude optimizer.eps optimizer.learning_rate optimizer.weight_decay
optimizer.z_loss profile.start profile.steps row_length schedule.cooldown schedule.cooldown_shape schedule.final_ratio
schedule.kind schedule.warmup seed steps trunk.step trunk.workdir
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
        *(mm1.get_config(size) for size in mm1.SIZES),
    ],
)
def test_shipped_configs_have_the_same_keys_and_are_locked(config):
    assert keys(config) == KEYS
    assert config.is_locked


def test_every_key_is_read():
    """A key that no code reads is a promise nobody keeps."""
    import pathlib

    root = pathlib.Path(__file__).parent.parent
    code = "\n".join(
        f.read_text()
        for p in ("nmm_jax", "data_pipelines", "configs/loading.py")
        for f in ([root / p] if p.endswith(".py") else (root / p).rglob("*.py"))
    )
    unread = [k for k in KEYS if f".{k.rsplit('.', 1)[-1]}" not in code]
    assert not unread
