"""Learning rates, against cases worked by hand."""

import math

import numpy as np
import pytest

from configs import loading
from nmm_jax.training.schedule import ends, make_schedule


def rates(steps=20, peak=2.0, **schedule):
    overrides = {f"schedule.{k}": v for k, v in schedule.items()}
    config = loading.load("configs/quickstart.py", {"steps": steps, "optimizer.learning_rate": peak, **overrides})
    f = make_schedule(config)
    return np.array([float(f(t)) for t in range(steps)])


def test_warmup_then_stable():
    np.testing.assert_allclose(rates(warmup=4, cooldown=0), [0.5, 1.0, 1.5, 2.0] + [2.0] * 16, rtol=1e-6)


def test_linear_cooldown_by_hand():
    got = rates(warmup=0, cooldown=4, cooldown_shape="linear")
    np.testing.assert_allclose(got, [2.0] * 17 + [1.5, 1.0, 0.5], rtol=1e-6)


def test_one_minus_sqrt_cooldown_by_hand():
    got = rates(warmup=0, cooldown=4, cooldown_shape="1-sqrt")[-4:]
    np.testing.assert_allclose(got, [2 * (1 - math.sqrt(u)) for u in (0, 0.25, 0.5, 0.75)], rtol=1e-6)


def test_final_ratio_is_where_it_would_end():
    got = rates(warmup=0, cooldown=4, cooldown_shape="linear", final_ratio=0.5)[-4:]
    np.testing.assert_allclose(got, [2.0, 1.75, 1.5, 1.25], rtol=1e-6)


def test_cosine_is_half_way_in_the_middle():
    got = rates(kind="cosine", warmup=4)
    assert got[4] == 2.0 and got[12] == pytest.approx(1.0, rel=1e-6)
    assert np.all(np.diff(got[4:]) < 0)


def test_a_longer_run_agrees_with_its_trunk_until_the_cooldown():
    trunk, cooled = rates(warmup=4, cooldown=0), rates(warmup=4, cooldown=6)
    np.testing.assert_array_equal(trunk[:15], cooled[:15])


@pytest.mark.parametrize("schedule", [{}, {"schedule.kind": "cosine"}, {"schedule.cooldown_shape": "linear"}])
def test_other_ends_than_the_configs(schedule):
    short, long = (
        loading.load("configs/quickstart.py", {"steps": n, "schedule.warmup": 3, "schedule.cooldown": k} | schedule)
        for n, k in ((20, 0), (30, 7))
    )
    steps = np.arange(30)
    np.testing.assert_array_equal(make_schedule(short)(steps, ends(long)), make_schedule(long)(steps))
    assert not np.array_equal(make_schedule(short)(steps), make_schedule(long)(steps))
