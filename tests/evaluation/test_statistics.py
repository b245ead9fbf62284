import math

import numpy as np
import pytest

from nmm_jax.evaluation.statistics import proportion, ratio


def bootstrap(x, y, draws=4000):
    rng = np.random.default_rng(1)
    picks = rng.integers(0, len(x), (draws, len(x)))
    return (x[picks].sum(1) / y[picks].sum(1)).std()


@pytest.mark.parametrize("seed", range(3))
def test_error_of_a_ratio_is_the_bootstraps_over_rows(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 120, 150).astype(float)
    hardness = rng.gamma(4.0, 0.5, 150)  # a whole row is hard or easy: its tokens are not independent
    losses = tokens * hardness
    found = ratio(losses, tokens)
    assert found.value == pytest.approx(losses.sum() / tokens.sum())
    assert found.standard_error == pytest.approx(bootstrap(losses, tokens), rel=0.1)


def test_error_of_a_share_is_binomial_and_the_bootstraps():
    right = (np.arange(400) % 10 < 3).astype(float)
    found = proportion(right)
    assert found.value == pytest.approx(0.3)
    assert found.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 399))
    assert found.standard_error == pytest.approx(bootstrap(right, np.ones(400)), rel=0.05)


def test_a_ratio_of_proportional_sums_has_no_error():
    y = np.array([3.0, 1.0, 7.0])
    assert ratio(0.25 * y, y).standard_error == pytest.approx(0, abs=1e-12)


def test_one_row_has_no_error_and_no_tokens_no_loss():
    assert ratio(np.array([2.0]), np.array([4.0])).standard_error is None
    with pytest.raises(ValueError, match="sum to 0"):
        ratio(np.zeros(3), np.zeros(3))
