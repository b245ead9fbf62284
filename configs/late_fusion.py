"""Late fusion: a vision tower, a connector and the decoder, trained from scratch together.

    python -m nmm_jax.describe --config=configs/late_fusion.py:289m
    python -m nmm_jax.train --config=configs/late_fusion.py:289m --config.data.root=DATA --workdir=RUN
    python -m nmm_jax.train --config=configs/late_fusion.py:1b,150000 --config.data.root=DATA --workdir=RUN

The argument is a size and, after a comma, the steps: 50,000 unless given, 105 B positions. Rows, batch and schedule are
those of configs/early_fusion.py, so that two runs of as many steps see the same text and images.

Shukor et al. 2025, "Scaling Laws for Native Multimodal Models" (arXiv 2504.07951), Table 6. Tower and decoder both have
24 layers; the feed-forward layers of both are SwiGLU, which alone gives the parameters that the paper reports. The
tower's rate is 0.01 of the decoder's: of 0.1, 0.01 and 0.001 it has the lowest loss and the best downstream accuracy
from scratch (Table 8). What the paper leaves open is chosen here: 16 heads, which divide all widths; LayerNorm and
QK-norm as in the decoder; learned positions, no class token; the connector, a linear layer, GELU and another one on
each of the 256 patches.

Hardware: TPU slices and clusters of GPUs. Time: chip-days for the default 50,000 steps, computed and not measured
(nobody has made these runs yet), as in configs/early_fusion.py. Loss to expect: level with early fusion at equal FLOPs,
by the paper's frontiers (29.923 C^-0.0494 against 29.574 C^-0.0492); its data are not public, so compare differences.

    size     text width   vision width   parameters*   text + vision       learning rate   FLOPs a position   chip-days
    289m            768            384        289.8M    247.3M +  42.5M           1.5e-3             1.51 G          10
    493m           1024            512        493.4M    411.6M +  81.8M           1.5e-3             2.58 G          17
    1b             1536            768       1004.3M    834.4M + 169.9M           5e-4               5.32 G          35
    1.75b          2048           1024       1748.0M   1439.7M + 308.3M           4.2e-4             9.30 G          61
    2.43b          2464           1184       2430.5M   2012.2M + 418.3M           3.8e-4            13.02 G          86
    3.7b           3072           1536       3707.2M   3027.8M + 679.5M           3.3e-4            19.83 G         131
    * as the paper counts: matrices of both stacks and both embedding matrices

Two more are for 2 CPU cores, the tower's rate a tenth of the decoder's: at the whole rate `quickstart` does not learn
to see (docs/results.md). `quickstart` is configs/quickstart.py with a tower of 2 layers. `small` is configs/small.py
with one of 4 on patches of 8 pixels, of which a square of four becomes one of the same 16 positions, so that rows are
the very same. `small,encoder=clip` (siglip, aim, aimv2) has the tower of configs/encoder.py:clip-small, to start from:

    python -m nmm_jax.train --config=configs/late_fusion.py:quickstart --config.data.root=runs/scenes \\
        --workdir=runs/late
    python -m nmm_jax.train --config=configs/late_fusion.py:small,encoder=clip --config.start.vision=runs/clip \\
        --config.data.root=data --workdir=runs/late
"""

from ml_collections import ConfigDict

from configs import early_fusion, encoder, quickstart, small
from configs.argument import parse

# size: text width, vision width, learning rate
SIZES = {
    "289m": (768, 384, 1.5e-3),
    "493m": (1024, 512, 1.5e-3),
    "1b": (1536, 768, 5e-4),
    "1.75b": (2048, 1024, 4.2e-4),
    "2.43b": (2464, 1184, 3.8e-4),
    "3.7b": (3072, 1536, 3.3e-4),
}
CPU = ("quickstart", "small")


def get_config(argument: str = "289m"):
    """argument: SIZE or SIZE,STEPS; sizes are the keys of SIZES, and CPU. small has the option encoder=KIND."""
    options = {"encoder": encoder.KINDS} if argument.startswith("small") else {}
    size, steps, chosen = parse(argument, "configs/late_fusion.py", (*SIZES, *CPU), options)
    c = _on_cpu(size) if size in CPU else _of_paper(size, steps)
    c.steps = steps or c.steps
    if "encoder" in chosen:
        encoder.set_tower(c, f"{chosen['encoder']}-small")
    return c.lock()


def _of_paper(size: str, steps: int | None) -> ConfigDict:
    c = early_fusion.get_config(f"275m,{steps}" if steps else "275m").unlock()
    c.model.family = "late_fusion"
    c.model.width, c.model.vision.width, c.optimizer.learning_rate = SIZES[size]
    c.model.vision.qk_norm = "full"
    c.optimizer.vision_scale = 0.01
    return c


def _on_cpu(name: str) -> ConfigDict:
    c = (quickstart if name == "quickstart" else small).get_config().unlock()
    c.model.family = "late_fusion"
    c.model.patch_positions = False  # the tower has its own
    vision = c.model.vision
    vision.width, vision.depth, vision.heads, vision.ffn_width = c.model.width, c.model.depth, 4, 384
    vision.qk_norm = "full"
    c.optimizer.vision_scale = 0.1
    if name == "small":
        c.image.patch = 8
        c.model.connector.kind = "average"
    return c
