"""Parameters, FLOPs and memory of a config, by arithmetic: no array is made and nothing is compiled.

FLOPs are those that the mathematics needs: two for each multiply-add of a matrix product, three times the forward
pass for training, attention over the keys that the mask lets through, nothing for norms and activations, nothing for
what rematerialisation computes again. (XLA's own analysis does not multiply loop bodies.)
"""

import dataclasses
import math

from ml_collections import ConfigDict

from nmm_jax.models.spec import MoESpec, Spec

FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a model is made of.

    Attributes:
      parts: parameters by part of the network; they sum to `parameters`.
      active_parameters: those that one position meets; all of them in a dense model.
      paper_parameters: N as Shukor et al. (arXiv 2504.07951) count it: the decoder's matrices and both embedding
        matrices, of experts those that one position meets, without routers. (Tied embeddings are one matrix and count
        once.)
      paper_total: the same with all experts; what the paper calls a mixture's total.
      product_parameters: those that are multiplied with a position: of the decoder, its routers and the unembedding.
      patch_parameters: those that are multiplied with every patch.
      flops_per_pair: forward FLOPs of one query seeing one key, in all heads and layers.
    """

    parts: dict[str, int]
    active_parameters: int
    paper_parameters: int
    paper_total: int
    product_parameters: int
    patch_parameters: int
    flops_per_pair: int

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    def forward_flops(self, tokens: float, pairs: float, patches: float) -> float:
        """FLOPs of a forward pass.

        Args:
          tokens: positions, of text and of images, without padding.
          pairs: (query, key) pairs that attention needs (`attended_pairs`).
          patches: image positions among the tokens.
        """
        return 2 * self.product_parameters * tokens + self.flops_per_pair * pairs + 2 * self.patch_parameters * patches

    def training_flops(self, tokens: float, pairs: float, patches: float) -> float:
        """FLOPs of forward and backward pass; pixels need no gradient, so patches count twice, all else three times."""
        return 3 * self.forward_flops(tokens, pairs, patches) - 2 * self.patch_parameters * patches


def count(config: ConfigDict) -> Counts:
    """Counts the model of a config."""
    spec = Spec.from_config(config)
    d, layers = spec.width, spec.depth
    query_width, key_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    qk_scales = {"none": 0, "full": query_width + key_width, "head": 2 * spec.head_dim}[spec.qk_norm]
    embedding = spec.vocab_size * d
    head = 0 if spec.tie_embeddings else embedding
    patch_kernel = 3 * spec.patch**2 * d
    attention = layers * 2 * d * (query_width + key_width)
    with_experts = layers // spec.period if spec.moe else 0
    ffn = (layers - with_experts) * 3 * d * spec.ffn_width
    experts = active_experts = router = router_bias = 0
    if spec.moe:
        moe = spec.moe
        one = with_experts * 3 * d * moe.width
        ffn += moe.shared * one
        experts, active_experts = moe.experts * one, moe.top_k * one
        router = 0 if moe.modality == "fixed" else with_experts * d * moe.experts
        router_bias = with_experts * moe.experts if router and moe.balance == "bias" else 0
    parts = {
        "token_embedding": embedding,
        "patch_embedding": patch_kernel + d + spec.patch_positions * d,
        "attention": attention,
        "ffn": ffn,
        "experts": experts,
        "routers": router + router_bias,
        "norms": layers * (2 * d + qk_scales) + d,
        "head": head,
    }
    return Counts(
        parts=parts,
        active_parameters=sum(parts.values()) - experts + active_experts,
        paper_parameters=attention + ffn + active_experts + embedding + head,
        paper_total=attention + ffn + experts + embedding + head,
        product_parameters=attention + ffn + active_experts + router + embedding,  # the unembedding, tied or not
        patch_parameters=patch_kernel,
        flops_per_pair=layers * 2 * 2 * query_width,  # q k and weights v
    )


def causal_keys(row_length: int) -> float:
    """Mean number of keys a query sees when a row is one causal document."""
    return (row_length + 1) / 2


def memory(config: ConfigDict) -> dict[str, int]:
    """Bytes in all devices together while a step runs, by part; "activations" is an estimate.

    What the mesh holds several times over counts as often: everything over `replica`, all but the experts over
    `expert`. (An axis of -1 counts as 1.) Activations are what layers keep for the backward pass of one microbatch
    under the config's remat policy. Not in it: one layer's workspace, a chunk of logits, parameters gathered for use.
    """
    spec, counts = Spec.from_config(config), count(config)
    replicas, expert_axis = max(config.mesh.replica, 1), max(config.mesh.expert, 1)
    experts = counts.parts["experts"]
    n = replicas * (experts + (counts.parameters - experts) * expert_axis)
    tokens = math.ceil(config.batch_rows / config.gradient_accumulation) * config.row_length
    element = {"float32": 4, "bfloat16": 2}[spec.dtype]
    with_experts = spec.depth // spec.period if spec.moe else 0
    kept = (spec.depth - with_experts) * _kept(spec, spec.ffn_width, 0)
    if spec.moe:
        rows, travelled = buffer_rows(spec.moe, expert_axis)
        kept += with_experts * _kept(spec, (rows + spec.moe.shared) * spec.moe.width, travelled)
    return {
        "parameters": FLOAT32 * n,
        "optimizer": 2 * FLOAT32 * n,  # Adam's two moments
        "gradients": FLOAT32 * n,
        "activations": int(tokens * kept * element),
    }


def buffer_rows(moe: MoESpec, expert_axis: int) -> tuple[float, float]:
    """Rows for each token: of the buffers that experts compute on, and of those that crossed the network and came back.

    Dropless buffers have room for all tokens of the axis at each of its devices.
    """
    if expert_axis == 1:
        return moe.top_k, 0
    worst = expert_axis * min(moe.top_k, moe.experts // expert_axis)
    received = min(worst, moe.buffer_factor * moe.top_k) if moe.buffer_factor else worst
    return received, received + moe.top_k


def _kept(spec: Spec, ffn_width: float, travelled: float) -> float:
    """Values that a layer keeps of a position; `travelled` of its rows are buffers of an exchange."""
    d = spec.width
    query_width, key_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    named = 2 * query_width + 2 * key_width + 2 * ffn_width + travelled * d  # what models.decoder.KEPT names
    return {
        "full": d,
        "exchanges": d + travelled * d,
        "minimal": d + named,
        "none": d + named + 2 * d + query_width + key_width + ffn_width,
    }[spec.remat]
