"""The best N and D for a budget, from a law whose other columns are held.

    minimise  E + sum_i A_i/N^alpha_i + B/D^beta    where  C = k N D

With one term of N it is closed (Hoffmann et al., arXiv 2203.15556, equation 4):

    N = G (C/k)^a,  D = (C/k)^b / G,  G = (alpha A/(beta B))^(1/(alpha+beta)),  a = beta/(alpha+beta),  b = 1 - a.

With several the loss is convex in log N, and its slope is halved towards zero.

k is 6 where all parameters meet all tokens. Of late fusion, with a share v of N in the tower and r tokens of the tower
to one of the decoder, C = 6 (N_v D_v + (N - N_v) D) is 6 (1 - v + v r) N D.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

FLOPS = 6.0  # of a parameter and a token: two forwards, four backwards
_HALVINGS = 200
_WIDE = 200.0  # e-folds of N to either side of C/k: no optimum of a real table is further


def flops_per_pair(vision_share: float = 0.0, vision_tokens: float = 0.0) -> float:
    """C / (N D).

    Args:
      vision_share: of N, in a tower of its own.
      vision_tokens: that the tower sees, for one of the decoder.
    """
    return FLOPS * (1 - vision_share + vision_share * vision_tokens)


class Optimum(NamedTuple):
    """Of each budget."""

    N: Float[np.ndarray, "*budgets"]
    D: Float[np.ndarray, "*budgets"]
    loss: Float[np.ndarray, "*budgets"]


@dataclasses.dataclass(frozen=True)
class Slice:
    """E + sum of A/N^alpha over `sizes` + B/D^beta; `sizes` and `tokens` are (coefficient, exponent)."""

    E: float
    sizes: tuple[tuple[float, float], ...]
    tokens: tuple[float, float]

    def loss(self, N: Float[np.ndarray, "..."], D: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        b, beta = self.tokens
        with np.errstate(over="ignore", invalid="ignore"):  # a bootstrap draw may have no use for a term: 0 / 0
            return self.E + sum(a / np.power(N, alpha) for a, alpha in self.sizes) + b / np.power(D, beta)

    def optimum(self, C: Float[np.ndarray, "*budgets"], per_pair: float = FLOPS) -> Optimum:
        """The N and D of least loss with C = per_pair N D.

        Raises:
          ValueError: an exponent is not positive: more of N or of D would never help, and there is no best.
        """
        b, beta = self.tokens
        if not all(exponent > 0 for _, exponent in (*self.sizes, self.tokens)):
            raise ValueError(f"exponents {[e for _, e in (*self.sizes, self.tokens)]} of N and D must all be positive")
        pairs = np.asarray(C, np.float64) / per_pair
        if len(self.sizes) == 1:
            a, alpha = self.sizes[0]
            ratio = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
            N = ratio * pairs ** (beta / (alpha + beta))
        else:
            N = np.exp(self._log_size(np.log(pairs)))
        return Optimum(N, pairs / N, self.loss(N, pairs / N))

    def _log_size(self, log_pairs: np.ndarray) -> np.ndarray:
        """log N where the slope of the loss along C is zero, by halving."""
        b, beta = self.tokens
        low, high = log_pairs - _WIDE, log_pairs + _WIDE
        for _ in range(_HALVINGS):
            x = (low + high) / 2
            # compared as logs: the terms themselves overflow at the ends
            falling = np.logaddexp.reduce([np.log(a * alpha) - alpha * x for a, alpha in self.sizes])
            rising = np.log(b * beta) + beta * (x - log_pairs)
            low, high = np.where(falling > rising, x, low), np.where(falling > rising, high, x)
        return (low + high) / 2
