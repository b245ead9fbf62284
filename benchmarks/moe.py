"""What a mixture of experts costs beside the dense block of equal active parameters, forward and backward.

    python -m benchmarks.moe [--experts=8,16,64] [--output=benchmarks/moe.json]          # three minutes on 2 cores
    python -m benchmarks.moe --width=768 --ffn=2048 --threads=1                          # another shape, one core

On JAX's default device: CPU in float32, accelerators in bfloat16. Every token goes to one expert, as wide as the dense
block. Rivals: the same layer by XLA's own jax.lax.ragged_dot, at the fewest experts (on CPU it multiplies every row
with every expert); and transformers' Mixtral block on the same weights and tokens where torch is installed
(`make .venv-all/ready`, then .venv-all/bin/python), by its loop over experts ("eager") and by the grouped product that
it chooses by itself. Outputs are compared before anything is timed.

All are timed in turns; "x dense" is the median over rounds of the ratio to the dense block's time in that round.
"needed" are the products of one matrix for each token, three of the SwiGLU and the router's, times three for the two
gradients; "more" is what is multiplied beyond that, where it can be counted.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks.tables import table
from benchmarks.timing import Timed, compiled, in_turns, origin, ratio, write
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

COLUMNS = {
    "way": ("way", ""), "experts": ("experts", "d"), "milliseconds": ("ms", ",.1f"), "times_dense": ("x dense", ".2f"),
    "needed_gflop": ("needed GFLOP", ",.2f"), "gflop_per_second": ("GFLOP/s", ",.0f"), "more_flop": ("more", ".1%"),
    "imbalance": ("busiest / mean", ".2f"),
}  # fmt: skip

Values = dict[str, Any]


@dataclasses.dataclass
class Case:
    way: str
    experts: int | None  # None: dense
    run: Callable[[], Any]  # once forward and backward, until it is done
    needed: float  # FLOPs
    executed: float | None


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

    def both(params, x, dy):
        y, pull = jax.vjp(apply, params, x)
        return y, pull(dy)

    program = compiled(both, params, x, dy)
    return lambda: jax.block_until_ready(program(params, x, dy)), program


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
    made = [Case("dense SwiGLU", None, forward_and_backward(apply, params, x, dy)[0], needed, needed)]
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
            rows = sum(int(count.sum()) * size for size, count in grouped_matmul.blocks_of(received, tokens))
            executed = own + needed * rows / tokens - needed
        made.append(Case("ours", experts, ours, own, executed))
        y, (_, dx) = ours()
        rivals = []
        if n == 0:
            run, program = forward_and_backward(ragged, params, x, dy)
            rivals.append(Case("jax.lax.ragged_dot", experts, run, own, program.cost_analysis().get("flops")))
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


def main(_):
    if _THREADS.value:  # before JAX and torch count the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    made, imbalance = cases(dtype)
    timed = [Timed(case.run) for case in made]
    in_turns(timed, _ROUNDS.value)
    rows = [
        {
            "way": case.way,
            "experts": case.experts,
            "milliseconds": 1e3 * way.median,
            "times_dense": ratio(way, timed[0]),
            "needed_gflop": case.needed / 1e9,
            "gflop_per_second": case.needed / 1e9 / way.median,
            "more_flop": None if case.executed is None else case.executed / case.needed - 1,
            "imbalance": imbalance.get(case.experts or 0),
            "seconds": way.seconds,
        }
        for case, way in zip(made, timed, strict=True)
    ]
    device = jax.devices()[0].device_kind
    print(
        f"{_TOKENS.value:,} tokens, D={_WIDTH.value}, F={_FFN.value}, {dtype}, {device}, top-1, forward and backward\n"
    )
    print(table(rows, COLUMNS))
    missing = {}
    if not any(row["way"].startswith("transformers") for row in rows):
        missing["transformers"] = "is not installed here: `make .venv-all/ready`, then .venv-all/bin/python"
    if jax.default_backend() != "gpu":
        missing["kernels for GPUs"] = "need one: python -m benchmarks.moe --width=2048 --ffn=5632 --experts=8,64 there"
    print()
    for what, why in missing.items():
        print(f"not measured here: {what}: {why}")
    if _OUTPUT.value:
        sizes = {"tokens": _TOKENS.value, "width": _WIDTH.value, "ffn": _FFN.value, "dtype": dtype}
        record = sizes | {"rounds": _ROUNDS.value, "threads": _THREADS.value, "ways": rows, "not_measured": missing}
        write(_OUTPUT.value, record | origin(("jax", "jaxlib", "torch", "transformers", "tokamax")))


if __name__ == "__main__":
    app.run(main)
