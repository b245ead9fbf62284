"""The slice that each shipped config is meant for, and what is set for it there: docs/pods.md's table.

    python -m nmm_jax.compilation.targets --output=runs/targets --write=docs/pods.md

compiles them all: hours on 2 cores, and what is in the folder is not made again. Microbatches are of 8 to 32 thousand
positions a device, so that products are large and a chunk of logits, or a dropless buffer of experts, is not.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Target:
    config: str  # FILE:ARGUMENT, the file within configs/
    topology: str
    slices: int = 1
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Fit for a file's."""
        times = f"-x{self.slices}" if self.slices > 1 else ""
        return f"{self.config}-{self.topology}{times}".replace(":", "-").replace(",", "-")


def _microbatches(n: int) -> dict[str, Any]:
    return {"gradient_accumulation": n}


TARGETS = (
    # early fusion, the paper's ladder and the hardware's
    Target("early_fusion:275m", "v5e:4x4", overrides=_microbatches(8)),
    Target("early_fusion:464m", "v5e:8x8", overrides=_microbatches(2)),
    Target("early_fusion:932m", "v5e:8x16"),
    Target("early_fusion:1.6b", "v5e:16x16"),
    Target("early_fusion:2.3b", "v5e:16x16"),
    Target("early_fusion:3.4b", "v5p:4x4x8"),
    Target("early_fusion:8b", "v5p:4x4x8"),
    Target("early_fusion:hw-300m", "v5e:4x4", overrides=_microbatches(8)),
    Target("early_fusion:hw-1b", "v5e:8x8", overrides=_microbatches(2)),
    Target("early_fusion:hw-3b", "v5p:4x4x4"),
    Target("early_fusion:hw-8b", "v5p:4x4x4"),
    Target("early_fusion:hw-8b", "v6e:16x16", slices=2),
    # with experts
    Target("moe:275m-8e", "v5e:4x4", overrides=_microbatches(16)),
    Target("moe:464m-8e", "v5e:8x8", overrides=_microbatches(4)),
    Target("moe:932m-8e", "v5e:8x16", overrides=_microbatches(2)),
    Target("moe:1.6b-8e", "v5e:16x16"),
    Target("moe:2.3b-8e", "v5p:4x4x8"),
    Target("moe:3.4b-8e", "v5p:4x4x8"),
    Target("moe:hw-300m-8e", "v5e:4x4", overrides=_microbatches(16)),
    Target("moe:hw-1b-8e", "v5p:4x4x4", overrides=_microbatches(2)),
    Target("moe:hw-3b-8e", "v5p:4x4x8"),
    Target("moe:hw-1b-aware", "v5p:4x4x4"),
    Target("moe:hw-1b-4+4", "v5p:4x4x4", overrides=_microbatches(2)),
    Target("moe:hw-1b-64e", "v5p:4x4x4", overrides=_microbatches(8)),
    # MM1
    Target("mm1:3b", "v5p:4x4x4"),
    Target("mm1:7b", "v5p:4x4x8"),
    Target("mm1:30b", "v5p:8x8x8"),
    Target("mm1:3b-64e", "v5p:8x8x8"),
    Target("mm1:7b-32e", "v5p:8x8x8"),
    # late fusion
    Target("late_fusion:289m", "v5e:4x4", overrides=_microbatches(8)),
    Target("late_fusion:493m", "v5e:8x8", overrides=_microbatches(2)),
    Target("late_fusion:1b", "v5e:8x16"),
    Target("late_fusion:1.75b", "v5e:16x16"),
    Target("late_fusion:2.43b", "v5p:4x4x8"),
    Target("late_fusion:3.7b", "v5p:4x4x8"),
    # deep fusion
    Target("deep_fusion:cogvlm-17b", "v5p:4x4x8"),
    Target("deep_fusion:cogvlm2-19b", "v5p:4x4x8"),
    Target("deep_fusion:mot-932m", "v5e:8x16"),
    Target("deep_fusion:mot-hw-3b", "v5p:4x4x8"),
    # encoders
    Target("encoder:clip-l", "v5e:8x8"),
    Target("encoder:clip-h", "v5e:16x16"),
    Target("encoder:siglip-so400m", "v5e:16x16"),
    Target("encoder:aim-7b", "v5p:4x4x8"),
    Target("encoder:aimv2-3b", "v5p:4x4x8"),
)
