"""Mixture of experts: a feed-forward layer that has many sets of weights, of which a token meets a few.

    y = sum over the k chosen experts e of gate_e * SwiGLU_e(x)  (+ a SwiGLU that every token passes, if shared)

models/router.py chooses, models/dispatch.py sorts and puts back, models/grouped_matmul.py multiplies. No token is
dropped unless the buffers are bounded (`model.moe.buffer_factor`). With more than one device this happens inside
shard_map, each device sorting its own tokens; where the mesh has an `expert` axis they travel to their experts:

    ragged, padded   sort, send every row to its expert's device, compute, send back, put back   (parallel/exchange.py)
    gather           every device of the axis sees all tokens of the axis, computes those of its experts, and the
                     results are summed where they belong
"""

import collections
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from nmm_jax.models import grouped_kernels
from nmm_jax.models.dispatch import from_groups, sort_by_group, to_groups
from nmm_jax.models.grouped_matmul import grouped_matmul
from nmm_jax.models.layers import FeedForward, weight
from nmm_jax.models.router import Choice, Statistics, route, route_by_modality
from nmm_jax.models.spec import MoESpec, StackSpec
from nmm_jax.parallel import exchange
from nmm_jax.parallel.chips import of_device
from nmm_jax.parallel.gathered import gather, sum_of_shares
from nmm_jax.parallel.mesh import BATCH_AXES
from nmm_jax.parallel.sharding import Constrain, spec

# What crossed the network, by checkpoint name: kept, it need not cross again in the backward pass (model.remat).
EXCHANGED = ("moe_received", "moe_returned")

Weights = tuple[Array, ...]  # gate, up, down


class Router(nnx.Module):
    """Scores of all experts, in float32: rounding would flip choices."""

    def __init__(self, model: StackSpec, moe: MoESpec, *, rngs: nnx.Rngs):
        axes = {"embed": model.width, "router": moe.experts}
        self.kernel = weight(model, rngs, axes, role="inner", inputs=model.width)
        if moe.balance == "bias":
            self.bias = nnx.Param(jnp.zeros((moe.experts,), jnp.float32), logical=("router",))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S E"]:
        # The hardware's default for float32 is a product of bfloat16 (TPU) or TF32 (GPU).
        return jnp.matmul(x.astype(jnp.float32), self.kernel[...], precision=jax.lax.Precision.HIGHEST)


class Experts(nnx.Module):
    """The weights of all experts of a layer."""

    AXES = (("expert", "embed", "mlp"), ("expert", "embed", "mlp"), ("expert", "mlp", "embed"))

    def __init__(self, model: StackSpec, moe: MoESpec, layer: Array | int, *, rngs: nnx.Rngs):
        e, d, f = moe.experts, model.width, moe.width
        self.gate = weight(model, rngs, {"expert": e, "embed": d, "mlp": f}, role="inner", inputs=d)
        self.up = weight(model, rngs, {"expert": e, "embed": d, "mlp": f}, role="inner", inputs=d)
        self.down = weight(model, rngs, {"expert": e, "mlp": f, "embed": d}, role="residual", inputs=f, layer=layer)

    def weights(self, dtype: jnp.dtype) -> Weights:
        return self.gate[...].astype(dtype), self.up[...].astype(dtype), self.down[...].astype(dtype)


class MoE(nnx.Module):
    """A feed-forward layer of experts."""

    def __init__(self, model: StackSpec, layer: Array | int, *, rngs: nnx.Rngs):
        assert model.moe
        self.moe = model.moe
        if self.moe.modality != "fixed":
            self.router = Router(model, self.moe, rngs=rngs)
        self.experts = Experts(model, self.moe, layer, rngs=rngs)
        if self.moe.shared:
            self.shared = FeedForward(model, layer, rngs=rngs, width=self.moe.shared * self.moe.width)

    def __call__(
        self, x: Float[Array, "B S D"], modality: Int[Array, "B S"], constrain: Constrain
    ) -> tuple[Float[Array, "B S D"], Statistics]:
        """The output, 0 (but for shared experts) at padding, and this layer's statistics.

        Args:
          modality: 0 text, 1 image patch, -1 padding.

        Returns:
          y, and balance_loss [], router_z_loss [], expert_tokens int32 [2,E] (by modality, before any drop),
          dropped_tokens int32 [], router_entropy [2] (sums over tokens, nats).
        """
        with jax.named_scope("router"):
            if self.moe.modality == "fixed":
                choice, statistics = route_by_modality(self.moe, modality)
            else:
                bias = jax.lax.stop_gradient(self.router.bias[...]) if self.moe.balance == "bias" else None
                choice, statistics = route(self.moe, self.router(x), modality, bias)
        with jax.named_scope("experts"):
            y, dropped = apply_experts(self.moe, x, choice, self.experts.weights(x.dtype), constrain)
        if self.moe.shared:
            y = y + self.shared(x, constrain)
        return y, statistics | {"dropped_tokens": dropped}


def apply_experts(
    moe: MoESpec, x: Float[Array, "B S D"], choice: Choice, weights: Weights, constrain: Constrain
) -> tuple[Float[Array, "B S D"], Int[Array, ""]]:
    """Every token through its experts; also how many (token, choice) pairs a bounded buffer had no room for."""
    mesh = constrain.mesh
    if mesh is None or mesh.size == 1:
        return _apply(moe, constrain.platform, "", x, *choice, weights, axis_size=1)
    local = partial(_apply, moe, constrain.platform, choose_transport(moe, mesh))

    def body(x: Array, experts: Array, gates: Array, *shards: Array) -> tuple[Array, Array]:
        whole = [gather(w, axes, mesh) for w, axes in zip(shards, Experts.AXES, strict=True)]
        y, dropped = local(x, experts, gates, tuple(whole), axis_size=mesh.shape["expert"])
        return y[None], jax.lax.psum(dropped, BATCH_AXES)

    tokens = PartitionSpec(BATCH_AXES)
    parts, dropped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, *(spec(axes) for axes in Experts.AXES)),
        out_specs=(PartitionSpec("tensor", BATCH_AXES), PartitionSpec()),
        check_vma=False,
    )(x, choice.experts, choice.gates, *weights)
    return sum_of_shares(parts), dropped  # each part of the width gives a part of the sum


def _apply(
    moe: MoESpec,
    platform: str,
    transport: str,
    x: Array,
    experts: Array,
    gates: Array,
    weights: Weights,
    axis_size: int,
) -> tuple[Float[Array, "b S D"], Int[Array, ""]]:
    """What one device does, with its rows x [b,S,D] and its experts' weights; `axis_size` of the mesh axis `expert`."""
    flat = x.reshape(-1, x.shape[-1])
    experts, gates = (a.reshape(-1, moe.top_k) for a in (experts, gates))
    compute = partial(_feed_forward, moe, platform, weights)
    if axis_size == 1:
        y, dropped = _here(flat, experts, gates, moe.experts, compute)
    elif transport == "gather":
        y, dropped = _gathered(moe, flat, experts, gates, axis_size, compute)
    else:
        y, dropped = _exchanged(moe, transport, flat, experts, gates, axis_size, compute)
    return y.reshape(x.shape), dropped


def choose_transport(moe: MoESpec, mesh: Mesh) -> str:
    """model.moe.transport, or by what the mesh's devices have.

    `gather` moves mesh.expert / top_k times the rows of an exchange, as `padded` does if a device may get all rows.
    Where that is once, 8 choices over 8 H100s, marin's log has it at 34 ms a layer and the ragged exchange at 60; so
    on GPU it is taken up to twice. Not measured here.
    """
    if moe.transport != "auto":
        return moe.transport
    platform, axis_size = Constrain(mesh).platform, mesh.shape["expert"]
    if platform in ("gpu", "cuda"):
        return "gather" if axis_size <= 2 * moe.top_k else "ragged"
    if lacks_ragged(mesh):
        return "padded" if platform == "cpu" else "gather"
    return "ragged"


def lacks_ragged(mesh: Mesh) -> str:
    """Which devices they are, if XLA has no all-to-all of unequal parts for the mesh's; else nothing."""
    devices = list(mesh.devices.flat)
    if devices[0].platform == "cpu":
        return "CPU"
    chip = of_device(devices[0])
    in_slice = max(collections.Counter(getattr(device, "slice_index", 0) for device in devices).values())
    # libtpu 0.0.42.1: "not supported in limited ICI routing settings", of v5e:4x8, 8x8, 8x16 and 16x16, not of 4x4.
    return "a v5e slice of more than 16 chips" if chip and chip.name == "v5e" and in_slice > 16 else ""


def check_platform(moe: MoESpec | None, mesh: Mesh) -> None:
    """Raises ValueError where the config asks for what the mesh's devices do not have."""
    platform, axis_size = Constrain(mesh).platform, mesh.shape["expert"]
    if moe is None:
        if axis_size > 1:
            raise ValueError(
                f"mesh.expert = {axis_size} and the model has no experts (model.moe.experts = 0): every device of that "
                "axis would hold all parameters; make it 1 and mesh.fsdp larger"
            )
        return
    runs_on = {"megablox": ("tpu",), "tokamax": ("gpu", "cuda")}.get(moe.grouped_matmul, (platform,))
    if platform not in runs_on:
        raise ValueError(
            f"model.moe.grouped_matmul = {moe.grouped_matmul!r} runs on {runs_on[0].upper()}, and these devices are "
            f"{platform.upper()}; 'auto' chooses by device"
        )
    if moe.transport == "ragged" and axis_size > 1 and (lacking := lacks_ragged(mesh)):
        raise ValueError(
            f"model.moe.transport = 'ragged': XLA has none for {lacking}; take 'padded', 'gather' or 'auto'"
        )
    if moe.grouped_matmul in ("auto", "tokamax") and platform in ("gpu", "cuda"):
        grouped_kernels.import_tokamax()  # which says what to install


def _here(x, experts, gates, num_experts, compute, capacity=None):
    """Without exchange: `experts` [T,k] are numbers of this device's own, num_experts is none of them."""
    order = sort_by_group(experts, num_experts, capacity)
    rows = compute(to_groups(x, order), order.sizes)
    dropped = (experts < num_experts).sum(dtype=jnp.int32) - order.sizes.sum()
    return _combine(from_groups(rows, order), gates), dropped


def _gathered(moe, x, experts, gates, axis_size, compute):
    own = moe.experts // axis_size
    x = checkpoint_name(jax.lax.all_gather(x, "expert", tiled=True), "moe_received")
    experts, gates = (jax.lax.all_gather(a, "expert", tiled=True) for a in (experts, gates))
    experts = experts - jax.lax.axis_index("expert") * own
    experts = jnp.where((experts >= 0) & (experts < own), experts, own)
    y, dropped = _here(x, experts, gates, own, compute, _capacity(moe, x.shape[0], axis_size))
    return checkpoint_name(jax.lax.psum_scatter(y, "expert", tiled=True), "moe_returned"), dropped


def _exchanged(moe, transport, x, experts, gates, axis_size, compute):
    order = sort_by_group(experts, moe.experts)
    capacity = _capacity(moe, x.shape[0] * axis_size, axis_size)
    plan, stayed = exchange.make_plan(order.sizes, capacity, "expert")
    rows = exchange.send(to_groups(x, order), plan, capacity, transport, "expert")
    rows = compute(checkpoint_name(rows, "moe_received"), exchange.received(plan, "expert"))
    rows = exchange.send_back(rows, plan, order.source.size, transport, "expert")
    return _combine(from_groups(checkpoint_name(rows, "moe_returned"), order), gates), stayed


def _capacity(moe: MoESpec, tokens: int, axis_size: int) -> int:
    """Rows of a device's buffer, of `tokens` on the axis: all that could come, or buffer_factor times the mean."""
    worst = tokens * min(moe.top_k, moe.experts // axis_size)
    return min(worst, math.ceil(moe.buffer_factor * tokens * moe.top_k / axis_size)) if moe.buffer_factor else worst


def _feed_forward(
    moe: MoESpec, platform: str, weights: Weights, rows: Float[Array, "C D"], sizes: Int[Array, "E"]
) -> Float[Array, "C D"]:
    """SwiGLU, each row with its group's weights."""
    product = partial(grouped_matmul, sizes=sizes, implementation=moe.grouped_matmul, platform=platform)
    gate = checkpoint_name(product(rows, weights[0]), "ffn_gate")
    up = checkpoint_name(product(rows, weights[1]), "ffn_up")
    return product(jax.nn.silu(gate) * up, weights[2])


def _combine(found: Float[Array, "T k D"], gates: Float[Array, "T k"]) -> Float[Array, "T D"]:
    # Term by term: XLA:CPU's sum over an axis of few choices is slow, and more so its gradient.
    first, *others = (found[:, i].astype(jnp.float32) * gates[:, i, None] for i in range(gates.shape[1]))
    return sum(others, first).astype(found.dtype)
