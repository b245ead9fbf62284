"""In which order the rows of a batch stand, so that devices and microbatches have about as many images.

A batch is a set of rows to the loss; but each device has a run of neighbouring places of it (and each microbatch every
n-th place), and what a vision tower has to do there is as much as there are images. So rows are dealt into halves,
these into quarters and so on, two at a time from the fullest on, the fuller one to the half with fewer images so far:

    images      6 0 0 5 4 0 1 2
    halves      6 2 1 0 | 5 4 0 0
    quarters    6 0 | 2 1 | 5 0 | 4 0

The order depends on the batch alone and not on the number of devices.
"""

import numpy as np


def arrange(images: np.ndarray, microbatches: int = 1) -> np.ndarray:
    """Which row of the batch stands at each place, int64 [B].

    Args:
      images: of each row, int [B].
      microbatches: place p belongs to microbatch p % microbatches (training/step.py).
    """
    ranked = np.argsort(-images, kind="stable").tolist()
    parts = _dealt(ranked, images.tolist(), len(images) // microbatches, microbatches)
    return np.array([_halved(part, images.tolist()) for part in parts]).T.reshape(-1)


def _dealt(ranked: list[int], images: list[int], size: int, parts: int) -> list[list[int]]:
    """`parts` lists of `size` rows: each takes one of the next rows, the fullest goes to the list with the fewest."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for k in range(size):
        emptiest_first = sorted(range(parts), key=totals.__getitem__)
        for row, part in zip(ranked[k * parts : (k + 1) * parts], emptiest_first, strict=True):
            dealt[part].append(row)
            totals[part] += images[row]
    return dealt


def _halved(ranked: list[int], images: list[int]) -> list[int]:
    if len(ranked) < 2:
        return ranked
    even = len(ranked) // 2 * 2
    left, right = _dealt(ranked[:even], images, even // 2, 2)
    return _halved(left + ranked[even:], images) + _halved(right, images)
