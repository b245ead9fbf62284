"""Published runs (in ../shared/data/scaling beside the repository), what was published of them, and made-up runs."""

import csv
import json
import pathlib

import numpy as np
import pytest

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data" / "scaling"
needs_published = pytest.mark.skipif(not DATA.exists(), reason="needs the published runs in ../shared/data/scaling")

TRUTH = {"E": 1.9, "A": 260.0, "B": 1800.0, "alpha": 0.301, "beta": 0.335}


def published(name):
    return json.loads((DATA / name).read_text())


def chinchilla():
    """N, D and loss of all 245 runs, and which of them Epoch keeps: all but the five of the highest loss."""
    with (DATA / "chinchilla_epoch_svg_extracted_data.csv").open() as f:
        rows = list(csv.DictReader(f))
    N, C, loss = (np.array([float(row[name]) for row in rows]) for name in ("Model Size", "Training FLOP", "loss"))
    return {"N": N, "D": C / (6 * N), "C": C}, loss, loss < np.sort(loss)[-5]


def crossed(**axes):
    """Columns of all combinations."""
    return dict(zip(axes, (a.ravel() for a in np.meshgrid(*axes.values(), indexing="ij")), strict=True))


def runs(law, values, columns, noise=0.0, draws=1, seed=0):
    """Losses [draws, n] of a law with normal noise on their logs."""
    exact = law.predict(values, columns)
    return exact * np.exp(noise * np.random.default_rng(seed).normal(size=(draws, len(exact))))
