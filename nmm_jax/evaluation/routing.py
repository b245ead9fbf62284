"""Statistics of where routers sent their tokens: how much experts specialise by modality, how evenly they are loaded.

L MoE layers, M = 2 modalities (0 text, 1 image), E experts. A token that goes to k experts counts at each of them.
NaN stands for what is not defined, as the share of images at an expert without tokens; `as_json` makes it null.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nmm_jax.models.router import MODALITIES


@dataclasses.dataclass(frozen=True)
class Experts:
    """Which experts there are, and which tokens may go to which."""

    count: int
    layers: tuple[int, ...]  # that have experts, by their number in the network, from 0
    top_k: int = 1  # experts that a token goes to
    modality: str = "agnostic"  # or "fixed" (one expert a modality, no router), or "grouped" (a router a modality)
    image: int = 0  # experts, the last, that see images only; 0 where every expert sees every token

    @property
    def labels(self) -> list[str]:
        """A short name for each: its number, with T or I before it where it is of one modality."""
        if self.modality == "fixed":
            return list(MODALITIES)
        text = self.count - self.image
        return [f"{'T' if e < text else 'I'}{e}" if self.image else str(e) for e in range(self.count)]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"layers": list(self.layers), "labels": self.labels}

    @property
    def choices(self) -> Int[np.ndarray, "M"]:
        """Among how many experts a router chooses, by modality; 1 is no choice."""
        if self.image:
            return np.array([self.count - self.image, self.image])
        return np.array([self.count, self.count])


@dataclasses.dataclass(frozen=True)
class Counts:
    """What routers did with the tokens of some rows; counts of other rows can be added."""

    expert_tokens: Int[np.ndarray, "L M E"]
    entropy: Float[np.ndarray, "L M"]  # nats, summed over tokens
    dropped: Int[np.ndarray, "L"]  # of the assignments in expert_tokens, those that found no room
    tokens: Int[np.ndarray, "M"]
    rows: int

    def __add__(self, other: "Counts") -> "Counts":
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Counts(*(a + b for a, b in zip(mine, others, strict=True)))


def load(expert_tokens: Int[np.ndarray, "*any E"]) -> Float[np.ndarray, "*any E"]:
    """Share of the assignments that each expert has; they add up to 1. NaN where there are none at all."""
    return _divide(expert_tokens, expert_tokens.sum(-1, keepdims=True))


def image_share(expert_tokens: Int[np.ndarray, "L M E"]) -> Float[np.ndarray, "L E"]:
    """Share of images among each expert's tokens; NaN at experts without tokens."""
    return _divide(expert_tokens[:, 1], expert_tokens.sum(1))


def binary_entropy(p: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """-p log2 p - (1-p) log2 (1-p), in bits: 0 at 0 and 1, 1 at 1/2."""
    p = np.asarray(p, np.float64)
    q = 1 - p
    return -(p * np.log2(np.where(p > 0, p, 1)) + q * np.log2(np.where(q > 0, q, 1)))


def specialisation(expert_tokens: Int[np.ndarray, "L M E"]) -> Float[np.ndarray, "L"]:
    """Mean over the experts that have tokens of 1 - H(image_share): 1 where every expert sees one modality only.

    Shukor et al. 2025 (arXiv 2504.07951), section 4.4. It is 0 only where experts see as many image as text tokens:
    `baseline` is what it is when routers do not look at modality. Experts count alike, however many tokens they have,
    so with uneven loads it can also be below that.
    """
    return _mean(1 - binary_entropy(image_share(expert_tokens)))


def baseline(tokens: Int[np.ndarray, "M"]) -> float:
    """1 - H(share of images among all tokens): the specialisation of routers that do not look at modality."""
    return float(1 - binary_entropy(_divide(tokens[1], tokens.sum())))


def deviation(expert_tokens: Int[np.ndarray, "L M E"]) -> Float[np.ndarray, "L M"]:
    """Mean over all E experts of |share - 1/E|, where share is the part of a modality's assignments at that expert.

    0 is a modality spread evenly; 1/E is one that half of the experts share evenly among them, as when experts are
    divided between two modalities; 2 (E-1) / E^2, the most, is all of it at one expert. NaN for a modality without
    tokens. Appendix E.2 of arXiv 2504.07951 redefines the score as such a distance from uniform assignment; we do not
    have its exact wording (signs, averages), so this is our definition, and both modalities are kept apart. Unlike
    `specialisation` it does not depend on how many tokens of each modality there are; but uneven loads raise it too.
    """
    return np.abs(load(expert_tokens) - 1 / expert_tokens.shape[-1]).mean(-1)


def imbalance(expert_tokens: Int[np.ndarray, "L M E"]) -> Float[np.ndarray, "L"]:
    """Tokens at the busiest expert over the mean of all experts: 1 is even, E is all at one expert."""
    tokens = expert_tokens.sum(1)
    return _divide(tokens.max(-1), tokens.mean(-1))


def statistics(counts: Counts, experts: Experts) -> dict[str, Any]:
    """All of it, ready for JSON: nmm_jax/routing.py lists the keys."""
    expert_tokens = counts.expert_tokens
    deviations = deviation(expert_tokens)
    # A choice of one has no entropy, and no share of the largest entropy there could be.
    largest = np.log(np.where(experts.choices > 1, experts.choices, np.nan)) * counts.tokens
    routed = counts.tokens > 0
    return as_json(
        {
            "rows": counts.rows,
            "tokens": _by_modality(counts.tokens),
            "expert_tokens": _by_modality(expert_tokens.swapaxes(0, 1)),
            "dropped": _divide(counts.dropped, expert_tokens.sum((1, 2))),
            "load": {"all": load(expert_tokens.sum(1)), **_by_modality(load(expert_tokens).swapaxes(0, 1))},
            "image_share": image_share(expert_tokens),
            "empty_experts": (expert_tokens.sum(1) == 0).sum(-1),
            "imbalance": imbalance(expert_tokens),
            "specialisation": specialisation(expert_tokens),
            "specialisation_baseline": baseline(counts.tokens),
            "deviation": {"mean": _mean(deviations), **_by_modality(deviations.T)},
            "entropy": {
                "all": _divide(counts.entropy.sum(1), counts.tokens.sum()),
                **_by_modality(_divide(counts.entropy, counts.tokens).T),
            },
            "entropy_share": {
                "all": _divide(counts.entropy[:, routed].sum(1), largest[routed].sum()),
                **_by_modality(_divide(counts.entropy, largest).T),
            },
        }
    )


def as_json(value: Any) -> Any:
    """Dicts of arrays as dicts of lists, with None for NaN."""
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    array = np.asarray(value)
    if array.dtype.kind != "f":
        return array.tolist()
    defined = array.astype(object)
    defined[np.isnan(array)] = None
    return defined.tolist()


def _by_modality(arrays: Sequence[Any] | np.ndarray) -> dict[str, Any]:
    return dict(zip(MODALITIES, arrays, strict=True))


def _divide(a: Any, b: Any) -> np.ndarray:
    """a / b; NaN where b is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a / np.where(b == 0, np.nan, b)


def _mean(x: Float[np.ndarray, "L n"]) -> Float[np.ndarray, "L"]:
    """Over the last axis, of what is not NaN; NaN where all is."""
    defined = ~np.isnan(x)
    return _divide(np.where(defined, x, 0).sum(-1), defined.sum(-1))
