"""The pollution report on disk: one HTML file that needs nothing else, tables for machines, and the plot.

Everything is written from one document, so that page and tables cannot disagree:

    loras: a list of {name, source, role, flags, measures: {measure: {value, low, high}}, pictures: their folder}, the
        original model first
    measures: {measure: {label, group, direction, about}}, in the order of the tables
    not_computed: {measure: reason}
    verdict: one line; keep: the checkpoint to keep, or None
    response_measure, pollution_unit, pollution_note, region, settings, prompts, seeds, rank_correlations

Source: [ours].
"""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from programs.writing import whole


GROUPS = {
    "pollution": "Pollution",
    "response": "Response: is the target there?",
    "preservation": "Preservation: is it still the same portrait?",
    "truth": "Truth, as the toy world's probe reads it",
}
FLAGS = {
    "over-aligned": "Hardly anything moved, but the target is not there either: preserved for want of a response.",
    "no response": "The target shows no more often than with the original model.",
}
THUMBNAIL = 256  # pixels of a picture's longer side in the page, at most; small ones are enlarged by the browser
COLORS = {"original": (110, 110, 110), "reference": (196, 70, 44), "lora": (30, 90, 200), "checkpoint": (20, 130, 90)}
CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; background: #fafbfc; max-width: 1120px;
  margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 8px; }
p { margin: 6px 0; } .quiet { color: #5b6676; font-size: 13px; }
.verdict { background: #e9f1ff; border-left: 4px solid #1e5ac8; padding: 10px 14px; border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; background: white; font-variant-numeric: tabular-nums; margin: 6px 0; }
th, td { border: 1px solid #dfe4ea; padding: 5px 8px; text-align: right; vertical-align: top; }
th { background: #f1f4f7; font-weight: 600; max-width: 120px; vertical-align: bottom; }
th:first-child, td:first-child, td.text { text-align: left; } td:first-child, .flag { white-space: nowrap; }
.top { display: flex; flex-wrap: wrap; gap: 16px 28px; align-items: flex-start; margin-top: 14px; }
.top > div { min-width: 0; max-width: 620px; } .top img { max-width: 100%; }
td small { display: block; font-size: 12px; color: #5b6676; white-space: nowrap; } td.missing { color: #8a94a3; }
tr.keep td { background: #eaf7ef; }
.flag { display: inline-block; background: #fdeceb; color: #a3261b; border-radius: 3px; padding: 0 6px; }
.pictures { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 6px 8px; max-width: 860px; }
.pictures .row { grid-column: 1 / -1; color: #5b6676; font-size: 13px; margin-top: 8px; }
.pictures .head { font-weight: 600; font-size: 13px; }
.pictures img { width: 100%; display: block; border-radius: 3px; }
.small img { image-rendering: pixelated; }
details > summary { cursor: pointer; font-weight: 600; margin: 10px 0 6px; }
"""


@dataclass(frozen=True)
class PictureRow:
    """Pictures of one prompt and seed under `PICTURE_HEADERS`, and what is written over them."""

    caption: str
    pictures: Sequence[Image.Image]


PICTURE_HEADERS = ("original, base prompt", "adapted, base prompt", "adapted, full prompt", "SFCM")


def format_number(value: float | None) -> str:
    """Three decimals, or a dash where there is no number. Source: [ours]."""
    # Rounded to zero, a small negative number would keep its sign.
    return "–" if value is None else f"{round(value, 3) + 0.0:.3f}"


def without_nan(value: Any) -> Any:
    """The same for JSON, which has no NaN: None instead. Source: [ours]."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -------------------------------------------------------------------------------------------------------------- tables


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write the document. Source: [ours]."""
    _write_whole(path, json.dumps(without_nan(document), indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, document: Mapping[str, Any]) -> None:
    """Write a line for each LoRA and measure; what is not computed has no value but a reason. Source: [ours]."""
    lines = []
    for lora in document["loras"]:
        for name in document["measures"]:
            estimate = lora["measures"].get(name, {"value": None, "low": None, "high": None})
            reason = document["not_computed"].get(name, "")
            lines.append({"lora": lora["name"], "role": lora["role"], "measure": name, **estimate, "reason": reason})
    write_lines(path, lines)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write lines of equal columns as CSV; None and NaN are empty. Source: [ours]."""
    file = StringIO()
    writer = csv.DictWriter(file, list(lines[0]))
    writer.writeheader()
    writer.writerows(without_nan(list(lines)))
    _write_whole(path, file.getvalue())


def _write_whole(path: Path, text: str) -> None:
    with whole(path) as file:
        file.write_text(text, encoding="utf-8", newline="")


# ---------------------------------------------------------------------------------------------------------------- plot


def response_plot(document: Mapping[str, Any], size: tuple[int, int] = (460, 340)) -> Image.Image | None:
    """Response over pollution with their intervals; checkpoints are joined, and the one to keep has a ring.

    Returns:
        An RGB image, or None where one of the two was not computed.

    Source: [ours].
    """
    across, up = "pollution", document["response_measure"]
    points = [
        (lora, lora["measures"][across], lora["measures"][up])
        for lora in document["loras"]
        if up is not None and across in lora["measures"] and up in lora["measures"]
    ]
    if not points:
        return None
    scale = 2  # drawn at twice the size and shrunk, since PIL's lines are not antialiased
    panel = Image.new("RGB", (size[0] * scale, size[1] * scale), "white")
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(size=12 * scale)
    left, right, top, bottom = 60 * scale, (size[0] - 20) * scale, 20 * scale, (size[1] - 46) * scale
    place_x = _Axis([estimate for _, estimate, _ in points], left, right)
    place_y = _Axis([estimate for _, _, estimate in points], bottom, top)
    for tick, x in place_x.ticks():
        pen.line((x, top, x, bottom), fill=(232, 232, 232), width=scale)
        pen.text((x, bottom + 12 * scale), tick, fill=(90, 90, 90), font=font, anchor="mm")
    for tick, y in place_y.ticks():
        pen.line((left, y, right, y), fill=(232, 232, 232), width=scale)
        pen.text((left - 8 * scale, y), tick, fill=(90, 90, 90), font=font, anchor="rm")
    label = f"pollution ({document['pollution_unit']})"
    pen.text(((left + right) / 2, bottom + 34 * scale), label, fill="black", font=font, anchor="mm")
    response = document["measures"][up]["label"]
    pen.text((left, 9 * scale), f"response ({response})", fill="black", font=font, anchor="lm")

    places = [(lora, place_x(x["value"]), place_y(y["value"])) for lora, x, y in points]
    joined = [(x, y) for lora, x, y in places if lora["role"] in ("original", "checkpoint")]
    if any(lora["role"] == "checkpoint" for lora, _, _ in places):
        pen.line(joined, fill=(150, 200, 178), width=2 * scale)
    for (lora, x, y), (_, wide, tall) in zip(places, points):
        color = COLORS[lora["role"]]
        if wide["low"] is not None:
            pen.line((place_x(wide["low"]), y, place_x(wide["high"]), y), fill=color, width=scale)
        if tall["low"] is not None:
            pen.line((x, place_y(tall["low"]), x, place_y(tall["high"])), fill=color, width=scale)
        pen.ellipse(_around(x, y, 4 * scale), fill=color)
        if lora["name"] == document["keep"]:
            pen.ellipse(_around(x, y, 9 * scale), outline=color, width=2 * scale)
    _write_names(pen, font, [(lora["name"], COLORS[lora["role"]], x, y) for lora, x, y in places], left, right, scale)
    return panel.resize(size, Image.Resampling.LANCZOS)


def _write_names(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    points: Sequence[tuple[str, tuple[int, int, int], float, float]],
    left: float,
    right: float,
    scale: int,
) -> None:
    """Each name beside its point, in the first of the places around it that no other name or point has."""
    taken = [_around(x, y, 5 * scale) for _, _, x, y in points]
    for name, color, x, y in points:
        boxes = []
        for row in (0, 1, -1, 2, -2, 3, -3):
            for anchor, step in (("lm", 8), ("rm", -8)):
                place = (x + step * scale, y + (14 * row - 9) * scale)
                box = pen.textbbox(place, name, font=font, anchor=anchor)
                crossed = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
                crossed += 100 * (box[0] < left or box[2] > right)
                boxes.append((crossed, len(boxes), place, anchor, box))
        _, _, place, anchor, box = min(boxes)
        taken.append(box)
        pen.text(place, name, fill=color, font=font, anchor=anchor)


class _Axis:
    """Places numbers between two ends of a plot, with some room beyond the outermost."""

    def __init__(self, estimates: Sequence[Mapping[str, float | None]], start: float, end: float) -> None:
        ends = [number for e in estimates for number in e.values() if number is not None] + [0.0]
        room = 0.08 * (max(ends) - min(ends)) or 1.0
        self.low, self.high, self.start, self.end = min(ends) - room, max(ends) + room, start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[str, float]]:
        """About five round numbers and their places."""
        rough = (self.high - self.low) / 5
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough)
        first = math.ceil(self.low / step)
        values = [step * i for i in range(first, math.floor(self.high / step) + 1)]
        decimals = max(0, -math.floor(math.log10(step)))
        return [(f"{value + 0.0:.{decimals}f}", self(value)) for value in values]


def _around(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return (x - radius, y - radius, x + radius, y + radius)


# ---------------------------------------------------------------------------------------------------------------- page


def write_html(
    path: Path,
    document: Mapping[str, Any],
    pictures: Iterable[tuple[str, Sequence[PictureRow]]],
    plot: Image.Image | None,
) -> None:
    """Write the report as one page without scripts that loads nothing from anywhere.

    Args:
        path: the file.
        document: as above.
        pictures: of each LoRA its name and some rows; only those of one are looked at at a time.
        plot: of `response_plot`.

    Source: [ours].
    """
    document = without_nan(document)
    settings = document["settings"]
    parts = [
        "<h1>Is my LoRA clean?</h1>",
        f'<p class="quiet">{escape(settings["pretrained_model_name_or_path"])}; prompts: {len(document["prompts"])}, '
        f"seeds of each: {len(document['seeds'])}, {settings['num_inference_steps']} steps, guidance scale "
        f"{settings['guidance_scale']:g}. Below each number its 95 % interval, from {settings['num_resamples']} "
        "resamples of the prompts.</p>",
        f'<p class="verdict">{escape(document["verdict"])}</p>',
        '<div class="top"><div>' + _summary(document) + "</div>",
    ]
    if plot is not None:
        parts.append(f'<img alt="response over pollution" width="{plot.width}" src="{_data_url(plot)}">')
    parts.append("</div>")
    for group, heading in GROUPS.items():
        names = [name for name, measure in document["measures"].items() if measure["group"] == group]
        parts += [_group(document, heading, names)] if names else []
    parts += [_correlations(document), _missing(document), "<h2>Pictures</h2>"]
    for i, (name, rows) in enumerate(pictures):
        is_open = " open" if i < 3 else ""
        parts.append(f"<details{is_open}><summary>{escape(name)}</summary>{_pictures(rows)}</details>")
    parts += [_prompts(document), _settings(settings)]
    body = "\n".join(part for part in parts if part)
    _write_whole(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Is my LoRA clean?</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n",
    )


def _table(header: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{escape(text)}</th>" for text in header)
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(rows)}</table></div>'


def _number_cell(estimate: Mapping[str, float | None] | None, measure: str) -> str:
    """A number with its interval below, both as they stand in metrics.json too."""
    if estimate is None or estimate["value"] is None:
        return '<td class="missing">–</td>'
    ends = ""
    if estimate["low"] is not None:
        ends = f"<small>{format_number(estimate['low'])} to {format_number(estimate['high'])}</small>"
    value = format_number(estimate["value"])
    return f'<td data-measure="{measure}" data-value="{estimate["value"]!r}">{value}{ends}</td>'


def _row(document: Mapping[str, Any], lora: Mapping[str, Any], names: Sequence[str], last: str = "") -> str:
    keep = ' class="keep"' if lora["name"] == document["keep"] else ""
    cells = "".join(_number_cell(lora["measures"].get(name), name) for name in names)
    return f'<tr{keep} data-lora="{escape(lora["name"])}"><td>{escape(lora["name"])}</td>{cells}{last}</tr>'


def _summary(document: Mapping[str, Any]) -> str:
    leak = "truth_leak" if "truth_leak" in document["measures"] else "leak"
    names = [name for name in ("pollution", document["response_measure"], leak) if name in document["measures"]]
    rows = []
    for lora in document["loras"]:
        flags = "".join(f'<span class="flag">{escape(flag)}</span>' for flag in lora["flags"]) or "–"
        rows.append(_row(document, lora, names, f'<td class="text">{flags}</td>'))
    header = ["", *(document["measures"][name]["label"] for name in names), "flag"]
    raised = dict.fromkeys(flag for lora in document["loras"] for flag in lora["flags"])
    notes = [document["pollution_note"], *(f"{flag}: {FLAGS[flag]}" for flag in raised)]
    return _table(header, rows) + "".join(f'<p class="quiet">{escape(note)}</p>' for note in notes)


def _group(document: Mapping[str, Any], heading: str, names: Sequence[str]) -> str:
    computed = [name for name in names if name not in document["not_computed"]]
    parts = [f"<h2>{escape(heading)}</h2>"]
    if computed:
        arrows = {"higher": "↑", "lower": "↓"}
        labels = {name: document["measures"][name] for name in computed}
        header = ["", *(f"{measure['label']}\u00a0{arrows[measure['direction']]}" for measure in labels.values())]
        parts.append(_table(header, [_row(document, lora, computed) for lora in document["loras"]]))
        about = [f"<b>{escape(measure['label'])}</b>: {escape(measure['about'])}" for measure in labels.values()]
        parts.append(f'<p class="quiet">{" ".join(about)}</p>')
    if names[0] == "change":
        parts.append(f'<p class="quiet">{escape(document["region"])}</p>')
    return "\n".join(parts)


def _correlations(document: Mapping[str, Any]) -> str:
    found = document["rank_correlations"]
    if not found:
        return ""
    labels = document["measures"]
    rows = []
    for row in found:
        proxy, truth = (escape(labels[row[name]]["label"]) for name in ("proxy", "truth"))
        value = format_number(row["spearman"])
        rows.append(f"<tr><td>{proxy}</td><td>{truth}</td><td>{value}</td></tr>")
    return (
        "<h2>Do the measures order the LoRAs as the truth does?</h2>"
        + _table(["measure", "truth", "Spearman"], rows)
        + f'<p class="quiet">Over {found[0]["loras"]} LoRAs. Where less of the one and more of the other is better, '
        "-1 is the best.</p>"
    )


def _missing(document: Mapping[str, Any]) -> str:
    missing = document["not_computed"]
    if not missing:
        return ""
    labels = document["measures"]
    items = [f"<li><b>{escape(labels[name]['label'])}</b>: {escape(why)}</li>" for name, why in missing.items()]
    return f"<h2>Not computed</h2><ul>{''.join(items)}</ul>"


def _pictures(rows: Sequence[PictureRow]) -> str:
    small = " small" if max(rows[0].pictures[0].size) < THUMBNAIL else ""
    cells = [f'<div class="head">{escape(text)}</div>' for text in PICTURE_HEADERS]
    for row in rows:
        cells.append(f'<div class="row">{escape(row.caption)}</div>')
        for text, picture in zip(PICTURE_HEADERS, row.pictures, strict=True):
            cells.append(f'<img alt="{escape(text)}" src="{_thumbnail_url(picture)}">')
    return f'<div class="pictures{small}">{"".join(cells)}</div>'


def _prompts(document: Mapping[str, Any]) -> str:
    rows = [
        "<tr>" + "".join(f'<td class="text">{escape(prompt[key])}</td>' for key in prompt) + "</tr>"
        for prompt in document["prompts"]
    ]
    return f"<details><summary>Prompts</summary>{_table(list(document['prompts'][0]), rows)}</details>"


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [
        f'<tr><td>--{escape(name)}</td><td class="text">{escape(str(value))}</td></tr>'
        for name, value in settings.items()
        if value is not None
    ]
    return f"<details><summary>Settings</summary>{_table(['flag', 'value'], rows)}</details>"


def _data_url(picture: Image.Image) -> str:
    """A picture inside the page, whole, without loss."""
    buffer = BytesIO()
    picture.convert("RGB").save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _thumbnail_url(picture: Image.Image) -> str:
    """The same of a portrait, which is made smaller, and lossy, where it is large."""
    if max(picture.size) <= THUMBNAIL:
        return _data_url(picture)
    smaller, buffer = picture.convert("RGB"), BytesIO()
    smaller.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    smaller.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
