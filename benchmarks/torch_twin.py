"""Our early- and late-fusion models as plain PyTorch, to be timed against: same weights, batch, loss and gradients.

Written as its users write it: nn.Linear, fused attention kernels, images that are there and no empty slots, Mixtral's
experts from transformers, AdamW in one fused kernel, and torch.compile over the whole loss. tests/benchmarks shows that
both libraries compute the same. Deep fusion, biases in the decoder and routing by modality have no twin.

    tokens ----> embed ----------------.
    images ----> patches, or a tower ---+--> blocks --> norm --> head --> cross-entropy (+ routers' losses)
                 and a connector
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from nmm_jax.models.spec import ConnectorSpec, MoESpec, Spec, StackSpec, VisionSpec

Tensors = dict[str, torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RMSNorm(nn.Module):
    """In float32 over all heads together where `x` has them."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class LayerNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight, None, self.eps).to(x.dtype)


def norm(spec: StackSpec, width: int) -> nn.Module:
    return (LayerNorm if spec.norm == "layernorm" else RMSNorm)(width, spec.norm_eps)


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


class Attention(nn.Module):
    def __init__(self, spec: StackSpec):
        super().__init__()
        self.spec = spec
        heads, groups = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.query, self.key, self.value = (linear(spec.width, n) for n in (heads, groups, groups))
        self.out = linear(heads, spec.width)
        if spec.qk_norm != "none":
            full = spec.qk_norm == "full"
            self.query_norm = norm(spec, heads if full else spec.head_dim)
            self.key_norm = norm(spec, groups if full else spec.head_dim)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, attend: Attend):
        b, s, _ = x.shape
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.spec.qk_norm == "full":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (y.view(b, s, -1, self.spec.head_dim) for y in (q, k, v))
        if self.spec.qk_norm == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B,S,H,K] by tables [B,S,1,K]: Llama's rotate_half."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, spec: StackSpec):
        super().__init__()
        self.gate, self.up = linear(spec.width, spec.ffn_width), linear(spec.width, spec.ffn_width)
        self.down = linear(spec.ffn_width, spec.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A router and Mixtral's experts, which transformers multiplies by torch's grouped product or in a loop."""

    def __init__(self, spec: StackSpec, moe: MoESpec, implementation: str):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        sizes = dict(hidden_size=spec.width, intermediate_size=moe.width, num_local_experts=moe.experts)
        config = MixtralConfig(**sizes, num_experts_per_tok=moe.top_k)
        config._experts_implementation = implementation  # what from_pretrained(experts_implementation=) sets
        self.moe = moe
        self.router = linear(spec.width, moe.experts)
        self.experts = MixtralExperts(config)

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y, the balance loss (Fedus et al., arXiv:2101.03961) and the z-loss, both without padding; real [B,S]."""
        flat, real = x.flatten(0, 1), real.flatten().float()
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(flat.float(), self.router.weight)
        probabilities = logits.softmax(-1)
        gates, chosen = probabilities.topk(self.moe.top_k, dim=-1)
        if self.moe.renormalise:
            gates = gates / gates.sum(-1, keepdim=True)
        gates = gates * real[:, None]
        # Autocast knows no grouped product.
        weights = {name: w.to(x.dtype) for name, w in self.experts.named_parameters()}
        y = torch.func.functional_call(self.experts, weights, (flat, chosen, gates)).view_as(x)
        tokens, z = real.sum(), logits.logsumexp(-1)
        received = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0).mul(real[:, None]).sum(0)
        probability = (probabilities * real[:, None]).sum(0)
        balance = self.moe.experts * (received * probability).sum() / (tokens * self.moe.top_k * tokens)
        return y, balance, (real * z.square()).sum() / tokens


class Block(nn.Module):
    def __init__(self, spec: StackSpec, layer: int, experts: str):
        super().__init__()
        self.after = spec.norm_position == "post"
        self.attention_norm, self.ffn_norm = norm(spec, spec.width), norm(spec, spec.width)
        self.attention = Attention(spec)
        self.is_mixture = spec.has_experts(layer)
        self.ffn = Experts(spec, spec.moe, experts) if self.is_mixture else SwiGLU(spec)

    def forward(self, x, rotary, attend: Attend, real):
        if self.after:
            x = x + self.attention_norm(self.attention(x, rotary, attend))
            y, losses = self.feed_forward(x, real)
            return x + self.ffn_norm(y), losses
        x = x + self.attention(self.attention_norm(x), rotary, attend)
        y, losses = self.feed_forward(self.ffn_norm(x), real)
        return x + y, losses

    def feed_forward(self, x, real):
        if not self.is_mixture:
            return self.ffn(x), None
        y, *losses = self.ffn(x, real)
        return y, torch.stack(losses)


class Stack(nn.Module):
    def __init__(self, spec: StackSpec, experts: str = "grouped_mm"):
        super().__init__()
        self.again = spec.remat != "none"  # torch.compile decides by itself what "minimal" says
        self.layers = nn.ModuleList(Block(spec, i, experts) for i in range(spec.depth))

    def forward(self, x, rotary, attend: Attend, real=None):
        """x through all layers, and the routers' losses [2], means over layers with experts; or None."""
        losses = []
        for layer in self.layers:
            arguments = (x, rotary, attend, real)
            x, own = checkpoint(layer, *arguments, use_reentrant=False) if self.again else layer(*arguments)
            losses += [] if own is None else [own]
        return x, torch.stack(losses).mean(0) if losses else None


class Patches(nn.Module):
    """Linear, of normalised pixels in the order (row, column, colour) of a patch, and perhaps a learned position."""

    def __init__(self, spec: Spec | VisionSpec, has_bias: bool, positions: int):
        super().__init__()
        self.patch = spec.patch
        self.project = linear(3 * spec.patch**2, spec.width, has_bias)
        self.positions = nn.Parameter(torch.zeros(positions, spec.width)) if positions else None
        self.register_buffer("mean", torch.tensor(spec.pixel_mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.pixel_std), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[n,height,width,3] uint8 -> [n,P,D]."""
        n, height, width, _ = images.shape
        pixels = (images.float() / 255 - self.mean) / self.std
        squares = pixels.view(n, height // self.patch, self.patch, width // self.patch, self.patch, 3).transpose(2, 3)
        x = self.project(squares.reshape(n, -1, 3 * self.patch**2))
        return x if self.positions is None else x + self.positions


class Tower(nn.Module):
    """A ViT and a connector from its patches to the decoder's positions."""

    def __init__(self, spec: VisionSpec, connector: ConnectorSpec):
        super().__init__()
        self.patches = Patches(spec, spec.patch_bias, spec.tokens)
        self.stack = Stack(spec)
        self.final_norm = norm(spec, spec.width)
        self.kind, self.edge, self.side = connector.kind, math.isqrt(connector.positions), spec.side
        if connector.kind == "mlp":
            self.up = linear(connector.inputs, connector.width, True)
        self.out = linear(connector.width if connector.kind == "mlp" else connector.inputs, connector.outputs, True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x, _ = self.stack(self.patches(images), None, F.scaled_dot_product_attention)
        x = self.final_norm(x)
        if self.kind == "mlp":
            return self.out(F.gelu(self.up(x)))
        grid = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.out(F.adaptive_avg_pool2d(grid, self.edge).flatten(2).transpose(1, 2))


class Twin(nn.Module):
    """The network and its loss.

    Args:
      attention: "sdpa" (a boolean mask of [B,1,S,S]) or "flex" (blocks that the mask leaves; GPU).
      experts: of transformers: "grouped_mm" or "eager", a loop.

    Raises:
      ValueError: the config's model has no twin.
    """

    def __init__(self, config: ConfigDict, attention: str = "sdpa", experts: str = "grouped_mm"):
        super().__init__()
        spec = Spec.from_config(config)
        refuse(config, spec)
        self.spec, self.flex = spec, attention == "flex"
        self.weights = config.model.moe.balance_loss, config.model.moe.z_loss
        self.dtype = getattr(torch, spec.dtype)
        self.embed = nn.Embedding(spec.vocab_size, spec.width)
        if spec.vision and spec.connector:
            self.images: nn.Module = Tower(spec.vision, spec.connector)
        else:
            self.images = Patches(spec, True, spec.patch_positions)
        self.stack = Stack(spec, experts)
        self.final_norm = norm(spec, spec.width)
        self.head = linear(spec.width, spec.vocab_size)
        if spec.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """What is minimised, and the text loss; of a batch of `tensors`."""
        with torch.autocast(batch["tokens"].device.type, self.dtype, enabled=self.dtype != torch.float32):
            x, router = self.hidden(batch)
            logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), reduction="sum")
        loss = loss / batch["scored"]
        if router is None:
            return loss, loss
        return loss + sum(w * own for w, own in zip(self.weights, router, strict=True)), loss

    def hidden(self, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.embed(batch["tokens"]).to(self.dtype)
        if len(batch["images"]):
            x = x.masked_scatter(batch["is_patch"][..., None], self.images(batch["images"]).to(x.dtype))
        rotary = self.rotary(batch["positions"]) if self.spec.rope_theta else None
        x, router = self.stack(x, rotary, self.attend(batch), batch["segment_ids"] > 0)
        return self.final_norm(x), router

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.spec.head_dim
        frequencies = self.spec.rope_theta ** (-torch.arange(0, k, 2, device=positions.device) / k)
        angles = (positions[..., None, None].float() * frequencies).repeat(1, 1, 1, 2)
        return angles.cos(), angles.sin()

    def attend(self, batch: Tensors) -> Attend:
        grouped = {"enable_gqa": True} if self.spec.kv_heads != self.spec.heads else {}
        if self.flex:
            return lambda q, k, v: flex_attention(q, k, v, block_mask=batch["mask"], **grouped)
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=batch["mask"], **grouped)


def refuse(config: ConfigDict, spec: Spec) -> None:
    stacks = [spec, spec.vision] if spec.vision else [spec]
    wrong = {
        "model.family": spec.family not in ("early_fusion", "late_fusion"),
        "model.deep.modules": spec.deep is not None,
        "model.ffn": any(stack.ffn != "swiglu" for stack in stacks),
        "model.bias": any(stack.bias for stack in stacks),
        "model.delimiter_vectors": spec.delimiter_vectors,
        "model.moe.modality": spec.moe is not None and spec.moe.modality != "agnostic",
        "model.moe.balance": spec.moe is not None and spec.moe.balance != "loss",
        "model.moe.shared": spec.moe is not None and spec.moe.shared > 0,
        "model.connector.kind": spec.connector is not None and spec.connector.kind not in ("mlp", "average"),
        "model.vision": spec.vision is not None
        and (spec.vision.class_token or spec.vision.positions != "learned" or spec.vision.embedding_norm != "none")
        or spec.vision is not None
        and spec.vision.layers_used != spec.vision.depth,
        "optimizer.freeze": bool(config.optimizer.freeze),
        "optimizer.z_loss": bool(config.optimizer.z_loss),
        "gradient_accumulation": config.gradient_accumulation != 1,
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{key} of this config has no counterpart in benchmarks/torch_twin.py")


def tensors(batch: Mapping[str, np.ndarray], attention: str = "sdpa", device: str = "cpu") -> Tensors:
    """A batch of the loader as the twin takes it: filled images alone, targets that are not scored as -100, a mask."""

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    scored = batch["loss_mask"] > 0
    found = {
        "tokens": put(batch["tokens"]),
        "targets": put(np.where(scored, batch["targets"], -100).astype(np.int64)),
        "scored": put(np.asarray(max(scored.sum(), 1), np.float32)),
        "is_patch": put(batch["image_index"] >= 0),
        "images": put(batch["images"][batch["image_mask"]]),
        "segment_ids": put(batch["segment_ids"]),
        "positions": put(batch["positions"]),
    }
    segments, until = found["segment_ids"], put(batch["attend_until"])
    if attention == "flex":

        def sees(row, head, query, key):
            return (segments[row, query] == segments[row, key]) & (key < until[row, query])

        b, s = segments.shape
        return found | {"mask": _block_mask(sees, b, None, s, s, device=device)}
    keys = torch.arange(segments.shape[1], device=device)
    sees = (segments[:, :, None] == segments[:, None, :]) & (keys < until[:, :, None])
    return found | {"mask": sees[:, None]}


_block_mask = torch.compile(create_block_mask)


def state_dict(params: Mapping[str, Any], spec: Spec) -> dict[str, np.ndarray]:
    """Our parameters, or their gradients, by the twin's names."""
    flat = {name: np.asarray(x, np.float32) for name, x in flatten_dict(params, sep="/").items()}
    found: dict[str, np.ndarray] = {
        "embed.weight": flat["embed/tokens"],
        "final_norm.weight": flat["final_norm/scale"],
        "head.weight": flat["embed/tokens"] if spec.tie_embeddings else flat["head/kernel"].T,
    }
    found |= _stack(flat, "layers/", "stack.", spec)
    if spec.vision and spec.connector:
        found |= _stack(flat, "vision/layers/", "images.stack.", spec.vision)
        found["images.final_norm.weight"] = flat["vision/final_norm/scale"]
        found["images.patches.positions"] = flat["vision/positions"]
        found |= _linear(flat, "vision/patches/", "images.patches.project")
        if spec.connector.kind == "mlp":
            found |= _linear(flat, "connector/up/", "images.up")
        found |= _linear(flat, f"connector/{'down' if spec.connector.kind == 'mlp' else 'out'}/", "images.out")
    else:
        found |= _linear(flat, "patches/", "images.project")
        if spec.patch_positions:
            found["images.positions"] = flat["patches/patch_positions"]
    return {name: np.ascontiguousarray(x) for name, x in found.items()}


def _linear(flat: Mapping[str, np.ndarray], ours: str, theirs: str) -> dict[str, np.ndarray]:
    found = {f"{theirs}.weight": flat[f"{ours}kernel"].T}
    return found | ({f"{theirs}.bias": flat[f"{ours}bias"]} if f"{ours}bias" in flat else {})


def _stack(flat: Mapping[str, np.ndarray], ours: str, theirs: str, spec: StackSpec) -> dict[str, np.ndarray]:
    found = {}
    for i in range(spec.depth):
        of_period = f"{ours}block_{i % spec.period}/" if spec.period > 1 else ours
        of = {
            name.removeprefix(of_period): x[i // spec.period]
            for name, x in flat.items()
            if name.startswith(of_period) and name.count("/block_") <= of_period.count("/block_")
        }
        layer = f"{theirs}layers.{i}."
        for name in ("query", "key", "value"):
            found[f"{layer}attention.{name}.weight"] = of[f"attention/{name}"].reshape(spec.width, -1).T
        found[f"{layer}attention.out.weight"] = of["attention/out"].reshape(-1, spec.width).T
        for name, x in of.items():
            if name.endswith("norm/scale"):
                found[layer + name.replace("/scale", ".weight").replace("/", ".")] = x.reshape(-1)
        if spec.has_experts(i):
            gate, up, down = (of[f"ffn/experts/{name}"].swapaxes(1, 2) for name in ("gate", "up", "down"))
            found[f"{layer}ffn.router.weight"] = of["ffn/router/kernel"].T
            found[f"{layer}ffn.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            found[f"{layer}ffn.experts.down_proj"] = down
        else:
            found |= {f"{layer}ffn.{name}.weight": of[f"ffn/{name}"].T for name in ("gate", "up", "down")}
    return found


@dataclasses.dataclass
class Trainer:
    """The twin's training step: loss, gradients, clipping, AdamW with our decoupled decay at our rates.

    torch decays by lr * weight_decay, so that weight_decay / peak in its place is what training/optimizer.py says. The
    rate of step t is learning_rate(t); of the tower both are times optimizer.vision_scale.
    """

    config: ConfigDict
    learning_rate: Callable[[int], float]
    state: dict[str, np.ndarray]
    attention: str = "sdpa"
    experts: str = "grouped_mm"
    device: str = "cpu"
    compiled: bool = True

    def __post_init__(self):
        c = self.config.optimizer
        self.twin = Twin(self.config, self.attention, self.experts)
        self.twin.load_state_dict({name: torch.tensor(x) for name, x in self.state.items()})
        self.twin.to(self.device)
        self.loss = torch.compile(self.twin) if self.compiled else self.twin
        tower = "images." if self.twin.spec.vision else "no"
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in self.twin.named_parameters():
            is_tower = name.startswith(tower) and not name.startswith(("images.up", "images.out"))
            decays = not any(part in name for part in ("norm", "bias", "positions"))
            groups.setdefault((decays, c.vision_scale if is_tower else 1.0), []).append(parameter)
        self.scales = [scale for _, scale in groups]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": own, "weight_decay": c.weight_decay / c.learning_rate if decays else 0.0}
                for (decays, _), own in groups.items()
            ],
            lr=1.0,
            betas=(c.beta1, c.beta2),
            eps=c.eps,
            fused=True,
        )
        self.steps = 0

    def forward(self, batch: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.loss(tensors(batch, self.attention, self.device))

    def update(self) -> None:
        """Clips what .grad holds and applies it."""
        if self.config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(self.twin.parameters(), self.config.optimizer.clip_norm, foreach=True)
        rate = self.learning_rate(self.steps)
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = rate * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def step(self, batch: Mapping[str, np.ndarray]) -> torch.Tensor:
        """The text loss, before the update."""
        minimised, loss = self.forward(batch)
        minimised.backward()
        self.update()
        return loss.detach()
