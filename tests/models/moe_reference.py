"""One mixture-of-experts layer, token by token and expert by expert in float64, with gradients derived by hand.

Nothing here sorts, pads, batches or differentiates automatically, so that it shares no mistake with the layer.
T tokens, D width, E experts, F width of an expert; modality is 0 for text, 1 for image patches, -1 for padding.
"""

import dataclasses

import numpy as np

TEXT, IMAGE = 0, 1


@dataclasses.dataclass(frozen=True)
class Options:
    experts: int
    top_k: int = 1
    modality: str = "agnostic"  # agnostic | fixed (text to expert 0, images to 1) | grouped (text's experts first)
    image_experts: int = 0  # of grouped
    renormalise: bool = False

    def group(self, modality):
        """The experts that a token of this modality may go to."""
        first_of_image = self.experts - self.image_experts
        if self.modality == "agnostic":
            return np.arange(self.experts)
        return np.arange(first_of_image) if modality == TEXT else np.arange(first_of_image, self.experts)


@dataclasses.dataclass
class Routed:
    """Where one token goes."""

    group: np.ndarray  # experts it could choose
    probabilities: np.ndarray  # of them
    log_normaliser: float
    chosen: np.ndarray  # places within group
    gates: np.ndarray
    margin: float  # between the last chosen and the first not chosen


def silu(x):
    return x / (1 + np.exp(-x))


def silu_slope(x):
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


def swiglu(x, gate, up, down):
    return (silu(x @ gate) * (x @ up)) @ down


def swiglu_gradients(x, gate, up, down, dy):
    """(dx, dgate, dup, ddown) of one token x [D]."""
    a, b = x @ gate, x @ up
    inner = silu(a) * b
    d_inner = down @ dy
    da, db = d_inner * b * silu_slope(a), d_inner * silu(a)
    return gate @ da + up @ db, np.outer(x, da), np.outer(x, db), np.outer(inner, dy)


def route(x, modality, weights, options):
    """Routed of one token that is no padding."""
    if options.modality == "fixed":
        return Routed(np.array([modality]), np.ones(1), 0.0, np.array([0]), np.ones(1), np.inf)
    group = options.group(modality)
    logits = x @ weights["router"][:, group]
    log_normaliser = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    p = np.exp(logits - log_normaliser)
    score = p + weights["bias"][group] if "bias" in weights else p
    order = np.argsort(-score, kind="stable")
    chosen = order[: options.top_k]
    margin = score[chosen[-1]] - score[order[options.top_k]] if options.top_k < len(group) else np.inf
    gates = p[chosen] / p[chosen].sum() if options.renormalise else p[chosen]
    return Routed(group, p, log_normaliser, chosen, gates, margin)


def forward(x, modality, weights, options):
    """What the layer does to x [T,D].

    Args:
      weights: router [D,E], gate and up [E,D,F], down [E,F,D], and perhaps bias [E] (of the choice) and
        shared_gate, shared_up [D,G], shared_down [G,D]; no router where modality is "fixed".

    Returns:
      y [T,D], and balance_loss, router_z_loss, expert_tokens [2,E], router_entropy [2], margin (of the closest choice).
    """
    routed = [None if m < 0 else route(x[t], m, weights, options) for t, m in enumerate(modality)]
    y = np.zeros_like(x)
    expert_tokens = np.zeros((2, options.experts), np.int64)
    entropy = np.zeros(2)
    squares, margin = [], np.inf
    for t, r in enumerate(routed):
        if r is None:
            continue
        for place, share in zip(r.chosen, r.gates, strict=True):
            e = r.group[place]
            y[t] += share * swiglu(x[t], weights["gate"][e], weights["up"][e], weights["down"][e])
            expert_tokens[modality[t], e] += 1
        if "shared_gate" in weights:
            y[t] += swiglu(x[t], weights["shared_gate"], weights["shared_up"], weights["shared_down"])
        entropy[modality[t]] -= (r.probabilities * np.log(r.probabilities)).sum()
        squares.append(r.log_normaliser**2)
        margin = min(margin, r.margin)
    aux = {
        "balance_loss": balance_loss(routed, modality, expert_tokens, options),
        "router_z_loss": np.mean(squares),
        "expert_tokens": expert_tokens,
        "router_entropy": entropy,
        "margin": margin,
    }
    return y, aux


def routers(modality, options):
    """The choices that are balanced, each for itself: (its tokens, its experts)."""
    if options.modality == "grouped":
        return [(np.flatnonzero(modality == m), options.group(m)) for m in (TEXT, IMAGE)]
    return [(np.flatnonzero(modality >= 0), options.group(TEXT))]


def balance_loss(routed, modality, expert_tokens, options):
    """E sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, equation 4), a mean over groups by their share of tokens.

    f_e: expert e's share of the assignments; P_e: its mean probability.
    """
    if options.modality == "fixed":
        return 0.0
    total = 0.0
    for tokens, group in routers(modality, options):
        if len(tokens):
            share = len(tokens) / (modality >= 0).sum()
            f = expert_tokens[:, group].sum(0) / (options.top_k * len(tokens))
            mean = np.mean([routed[t].probabilities for t in tokens], axis=0)
            total += share * len(group) * (f @ mean)
    return total


def gradients(x, modality, weights, options, dy, d_balance=0.0, d_z=0.0):
    """Of sum(dy * y) + d_balance * balance_loss + d_z * router_z_loss: a dict with x and the names in weights."""
    d = {name: np.zeros_like(value) for name, value in (weights | {"x": x}).items()}
    real = (modality >= 0).sum()
    counts = forward(x, modality, weights, options)[1]["expert_tokens"]
    d_probability = {}  # by token: of balance_loss, in which the counts are constants
    for tokens, group in routers(modality, options):
        for t in tokens:
            f = counts[:, group].sum(0) / (options.top_k * len(tokens))
            d_probability[t] = d_balance * (len(tokens) / real) * len(group) * f / len(tokens)
    for t, m in enumerate(modality):
        if m < 0:
            continue
        if "shared_gate" in weights:
            names = ("shared_gate", "shared_up", "shared_down")
            dx, *d_own = swiglu_gradients(x[t], *(weights[name] for name in names), dy[t])
            d["x"][t] += dx
            for name, value in zip(names, d_own, strict=True):
                d[name] += value
        r = route(x[t], m, weights, options)
        d_gates = np.zeros(len(r.chosen))
        for i, place in enumerate(r.chosen):
            e = r.group[place]
            own = [weights[name][e] for name in ("gate", "up", "down")]
            d_gates[i] = dy[t] @ swiglu(x[t], *own)
            dx, *d_own = swiglu_gradients(x[t], *own, r.gates[i] * dy[t])
            d["x"][t] += dx
            for name, value in zip(("gate", "up", "down"), d_own, strict=True):
                d[name][e] += value
        if options.modality == "fixed":
            continue
        if options.renormalise:  # gate_i = p_i / s, s the sum over the chosen
            d_gates = (d_gates - d_gates @ r.gates) / r.probabilities[r.chosen].sum()
        dp = d_probability[t].copy()
        dp[r.chosen] += d_gates
        d_logits = r.probabilities * (dp - r.probabilities @ dp + d_z * 2 * r.log_normaliser / real)
        d["router"][:, r.group] += np.outer(x[t], d_logits)
        d["x"][t] += weights["router"][:, r.group] @ d_logits
    d.pop("bias", None)  # it has none
    return d
