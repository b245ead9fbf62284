"""What interval attention costs, forward and backward, as multiples of the FLOPs that its mask needs.

    python -m benchmarks.attention --output=attention.json                  # two minutes on 2 cores
    python -m benchmarks.attention --config=configs/small.py --data=data    # rows of that config's data instead

On JAX's default device: CPU in float32, accelerators in bfloat16. Rows are of the 45/45/10 mixture, synthetic unless
data is given (benchmarks/mixture_rows.py).

    needed   pairs of a query and a key that it sees, padding left out; 4 K FLOPs for each and each head forward, 2.5
             times as many backward
    floor    their time at the chip's peak (nmm_jax/parallel/chips.py); on CPU at the rate of a product of two
             MATRIX x MATRIX matrices, timed in the same turns

Rivals compute the same and are compared before anything is timed, but for those named causal: fast kernels that know
neither documents nor images, and see all keys before a query. Backward is a run of both passes less a run of the
forward pass in the same round; "blocked" computes its scores again in it.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.mixture_rows import first_of_segment, of_data, synthetic
from benchmarks.tables import table
from benchmarks.timing import Timed, compiled, in_turns, origin, write
from nmm_jax.models.attention import attention
from nmm_jax.parallel.chips import peak_flops

_LENGTHS = flags.DEFINE_list("lengths", ["1024", "4096", "8192"], "S, positions of a row")
_POSITIONS = flags.DEFINE_integer("positions", 0, "of a batch; 0 is 8,192 on CPU, 65,536 elsewhere", lower_bound=0)
_HEADS = flags.DEFINE_integer("heads", 0, "H; 0 is 2 on CPU, 16 elsewhere", lower_bound=0)
_KV_HEADS = flags.DEFINE_integer("kv_heads", 0, "G; 0 is H", lower_bound=0)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "K", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "runs of each, after one that is not counted", lower_bound=1)
_CONFIG = flags.DEFINE_string("config", None, "a config, to take rows of its data")
_DATA = flags.DEFINE_string("data", None, "its data.root")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")

MATRIX = 2048
SCORES = 1 << 30  # bytes of all scores of a batch, beyond which the reference is left out: it keeps several such arrays
RUNS = {"cpu": 1}  # before it is waited for; elsewhere 20, or the time would be that of starting them
COLUMNS = {
    "length": ("S", "d"),
    "way": ("way", ""),
    "forward_milliseconds": ("forward ms", ".2f"),
    "forward_over_floor": ("x floor", ".2f"),
    "backward_milliseconds": ("backward ms", ".2f"),
    "backward_over_floor": ("x floor", ".2f"),
    "both_over_floor": ("both x floor", ".2f"),
    "temporary_megabytes": ("temporary MB", ".1f"),
}

# Ways


@dataclasses.dataclass
class Way:
    name: str
    forward: Timed
    both: Timed
    temporary: float | None = None  # megabytes, of both passes


@dataclasses.dataclass
class Batch:
    q: jax.Array  # [B,S,H,K]
    k: jax.Array  # [B,S,G,K]
    v: jax.Array
    dout: jax.Array
    segments: np.ndarray
    until: np.ndarray

    @property
    def first(self) -> np.ndarray:
        return first_of_segment(self.segments)

    @property
    def pairs(self) -> int:
        return int((self.until - self.first)[self.segments > 0].sum())


def batch_of(segments: np.ndarray, until: np.ndarray, heads: int, groups: int, head_dim: int, dtype: Any) -> Batch:
    r = np.random.default_rng(0)
    shape = (*segments.shape, heads, head_dim)
    q, k, v, dout = (
        jnp.asarray(r.normal(size=(*shape[:2], n, head_dim)), dtype) for n in (heads, groups, groups, heads)
    )
    return Batch(q, k, v, dout, segments, until)


def jax_way(name: str, attend: Callable[..., jax.Array], batch: Batch) -> Way:
    """attend(q, k, v, segment_ids, attend_until), compiled apart for the forward pass and for both."""

    def both(q, k, v, dout, *mask):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, *mask), q, k, v)
        return out, *pull(dout)

    mask = jnp.asarray(batch.segments), jnp.asarray(batch.until)
    qkv = batch.q, batch.k, batch.v
    forward = compiled(attend, *qkv, *mask)
    backward = compiled(both, *qkv, batch.dout, *mask)
    memory = backward.memory_analysis()
    return Way(
        name,
        Timed(lambda: _done(forward, *qkv, *mask)),
        Timed(lambda: _done(backward, *qkv, batch.dout, *mask)),
        None if memory is None else memory.temp_size_in_bytes / 1e6,
    )


def _done(program: jax.stages.Compiled, *arguments: Any) -> Any:
    for _ in range(runs()):
        found = program(*arguments)
    return jax.block_until_ready(found)


def runs() -> int:
    return RUNS.get(jax.default_backend(), 20)


def cudnn_causal(q, k, v, *_):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def splash_causal(q, k, v, *_):
    """With the mask that it is made for, known as it is compiled."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    s, heads = q.shape[1], q.shape[2]
    mask = splash.MultiHeadMask([splash.CausalMask((s, s))] * heads)
    sizes = splash.BlockSizes(*(min(512, s),) * 8)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    by_head = [x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v)]
    return jax.vmap(kernel)(*by_head).swapaxes(1, 2)


def sdpa(batch: Batch) -> Way:
    """torch's scaled_dot_product_attention, given the whole mask."""
    import torch

    segments, keys = batch.segments, np.arange(batch.segments.shape[1])
    mask = (segments[:, :, None] == segments[:, None]) & (keys < batch.until[:, :, None])
    grouped = {"enable_gqa": True} if batch.q.shape[2] != batch.k.shape[2] else {}
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, attn_mask=torch.tensor(mask)[:, None], **grouped
    )
    return torch_way("torch SDPA, boolean mask", attend, batch, "cpu")


def flex(batch: Batch) -> Way:
    """torch's FlexAttention: its blocks are left out as ours are, by a mask of blocks made before."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    first, until = (torch.tensor(x, device="cuda") for x in (batch.first, batch.until))
    s = batch.segments.shape[1]

    def sees(b, h, query, key):
        return (first[b, query] <= key) & (key < until[b, query])

    blocks = create_block_mask(sees, len(batch.segments), None, s, s, device="cuda")
    attend = functools.partial(
        torch.compile(flex_attention), block_mask=blocks, enable_gqa=batch.q.shape[2] != batch.k.shape[2]
    )
    return torch_way("torch FlexAttention", attend, batch, "cuda")


def torch_way(name: str, attend: Callable[..., Any], batch: Batch, device: str) -> Way:
    import torch

    dtype = getattr(torch, str(batch.q.dtype))
    by_head = [
        torch.tensor(np.asarray(x, np.float32)).to(device, dtype).transpose(1, 2).contiguous()
        for x in (batch.q, batch.k, batch.v, batch.dout)
    ]
    qkv, dout = [x.requires_grad_() for x in by_head[:3]], by_head[3]

    def wait(found):
        if device == "cuda":
            torch.cuda.synchronize()
        return [x.detach().transpose(1, 2) for x in found]

    def forward():
        with torch.no_grad():
            for _ in range(runs()):
                found = attend(*qkv)
        return wait([found])

    def both():
        for _ in range(runs()):
            out = attend(*qkv)
            gradients = torch.autograd.grad(out, qkv, dout)
        return wait([out, *gradients])

    return Way(name, Timed(forward), Timed(both))


def ways_of(batch: Batch) -> tuple[list[Way], dict[str, str]]:
    """Those that run here, ours first; and of the others why they do not."""
    platform = {"cuda": "gpu"}.get(jax.default_backend(), jax.default_backend())
    b, s, heads, _ = batch.q.shape
    scores = b * heads * s * s * 4

    def ours(implementation):
        attend = functools.partial(attention, implementation=implementation)
        return lambda: jax_way(f"ours, {implementation}", lambda *a: attend(*a), batch)

    rivals: list[tuple[str, str, Callable[[], Way]]] = [
        ("gpu", "ours, triton", ours("triton")),
        ("tpu", "ours, splash", ours("splash")),
        ("any", "ours, blocked", ours("blocked")),
        ("cpu", "ours, reference", ours("reference")),
        ("cpu", "torch SDPA, boolean mask", lambda: sdpa(batch)),
        ("gpu", "torch FlexAttention", lambda: flex(batch)),
        ("gpu", "cuDNN, causal", lambda: jax_way("cuDNN, causal", cudnn_causal, batch)),
        ("tpu", "splash, causal", lambda: jax_way("splash, causal", splash_causal, batch)),
    ]
    made, missing = [], {}
    for where, name, make in rivals:
        if where not in ("any", platform):
            missing[name] = f"needs {'an NVIDIA GPU' if where == 'gpu' else f'a {where.upper()}'}"
        elif name == "ours, reference" and scores > SCORES:
            missing[f"{name}, S={s}"] = f"its scores alone are {scores / 2**30:.1f} GiB"
        else:
            try:
                made.append(make())
            except Exception as e:  # a rival that is not there, or refuses the shape, is told and left out
                if name.startswith("ours"):
                    raise
                missing[f"{name}, S={s}"] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return made, missing


def compare(made: list[Way], dtype: str) -> None:
    """Of what should be the same, output and gradients. A rival that computes something else is none."""
    masked = [way for way in made if not way.name.endswith("causal")]
    expected = [np.asarray(x, np.float32) for x in masked[0].both.run()]
    for way in masked[1:]:
        for found, want in zip(way.both.run(), expected, strict=True):
            found = found.float().cpu().numpy() if hasattr(found, "cpu") else np.asarray(found, np.float32)
            error = np.linalg.norm(found - want) / np.linalg.norm(want)
            if not error < (1e-4 if dtype == "float32" else 0.02):
                raise ValueError(f"{way.name} differs from {masked[0].name} by {error:.2g}")


def matrix_product(dtype: str) -> Timed:
    a, b = (jax.random.normal(jax.random.key(n), (MATRIX, MATRIX), dtype) for n in range(2))
    multiply = compiled(jnp.matmul, a, b)
    return Timed(lambda: _done(multiply, a, b))


# Results


def over_floor(seconds: list[float], products: Timed, flops: float, peak: float | None) -> float:
    """The median over rounds of a time over what these FLOPs need."""
    if peak:
        return statistics.median(seconds) / runs() * peak / flops
    times = [flops / (2 * MATRIX**3) * p for p in products.seconds]  # of the FLOPs, at the rate of that round
    if len(times) != len(seconds):
        return statistics.median(seconds) / statistics.median(times)
    return statistics.median(s / t for s, t in zip(seconds, times, strict=True))


def result(way: Way, products: Timed, needed: float, peak: float | None) -> dict[str, Any]:
    forward, both = way.forward.seconds, way.both.seconds
    if len(forward) != len(both):
        forward = [statistics.median(forward)] * len(both)
    backward = [b - f for f, b in zip(forward, both, strict=True)]
    return {
        "way": way.name,
        "forward_milliseconds": 1e3 * way.forward.median / runs(),
        "forward_over_floor": over_floor(way.forward.seconds, products, needed, peak),
        "backward_milliseconds": 1e3 * statistics.median(backward) / runs(),
        "backward_over_floor": over_floor(backward, products, 2.5 * needed, peak),
        "both_over_floor": over_floor(way.both.seconds, products, 3.5 * needed, peak),
        "temporary_megabytes": way.temporary,
        "forward_seconds": way.forward.seconds,
        "both_seconds": way.both.seconds,
    }


def main(_):
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    heads = _HEADS.value or (2 if on_cpu else 16)
    groups = _KV_HEADS.value or heads
    positions = _POSITIONS.value or (8192 if on_cpu else 65536)
    peak = peak_flops(jax.devices()[0])
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    masks = {}
    for s in map(int, _LENGTHS.value):
        count = max(positions // s, 1)
        segments, until = of_data(_CONFIG.value, _DATA.value, s, count) if _CONFIG.value else synthetic(s, count)
        batch = batch_of(segments, until, heads, groups, _HEAD_DIM.value, dtype)
        made, left_out = ways_of(batch)
        compare(made, dtype)
        products = matrix_product(dtype)
        in_turns([products, *(timed for way in made for timed in (way.forward, way.both))], _ROUNDS.value)
        needed = 4.0 * batch.pairs * _HEAD_DIM.value * heads
        rows += [{"length": s, **result(way, products, needed, peak)} for way in made]
        missing |= left_out
        masks[s] = {
            "rows": count,
            "pairs": batch.pairs,
            "of_square": batch.pairs / (count * s * s),
            "padding": float((segments == 0).mean()),
            "needed_gflop_forward": needed / 1e9,
            "product_flops_per_second": 2 * MATRIX**3 * runs() / products.median,
        }
    device = jax.devices()[0].device_kind
    print(f"{dtype}, {device}, H={heads}, G={groups}, K={_HEAD_DIM.value}, {positions:,} positions of S a batch\n")
    print(table(rows, COLUMNS), "\n")
    for s, mask in masks.items():
        rate = peak or mask["product_flops_per_second"]
        print(
            f"S={s}: {mask['of_square']:.3f} S^2 pairs a row, {mask['padding']:.1%} padding; floor at "
            f"{rate / 1e9:,.0f} GFLOP/s{'' if peak else ' (measured)'}"
        )
    for name, reason in missing.items():
        print(f"not measured here: {name}: {reason}")
    if _OUTPUT.value:
        record = {
            "heads": heads,
            "kv_heads": groups,
            "head_dim": _HEAD_DIM.value,
            "dtype": dtype,
            "rounds": _ROUNDS.value,
            "data": _CONFIG.value or "synthetic",
            "peak_flops": peak,
            "masks": masks,
            "ways": rows,
            "not_measured": missing,
        }
        write(_OUTPUT.value, record | origin(("jax", "jaxlib", "torch", "libtpu", "jax-cuda13-plugin", "tokamax")))


if __name__ == "__main__":
    app.run(main)
