"""The response-pollution plane: which rows lie on its Pareto front, and how it is drawn.

Legend: N rows, P prompts, R resamples of the prompts.
Source: [ours].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont


SCALE = 2  # drawn at twice the size and shrunk, since PIL's lines are not antialiased
PANEL = (470, 380)
MARKERS = {"circle": 0, "square": 4, "diamond": 4, "triangle": 3, "pentagon": 5}
TURNS = {"square": math.pi / 4, "diamond": 0.0, "triangle": -math.pi / 2, "pentagon": -math.pi / 2}
Color = tuple[int, int, int]


# --------------------------------------------------------------------------------------------------------------- front


def pareto_front(response: np.ndarray, pollution: np.ndarray) -> np.ndarray:
    """Which rows no other row dominates: one that responds as much and pollutes as little, and is better in either.

    Args:
        response: (..., N), more is better.
        pollution: (..., N), less is better.

    Returns:
        (..., N) bool; equal rows do not dominate each other.

    Source: [ours].
    """
    more, less = response[..., None, :] - response[..., None], pollution[..., None] - pollution[..., None, :]
    dominated = (more >= 0) & (less >= 0) & ((more > 0) | (less > 0))
    return ~dominated.any(axis=-1)


def front_shares(response: np.ndarray, pollution: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """How often each row is on the front when the prompts are resampled, for all rows together.

    Args:
        response, pollution: (N, P).
        resamples: (R, P) indices of prompts.

    Returns:
        (N,) in [0, 1].

    Source: [ours].
    """
    means = [values[:, resamples].mean(axis=-1).T for values in (response, pollution)]
    return pareto_front(*means).mean(axis=0)


# ------------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Point:
    """A place in the plane.

    Attributes:
        response, pollution: its coordinates.
        response_ends, pollution_ends: the ends of their intervals; None draws no error bar.
        hollow: drawn as an outline.
        on_front: drawn with a ring, and joined to the other points of the front.
    """

    response: float
    pollution: float
    response_ends: tuple[float, float] | None = None
    pollution_ends: tuple[float, float] | None = None
    hollow: bool = False
    on_front: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one kind; a curve is joined by a thick line, other points that belong together by a thin one."""

    label: str
    color: Color
    points: list[Point]
    curve: bool = False
    marker: str = "circle"


def draw_marker(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, series: Series, hollow: bool) -> None:
    """A filled marker, and its inside white again if it is hollow."""
    fills = [(series.color, radius)] + ([("white", 0.55 * radius)] if hollow else [])
    for fill, reach in fills:
        if series.marker == "circle":
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)
            continue
        count, turn = MARKERS[series.marker], TURNS[series.marker]
        angles = [turn + 2 * math.pi * k / count for k in range(count)]
        # corners reach further than a circle of the same area
        pen.polygon([(x + 1.25 * reach * math.cos(a), y + 1.25 * reach * math.sin(a)) for a in angles], fill=fill)


def tick_step(span: float) -> float:
    """A round distance of ticks, about six to a span."""
    return next(step for step in (0.5, 1, 2, 4, 5, 10, 20, 50, 100) if span / step <= 8 or step == 100)


def _grid(pen, font, place_x, place_y, low: float, high: float) -> None:
    step = tick_step(high - low)
    for tick in np.linspace(0, 1, 6):
        pen.line((place_x(tick), place_y(low), place_x(tick), place_y(high)), fill=(232, 232, 232), width=SCALE)
        text = (place_x(tick), place_y(low) + 10 * SCALE)
        pen.text(text, f"{tick:.1f}", fill=(90, 90, 90), font=font, anchor="mm")
    for tick in np.arange(math.ceil(low / step) * step, high, step):
        shade = (170, 170, 170) if tick == 0 else (232, 232, 232)
        pen.line((place_x(0), place_y(tick), place_x(1), place_y(tick)), fill=shade, width=SCALE)
        pen.text((place_x(0) - 6 * SCALE, place_y(tick)), f"{tick:g}", fill=(90, 90, 90), font=font, anchor="rm")


def plane_panel(title: str, pollution: str, series: Sequence[Series], size: tuple[int, int] = PANEL) -> Image.Image:
    """Response across and pollution up, so that what is wanted lies below and to the right.

    Args:
        title: above the panel.
        pollution: what the vertical axis is.
        series: what is drawn, the first at the bottom.
        size: of the picture in pixels.
    """
    panel = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(size=12 * SCALE)
    left, right, top, bottom = 40 * SCALE, (size[0] - 14) * SCALE, 46 * SCALE, (size[1] - 40) * SCALE
    points = [point for line in series for point in line.points]
    ends = [end for point in points for end in (point.pollution, *(point.pollution_ends or ()))]
    low, high = min(0.0, min(ends)), max(0.0, max(ends))
    pad = 0.05 * (high - low or 1)
    low, high = low - (pad if low < 0 else 0), high + pad
    place_x = lambda response: left + (right - left) * response  # noqa: E731
    place_y = lambda value: bottom - (bottom - top) * (value - low) / (high - low)  # noqa: E731

    pen.text((4 * SCALE, 4 * SCALE), title, fill="black", font=ImageFont.load_default(size=13 * SCALE))
    pen.text((4 * SCALE, 24 * SCALE), pollution, fill=(90, 90, 90), font=font)
    pen.text(((left + right) / 2, bottom + 28 * SCALE), "response", fill=(90, 90, 90), font=font, anchor="mm")
    _grid(pen, font, place_x, place_y, low, high)
    front = sorted((point.response, point.pollution) for point in points if point.on_front)
    if len(front) > 1:
        pen.line([(place_x(x), place_y(y)) for x, y in front], fill=(205, 205, 205), width=5 * SCALE, joint="curve")
    for line in series:
        middle = [(place_x(point.response), place_y(point.pollution)) for point in line.points]
        if len(middle) > 1:
            pen.line(middle, fill=line.color, width=2 * SCALE if line.curve else SCALE)
        for (x, y), point in zip(middle, line.points, strict=True):
            pale = tuple((255 + channel) // 2 for channel in line.color)
            if point.response_ends is not None:
                first, last = (place_x(end) for end in point.response_ends)
                pen.line((first, y, last, y), fill=pale, width=SCALE)
            if point.pollution_ends is not None:
                first, last = (place_y(end) for end in point.pollution_ends)
                pen.line((x, first, x, last), fill=pale, width=SCALE)
    for line in series:
        for point in line.points:
            x, y = place_x(point.response), place_y(point.pollution)
            radius = (3 if line.curve else 4.5) * SCALE
            if point.on_front:
                ring = radius + 4 * SCALE
                pen.ellipse((x - ring, y - ring, x + ring, y + ring), outline="black", width=round(1.2 * SCALE))
            draw_marker(pen, x, y, radius, line, point.hollow)
    return panel.resize(size, Image.Resampling.LANCZOS)


def legend(series: Sequence[Series], width: int, notes: Sequence[str] = ()) -> Image.Image:
    """The series' markers and labels in columns, and a line for each note."""
    font = ImageFont.load_default(size=12 * SCALE)
    widest = max(font.getlength(line.label) for line in series) / SCALE + 44
    columns = max(1, int(width // widest))
    rows = -(-len(series) // columns)
    picture = Image.new("RGB", (width * SCALE, (12 + 20 * (rows + len(notes))) * SCALE), "white")
    pen = ImageDraw.Draw(picture)
    for place, line in enumerate(series):
        column, row = divmod(place, rows)
        x, y = (18 + column * width / columns) * SCALE, (14 + 20 * row) * SCALE
        if line.curve:
            pen.line((x - 10 * SCALE, y, x + 10 * SCALE, y), fill=line.color, width=2 * SCALE)
        draw_marker(pen, x, y, 4.5 * SCALE, line, hollow=False)
        pen.text((x + 16 * SCALE, y), line.label, fill="black", font=font, anchor="lm")
    for place, note in enumerate(notes):
        y = (14 + 20 * (rows + place)) * SCALE
        pen.text((8 * SCALE, y), note, fill=(90, 90, 90), font=font, anchor="lm")
    return picture.resize((width, picture.height // SCALE), Image.Resampling.LANCZOS)


def plane_picture(
    panels: dict[str, list[Series]], pollution: str, notes: Sequence[str] = (), columns: int = 2
) -> Image.Image:
    """Panels in rows, and one legend of all that they show below.

    Args:
        panels: by title, what each shows.
        pollution: what the vertical axis is.
        notes: lines below the legend.
        columns: panels in a row.
    """
    drawn = [plane_panel(title, pollution, series) for title, series in panels.items()]
    columns = min(columns, len(drawn))
    labels: dict[str, Series] = {}
    for line in (line for series in panels.values() for line in series):
        labels.setdefault(line.label, line)
    below = legend(list(labels.values()), columns * PANEL[0], notes)
    rows = -(-len(drawn) // columns)
    picture = Image.new("RGB", (columns * PANEL[0], rows * PANEL[1] + below.height), "white")
    for place, panel in enumerate(drawn):
        picture.paste(panel, (place % columns * PANEL[0], place // columns * PANEL[1]))
    picture.paste(below, (0, rows * PANEL[1]))
    return picture
