"""Early fusion that costs as much as a given late fusion: as many parameters, or as many FLOPs on the same rows."""

import math
from collections.abc import Callable

from ml_collections import ConfigDict

from benchmarks.workload import Needs
from nmm_jax.scaling.counting import count


def counterparts(late: ConfigDict, needed: Needs) -> dict[str, ConfigDict]:
    """The two of them; parameters as the paper counts, FLOPs of a training step with these needs.

    Raises:
      ValueError: the config is not of late fusion.
    """
    if late.model.family != "late_fusion":
        raise ValueError(f"model.family = {late.model.family!r} has no counterpart in early fusion; late_fusion has")
    measures = {
        "early, equal parameters": lambda config: count(config).paper_parameters,
        "early, equal FLOPs": lambda config: count(config).training_flops(*needed),
    }
    return {name: _early(late, measure) for name, measure in measures.items()}


def _early(late: ConfigDict, measure: Callable[[ConfigDict], float]) -> ConfigDict:
    """With the feed-forward width, a multiple of 8, at which the measure, linear in it, is next to the late one's."""
    c = late.copy_and_resolve_references().unlock()
    c.model.family, c.model.patch_positions, c.optimizer.vision_scale = "early_fusion", True, 1.0
    c.image.patch = c.image.size // math.isqrt(c.image.positions)
    measured = []
    for c.model.ffn_width in (128, 256):
        measured.append(measure(c))
    slope = (measured[1] - measured[0]) / 128
    c.model.ffn_width = 8 * round((128 + (measure(late) - measured[0]) / slope) / 8)
    return c.lock()
