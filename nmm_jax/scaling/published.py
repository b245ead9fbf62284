"""Scaling laws that others published: what they printed, where it contradicts itself, and what can be planned with.

    shukor    Shukor et al. 2025, "Scaling Laws for Native Multimodal Models", arXiv 2504.07951v4
    epoch     Besiroglu et al. 2024, "Chinchilla Scaling: A replication attempt", arXiv 2404.10102, the refit of
              Hoffmann et al. 2022 (arXiv 2203.15556); digits of their notebook, epoch-research/analyzing-chinchilla

Numbers are kept as they are printed: the last digit says how exact they are. `contradictions()` holds each row's
exponents against its own alpha and beta. A and B of Shukor's dense laws are not printed; where this file has them they
are reconstructed, and said to be.

Losses are comparable only between the same held-out sets, tokenizer and loss mask, and Shukor's are not public:
their exponents and differences carry over to other data, their values do not.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from nmm_jax.scaling.laws import law
from nmm_jax.scaling.optima import FLOPS

SHUKOR = "Shukor et al. 2025, arXiv 2504.07951v4"
EPOCH = "Besiroglu et al. 2024, arXiv 2404.10102, refit of Hoffmann et al. 2022"


def rounded(digits: str) -> tuple[float, float]:
    """The bounds of what is printed so: -.0420 is (-0.04205, -0.04195)."""
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
    return float(digits) - half, float(digits) + half


# Exponents that Shukor et al. find by regression on a grid of budgets differ from those that follow from alpha and beta
# by up to 0.003 in their own Table 9, and in no other row by more than 0.006 or by less than 0.017.
TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of printed exponents, as digits.

    L = E + A/N^alpha + B/D^beta;  N ~ C^a, D ~ C^b, D ~ N^d, L ~ C^c;  dn: D/N ~ C^dn, where a figure prints it.
    """

    where: str
    architecture: str
    data: str
    E: str
    alpha: str
    beta: str
    a: str
    b: str
    d: str
    c: str
    dn: str = ""

    @property
    def name(self) -> str:
        return f"{self.where}, {self.architecture}, {self.data}"


# fmt: off
ROWS = (
    Row("Table 2", "early", "text",        "2.222", ".3084", ".3375", ".5246", ".4774", ".9085", "-.0420"),
    Row("Table 2", "early", "captions",    "1.569", ".3111", ".3386", ".5203", ".4785", ".9187", "-.0610"),
    Row("Table 2", "early", "interleaved", "1.966", ".2971", ".338",  ".5315", ".4680", ".8791", "-.0459"),
    Row("Table 2", "early", "mean",        "1.904", ".301",  ".335",  ".5262", ".473",  ".8987", "-.0492", "-.053"),
    Row("Table 2", "late",  "mean",        "1.891", ".2903", ".3383", ".6358", ".4619", ".6732", "-.0494", "-.076"),
    Row("Table 2", "moe",   "mean",        "2.158", ".710",  ".372",  ".361",  ".656",  "1.797", "-.047",  ".312"),
    Row("Table 3", "early", "mean of 45-45-10", "1.906", ".301", ".335", ".527", ".474", ".901", "-.0492"),
    Row("Table 3", "early", "mean of 40-20-40", "1.965", ".328", ".348", ".518", ".486", ".937", "-.0486"),
    Row("Table 3", "early", "mean of 30-30-40", "1.847", ".253", ".338", ".572", ".428", ".748", "-.0463"),
    Row("Table 3", "early", "mean of 20-40-40", "1.836", ".259", ".354", ".582", ".423", ".726", "-.0488"),
)
# fmt: on

# Table 9, of early fusion, printed both ways: from alpha and beta, and by regression on budgets.
TABLE_9 = {
    "closed form": {"a": ".52649", "b": ".47351", "d": ".89938", "n": "1.11188", "dn": "-.05298"},
    "regression": {"a": ".52391", "b": ".47534", "d": ".90052", "n": "1.10224", "dn": "-.04933"},
}

# Exponents as Figure 2 has them, with more digits; the early ones round to Table 2's.
FIGURE_2 = {
    "early": {"alpha": ".30051", "beta": ".33491"},
    "late": {"alpha": ".2777", "beta": ".34299"},
}

# Table 11, early fusion's mean, 100 bootstraps: mean and standard deviation.
BOOTSTRAP = {
    "E": (1.80922, 0.33811),
    "alpha": (0.29842, 0.10101),
    "beta": (0.33209, 0.02892),
    "a": (0.54302, 0.08813),
    "b": (0.48301, 0.05787),
    "d": (0.92375, 0.23296),
}


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The least loss that a budget buys, L = K C^c, as a figure prints it."""

    where: str
    architecture: str
    data: str
    K: str
    c: str

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.data.removeprefix('mean of ')}"

    def loss(self, C: float) -> float:
        return float(self.K) * C ** float(self.c)

    def open_share(self, C: float) -> float:
        """How far the rounding of c lets the loss be off, to either side."""
        low, high = rounded(self.c)
        return (high - low) / 2 * math.log(C)


# Fitted to C > 3e19. The mixtures are captions-interleaved-text, in percent; where none is named it is 45-45-10. The
# mean of MoE is also printed as 26.287 C^-.047 (Figure 9) and with -.0474 (Figure 1): the same within c's rounding.
FRONTIERS = (
    Frontier("Figures 5, 26-28", "early", "mean", "29.574", "-.0492"),
    Frontier("Figures 5, 26-28", "late", "mean", "29.923", "-.0494"),
    Frontier("Figures 5, 26-28", "moe", "mean", "27.086", "-.048"),
    Frontier("Figures 5, 26-28", "early", "captions", "47.97", "-.061"),
    Frontier("Figures 5, 26-28", "late", "captions", "49.99", "-.062"),
    Frontier("Figures 5, 26-28", "moe", "captions", "51.857", "-.064"),
    Frontier("Figures 5, 26-28", "early", "interleaved", "25.114", "-.0458"),
    Frontier("Figures 5, 26-28", "late", "interleaved", "25.303", "-.0460"),
    Frontier("Figures 5, 26-28", "moe", "interleaved", "22.715", "-.044"),
    Frontier("Figures 5, 26-28", "early", "text", "22.709", "-.042"),
    Frontier("Figures 5, 26-28", "late", "text", "22.642", "-.042"),
    Frontier("Figures 5, 26-28", "moe", "text", "20.036", "-.040"),
    Frontier("Figures 5, 26-28", "early", "mean of 40-20-40", "28.590", "-.0486"),
    Frontier("Figures 5, 26-28", "early", "mean of 30-30-40", "25.623", "-.0463"),
    Frontier("Figures 5, 26-28", "early", "mean of 20-40-40", "29.002", "-.0488"),
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A law to plan with.

    Attributes:
      law: a name of laws.py.
      data: what its losses are of.
      fitted: the range of N, D and C that it was fitted to.
      errors: standard errors, where they are published.
      reconstructed: parameters that are not printed.
      notes: what whoever plans with it has to know.
    """

    name: str
    law: str
    values: Mapping[str, float]
    source: str
    data: str
    fitted: Mapping[str, tuple[float, float]]
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reconstructed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# Sizes and tokens of Shukor's Table 6; the largest budget is that of the largest model at the most tokens.
_SIZES, _TOKENS = (274.8e6, 3354.2e6), (2.5e9, 600e9)
_BUDGETS = (3e19, FLOPS * _SIZES[1] * _TOKENS[1])
_FITTED = {"N": _SIZES, "D": _TOKENS, "C": _BUDGETS}
_WITH_SIZES = {f"{name}-mean": f"a loss for a budget; N and D are published:{name}'s" for name in ("early", "moe")}
_MEAN = "mean of Shukor et al."
_PRIVATE = "its held-out sets are not public: exponents and differences carry over to other data, losses do not"
_WITHOUT_SIZES = "A and B are not printed, and nothing printed tells them: a loss for a budget, no N and D"

LAWS: dict[str, Published] = {
    "early": Published(
        "early",
        "dense",
        {"E": 1.904, "A": 260.0, "B": 1800.0, "alpha": 0.30051, "beta": 0.33491},
        f"{SHUKOR}, Figure 2 and Table 2",
        _MEAN,
        _FITTED,
        reconstructed=("A", "B"),
        notes=(
            "A and B are reconstructed from the printed frontier and D/N near 50 at 1e21 FLOPs (Figures 1 and 22): "
            "A 256 to 265, B 1770 to 1840, losses to about 1%, at 3e19 to 2%",
            _PRIVATE,
        ),
    ),
    "moe": Published(
        "moe",
        "dense",
        {"E": 2.158, "A": 381773.0, "B": 4659.0, "alpha": 0.710, "beta": 0.372},
        f"{SHUKOR}, Table 12",
        _MEAN,
        _FITTED,
        notes=("N is active parameters of 8 experts, one a token", _PRIVATE),
    ),
    "chinchilla": Published(
        "chinchilla",
        "dense",
        {"E": 1.81686, "A": 482.00572, "B": 2085.4342, "alpha": 0.34781, "beta": 0.36585},
        EPOCH,
        "text of Chinchilla",
        # of the 240 runs that it is fitted to
        {"N": (57.3e6, 16.2e9), "D": (8.19e5, 318e9), "C": (1.4e18, 1.3e22)},
        errors={"E": 0.02566, "A": 124.52232, "B": 1293.2841, "alpha": 0.0154, "beta": 0.0206},
        notes=("text alone; read off a figure of Hoffmann et al.; A and B are uncertain by 26% and 62%, and tied",),
    ),
} | {
    each.name: Published(
        each.name,
        "frontier",
        {"K": float(each.K), "c": float(each.c)},
        f"{SHUKOR}, {each.where}",
        f"{each.data} of Shukor et al.",
        {"C": _BUDGETS},
        notes=(
            _WITH_SIZES.get(each.name, _WITHOUT_SIZES),
            f"the digits of c leave its loss open by {each.open_share(1e21):.1%} at 1e21",
            _PRIVATE,
        ),
    )
    for each in FRONTIERS
}

# Table 12's law of sparsity. Its lambda and delta are round, its E and C are halves of the plain law's E, and its d and
# gamma are the plain law's A and alpha: at S = 0 it is that law, and with N active parameters it has the loss rise with
# the sparsity. It is kept to be compared with, not to plan with.
SPARSITY = {
    "E": 1.0788, "A": 1.0, "B": 4660.0, "alpha": 0.5890, "beta": 0.3720,
    "C": 1.0788, "lambda": 0.2, "d": 381475.0, "delta": 0.2, "gamma": 0.70956,
}  # fmt: skip


def find(name: str) -> Published:
    """The law of that name.

    Raises:
      ValueError: there is none; the message lists those there are.
    """
    if name == "late":
        raise ValueError(f"published:late: {_WITHOUT_SIZES.partition(':')[0]}; its frontier is published:late-mean")
    if name not in LAWS:
        raise ValueError(f"there is no published law {name!r}; there are {', '.join(LAWS)}")
    return LAWS[name]


def reconstruct(
    E: float, alpha: float, beta: float, frontier: Frontier, tokens_per_parameter: float, at: float = 1e21
) -> tuple[float, float]:
    """A and B of a dense law of which all else is known, by least squares of log L over C from 3e19 to 1e22.

    The frontier alone leaves a whole curve of them; D/N at one budget chooses. It fixes A/B, and with that N and D at
    all budgets, so that the reducible loss is proportional to B.
    """
    size = math.sqrt(at / (FLOPS * tokens_per_parameter))
    ratio = (size / (at / FLOPS) ** (beta / (alpha + beta))) ** (alpha + beta) * beta / alpha
    unit = law("dense").at({"E": 0.0, "A": ratio, "B": 1.0, "alpha": alpha, "beta": beta})
    budgets = np.geomspace(_BUDGETS[0], 1e22, 61)
    aim, reducible = np.array([frontier.loss(C) for C in budgets]), unit.optimum(budgets).loss
    candidates = np.geomspace(1, 1e6, 40_001)
    errors = np.square(np.log((E + candidates[:, None] * reducible) / aim)).mean(axis=1)
    B = float(candidates[np.argmin(errors)])
    return ratio * B, B


@dataclasses.dataclass(frozen=True)
class Contradiction:
    """A printed number that its own source has otherwise; `gap` is how far apart they are, beyond rounding."""

    where: str
    name: str
    printed: str
    otherwise: float
    because: str
    gap: float

    def __str__(self) -> str:
        return f"{self.where}: {self.name} is printed {self.printed}, {self.because} {self.otherwise:.4g}"


def closed_forms(alpha: str, beta: str) -> dict[str, tuple[float, float]]:
    """Bounds of the exponents that follow from a printed alpha and beta, by their letters."""
    corners = np.array([(x, y) for x in rounded(alpha) for y in rounded(beta)]).T
    found = law("dense").exponents({"alpha": corners[0], "beta": corners[1]})
    return {name: (float(each.min()), float(each.max())) for name, each in found.items()}


def gap(printed: str, bounds: tuple[float, float]) -> float:
    """How far a printed number is from bounds, beyond what its own rounding explains."""
    low, high = rounded(printed)
    return max(0.0, low - bounds[1], bounds[0] - high)


def contradictions(tolerance: float = TOLERANCE) -> list[Contradiction]:
    """The printed numbers that do not agree with others of the same source."""
    found = []
    for row in ROWS:
        forms = closed_forms(row.alpha, row.beta)
        for name in ("a", "b", "d", "dn"):
            printed = getattr(row, name)
            if printed and (apart := gap(printed, forms[name])) > tolerance:
                middle = sum(forms[name]) / 2
                found.append(Contradiction(row.name, name, printed, middle, "and by its alpha and beta", apart))
    for architecture, exponents in FIGURE_2.items():
        row = next(row for row in ROWS if (row.architecture, row.data) == (architecture, "mean"))
        for name, printed in exponents.items():
            other = getattr(row, name)
            if apart := gap(printed, rounded(other)):
                where, because = f"Figure 2, {architecture}, mean", f"and in {row.where}"
                found.append(Contradiction(where, name, printed, float(other), because, apart))
    return found


def table() -> str:
    """All rows, their closed forms, and what contradicts itself."""
    lines = [f"{SHUKOR}; in brackets: from alpha and beta", ""]
    lines.append(f"{'':<38}{'alpha':>7}{'beta':>7}" + "".join(f"{name:>18}" for name in ("a", "b", "d")))
    for row in ROWS:
        forms = closed_forms(row.alpha, row.beta)
        cells = [f"{getattr(row, name)} ({sum(forms[name]) / 2:.4f})" for name in ("a", "b", "d")]
        lines.append(f"{row.name:<38}{row.alpha:>7}{row.beta:>7}" + "".join(f"{cell:>18}" for cell in cells))
    lines += ["", "contradictions"] + [f"  {each}" for each in contradictions()]
    lines += ["", "to plan with: --law=published:NAME"]
    lines += [f"  {name:<24}{each.law:<10}{each.source}" for name, each in LAWS.items()]
    return "\n".join(lines)
