"""Early fusion at the sizes of the paper, and at sizes that fit the hardware.

    python -m nmm_jax.describe --config=configs/early_fusion.py:275m
    python -m nmm_jax.train --config=configs/early_fusion.py:275m --config.data.root=DATA --workdir=RUN
    python -m nmm_jax.train --config=configs/early_fusion.py:932m,150000 --config.data.root=DATA --workdir=RUN

The argument is a size and, after a comma, the steps: 50,000 unless given, 105 B positions. Warm-up and cooldown follow
from the steps. A trunk from which cooldowns of several lengths start has --config.schedule.cooldown=0.

Shukor et al. 2025, "Scaling Laws for Native Multimodal Models" (arXiv 2504.07951), Table 6 and appendix A; the 8B row
is its sibling's, arXiv 2507.09404. Batches of 2,048 rows of 1,024 positions, 45/45/10 captions, interleaved documents
and text. What the paper leaves open is its code base's (DCLM's block, the vocabulary of GPT-NeoX's tokenizer padded to
50,432, its initialisation); 16 heads is the only usual number that makes all its head dimensions even.

The paper's widths are an exact ladder, with head dimensions from 50 to 320. `hw-` sizes have a head dimension of 128
and dimensions that are multiples of 128, so that matrix units and attention kernels are full: take them for anything
but reproducing the paper. Their learning rates are interpolated in the paper's table (log-log), not tuned. hw-8b is 8b
with 40 heads.

Hardware: TPU slices and clusters of GPUs; the smallest sizes also one machine of 8. Time: chip-days for the default
50,000 steps, computed and not measured (nobody has made these runs yet), from the FLOPs that `describe` counts at 40%
of the 459 TFLOP/s (bf16) of a TPU v5p chip. Loss to expect: the paper's fit at 100 B positions, the mean of its three
held-out sets as reconstructed from its published frontier; its data are not public, so compare differences only.

    size     width x depth   heads  head dim   parameters*   learning rate   FLOPs a position   chip-days   loss
    275m        800 x 24        16        50        274.8M          1.5e-3             1.53 G          10   3.03
    464m       1088 x 24        16        68        464.0M          1.5e-3             2.62 G          17   2.92
    932m       1632 x 24        16       102        931.7M          5e-4               5.34 G          35   2.80
    1.6b       2208 x 24        16       138       1626.8M          4.2e-4             9.42 G          62   2.72
    2.3b       2624 x 24        16       164       2279.9M          4e-4              13.28 G          88   2.68
    3.4b       3232 x 24        16       202       3354.2M          3.5e-4            19.63 G         130   2.63
    8b         5120 x 24        16       320       8129.1M          2.4e-4            47.99 G         317   2.55
    hw-300m    1024 x 16         8       128        308.8M          1.5e-3             1.64 G          11   3.01
    hw-1b      2048 x 16        16       128       1028.7M          4.8e-4             5.76 G          38   2.79
    hw-3b      3072 x 24        24       128       3027.8M          3.6e-4            17.69 G         117   2.64
    hw-8b      5120 x 24        40       128       8129.1M          2.4e-4            47.99 G         317   2.55
    * as the paper counts: the decoder's matrices and both embedding matrices
"""

from configs.base import base

# size: width, depth, heads, learning rate
SIZES = {
    "275m": (800, 24, 16, 1.5e-3),
    "464m": (1088, 24, 16, 1.5e-3),
    "932m": (1632, 24, 16, 5e-4),
    "1.6b": (2208, 24, 16, 4.2e-4),
    "2.3b": (2624, 24, 16, 4e-4),
    "3.4b": (3232, 24, 16, 3.5e-4),
    "8b": (5120, 24, 16, 2.4e-4),
    "hw-300m": (1024, 16, 8, 1.5e-3),
    "hw-1b": (2048, 16, 16, 4.8e-4),
    "hw-3b": (3072, 24, 24, 3.6e-4),
    "hw-8b": (5120, 24, 40, 2.4e-4),
}


def get_config(argument: str = "275m"):
    """argument: SIZE or SIZE,STEPS; sizes are the keys of SIZES."""
    size, _, steps = argument.partition(",")
    if size not in SIZES or (steps and not steps.isdecimal()):
        raise ValueError(
            f"configs/early_fusion.py:{argument}: expected SIZE or SIZE,STEPS, where SIZE is one of {', '.join(SIZES)}"
        )
    c = base()
    c.steps = int(steps) if steps else 50_000
    c.batch_rows = 2_048
    c.row_length = 1_024
    c.data.tokenizer = "tokenizer.json"
    c.image.per_row = 3  # four images of 256 positions would leave a row no place for text

    c.model.vocab_size = 50_432
    c.model.width, c.model.depth, c.model.heads, c.optimizer.learning_rate = SIZES[size]
    c.model.norm = "layernorm"
    c.model.qk_norm = "full"
    c.model.init = "fan_in_depth_scaled"

    c.schedule.warmup = warmup(c.steps)
    c.schedule.cooldown = c.steps // 5
    c.checkpoint.every = 1_000
    return c.lock()


def warmup(steps: int) -> int:
    """The paper's: 1,000 steps for runs of up to 4,000, 2,500 up to 15,000, else 5,000; at most a quarter of a run."""
    return min(steps // 4, 1_000 if steps <= 4_000 else 2_500 if steps <= 15_000 else 5_000)
