"""The response-pollution plane: which rows lie on its Pareto front, and how it is drawn.

Legend: N rows, R resamples.
Source: [ours].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evaluation.measures import Estimate


PANEL = (4.7, 3.8)  # inches
# How a point's marker is filled, by the way to draw of a `Job`.
FILLS = {
    "": {},
    "guided": {"markerfacecolor": "white"},
    "late": {"fillstyle": "right", "markerfacecoloralt": "white"},
}


def pareto_front(response: np.ndarray, pollution: np.ndarray) -> np.ndarray:
    """Which rows (..., N) no other one dominates: responds as much, pollutes as little, and is better in either.

    Equal rows do not dominate each other.
    """
    more, less = response[..., None, :] - response[..., None], pollution[..., None] - pollution[..., None, :]
    dominated = (more >= 0) & (less >= 0) & ((more > 0) | (less > 0))
    return ~dominated.any(axis=-1)


def front_shares(response: np.ndarray, pollution: np.ndarray) -> np.ndarray:
    """(N,): in how many resamples each row is on the front, by its resampled means, (R, N) each."""
    return pareto_front(response, pollution).mean(axis=0)


@dataclass(frozen=True)
class Point:
    """A place in the plane; on the front it has a ring, and is joined to the others."""

    response: Estimate
    pollution: Estimate
    way: str = ""  # of `FILLS`
    on_front: bool = False

    @property
    def place(self) -> tuple[float, float]:
        return self.response.value, self.pollution.value


@dataclass(frozen=True)
class Series:
    """Points of one kind. A curve is joined by a thick line, other points, with their intervals, by a thin one."""

    label: str
    color: str
    points: list[Point]
    curve: bool = False
    marker: str = "o"

    @property
    def style(self) -> dict[str, object]:
        """As matplotlib has it."""
        width, size = (2, 5) if self.curve else (1, 7)
        return {"color": self.color, "linewidth": width, "marker": self.marker, "markersize": size}


def _draw_panel(axes: Axes, title: str, pollution: str, series: Sequence[Series]) -> None:
    """Response across and pollution up, so that what is wanted lies below and to the right."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlim=(-0.02, 1.02), xlabel="response", ylabel=pollution)
    axes.grid(color="0.91")
    axes.axhline(0, color="0.67", linewidth=1)
    front = sorted(point.place for line in series for point in line.points if point.on_front)
    axes.plot([x for x, _ in front], [y for _, y in front], color="0.8", linewidth=5, solid_capstyle="round", zorder=1)
    for line in series:
        thin = line.style | {"marker": None, "zorder": 2}
        axes.plot(*zip(*(point.place for point in line.points)), **thin)
        for point in line.points:
            x, y = point.place
            if not line.curve and point.response.low is not None:
                axes.plot((point.response.low, point.response.high), (y, y), **thin, alpha=0.5)
                axes.plot((x, x), (point.pollution.low, point.pollution.high), **thin, alpha=0.5)
            axes.plot(x, y, **line.style | FILLS[point.way], markeredgewidth=1.5, zorder=3)
            if point.on_front:
                axes.plot(x, y, "o", markersize=14, markerfacecolor="none", markeredgecolor="black", zorder=4)


def plane_figure(
    panels: dict[str, list[Series]], pollution: str, notes: Sequence[str] = (), columns: int = 2
) -> Figure:
    """Panels by title, with pollution as the vertical axis, and below one legend of all that they show, with notes."""
    columns = min(columns, len(panels))
    rows, labels = -(-len(panels) // columns), {}
    for line in (line for series in panels.values() for line in series):
        labels.setdefault(line.label, Line2D([], [], label=line.label, **line.style))
    below = 0.22 * (-(-len(labels) // columns) + len(notes)) + 0.2
    figure = Figure((columns * PANEL[0], rows * PANEL[1] + below), layout="constrained")
    drawn = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, series) in zip(drawn, panels.items(), strict=False):
        _draw_panel(axes, title, pollution, series)
    for axes in drawn[len(panels) :]:
        axes.set_axis_off()
    figure.legend(
        handles=[*labels.values()], loc="outside lower left", ncols=columns, frameon=False, fontsize=9,
        title="\n".join(notes) or None, title_fontsize=9, alignment="left",
    )  # fmt: skip
    return figure
