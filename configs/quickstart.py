"""A model that learns to see in minutes on a laptop: rendered scenes, 32x32 pixels, half a million parameters.

    make quickstart          # everything: corpus, training, evaluation, report page
    make quickstart-long     # the variant below

or step by step:

    python -m data_pipelines.scenes --output=runs/scenes --level=quickstart
    python -m nmm_jax.train --config=configs/quickstart.py --config.data.root=runs/scenes --workdir=runs/quickstart
    python -m nmm_jax.evaluate --workdir=runs/quickstart

Hardware: 2 CPU cores. Time: 222 s in all, the corpus, evaluation and report included; 1,121 s for "long", measured
while tests ran on the same cores. Result to expect (docs/results.md): a caption loss less than half of that with
shuffled images, colour and count questions answered right three times in four; after "long" also 97% of "which one is
on the right-hand side?" about pairs of colour and shape seen in training, and one in five about pairs never seen.
"""

from configs.base import base


def get_config(variant: str = ""):
    """variant: "" (minutes) or "long" (under half an hour; also learns where things are)."""
    if variant not in ("", "long"):
        raise ValueError(f"configs/quickstart.py has no variant {variant!r}; it has '' and 'long'")
    c = base()
    c.steps = 1_200
    c.batch_rows = 8
    c.row_length = 128
    c.data.root = "runs/scenes"
    c.data.tokenizer = "tokenizer.json"
    c.image.size = 32
    c.image.patch = 8
    c.image.positions = 16
    c.image.per_row = 5
    c.image.augment = False  # a flip would swap left and right, a crop would lose objects
    c.image.mean = (0.5, 0.5, 0.5)
    c.image.std = (0.25, 0.25, 0.25)

    c.model.vocab_size = 256
    c.model.width = 128
    c.model.depth = 2
    c.model.heads = 4
    c.model.ffn_width = 384
    c.model.rope_theta = 100.0
    c.model.patch_positions = True
    c.model.init = "normal"
    c.model.dtype = "float32"
    c.model.scan_layers = False
    c.model.remat = "none"

    c.optimizer.learning_rate = 2e-3
    c.optimizer.beta2 = 0.98
    c.schedule.warmup = 40
    c.schedule.cooldown = 600
    c.schedule.cooldown_shape = "linear"
    c.checkpoint.every = 400
    c.log.every = 10
    if variant == "long":
        c.steps = 4_000
        c.schedule.cooldown = 2_000
        c.checkpoint.every = 1_000
    return c.lock()
