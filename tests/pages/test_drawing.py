"""What figures are made of, and the files and pages they end in."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from nmm_jax.pages import axes as parts
from nmm_jax.pages import drawing, numbers


def test_the_hull():
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.5], [0.5, 0]])
    assert {tuple(point) for point in parts.hull(square)} == {(0, 0), (1, 0), (1, 1), (0, 1)}
    assert len(parts.hull(np.array([[0.2, 0.3], [0.2, 0.3]]))) == 2  # of one mixture: there and back


def test_signs():
    assert [parts.signed(value, 0) for value in (-0.5, 0, 1)] == ["−0.5", "0", "+1"]


def test_labels_do_not_lie_on_each_other():
    _, axes = parts.new_figure(4)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    parts.beside(axes, [parts.Label(1, y, f"{y}", "black") for y in (0.5, 0.501, 0.502, 0.9)])
    heights = sorted(text.xy[1] for text in axes.texts)
    assert np.all(np.diff(heights) > 0.04) and heights[0] == pytest.approx(0.5) and heights[-1] == pytest.approx(0.9)


@pytest.mark.parametrize(("value", "text"), [(1e21, "10²¹"), (3.14e19, "3.1×10¹⁹"), (0.02, "2×10⁻²")])
def test_powers(value, text):
    assert numbers.power(value) == text


def test_counts():
    assert [numbers.count(n) for n in (2.748e8, 1.6268e9, 6e11, 1234, 7.0)] == ["275M", "1.63B", "600B", "1.23k", "7"]


def test_colours_are_told_apart_by_all_eyes():
    """Machado et al. 2009: seen by deuteranopes and protanopes no two are close; none fades on white or black."""
    deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    protan = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    colours = np.array([to_rgb(colour) for colour in drawing.COLOURS[:4]])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    for matrix in (np.eye(3), np.array(deutan), np.array(protan)):
        seen = linear @ matrix.T
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(seen), 1)]
        assert apart.min() > 0.1
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    for background in (1.0, 0.009):  # of the pages: contrast as the web's guidelines have it, 3 for graphics
        brighter, darker = np.maximum(luminance, background), np.minimum(luminance, background)
        assert ((brighter + 0.05) / (darker + 0.05)).min() > 3


def test_files_and_pages(tmp_path):
    def figure():
        drawn, axes = parts.new_figure(2)
        axes.set_xlabel("parameters, N", color=drawing.ink())
        return drawn

    with drawing.on_paper():
        drawing.save(figure(), tmp_path / "a-b", "title")
    assert (tmp_path / "a-b.png").read_bytes().startswith(b"\x89PNG")
    svg = ElementTree.parse(tmp_path / "a-b.svg")
    assert "parameters, N" in "".join(svg.getroot().itertext())  # text stays text
    with drawing.on_page():
        page, again = (drawing.to_svg(figure(), "title") for _ in range(2))
    assert page == again
    assert 'role="img"' in page and "currentColor" in page and "#2a2e35" not in page
    ElementTree.fromstring(page)
