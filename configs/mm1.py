"""MM1's mixtures of experts: their language models, with early fusion in the place of the image encoder.

    python -m nmm_jax.describe --config=configs/mm1.py:3b-64e
    python -m nmm_jax.train --config=configs/mm1.py:3b-64e --config.data.root=DATA --config.mesh.expert=64 --workdir=RUN

McKinzie et al. 2024 (arXiv 2403.09611): 64 experts in every 2nd layer for 64 B parameters, or 32 in every 4th for 47 B;
two experts a token, their gates renormalised; load-balancing loss 0.01, router z-loss 0.001. Learning rate
exp(-0.4214 ln N - 0.5535) with N the dense model's parameters without embeddings, weight decay a tenth of it; 512 rows
of 4,096 positions, 200,000 steps, 2,000 of warm-up and a cosine to a tenth; 45/45/10.

The paper gives no widths and depths. These are chosen to meet its totals, with head dimensions of 128 and 8 key-value
heads:

    size      width x depth   heads   feed-forward   dense*     active     in all
    3b-64e     3072 x 24         24          8,832   2.87 B     3.84 B     64.4 B
    7b-32e     4096 x 32         32         13,184   6.94 B     8.24 B     47.1 B
    * the model with one expert a layer

Hardware: a TPU slice or GPU cluster whose memories hold 12 bytes a parameter in all. Time and loss: nobody has made
these runs yet.
"""

import math

from configs.base import base

# size: width, depth, heads, feed-forward width, experts, every n-th layer
SIZES = {
    "3b-64e": (3072, 24, 24, 8_832, 64, 2),
    "7b-32e": (4096, 32, 32, 13_184, 32, 4),
}
KV_HEADS = 8


def get_config(size: str = "3b-64e"):
    """size: one of SIZES."""
    if size not in SIZES:
        raise ValueError(f"configs/mm1.py:{size}: expected one of {', '.join(SIZES)}")
    c = base()
    c.steps = 200_000
    c.batch_rows = 512
    c.row_length = 4_096
    c.data.tokenizer = "tokenizer.json"
    c.image.per_row = 15  # sixteen images of 256 positions would leave a row no place for text

    c.model.width, c.model.depth, c.model.heads, c.model.ffn_width, c.model.moe.experts, c.model.moe.every = SIZES[size]
    c.model.kv_heads = KV_HEADS
    c.model.moe.top_k = 2
    c.model.moe.renormalise = True

    c.optimizer.learning_rate = math.exp(-0.4214 * math.log(_dense(c.model)) - 0.5535)
    c.optimizer.weight_decay = 0.1 * c.optimizer.learning_rate
    c.schedule.kind = "cosine"
    c.schedule.warmup = 2_000
    c.schedule.final_ratio = 0.1
    c.checkpoint.every = 1_000
    return c.lock()


def _dense(model) -> int:
    """Parameters of the decoder's matrices, without embeddings, with one feed-forward layer in the place of experts."""
    attention = 2 * model.width * (model.width + model.kv_heads * model.width // model.heads)
    return model.depth * (attention + 3 * model.width * model.ffn_width)
