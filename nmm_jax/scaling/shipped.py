"""The configs that this project ships, by size, and the command that trains the one nearest to a plan."""

import bisect
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from etils import epath

from configs import early_fusion, ladder, late_fusion, loading, moe
from nmm_jax.scaling import counting

ARCHITECTURES = ladder.ARCHITECTURES
_ROOT = epath.Path(loading.__file__).parent.parent
_FITS = "hw-"  # begins the names of sizes that fit the hardware, a ladder of their own


class Config(NamedTuple):
    """A config and what it counts.

    Attributes:
      path: FILE[:ARGUMENT].
      N: parameters as the paper counts them, active ones of a mixture.
      total: with all experts.
      positions: of a step.
      flops: of a step of full rows, half of them images, with attention.
    """

    path: str
    N: int
    total: int
    positions: int
    flops: float


def ladders(architecture: str) -> list[list[str]]:
    """The shipped configs of an architecture, in ladders of rising N.

    Raises:
      ValueError: there is no such architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"there is no architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
    small = [f"configs/ladder.py:{architecture}-{size}" for size in ladder.SIZES]
    if architecture == "late":
        return [small, [f"configs/late_fusion.py:{size}" for size in late_fusion.SIZES]]
    sizes, form = list(early_fusion.SIZES), "configs/early_fusion.py:{}"
    if architecture == "moe":
        sizes, form = [size for size in sizes if size in moe.SIZES], "configs/moe.py:{}-8e"
    fast, papers = ([form.format(s) for s in sizes if s.startswith(_FITS) == fits] for fits in (True, False))
    return [fast, papers, small]  # of equal sizes the first is taken


@functools.cache
def read(path: str) -> Config:
    """Counts a config; raises what loading.load does."""
    file = path.partition(":")[0]
    elsewhere = not epath.Path(file).exists() and (_ROOT / file).exists()  # a plan is asked for in another folder
    config = loading.load(str(_ROOT / path) if elsewhere else path)
    counts = counting.count(config)
    positions, pairs, images = counting.full_rows(config)
    return Config(
        path=path,
        N=counts.paper_parameters,
        total=counts.paper_total,
        positions=int(positions),
        flops=counts.training_flops(positions, pairs, images),
    )


def nearest(architecture: str, N: float) -> Config:
    """The config whose logarithm of N is nearest."""
    near = []
    for paths in ladders(architecture):  # a config takes a tenth of a second to read: only what halving needs is read
        i = bisect.bisect(paths, N, key=lambda path: read(path).N)
        near += [read(path) for path in paths[max(i - 1, 0) : i + 1]]
    return min(near, key=lambda one: abs(math.log(one.N / N)))


def command(config: Config, steps: int, mixture: Mapping[str, float] | None = None) -> str:
    """What trains a config for as many steps, on its own mixture unless another is given, as one would type it."""
    keys = []
    if mixture:
        keys.append(f'--config.data.sources="{tuple(mixture)}"')
        keys.append(f'--config.data.weights="{tuple(round(share, 3) for share in mixture.values())}"')
    with_steps = f"{config.path},{steps}"  # their warm-up and cooldown follow
    if not any(config.path in paths for architecture in ARCHITECTURES for paths in ladders(architecture)):
        with_steps = f"{config.path} --config.steps={steps}"
    begin = f"python -m nmm_jax.train --config={with_steps}"
    return " ".join([begin, *keys, "--config.data.root=DATA --workdir=RUN"])
