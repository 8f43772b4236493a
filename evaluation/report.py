"""The pollution report on disk: one HTML file that needs nothing else, tables for machines, and the plot. [ours]

Everything is written from one document, so that page and tables cannot disagree:

    loras: a list of {name, source, role, flags, measures: {measure: {value, low, high}}, pictures: their folder}, the
        original model first
    measures: {measure: {label, group, direction, about}}, in the order of the tables
    not_computed: {measure: reason}
    verdict: one line; keep: the checkpoint to keep, or None
    response_measure, pollution_unit, pollution_note, region, settings, prompts, seeds, rank_correlations
"""

import base64
import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from PIL import Image

from evaluation.drawing import open_arrays, open_portraits
from pictures import overlay_heat_map
from programs.console import without_warning
from programs.loading import naming
from programs.writing import whole
from prompts import PromptPair


MEANS, PORTRAITS, NUMBERS, PAGE, PLOT = "metrics.csv", "portraits.csv", "metrics.json", "report.html", "response.png"
THUMBNAIL = 256  # pixels of a picture's longer side in the page, at most; small ones are enlarged by the browser
COLORS = {"original": "#6e6e6e", "reference": "#c4462c", "lora": "#1e5ac8", "checkpoint": "#14825a"}
NAME_LENGTH = 28  # of a LoRA in the plot, at most
PICTURE_HEADERS = ("original, base prompt", "adapted, base prompt", "adapted, full prompt", "SFCM")


class PictureRow(NamedTuple):
    """Pictures of one prompt and seed under `PICTURE_HEADERS`, and what is written over them."""

    caption: str
    pictures: Sequence[Image.Image]


def format_number(value: float | None) -> str:
    """Three decimals, or a dash where there is no number."""
    # Rounded to zero, a small negative number would keep its sign.
    return "–" if value is None else f"{round(value, 3) + 0.0:.3f}"


def without_nan(value: Any) -> Any:
    """The same for JSON, which has no NaN: None instead."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prepare_folder(folder: Path) -> None:
    """The output folder, without what an evaluation that did not come to measuring drew into it.

    Raises InputError: it cannot be made, or holds measures, which were hours of work and are of other portraits.
    """
    with naming(f"--output_dir {folder}"):
        for name in (MEANS, PORTRAITS, NUMBERS, PAGE):
            if (folder / name).exists():
                raise ValueError(f"holds {name} of an earlier evaluation: give another folder, or delete this one")
        folder.mkdir(parents=True, exist_ok=True)
        for picture in (folder / "pictures").glob("[0-9][0-9]*-*/p[0-9]*-s[0-9]*-*.*"):
            picture.unlink()


def write_tables(folder: Path, document: Mapping[str, Any], portraits: Sequence[Mapping[str, Any]]) -> None:
    """A CSV table with a line for each LoRA and measure, with a reason where it has no value, and one of portraits."""
    lines = []
    for lora in document["loras"]:
        for name in document["measures"]:
            estimate = lora["measures"].get(name, {"value": None, "low": None, "high": None})
            reason = document["not_computed"].get(name, "")
            lines.append({"lora": lora["name"], "role": lora["role"], "measure": name, **estimate, "reason": reason})
    for name, table in ((MEANS, lines), (PORTRAITS, portraits)):
        file = StringIO()
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(without_nan(list(table)))
        _write_whole(folder / name, file.getvalue())


def write_report(
    folder: Path, document: Mapping[str, Any], pictures: Iterable[tuple[str, Sequence[PictureRow]]]
) -> None:
    """Write the plot, the document, and the page. `pictures` are each LoRA's name and rows, looked at one by one."""
    plot = response_plot(document)
    if plot is not None:
        plot.save(folder / PLOT)
    document = without_nan(document)
    _write_whole(folder / NUMBERS, json.dumps(document, indent=2, allow_nan=False) + "\n")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"number": format_number, "address": _address}
    page = environment.get_template("report.html.jinja")
    more = {"pictures": pictures, "plot": plot, "headers": PICTURE_HEADERS, "thumbnail_size": THUMBNAIL}
    _write_whole(folder / PAGE, page.render(document, **more))


def _write_whole(path: Path, text: str) -> None:
    with whole(path) as file:
        file.write_text(text, encoding="utf-8", newline="")


def response_plot(document: Mapping[str, Any]) -> Image.Image | None:
    """Response over pollution with their intervals; checkpoints are joined, and the one to keep has a ring.

    An RGB image at twice the size at which the page shows it, or None where one of the two was not computed.
    """
    response = document["response_measure"]
    points = []
    for lora in without_nan(document["loras"]):
        across, up = lora["measures"].get("pollution"), lora["measures"].get(response)
        if across and up and None not in (across["value"], up["value"]):
            points.append((lora, across, up))
    if not points:
        return None
    figure = Figure((4.6, 3.4), dpi=200, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    axes.set_xlabel(f"pollution ({document['pollution_unit']})", fontsize=9, parse_math=False)
    axes.set_ylabel(f"response ({document['measures'][response]['label']})", fontsize=9, parse_math=False)
    axes.tick_params(colors="#5a5a5a", labelsize=8, length=0)
    axes.grid(color="#e8e8e8")
    axes.spines[:].set_visible(False)
    axes.margins(0.08)
    run = [(x["value"], y["value"]) for lora, x, y in points if lora["role"] in ("original", "checkpoint")]
    if any(lora["role"] == "checkpoint" for lora, _, _ in points):
        axes.plot(*zip(*run), color="#96c8b2", linewidth=2)
    named = []
    for lora, x, y in points:
        color = COLORS[lora["role"]]
        for line, across, ends in ((axes.hlines, y, x), (axes.vlines, x, y)):
            if ends["low"] is not None:
                line(across["value"], ends["low"], ends["high"], color=color, linewidth=1)
        axes.plot(x["value"], y["value"], "o", color=color, markersize=5.5)
        if lora["name"] == document["keep"]:
            axes.plot(x["value"], y["value"], "o", markersize=12, mfc="none", mec=color, mew=1.5)
        named.append((lora["name"], color, x["value"], y["value"]))
    # A LoRA may be called by letters that the font has not.
    with without_warning("Glyph"):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # names do not move the axes
        _write_names(axes, canvas, named)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _write_names(axes: Axes, canvas: FigureCanvasAgg, points: Sequence[tuple[str, str, float, float]]) -> None:
    """Each name beside its point, in the first of the places around it that no other name or point has."""
    renderer = canvas.get_renderer()
    centres = axes.transData.transform([point[2:] for point in points])
    taken = [Bbox([centre - 11, centre + 11]) for centre in centres]
    halo = [withStroke(linewidth=2, foreground="white")]
    for name, color, x, y in points:
        short = name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
        style = {"color": color, "fontsize": 8, "parse_math": False, "path_effects": halo}
        text = axes.annotate(short, (x, y), (0, 0), textcoords="offset points", va="center", **style)
        choices = []
        for row in (0, 1, -1, 2, -2, 3, -3):
            for side, align in ((1, "left"), (-1, "right")):
                text.set(position=(6 * side, 6 - 9 * row), ha=align)
                box = text.get_window_extent(renderer)
                outside = box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1
                crossed = 100 * outside + sum(box.overlaps(other) for other in taken)
                choices.append((crossed, len(choices), text.get_position(), align, box))
        _, _, place, align, box = min(choices)
        text.set(position=place, ha=align)
        taken.append(box)


def picture_rows(
    pairs: Sequence[PromptPair], names: Sequence[str], original: Path, adapted: Path, count: int
) -> list[PictureRow]:
    """The first seeds of as many prompts as possible, that many rows, of the original model's folder and a LoRA's."""
    seeds = len(names) // len(pairs)
    rows = []
    for i in sorted(sorted(range(len(names)), key=lambda i: (i % seeds, i))[:count]):
        before, after = (open_portraits(folder, names[i : i + 1]) for folder in (original, adapted))
        shown = [Image.fromarray(pictures[0]) for pictures in (before.base, after.base, after.full)]
        shown.append(overlay_heat_map(shown[-1], open_arrays(adapted, names[i : i + 1])[0]))
        rows.append(PictureRow(f"{names[i]}: {pairs[i // seeds].full_prompt}", shown))
    return rows


def _address(picture: Image.Image, longest: float = math.inf) -> str:
    """A picture inside the page, whole and without loss; where a side is longer than this, smaller and lossy."""
    picture, buffer = picture.convert("RGB"), BytesIO()
    is_small = max(picture.size) <= longest
    if not is_small:
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    kind, options = ("png", {"optimize": True}) if is_small else ("jpeg", {"quality": 90})
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
