"""Pictures in rows and columns, with a line of headers."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw


def picture_grid(rows: Sequence[Sequence[Image.Image]], headers: Sequence[str]) -> Image.Image:
    """Lay out pictures of one size, each at least 192 pixels wide, under a line of headers.

    Args:
        rows: as many pictures a row as there are headers.
        headers: texts, one a column.

    Returns:
        An RGB image on white.

    Source: [ours].
    """
    factor = max(1, -(-192 // rows[0][0].width))
    width, height = rows[0][0].width * factor, rows[0][0].height * factor
    margin, top = 6, 22
    grid = Image.new(
        "RGB", (len(headers) * (width + margin) + margin, len(rows) * (height + margin) + margin + top), "white"
    )
    for column, header in enumerate(headers):
        ImageDraw.Draw(grid).text((margin + column * (width + margin), 6), header, fill="black")
    for i, row in enumerate(rows):
        for column, picture in enumerate(row):
            place = (margin + column * (width + margin), top + i * (height + margin))
            grid.paste(picture.resize((width, height), Image.Resampling.LANCZOS), place)
    return grid
