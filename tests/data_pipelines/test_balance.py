"""Rows of a batch, dealt out so that every device and every microbatch has about as many images."""

import numpy as np
import pytest

from data_pipelines.balance import arrange


def test_the_drawn_example():
    images = np.array([6, 0, 0, 5, 4, 0, 1, 2])
    assert images[arrange(images)].tolist() == [6, 0, 2, 1, 5, 0, 4, 0]


@pytest.mark.parametrize("rows", [1, 2, 7, 24, 64, 512])
@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_every_row_once(rows, microbatches):
    images = np.random.default_rng(rows).integers(0, 17, rows * microbatches)
    assert sorted(arrange(images, microbatches).tolist()) == list(range(rows * microbatches))


@pytest.mark.parametrize("devices", [2, 8, 32, 64])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_devices_have_about_as_many(devices, microbatches):
    """Rows of a mixture: a tenth without images, half with a few, the others nearly full."""
    r = np.random.default_rng(0)
    some, many = r.poisson(3, 1024), r.integers(12, 17, 1024)
    images = np.where(r.random(1024) < 0.1, 0, np.where(r.random(1024) < 0.5, some, many))
    order = arrange(images, microbatches)

    def most(images):  # of a device, in a microbatch, over the mean
        by_device = images.reshape(devices, -1, microbatches).sum(1)
        return by_device.max() / by_device.mean()

    assert most(images[order]) < 1 + 6 * microbatches * devices / 1024
    assert most(images[order]) < 0.5 + 0.5 * most(images)
