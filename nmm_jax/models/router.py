"""Which experts a token goes to, and what keeps their loads even.

Token choice: every token takes the k experts of highest probability (Shazeer et al. 2017, arXiv:1701.06538). Three
kinds of routing, by `model.moe.modality`:

    agnostic   a learned router over all experts; it may specialise by itself
    grouped    a learned router within a group of experts for each modality (MoMa, arXiv:2407.21770)
    fixed      no router: one expert for text, one for images (the modality-aware model of arXiv:2504.07951)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from nmm_jax.models.spec import MoESpec

MODALITIES = ("text", "image")

# The choice, by checkpoint name: every policy of rematerialisation keeps it. Computed again, close scores may fall the
# other way, and the backward pass would meet other rows than the forward pass had sorted.
CHOICE = "moe_choice"

Statistics = dict[str, Array]


class Choice(NamedTuple):
    experts: Int[Array, "B S k"]  # the number of experts is none: padding goes nowhere
    gates: Float[Array, "B S k"]  # float32, what each expert's output is multiplied with


def route(
    moe: MoESpec, logits: Float[Array, "B S E"], modality: Int[Array, "B S"], bias: Float[Array, "E"] | None = None
) -> tuple[Choice, Statistics]:
    """The choice of a learned router.

    Args:
      logits: float32.
      modality: 0 text, 1 image patch, -1 padding.
      bias: added to the probabilities for the choice alone (Wang et al. 2024, arXiv:2408.15664).

    Returns:
      The choice, and of this layer: balance_loss [], router_z_loss [], expert_tokens [2,E], router_entropy [2].
    """
    k = moe.top_k
    allowed = may_choose(moe, modality)
    logits = jnp.where(allowed, logits, -jnp.inf)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    probabilities = jnp.exp(logits - log_z[..., None])
    ranked = probabilities if bias is None else jnp.where(allowed, probabilities + bias, -jnp.inf)
    ranked = jax.lax.stop_gradient(ranked)
    experts = jnp.argmax(ranked, axis=-1)[..., None] if k == 1 else jax.lax.top_k(ranked, k)[1]
    experts = checkpoint_name(experts, CHOICE)
    if moe.renormalise:  # softmax over the chosen logits: their probabilities may all be 0 where a bias chose
        gates = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
    else:
        gates = jnp.take_along_axis(probabilities, experts, axis=-1)

    real = modality >= 0
    tokens = jnp.maximum(real.sum(), 1)
    experts = jnp.where(real[..., None], experts, moe.experts).astype(jnp.int32)
    counts = count_tokens(moe, experts, modality)
    entropy = -jax.scipy.special.xlogy(probabilities, probabilities).sum(-1)
    statistics = {
        "balance_loss": _balance_loss(moe, probabilities, counts, modality),
        "router_z_loss": jnp.where(real, jnp.square(log_z), 0.0).sum() / tokens,
        "expert_tokens": counts,
        "router_entropy": jax.lax.stop_gradient(_by_modality(entropy, modality)),
    }
    return Choice(experts, jnp.where(real[..., None], gates, 0.0)), statistics


def route_by_modality(moe: MoESpec, modality: Int[Array, "B S"]) -> tuple[Choice, Statistics]:
    """The choice that takes no router: text to expert 0, patches to expert 1, with gate 1."""
    experts = jnp.where(modality >= 0, modality, moe.experts)[..., None].astype(jnp.int32)
    nothing = jnp.zeros((), jnp.float32)
    statistics = {
        "balance_loss": nothing,
        "router_z_loss": nothing,
        "expert_tokens": count_tokens(moe, experts, modality),
        "router_entropy": jnp.zeros(len(MODALITIES), jnp.float32),
    }
    return Choice(experts, (modality >= 0)[..., None].astype(jnp.float32)), statistics


def is_image_expert(moe: MoESpec) -> Bool[Array, "E"]:
    """Where there are groups: text's come first, then those of images."""
    return jnp.arange(moe.experts) >= moe.experts - moe.image_experts


def may_choose(moe: MoESpec, modality: Int[Array, "B S"]) -> Bool[Array, "B S E"]:
    """Which experts are open to a token; padding counts as text here."""
    if moe.modality == "agnostic":
        return jnp.ones((*modality.shape, moe.experts), bool)
    # Of booleans: a select by two compared int32 labels is miscompiled on CPU at E = 8 (jaxlib 0.10.2).
    return (modality == 1)[..., None] == is_image_expert(moe)


def count_tokens(moe: MoESpec, experts: Int[Array, "B S k"], modality: Int[Array, "B S"]) -> Int[Array, "2 E"]:
    """(token, choice) pairs that each expert receives, by modality."""
    chosen = experts[..., None] == jnp.arange(moe.experts)
    of = modality[..., None, None] == jnp.arange(len(MODALITIES))[:, None, None, None, None]
    return (chosen & of).sum((1, 2, 3), dtype=jnp.int32)


def rebalanced(moe: MoESpec, bias: Float[Array, "L E"], expert_tokens: Int[Array, "L 2 E"]) -> Float[Array, "L E"]:
    """The bias after a step: up by bias_rate for experts with less than their group's mean load, down for the others.

    Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", arXiv:2408.15664, algorithm 1.
    """
    load = expert_tokens.sum(1).astype(jnp.float32)
    return bias + moe.bias_rate * jnp.sign(_group_mean(moe, load) - load)


def load_imbalance(moe: MoESpec, expert_tokens: Int[Array, "L 2 E"]) -> Float[Array, "L"]:
    """Tokens of the busiest expert over the mean of its group: 1 is even. 0 where there are no tokens."""
    load = expert_tokens.sum(1).astype(jnp.float32)
    return (load / jnp.maximum(_group_mean(moe, load), 1e-9)).max(1)


def _group_mean(moe: MoESpec, load: Float[Array, "L E"]) -> Float[Array, "L E"]:
    same = _same_group(moe).astype(jnp.float32)
    return load @ same / same.sum(0)


def _same_group(moe: MoESpec) -> Bool[Array, "E E"]:
    group = is_image_expert(moe) if moe.modality != "agnostic" else jnp.zeros(moe.experts, bool)
    return group[:, None] == group


def _balance_loss(
    moe: MoESpec, probabilities: Float[Array, "B S E"], counts: Int[Array, "2 E"], modality: Int[Array, "B S"]
) -> Float[Array, ""]:
    """E sum_e f_e P_e: 1 when all experts get as much (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6).

    f_e is the share of (token, choice) pairs that e received, P_e its mean probability. With groups, each group's own,
    weighted with its share of the tokens. Means are over the real tokens of the batch (of a microbatch, where gradients
    are accumulated).
    """
    real = modality >= 0
    open_to = jnp.where(real[..., None], may_choose(moe, modality), False).sum((0, 1))  # tokens that may choose e
    experts_of_group = _same_group(moe).sum(0)
    received = counts.sum(0).astype(jnp.float32)
    probability = jnp.where(real[..., None], probabilities, 0.0).sum((0, 1))
    tokens = jnp.maximum(real.sum(), 1) * moe.top_k
    return (experts_of_group * received * probability / (tokens * jnp.maximum(open_to, 1))).sum()


def _by_modality(values: Float[Array, "B S"], modality: Int[Array, "B S"]) -> Float[Array, "2"]:
    return jnp.stack([jnp.where(modality == m, values, 0.0).sum() for m in range(len(MODALITIES))])
