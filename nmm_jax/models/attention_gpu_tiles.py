"""How attention's kernels for NVIDIA GPUs cut their work: blocks, warps and stages, and what of a GPU that takes.

A product takes widths that are powers of two, 16 or more, so K is taken as one of these or two: 64 and 128 as they are,
320 as 256 + 64, 68 as 64 + 16, 138 as 128 + 16, 164 as 128 + 64, but 50 as 64, 102 as 128, 202 as 256. What is
multiplied for nothing is then, of all: 15 % (68), 4 % (138), 15 % (164), 22 % (50), 20 % (102), 21 % (202).

Rows of K elements lie in memory as they are, so that where 16 bytes do not divide one, it is loaded in smaller pieces:
of bfloat16, 16 bytes where 8 divides K, 8 bytes for 68 and 164, 4 bytes for 50, 102, 138 and 202; and of an odd K 2
bytes, too few to be loaded ahead of their use.
"""

import dataclasses

from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of one kernel: positions of a block of queries and of keys, warps of a program, stages of its pipelined loop."""

    queries: int
    keys: int
    warps: int
    stages: int


# By kernel and bytes of an element: the widest K, and its tiles. None has been timed. Those with (f) are torch 2.13's
# for FlexAttention on H100 (torch/_inductor/template_heuristics/triton.py): Triton kernels of the same products, over
# blocks that a mask picks. The others are counted, from ptxas 13.0 on the kernels compiled for H100: the most warps on
# an SM of 65,536 registers and 227 KiB without spilling registers or, where a number stands, that many bytes a thread.
# Smaller blocks read less that is masked: in rows of the 45/45/10 mixture (benchmarks/mixture_rows.py) of 1024, 4096
# and 8192 positions, those of 64 x 64 read 1.29, 1.17 and 1.14 times the pairs that are needed, of 128 x 64 or 64 x 128
# 1.43, 1.27 and 1.22, of 128 x 128 1.53, 1.34 and 1.28. float32 is for comparisons; none was sought for it.
TILES: dict[tuple[str, int], dict[int, Tiles]] = {
    ("forward", 2): {
        64: Tiles(128, 64, 8, 2),  # 16 warps
        128: Tiles(128, 64, 8, 3),  # (f)
        256: Tiles(128, 64, 8, 2),
        320: Tiles(64, 64, 8, 2),
    },
    ("dq", 2): {
        64: Tiles(64, 64, 4, 3),  # 12 warps
        128: Tiles(128, 64, 8, 3),  # (f)
        256: Tiles(64, 64, 8, 2),
        320: Tiles(64, 32, 8, 2),
    },
    ("dkv", 2): {
        64: Tiles(64, 128, 8, 3),  # (f)
        128: Tiles(64, 128, 8, 3),  # (f)
        256: Tiles(32, 64, 8, 2),  # 16
        320: Tiles(32, 64, 8, 2),  # 260
    },
    ("forward", 4): {64: Tiles(64, 32, 4, 3), 128: Tiles(64, 32, 4, 2), 320: Tiles(32, 32, 8, 2)},
    ("dq", 4): {64: Tiles(64, 32, 4, 2), 128: Tiles(32, 32, 4, 2), 320: Tiles(32, 16, 8, 2)},
    ("dkv", 4): {64: Tiles(32, 64, 4, 2), 128: Tiles(32, 32, 4, 2), 320: Tiles(16, 32, 8, 2)},
}
KERNELS = ("forward", "dq", "dkv")
WIDEST = 320

# KiB that a program may have, by compute capability (CUDA's programming guide, "Compute Capabilities").
SHARED_MEMORY = {8.0: 163, 8.6: 99, 8.7: 163, 8.9: 99, 9.0: 227, 10.0: 227, 10.3: 227, 11.0: 227, 12.0: 99, 12.1: 99}


def tiles_of(kernel: str, head_dim: int, itemsize: int) -> Tiles:
    return next(tiles for widest, tiles in TILES[kernel, itemsize].items() if head_dim <= widest)


def parts(head_dim: int) -> tuple[tuple[int, int], ...]:
    """(start, width) of what K is taken as: one power of two, or two where these are less."""
    one = max(16, pl.next_power_of_2(head_dim))
    half = one // 2
    rest = pl.next_power_of_2(max(16, head_dim - half))
    return ((0, half), (half, rest)) if half + rest < one else ((0, one),)


def shared_memory(kernel: str, head_dim: int, itemsize: int) -> int:
    """Bytes that a program takes, at most: its own block of q, of q and dout or of k and v; stages of the two it reads;
    and 1 KiB for rearranging registers. (In float32, and of odd K, a stage less is kept.)
    """
    tiles = tiles_of(kernel, head_dim, itemsize)
    own, read = (tiles.keys, tiles.queries) if kernel == "dkv" else (tiles.queries, tiles.keys)
    rows = (1 if kernel == "forward" else 2) * own + 2 * tiles.stages * read
    numbers = 4 * read * (tiles.stages - 1) if kernel == "dkv" else 0  # an interval, lse and delta for each query
    return rows * sum(width for _, width in parts(head_dim)) * itemsize + 4 * numbers + 1024


def refusal(capability: float, head_dim: int, itemsize: int) -> str | None:
    """Why GPUs of this compute capability cannot run the kernels; None where they can."""
    if head_dim > WIDEST:
        return f"takes heads of up to {WIDEST}, not of {head_dim}"
    if capability < 8:
        return f"needs a GPU of compute capability 8.0 (Ampere) or more, not {capability}"
    needed = max(shared_memory(kernel, head_dim, itemsize) for kernel in KERNELS)
    there = SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values())) << 10
    if needed > there:
        return f"needs {needed:,} bytes of shared memory for heads of {head_dim}; a GPU of {capability} has {there:,}"
    return None
