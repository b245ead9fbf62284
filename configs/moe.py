"""Early fusion with a mixture of experts: the sizes of configs/early_fusion.py, and ways to route.

    python -m nmm_jax.describe --config=configs/moe.py:275m-8e
    python -m nmm_jax.train --config=configs/moe.py:275m-8e --config.data.root=DATA --config.mesh.expert=8 --workdir=RUN
    python -m nmm_jax.train --config=configs/moe.py:quickstart-8e --config.data.root=runs/scenes --workdir=runs/moe

The argument is SIZE-VARIANT or SIZE-VARIANT,STEPS. A variant has as many active parameters as the dense model of its
size, whatever it has in all:

    dense   the dense model
    8e      8 experts, one a token: the paper's
    aware   one feed-forward layer for text and one for images: the paper's modality-aware model
    4+4     4 experts for text and 4 for images, a router within each: aware at the capacity of 8e (MoMa)
    64e     fine-grained: each of the 8 cut in 8, of which a token meets 8

Shukor et al. 2025 (arXiv 2504.07951), section 4.4 and appendix A: experts in every layer, no token dropped, a weight of
0.01 for the load-balancing loss, 2,500 steps of warm-up. The paper mentions no router z-loss; 0.001 is MM1's. All else
is as in configs/early_fusion.py, its time too: FLOPs are those of the dense model. Hardware: what has 12 bytes for each
parameter there is, over all devices, and room for buffers (docs/moe.md has the sums; `describe` does them for a mesh).
Loss to expect of 8e: the paper's fit (Table 12) at 100 B positions; its data are not public, so compare differences.

    size        active*      in all (8e, 4+4, 64e)    loss
    275m         274.8M            1.20 B              2.92
    464m         464.0M            2.15 B              2.80
    932m         931.7M            4.51 B              2.70
    1.6b        1626.8M            8.18 B              2.65
    2.3b        2279.9M           11.76 B              2.62
    3.4b        3354.2M           17.53 B              2.60
    hw-300m      308.8M            1.28 B              2.89
    hw-1b       1028.7M            4.91 B              2.69
    hw-3b       3027.8M           15.71 B              2.61
    * as the paper counts: without norms, patch embedding and routers

quickstart-VARIANT is configs/quickstart.py with 4 layers, for 2 CPU cores: docs/results.md compares its variants.
"""

from configs import early_fusion, quickstart

SIZES = (*(size for size in early_fusion.SIZES if "8b" not in size), "quickstart")

VARIANTS = {
    "dense": {},
    "8e": {"experts": 8},
    "aware": {"experts": 2, "modality": "fixed"},
    "4+4": {"experts": 8, "modality": "grouped"},
    "64e": {"experts": 8, "granularity": 8},
}


def get_config(argument: str = "275m-8e"):
    """argument: SIZE-VARIANT or SIZE-VARIANT,STEPS."""
    name, _, steps = argument.partition(",")
    size, _, variant = name.rpartition("-")
    if size not in SIZES or variant not in VARIANTS or (steps and not steps.isdecimal()):
        raise ValueError(
            f"configs/moe.py:{argument}: expected SIZE-VARIANT or SIZE-VARIANT,STEPS, where SIZE is one of "
            f"{', '.join(SIZES)} and VARIANT one of {', '.join(VARIANTS)}"
        )
    c = quickstart.get_config() if size == "quickstart" else early_fusion.get_config(size)
    c.unlock()
    c.steps = int(steps) if steps else c.steps
    if size == "quickstart":
        c.model.depth = 4
        c.schedule.cooldown = c.steps // 2
    else:
        c.schedule.warmup = min(c.steps // 4, 2_500)
        c.schedule.cooldown = c.steps // 5
    c.model.moe.update(VARIANTS[variant])
    return c.lock()
