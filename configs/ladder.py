"""A ladder of small models in three architectures, for scaling studies: configs/study.py climbs it.

    python -m nmm_jax.describe --config=configs/ladder.py:early-w64
    python -m nmm_jax.train --config=configs/ladder.py:moe-w64,1000 --config.data.root=runs/study/scenes --workdir=RUN

The argument is ARCHITECTURE-SIZE or ARCHITECTURE-SIZE,STEPS. As in the paper's ladder (Shukor et al. 2025, arXiv
2504.07951, Table 6) depth is fixed and width grows, the towers of late fusion are half as wide as their decoders and as
deep, of 8 experts a token meets one, and the recipe is configs/early_fusion.py's, its rule for the warm-up too: a
quarter of a short run.

    early    early fusion
    late     a vision tower, an MLP and the decoder
    moe      early fusion with 8 experts in every layer

    sizes           depth   rows a step   image                   vocabulary   learning rate            for
    w16 to w192         4     8 x 128     32 pixels, 16 patches          256   RATE_ON_CPU              a core of a CPU
    w256 to w1536      12   256 x 1,024   224 pixels, 256 patches      8,192   1/width, at most 3e-3    a GPU

The paper's rates are 0.8 to 1.3 over the width; those for batches of 1,024 positions go on so at a fifth. Measured, in
260 steps on scenes of the level `full`, mean training loss of the last 40 (November 21, 2026):

    rate         1e-3     2e-3     4e-3     8e-3
    early-w24   2.040    1.317    1.129    1.088
    early-w96   1.017    0.995    1.000    1.005
"""

from ml_collections import ConfigDict

from configs import early_fusion, quickstart

ARCHITECTURES = ("early", "late", "moe")
ON_CPU = (16, 24, 32, 48, 64, 96, 128, 192)
ON_GPU = (256, 384, 512, 768, 1024, 1536)
SIZES = tuple(f"w{width}" for width in (*ON_CPU, *ON_GPU))
RATE_ON_CPU, RATE_ON_GPU = 0.2, 1.0  # times the width
STEPS = 1_000


def get_config(argument: str = "early-w64"):
    """argument: ARCHITECTURE-SIZE or ARCHITECTURE-SIZE,STEPS."""
    name, _, steps = argument.partition(",")
    architecture, _, size = name.partition("-")
    if architecture not in ARCHITECTURES or size not in SIZES or (steps and not steps.isdecimal()):
        raise ValueError(
            f"configs/ladder.py:{argument}: expected ARCHITECTURE-SIZE or ARCHITECTURE-SIZE,STEPS, where ARCHITECTURE "
            f"is one of {', '.join(ARCHITECTURES)} and SIZE one of {', '.join(SIZES)}"
        )
    width, n = int(size[1:]), int(steps or STEPS)
    c = _on_cpu(width) if width in ON_CPU else _on_gpu(width, n)
    c.steps = n
    c.schedule.warmup = early_fusion.warmup(n)
    c.schedule.cooldown = n // 5
    c.schedule.cooldown_shape = "1-sqrt"
    if architecture == "late":
        c.model.family = "late_fusion"
        c.model.patch_positions = False  # the tower has its own
        vision = c.model.vision
        vision.width, vision.depth, vision.qk_norm = width // 2, c.model.depth, "full"
        vision.heads = c.model.heads
        c.optimizer.vision_scale = 0.1
        if width in ON_CPU:
            vision.heads, vision.ffn_width = 2, _swiglu(vision.width, 16)
            c.model.scan_layers = True  # compiled in half the time, which is most of a short run's (w24: 27 s of 53 s)
    if architecture == "moe":
        c.model.moe.experts = 8
    return c.lock()


def _on_cpu(width: int) -> ConfigDict:
    c = quickstart.get_config().unlock()
    c.model.width, c.model.depth, c.model.heads, c.model.ffn_width = width, 4, max(width // 16, 2), _swiglu(width, 16)
    c.model.norm = "layernorm"
    c.model.init = "fan_in_depth_scaled"
    c.optimizer.beta2 = 0.95
    c.optimizer.learning_rate = RATE_ON_CPU / width
    c.checkpoint.every = 100_000  # what takes a minute begins again
    c.log.every = 20
    c.log.tensorboard = False
    c.data.workers = 1
    return c


def _on_gpu(width: int, steps: int) -> ConfigDict:
    c = early_fusion.get_config(f"hw-300m,{steps}").unlock()
    c.model.width, c.model.depth, c.model.heads = width, 12, width // 64
    c.batch_rows, c.model.vocab_size = 256, 8_192
    c.optimizer.learning_rate = min(RATE_ON_GPU / width, 3e-3)
    return c


def _swiglu(width: int, multiple: int) -> int:
    """8/3 of the width, rounded up."""
    return -(-8 * width // (3 * multiple)) * multiple
