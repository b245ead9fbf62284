"""Standard errors of ratios: of losses over rows of unequal length, and of shares of right answers."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and the standard deviation of its estimator."""

    value: float
    standard_error: float | None  # None from a single cluster


def ratio(numerators: Float[np.ndarray, "n"], denominators: Float[np.ndarray, "n"]) -> Estimate:
    """sum(numerators) / sum(denominators), over n independent clusters that each give one of both.

    The error is the linearised one of survey sampling (Cochran, Sampling Techniques, 1977, section 6.4):
    with r the ratio, the variance of sum(x - r * y) / sum(y). Tokens of one row are not independent, rows are;
    so a loss is the ratio of the rows' summed losses and counts of tokens.

    Raises:
      ValueError: the denominators sum to zero.
    """
    x, y = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if not y.sum() > 0:
        raise ValueError(f"a ratio over {len(y)} clusters whose denominators sum to {y.sum()}")
    value = x.sum() / y.sum()
    if len(y) < 2:
        return Estimate(float(value), None)
    variance = len(y) / (len(y) - 1) * np.square(x - value * y).sum()
    return Estimate(float(value), float(np.sqrt(variance) / y.sum()))


def proportion(right: Float[np.ndarray, "n"]) -> Estimate:
    """The share of ones among n independent zeros and ones."""
    return ratio(right, np.ones(len(right)))
