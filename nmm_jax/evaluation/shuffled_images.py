"""The control that shows whether a model uses its images: the same documents, each image from another document.

slot      0  1  2  3  4  5        m = 2, the largest count of images of one document
document  A  A  B  C  D  D
takes     2  3  4  5  0  1        the slot m further on, among slots sorted by document
of        B  C  D  D  A  A
"""

import numpy as np
from jaxtyping import Int, UInt8


def donors(documents: Int[np.ndarray, "R I"]) -> Int[np.ndarray, "R I"] | None:
    """For each image slot the flat number of the slot whose image it takes; None where that is impossible.

    Filled slots are permuted among themselves so that none takes an image of its own document; empty slots take
    their own. Sorted by document, a document's images are a run of at most m slots; so the slot m further on, around
    the end, is of another document as long as there are 2 m slots or more. With fewer, one document has more than
    half of the images, and no such permutation exists.

    Args:
      documents: which document each slot's image is from; -1 where the slot is empty.
    """
    flat = documents.reshape(-1)
    takes = np.arange(flat.size)
    filled = np.flatnonzero(flat >= 0)
    by_document = filled[np.argsort(flat[filled], kind="stable")]
    if not filled.size:
        return None
    largest = np.unique(flat[filled], return_counts=True)[1].max()
    if 2 * largest > filled.size:
        return None
    takes[by_document] = np.roll(by_document, -largest)
    assert (flat[takes[filled]] != flat[filled]).all(), "an image position got an image of its own document"
    return takes.reshape(documents.shape)


def exchange(images: UInt8[np.ndarray, "R I H W 3"], takes: Int[np.ndarray, "R I"]) -> UInt8[np.ndarray, "R I H W 3"]:
    """The images after every slot took its donor's."""
    return images.reshape(-1, *images.shape[2:])[takes]
