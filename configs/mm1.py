"""MM1: a pretrained vision encoder, a connector and a language model, all of it trained on.

    python -m nmm_jax.describe --config=configs/mm1.py:3b
    python -m nmm_jax.train --config=configs/mm1.py:3b --config.data.root=DATA --workdir=RUN \\
        --config.start.vision=ENCODER --config.start.decoder=LANGUAGE_MODEL
    python -m nmm_jax.train --config=configs/mm1.py:3b,encoder=clip-l,size=336,connector=average,tokens=64 ...
    python -m nmm_jax.train --config=configs/mm1.py:3b-64e --config.data.root=DATA --config.mesh.expert=64 --workdir=RUN

The argument is a size and, after commas, steps and choices:

    encoder     a tower of configs/encoder.py; clip-h unless given. --config.start.vision names a run of it
    size        pixels; 378 unless given. Positions of a tower that was trained at others are interpolated
    connector   linear, mlp, average, attention or c_abstractor, which is the default
    tokens      positions of an image, a square for average and c_abstractor; 144 unless given

McKinzie et al. 2024 (arXiv 2403.09611): CLIP's ViT-H/14 at 378 pixels, a C-Abstractor to 144 positions, at most 16
images in a row of 4,096; 45/45/10; 512 rows a step, 200,000 steps, 2,000 of warm-up and a cosine to a tenth; learning
rate exp(-0.4214 ln N - 0.5535), N the dense decoder's parameters without embeddings, weight decay a tenth of it. Its
language models were trained on text before. Mixtures have 64 experts in every 2nd layer, or 32 in every 4th; two
experts a token, gates renormalised; load-balancing loss 0.01, router z-loss 0.001; "64 B" and "47 B" in all.

The paper gives no widths and depths. These are chosen to meet its totals, with head dimensions of 128 and 8 key-value
heads (parameters of the language model):

    size      width x depth   heads   feed-forward    dense*     active     in all   learning rate
    3b         3072 x 24         24          8,832    2.87 B     2.87 B     2.87 B       6.2e-5
    7b         4096 x 32         32         13,184    6.94 B     6.94 B     6.94 B       4.2e-5
    30b        7168 x 48         56         22,912   30.01 B    30.01 B    30.01 B       2.2e-5
    3b-64e     3072 x 24         24          8,832    2.87 B     3.84 B     64.4 B       6.2e-5
    7b-32e     4096 x 32         32         13,184    6.94 B     8.24 B     47.1 B       4.2e-5
    * the model with one expert a layer

Hardware: TPU slices or GPU clusters whose memories hold 12 bytes a parameter in all. Time and loss: nobody has made
these runs yet.

`small` is for 2 CPU cores and the data of configs/small.py, with the choices of the others at its scale: an encoder
clip-small (siglip, aim, aimv2), 64 or 96 pixels (64 or 144 patches of 8 pixels), 16 tokens or another square.

    python -m nmm_jax.train --config=configs/encoder.py:clip-small --config.data.root=data --workdir=runs/clip
    python -m nmm_jax.train --config=configs/mm1.py:small --config.data.root=data --config.start.vision=runs/clip \\
        --workdir=runs/mm1
"""

import math
from collections.abc import Collection

from ml_collections import ConfigDict

from configs import encoder, small
from configs.argument import parse
from configs.base import base

# size: width, depth, heads, feed-forward width, experts, every n-th layer
SIZES = {
    "3b": (3072, 24, 24, 8_832, 0, 1),
    "7b": (4096, 32, 32, 13_184, 0, 1),
    "30b": (7168, 48, 56, 22_912, 0, 1),
    "3b-64e": (3072, 24, 24, 8_832, 64, 2),
    "7b-32e": (4096, 32, 32, 13_184, 32, 4),
}
KV_HEADS = 8
OPTIONS: dict[str, Collection[str] | type[int]] = {
    "encoder": encoder.TOWERS,
    "size": int,
    "connector": ("linear", "mlp", "average", "attention", "c_abstractor"),
    "tokens": int,
}


def get_config(argument: str = "3b"):
    """argument: SIZE[,STEPS][,encoder=NAME][,size=PIXELS][,connector=KIND][,tokens=N]; sizes are SIZES and small."""
    size, steps, chosen = parse(argument, "configs/mm1.py", (*SIZES, "small"), OPTIONS)
    c = _small() if size == "small" else _of_paper(size)
    encoder.set_tower(c, chosen.get("encoder", "clip-small" if size == "small" else "clip-h"))
    c.image.size = int(chosen.get("size", 64 if size == "small" else 378))
    c.image.positions = int(chosen.get("tokens", 16 if size == "small" else 144))
    c.model.connector.kind = chosen.get("connector", "c_abstractor")
    c.steps = steps or c.steps
    c.model.family = "late_fusion"
    c.schedule.kind = "cosine"
    c.schedule.warmup = min(c.schedule.warmup, c.steps // 4)
    c.schedule.final_ratio = 0.1
    return c.lock()


def _of_paper(size: str) -> ConfigDict:
    c = base()
    c.steps = 200_000
    c.batch_rows = 512
    c.row_length = 4_096
    c.data.tokenizer = "tokenizer.json"
    c.image.per_row = 16

    c.model.width, c.model.depth, c.model.heads, c.model.ffn_width, c.model.moe.experts, c.model.moe.every = SIZES[size]
    c.model.kv_heads = KV_HEADS
    if c.model.moe.experts:
        c.model.moe.top_k = 2
        c.model.moe.renormalise = True

    c.optimizer.learning_rate = math.exp(-0.4214 * math.log(_dense(c.model)) - 0.5535)
    c.optimizer.weight_decay = 0.1 * c.optimizer.learning_rate
    c.schedule.warmup = 2_000
    c.checkpoint.every = 1_000
    return c


def _small() -> ConfigDict:
    c = small.get_config().unlock()
    c.model.patch_positions = False
    c.optimizer.vision_scale = 0.1
    c.model.connector.width = 128
    c.model.connector.depth = 1
    return c


def _dense(model) -> int:
    """Parameters of the decoder's matrices, without embeddings, with one feed-forward layer in the place of experts."""
    attention = 2 * model.width * (model.width + model.kv_heads * model.width // model.heads)
    return model.depth * (attention + 3 * model.width * model.ffn_width)
