"""What a mixture of experts costs beside the dense block of equal active parameters, forward and backward.

    python -m benchmarks.moe [--experts=8,16,64] [--output=benchmarks/moe.json]          # three minutes on 2 cores
    python -m benchmarks.moe --width=768 --ffn=2048 --threads=1                          # another shape, one core

On JAX's default device: CPU in float32, accelerators in bfloat16. Every token goes to one expert, as wide as the dense
block. Rivals: the same layer by XLA's own jax.lax.ragged_dot, at the fewest experts (on CPU it multiplies every row
with every expert); and transformers' Mixtral block on the same weights and tokens where torch is installed
(`make .venv-all/ready`, then .venv-all/bin/python), by its loop over experts ("eager") and by the grouped product that
it chooses by itself. Outputs are compared before anything is timed.

All are timed in turns, one run of each a round, with a pause between (threads of one library that still wait for work
take time from the next); "x dense" is the median over rounds of the ratio to the dense block's time in that round.
What takes more than 5 s is run once. "needed" are the products of one matrix for each token, three of the SwiGLU and
the router's, times three for the two gradients; "more" is what is multiplied beyond that, where it can be counted.
"""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from configs.base import base
from nmm_jax.models import grouped_matmul
from nmm_jax.models.layers import FeedForward
from nmm_jax.models.moe import MoE
from nmm_jax.models.spec import Spec
from nmm_jax.parallel.sharding import Constrain

_TOKENS = flags.DEFINE_integer("tokens", 8192, "of a batch", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 256, "D", lower_bound=1)
_FFN = flags.DEFINE_integer("ffn", 704, "of the dense block and of an expert", lower_bound=1)
_EXPERTS = flags.DEFINE_list("experts", ["8", "16", "64"], "numbers of experts")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "runs of each, after one that is not counted", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 0, "CPU cores to run on; 0 is all", lower_bound=0)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")

PAUSE, ONCE = 0.25, 5.0  # seconds: between runs, and beyond which one run has to do

Values = dict[str, Any]


@dataclasses.dataclass(eq=False)
class Case:
    way: str
    experts: int  # 0: dense
    run: Callable[[], Any]  # once forward and backward, until it is done
    needed: float  # FLOPs
    executed: float | None
    seconds: list[float] = dataclasses.field(default_factory=list)


def spec_of(experts: int, dtype: str) -> Spec:
    c = base()
    c.model.update(dict(width=_WIDTH.value, ffn_width=_FFN.value, depth=1, heads=1, dtype=dtype, init="open_lm"))
    c.model.moe.update(dict(experts=experts, top_k=1, renormalise=True))  # as Mixtral does
    return Spec.from_config(c)


def module_of(make: Callable[[], nnx.Module]) -> tuple[Callable[..., Any], Values]:
    """(parameters, *inputs) -> output of a module, and its parameters."""
    graph, state = nnx.split(make(), nnx.Param)
    return lambda params, *inputs: nnx.merge(graph, params)(*inputs, Constrain()), nnx.to_pure_dict(state)


def forward_and_backward(apply: Callable[..., jax.Array], *operands: Any) -> tuple[Callable[[], Any], Any]:
    """Of apply(params, x), by both: a function that runs it, and the compiled program."""
    params, x, dy = operands

    @jax.jit
    def both(params, x, dy):
        y, pull = jax.vjp(apply, params, x)
        return y, pull(dy)

    compiled = both.lower(params, x, dy).compile()
    return lambda: jax.block_until_ready(compiled(params, x, dy)), compiled


def ragged(params: Values, x: jax.Array) -> jax.Array:
    """The layer as one would write it with what XLA has: sort, three ragged products, put back."""
    flat = x.reshape(-1, x.shape[-1])
    logits = flat.astype(jnp.float32) @ params["router"]["kernel"]
    expert = logits.argmax(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=logits.shape[-1]).astype(jnp.int32)
    gate, up, down = (params["experts"][name].astype(x.dtype) for name in ("gate", "up", "down"))
    rows = flat[order]
    inner = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    return jnp.zeros_like(flat).at[order].set(jax.lax.ragged_dot(inner, down, sizes)).reshape(x.shape)


def mixtral(params: Values, x: np.ndarray, dy: np.ndarray, dtype: str, implementation: str) -> Callable[[], Any]:
    """transformers' block with our weights. Raises ImportError where there is none."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if _THREADS.value:
        torch.set_num_threads(_THREADS.value)
    experts = {name: np.asarray(params["experts"][name]).swapaxes(1, 2) for name in ("gate", "up", "down")}
    config = MixtralConfig(
        hidden_size=_WIDTH.value,
        intermediate_size=_FFN.value,
        num_local_experts=len(experts["up"]),
        num_experts_per_tok=1,
    )
    config._experts_implementation = implementation  # what from_pretrained(experts_implementation=) sets
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(torch.tensor(np.asarray(params["router"]["kernel"]).T.copy()))
        block.experts.gate_up_proj.copy_(torch.tensor(np.concatenate([experts["gate"], experts["up"]], axis=1)))
        block.experts.down_proj.copy_(torch.tensor(experts["down"].copy()))
    block = block.to(device, getattr(torch, dtype))
    tx, tdy = (torch.tensor(a).to(device, getattr(torch, dtype)) for a in (x, dy))
    tx.requires_grad_()

    def run():
        for tensor in (tx, *block.parameters()):
            tensor.grad = None
        y = block(tx)
        y.backward(tdy)
        if device == "cuda":
            torch.cuda.synchronize()
        return y.detach(), tx.grad

    return run


def cases(dtype: str) -> tuple[list[Case], dict[int, float]]:
    """What is timed; and the busiest expert's load, over the mean, by number of experts."""
    tokens, d, f = _TOKENS.value, _WIDTH.value, _FFN.value
    r = np.random.default_rng(0)
    x32, dy32 = (r.normal(size=(1, tokens, d)).astype(np.float32) for _ in range(2))
    x, dy = (jnp.asarray(a, dtype) for a in (x32, dy32))
    needed = 18.0 * tokens * d * f
    apply, params = module_of(lambda: FeedForward(spec_of(0, dtype), 0, rngs=nnx.Rngs(params=0)))
    made = [Case("dense SwiGLU", 0, forward_and_backward(apply, params, x, dy)[0], needed, needed)]
    modality, imbalance = jnp.zeros((1, tokens), jnp.int32), {}
    for n, experts in enumerate(sorted(int(e) for e in _EXPERTS.value)):
        spec = spec_of(experts, dtype)
        layer, params = module_of(lambda spec=spec: MoE(spec, 0, rngs=nnx.Rngs(params=0)))
        ours, _ = forward_and_backward(lambda p, x, layer=layer: layer(p, x, modality)[0], params, x, dy)
        received = np.asarray(jax.jit(layer)(params, x, modality)[1]["expert_tokens"]).sum(0)
        imbalance[experts] = float(received.max() / received.mean())
        own = needed + 6 * tokens * d * experts  # the router's
        executed = None
        if jax.default_backend() == "cpu":  # the "blocks" form: a group's last block is a whole one
            rows = min(grouped_matmul.BLOCK, tokens)
            executed = own + needed * ((-(-received // rows) * rows).sum() / tokens - 1)
        made.append(Case("ours", experts, ours, own, executed))
        y, (_, dx) = ours()
        rivals = []
        if n == 0:
            run, compiled = forward_and_backward(ragged, params, x, dy)
            rivals.append(Case("jax.lax.ragged_dot", experts, run, own, compiled.cost_analysis().get("flops")))
        for implementation in ("eager", "grouped_mm"):
            try:
                run = mixtral(params, x32, dy32, dtype, implementation)
            except ImportError:
                continue
            rivals.append(Case(f"transformers, {implementation}", experts, run, own, None))
        for rival in rivals:
            compare(rival, y, dx if rival.way != "jax.lax.ragged_dot" else None)
        made += rivals
    return made, imbalance


def compare(rival: Case, y: jax.Array, dx: jax.Array | None) -> None:
    """A rival that computes something else is none."""
    for found, expected in zip(rival.run(), (y, dx), strict=True):
        if expected is None:
            continue
        found = found.float().cpu().numpy() if hasattr(found, "cpu") else np.asarray(found, np.float32)
        expected = np.asarray(expected, np.float32)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        limit = 1e-4 if jax.default_backend() == "cpu" else 0.05  # in bfloat16 some choices turn
        if not error < limit:
            raise ValueError(f"{rival.way} at {rival.experts} experts differs from ours by {error:.2g}")


def measure(made: list[Case]) -> None:
    slow = set()
    for n in range(_ROUNDS.value + 1):
        for case in made:
            if case in slow:
                continue
            time.sleep(PAUSE)
            begin = time.perf_counter()
            case.run()
            seconds = time.perf_counter() - begin
            if n == 0 and seconds > ONCE:
                slow.add(case)
            if n or case in slow:
                case.seconds.append(seconds)


def times_dense(case: Case, dense: Case) -> float:
    if len(case.seconds) == 1:
        return case.seconds[0] / statistics.median(dense.seconds)
    return statistics.median(s / d for s, d in zip(case.seconds, dense.seconds, strict=True))


def main(_):
    if _THREADS.value:  # before JAX and torch count the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    made, imbalance = cases(dtype)
    measure(made)
    rows = []
    for case in made:
        rows.append(
            {
                "way": case.way,
                "experts": case.experts,
                "milliseconds": 1e3 * statistics.median(case.seconds),
                "times_dense": times_dense(case, made[0]),
                "needed_gflop": case.needed / 1e9,
                "gflop_per_second": case.needed / 1e9 / statistics.median(case.seconds),
                "more_flop": None if case.executed is None else case.executed / case.needed - 1,
                "imbalance": imbalance.get(case.experts),
                "seconds": case.seconds,
            }
        )
    device = jax.devices()[0].device_kind
    print(
        f"{_TOKENS.value:,} tokens, D={_WIDTH.value}, F={_FFN.value}, {dtype}, {device}, top-1, forward and backward\n"
    )
    print(f"| {'way':26} | experts |      ms | x dense | needed GFLOP | GFLOP/s |    more | busiest / mean |")
    print(f"|{'-' * 28}|{'---:|' * 7}")
    for row in rows:
        more = "" if row["more_flop"] is None else f"{row['more_flop']:.1%}"
        busiest = "" if row["imbalance"] is None else f"{row['imbalance']:.2f}"
        print(
            f"| {row['way']:26} | {row['experts'] or '':>7} | {row['milliseconds']:7.1f} | {row['times_dense']:7.2f}"
            f" | {row['needed_gflop']:12.2f} | {row['gflop_per_second']:7.0f} | {more:>7} | {busiest:>14} |"
        )
    if _OUTPUT.value:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
        record = {
            "tokens": _TOKENS.value,
            "width": _WIDTH.value,
            "ffn": _FFN.value,
            "dtype": dtype,
            "rounds": _ROUNDS.value,
            "ways": rows,
            "machine": {
                "device": device,
                "processor": platform.processor() or platform.machine(),
                "cores": len(os.sched_getaffinity(0)),
                "python": platform.python_version(),
            },
            "versions": versions("jax", "torch", "transformers"),
            "commit": commit.strip(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        pathlib.Path(_OUTPUT.value).write_text(json.dumps(record, indent=2) + "\n")


def versions(*packages: str) -> dict[str, str]:
    import importlib.metadata

    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


if __name__ == "__main__":
    app.run(main)
