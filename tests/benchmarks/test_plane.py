"""Tests of the response-pollution plane: who is on the front, and that the picture shows what it is given."""

import numpy as np

from benchmarks.parts.plane import Point, Series, front_shares, pareto_front, plane_figure
from evaluation.measures import Estimate


def at(response: float, pollution: float, **how: bool | str) -> Point:
    return Point(Estimate(response, None, None), Estimate(pollution, None, None), **how)


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
    response = np.array([[1.0, 1.0, 0.0]] * 4)
    pollution = np.array([[1.0, 2.0, 5.0], [2.0, 2.25, 5.0], [3.0, 2.5, 5.0], [3.0, 2.5, 5.0]])
    assert front_shares(response, pollution).tolist() == [0.5, 0.5, 0.0]


def test_points_bars_rings_and_the_front_are_drawn_where_they_belong():
    barred = Point(Estimate(0.5, 0.2, 0.8), Estimate(-1.0, -2.0, 0.5), "guided", on_front=True)
    series = [
        Series("curve", "#c83c28", [at(0.25, 8.0, on_front=True), at(0.6, 4.0)], curve=True),
        Series("x", "#1e5ac8", [barred, at(0.75, 2.0, way="late"), at(0.7, 3.0)], marker="^"),
    ]
    figure = plane_figure({"first": series, "second": series, "third": series}, "pollution", notes=("a note",))
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == ["first", "second", "third"]
    lines = panels[0].lines
    drawn = {(tuple(map(float, line.get_xdata())), tuple(map(float, line.get_ydata()))): line for line in lines}
    assert drawn[(0.25, 0.5), (8.0, -1.0)].get_linewidth() == 5 and drawn[(0.25, 0.6), (8.0, 4.0)].get_linewidth() == 2
    assert ((0.2, 0.8), (-1.0, -1.0)) in drawn and ((0.5, 0.5), (-2.0, 0.5)) in drawn
    at_point = [line for line in lines if line.get_marker() != "None" and line.get_xdata()[0] == 0.5]
    marker, ring = sorted(at_point, key=lambda line: line.get_markersize())
    assert (marker.get_marker(), marker.get_markerfacecolor()) == ("^", "white")
    assert marker.get_color() == "#1e5ac8"
    (half,), (filled,) = ([line for line in lines if [*line.get_xdata()] == [x]] for x in (0.75, 0.7))
    assert (half.get_fillstyle(), half.get_markerfacecolor()) == ("right", "#1e5ac8")
    assert half.get_markerfacecoloralt() == "white" and filled.get_fillstyle() == "full"
    assert ring.get_marker() == "o" and ring.get_markerfacecolor() == "none"
    # what was drawn lies inside of the panel
    assert all(axes.get_ylim()[0] < -2.0 and axes.get_ylim()[1] > 8.0 for axes in panels)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["curve", "x"]
    assert legend.get_title().get_text() == "a note"


def test_a_figure_grows_with_its_panels_and_legend(tmp_path):
    series = [Series(f"method {i}", f"C{i}", [at(0.1 * i, i)]) for i in range(11)]
    one, two, three = (plane_figure(dict.fromkeys("abc"[:count], series), "pollution") for count in (1, 2, 3))
    width, height = one.get_size_inches()
    assert two.get_size_inches()[0] == three.get_size_inches()[0] == 2 * width
    assert two.get_size_inches()[1] < height < three.get_size_inches()[1]
    one.savefig(tmp_path / "plane.png")
    assert (tmp_path / "plane.png").stat().st_size > 1000
