"""Tests of the response-pollution plane: who is on the front, and that the picture shows what it is given."""

import numpy as np
import pytest

from benchmarks.plane import MARKERS, PANEL, Point, Series, front_shares, pareto_front, plane_panel, plane_picture


def test_the_front_by_hand():
    response, pollution = np.array([0.1, 0.5, 0.5, 0.9, 0.4]), np.array([0.0, 2.0, 3.0, 9.0, 2.0])
    assert pareto_front(response, pollution).tolist() == [True, True, False, True, False]
    # of two alike, neither dominates
    assert pareto_front(np.array([0.5, 0.5]), np.array([1.0, 1.0])).all()
    assert pareto_front(np.stack([response, response]), np.stack([pollution, -pollution])).tolist() == [
        [True, True, False, True, False],
        [False, False, False, True, False],
    ]


def test_shares_of_the_front_are_how_often_it_holds():
    response = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    pollution = np.array([[1.0, 3.0], [2.0, 2.5], [5.0, 5.0]])
    resamples = np.array([[0, 0], [0, 1], [1, 1], [1, 1]])
    assert front_shares(response, pollution, resamples).tolist() == [0.5, 0.5, 0.0]


def pixels_of(picture, color) -> np.ndarray:
    """Places (row, column) of a color, nearly."""
    return np.argwhere(np.abs(np.asarray(picture).astype(int) - color).max(axis=-1) < 60)


@pytest.mark.parametrize("marker", MARKERS)
def test_a_point_is_drawn_at_its_place_and_a_hollow_one_as_an_outline(marker):
    red, blue = (200, 60, 40), (30, 90, 200)
    series = [
        Series("red", red, [Point(0.25, 8.0)], marker=marker),
        Series("blue", blue, [Point(0.75, 2.0, hollow=True)], marker=marker),
    ]
    panel = plane_panel("title", "pollution", series)
    first, second = (pixels_of(panel, color) for color in (red, blue))
    # less to the right and below
    assert first[:, 1].mean() < second[:, 1].mean() and first[:, 0].mean() < second[:, 0].mean()
    width = first[:, 1].max() - first[:, 1].min()
    assert 6 <= width <= 16 and 0.15 * len(first) < len(second) < 0.9 * len(first)


def test_error_bars_rings_and_values_below_zero_are_drawn():
    color, plain = (30, 90, 200), Point(0.5, -1.0)
    without = plane_panel("", "", [Series("x", color, [plain, Point(0.6, 4.0)])])
    ringed = plane_panel("", "", [Series("x", color, [Point(0.5, -1.0, on_front=True), Point(0.6, 4.0)])])
    barred = plane_panel("", "", [Series("x", color, [Point(0.5, -1.0, (0.2, 0.8)), Point(0.6, 4.0)])])
    assert len(pixels_of(ringed, (0, 0, 0))) > len(pixels_of(without, (0, 0, 0)))
    pale = (142, 172, 227)
    extra = len(pixels_of(barred, pale)) - len(pixels_of(without, pale))
    assert extra > 0.4 * PANEL[0]
    # the lower point is inside the panel, above the labels of the axis
    assert pixels_of(without, color)[:, 0].max() < PANEL[1] - 40


def test_the_legend_names_each_kind_once_below_the_panels():
    series = [Series(f"method {i}", (20 * i, 90, 120), [Point(0.1 * i, i)]) for i in range(11)]
    one = plane_picture({"first": series}, "pollution")
    two = plane_picture({"first": series, "second": series}, "pollution")
    assert one.width == PANEL[0] and two.width == 2 * PANEL[0]
    # more columns, so fewer rows, and the second panel's series are the same
    assert PANEL[1] < two.height < one.height
    noted = plane_picture({"first": series, "second": series}, "pollution", notes=("a note",))
    assert two.height < noted.height < two.height + 40
    third = plane_picture({"first": series, "second": series, "third": series}, "pollution", columns=2)
    assert third.height > 2 * PANEL[1]
