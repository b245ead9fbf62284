"""Grouped matrix products, pass by pass: which implementation is the fastest for which shape, in which configuration.

    python -m benchmarks.grouped_matmul --output=grouped_matmul.json
    python -m benchmarks.grouped_matmul --shapes=16384x8x2048x5632 --tune=tuned.json         # on an NVIDIA GPU

A shape is rows x groups x inner x outer. Rows are dealt to groups evenly, or unevenly as routers do it: the largest has
about twice the mean.

    forward     x [N,K], w [G,K,M] -> [N,M]
    to rows     dy [N,M], w        -> [N,K]
    to weights  x, dy              -> [G,K,M]

On CPU in float32: ours ("blocks"), XLA's ragged_dot, torch by a loop over groups and by its grouped_mm. On NVIDIA GPUs
in bfloat16: ours as it chooses (models/grouped_kernels.py), tokamax's Mosaic kernel and the Triton ones by themselves,
and ragged_dot. Each is compared with a product by group before it is timed. "dense" is one plain product of as many
FLOPs, all rows with one matrix: what there is to reach. "of dense" is a way's speed over its, "x ours" over ours;
medians over rounds in turns.

--tune times every configuration of CONFIGURATIONS and writes the fastest of each shape and pass:

    {"device": "NVIDIA H200", "dtype": "bfloat16", "fastest": [
        {"pass": "forward", "rows": 16384, "groups": 8, "inner": 2048, "outer": 5632,
         "kernel": "mosaic", "config": {"block_m": 128, ...}, "microseconds": 512.0, "next": 540.1}, ...]}
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.tables import table
from benchmarks.timing import Timed, compiled, in_turns, origin, ratio, write
from nmm_jax.models import grouped_kernels
from nmm_jax.models.grouped_matmul import grouped_matmul

_SHAPES = flags.DEFINE_list("shapes", None, "ROWSxGROUPSxINNERxOUTER; unless given, some of our configs for the device")
_LOADS = flags.DEFINE_list("loads", ["even", "uneven"], "how rows are dealt to groups")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "of each, in turns, after one that is not counted", lower_bound=1)
_TUNE = flags.DEFINE_string("tune", None, "on NVIDIA GPUs: JSON file for the fastest configurations")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")

PASSES = ("forward", "to rows", "to weights")
# configs/moe.py: quickstart-8e and -64e on CPU; hw-1b-8e, hw-1b-64e, hw-3b-8e with 16,384 positions on a GPU.
SHAPES = {
    "cpu": ("1024x8x128x384", "8192x64x128x48", "8192x8x256x704"),
    "gpu": (
        "16384x8x2048x5632", "16384x8x5632x2048", "131072x64x2048x704", "131072x64x704x2048", "16384x8x3072x8192",
        "16384x8x8192x3072",
    ),
}  # fmt: skip
RUNS = {"cpu": 1}  # before it is waited for; elsewhere 20, or the time would be that of starting them

CONFIGURATIONS = {
    "mosaic": [
        dict(block_m=m, block_n=n, block_k=k, num_stages=stages, split_k=1, grid_block_n=columns)
        for m, n, k, stages, columns in itertools.product((64, 128), (64, 128), (64, 128), (2, 4), (1, 4, 8))
    ],
    "triton": [
        dict(block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in itertools.product((64, 128), (128, 256), (32, 64), (4, 8), (3, 4))
    ],
}

COLUMNS = {
    "shape": ("rows x groups x inner x outer", ""), "load": ("rows", ""), "pass": ("pass", ""), "way": ("way", ""),
    "milliseconds": ("ms", ",.3f"), "gflop_per_second": ("GFLOP/s", ",.0f"), "of_dense": ("of dense", ".0%"),
    "times_ours": ("x ours", ".2f"),
}  # fmt: skip

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Shape(NamedTuple):
    rows: int
    groups: int
    inner: int
    outer: int

    @classmethod
    def of(cls, text: str) -> "Shape":
        sizes = text.split("x")
        if len(sizes) != 4 or not all(n.isdecimal() for n in sizes):
            raise app.UsageError(f"--shapes={text}: expected ROWSxGROUPSxINNERxOUTER")
        return cls(*map(int, sizes))

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.outer

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Operands(NamedTuple):
    x: np.ndarray
    w: np.ndarray
    dy: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, shape: Shape, load: str) -> "Operands":
        r = np.random.default_rng(0)
        x, dy = (r.normal(size=(shape.rows, n)).astype(np.float32) for n in (shape.inner, shape.outer))
        w = r.normal(size=shape[1:]).astype(np.float32) * shape.inner**-0.5
        if load == "even":
            sizes = np.diff(np.arange(shape.groups + 1) * shape.rows // shape.groups)
        elif load == "uneven":
            share = r.lognormal(0, 0.5, shape.groups)
            sizes = r.multinomial(shape.rows, share / share.sum())
        else:
            raise app.UsageError(f"--loads: there is no {load!r}; expected some of even, uneven")
        return cls(x, w, dy, sizes.astype(np.int32))

    def expected(self, pass_: str) -> np.ndarray:
        """Group by group, in float32."""
        ends = np.cumsum(self.sizes)
        parts = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        if pass_ == "forward":
            return np.concatenate([self.x[part] @ w for part, w in zip(parts, self.w, strict=True)])
        if pass_ == "to rows":
            return np.concatenate([self.dy[part] @ w.T for part, w in zip(parts, self.w, strict=True)])
        return np.stack([self.x[part].T @ self.dy[part] for part in parts])


def runs() -> int:
    return RUNS.get(jax.default_backend(), 20)


def of_jax(product: Product, pass_: str, operands: Operands, dtype: str) -> Callable[[], jax.Array]:
    """One pass of a differentiable product; what the others would need is not computed."""
    x, w, dy = (jnp.asarray(a, dtype) for a in operands[:3])
    sizes = jnp.asarray(operands.sizes)
    functions: dict[str, Callable[..., jax.Array]] = {
        "forward": lambda x, w, dy, sizes: product(x, w, sizes),
        "to rows": lambda x, w, dy, sizes: jax.vjp(lambda x: product(x, w, sizes), x)[1](dy)[0],
        "to weights": lambda x, w, dy, sizes: jax.vjp(lambda w: product(x, w, sizes), w)[1](dy)[0],
    }
    program = compiled(functions[pass_], x, w, dy, sizes)

    def run() -> jax.Array:
        for _ in range(runs()):
            found = program(x, w, dy, sizes)
        return found.block_until_ready()

    return run


def dense(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return x @ w[0]


def of_torch(loop: bool, pass_: str, operands: Operands) -> Callable[[], Any]:
    """On CPU. The loop is that of transformers' fallback, each product written where it belongs."""
    import torch

    x, w, dy = map(torch.tensor, operands[:3])
    sizes = operands.sizes.tolist()
    ends = torch.tensor(np.cumsum(operands.sizes), dtype=torch.int32)

    def by_loop() -> Any:
        if pass_ == "to weights":
            out = torch.zeros_like(w)
            for g, (a, b) in enumerate(zip(x.split(sizes), dy.split(sizes), strict=True)):
                torch.mm(a.T, b, out=out[g])
            return out
        rows, matrices = (x, w) if pass_ == "forward" else (dy, w.transpose(1, 2))
        out = rows.new_empty(len(rows), matrices.shape[2])
        for a, matrix, to in zip(rows.split(sizes), matrices, out.split(sizes), strict=True):
            torch.mm(a, matrix, out=to)
        return out

    def by_group() -> Any:
        grouped_mm = torch.nn.functional.grouped_mm
        if pass_ == "to weights":
            return grouped_mm(x.T, dy, offs=ends)
        rows, matrices = (x, w) if pass_ == "forward" else (dy, w.transpose(1, 2))
        return grouped_mm(rows, matrices, offs=ends)

    return by_loop if loop else by_group


@contextlib.contextmanager
def forced(kernel: str, config: dict[str, int] | None = None) -> Iterator[None]:
    """What grouped_kernels chooses while a program is traced."""
    with contextlib.ExitStack() as stack:
        chosen = {"mosaic_is_faster": lambda *_: kernel == "mosaic"}
        if config:
            chosen[f"{kernel}_config"] = lambda *_: config
        for name, function in chosen.items():
            stack.enter_context(mock.patch.object(grouped_kernels, name, function))
        yield


def ways_of(pass_: str, operands: Operands, dtype: str) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Those that run here, ours first, and of the others why they do not."""
    on_gpu = jax.default_backend() == "gpu"

    def ours(kernel: str | None = None) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            with forced(kernel) if kernel else contextlib.nullcontext():
                return of_jax(grouped_matmul, pass_, operands, dtype)

        return make

    makers = {"ours": ours()}
    if on_gpu:
        makers |= {f"tokamax, {kernel}": ours(kernel) for kernel in CONFIGURATIONS if pass_ != "to weights"}
    else:
        makers |= {
            "torch, loop": lambda: of_torch(True, pass_, operands),
            "torch, grouped_mm": lambda: of_torch(False, pass_, operands),
        }
    makers["jax.lax.ragged_dot"] = lambda: of_jax(jax.lax.ragged_dot, pass_, operands, dtype)
    made, missing = {}, {}
    for name, make in makers.items():
        try:
            run = make()
            compare(name, run(), operands.expected(pass_), dtype)
        except Exception as e:  # a rival that is not there, or refuses the shape, is told and left out
            if name == "ours":
                raise
            missing[name] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        else:
            made[name] = run
    made["dense"] = of_jax(dense, pass_, operands._replace(w=operands.w[:1]), dtype)
    return made, missing


def compare(name: str, found: Any, expected: np.ndarray, dtype: str) -> None:
    found = np.asarray(found, np.float32)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if not error < (1e-5 if dtype == "float32" else 0.01):
        raise ValueError(f"{name} differs from a product by group by {error:.2g}")


def measure(shape: Shape, load: str, dtype: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    operands, rows, missing = Operands.of(shape, load), [], {}
    for pass_ in PASSES:
        made, left_out = ways_of(pass_, operands, dtype)
        missing |= {f"{name}, {pass_}, {shape}": why for name, why in left_out.items()}
        timed = {name: Timed(run) for name, run in made.items()}
        in_turns(timed.values(), _ROUNDS.value)
        for name, way in timed.items():
            seconds = way.median / runs()
            rows.append(
                {
                    "shape": str(shape),
                    "load": load,
                    "busiest_over_mean": float(operands.sizes.max() / operands.sizes.mean()),
                    "pass": pass_,
                    "way": name,
                    "milliseconds": 1e3 * seconds,
                    "gflop_per_second": shape.flops / 1e9 / seconds,
                    "of_dense": ratio(timed["dense"], way),
                    "times_ours": ratio(timed["ours"], way),
                    "seconds": [s / runs() for s in way.seconds],
                }
            )
    return rows, missing


def tune(shape: Shape, dtype: str) -> Iterator[dict[str, Any]]:
    """The fastest configuration for each pass; those that do not fit the chip, or are wrong, are passed over."""
    operands = Operands.of(shape, "uneven")
    for pass_ in PASSES:
        timed: list[tuple[str, dict[str, int], Timed]] = []
        expected = operands.expected(pass_)
        for kernel, configs in CONFIGURATIONS.items():
            if kernel == "mosaic" and pass_ == "to weights":  # which is our own Triton kernel
                continue
            for config in configs:
                with contextlib.suppress(Exception), forced(kernel, config):
                    run = of_jax(grouped_matmul, pass_, operands, dtype)
                    compare(kernel, run(), expected, dtype)
                    timed.append((kernel, config, Timed(run)))
        in_turns([way for _, _, way in timed], _ROUNDS.value)
        timed.sort(key=lambda each: each[2].median)
        micros = [1e6 * way.median / runs() for _, _, way in timed]
        if timed:
            kernel, config, _ = timed[0]
            best = {"kernel": kernel, "config": config, "microseconds": micros[0], "next": (micros + [None])[1]}
            yield {"pass": pass_, **shape._asdict(), **best}


def main(_):
    on_gpu = jax.default_backend() == "gpu"
    dtype = "bfloat16" if on_gpu else "float32"
    shapes = [Shape.of(text) for text in _SHAPES.value or SHAPES["gpu" if on_gpu else "cpu"]]
    device = jax.devices()[0].device_kind
    packages = ("jax", "jaxlib", "torch", "tokamax")
    if _TUNE.value:
        if not on_gpu:
            raise app.UsageError("--tune chooses among kernels for NVIDIA GPUs, and there is none here")
        fastest = [best for shape in shapes for best in tune(shape, dtype)]
        write(_TUNE.value, {"device": device, "dtype": dtype, "fastest": fastest} | origin(packages))
        print(f"{_TUNE.value}: {len(fastest)} of {3 * len(shapes)} shapes and passes")
        return
    rows, missing = [], {}
    for shape, load in itertools.product(shapes, _LOADS.value):
        found, left_out = measure(shape, load, dtype)
        rows, missing = rows + found, missing | left_out
    print(f"{device}, {dtype}\n\n{table(rows, COLUMNS)}\n")
    if not on_gpu:
        missing["tokamax, mosaic and triton"] = "need an NVIDIA GPU: python -m benchmarks.grouped_matmul there, --tune"
    for what, why in missing.items():
        print(f"not measured here: {what}: {why}")
    if _OUTPUT.value:
        record = {"dtype": dtype, "rounds": _ROUNDS.value, "ways": rows, "not_measured": missing}
        write(_OUTPUT.value, record | origin(packages))


if __name__ == "__main__":
    app.run(main)
