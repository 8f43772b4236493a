"""Pictures side by side, under headers or captions, and heat maps over them. [ours]

Legend: h/w size of a map.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


# Evenly spaced RGB colours of the heat map; each is lighter than the one before, so it also reads in black and white.
HEAT_COLORS = ((20, 16, 60), (74, 40, 132), (176, 58, 118), (242, 128, 68), (255, 238, 150))


def picture_grid(rows: Sequence[Sequence[Image.Image]], headers: Sequence[str]) -> Image.Image:
    """Lay out rows of pictures of one size as `captioned_pictures`, under a line of headers."""
    pictures = [picture for row in rows for picture in row]
    return captioned_pictures(pictures, [*headers, *[""] * (len(pictures) - len(headers))], len(headers))


def captioned_pictures(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 4) -> Image.Image:
    """Lay out pictures of one size, each at least 192 pixels wide, in rows, with a caption of its own over each.

    Captions are broken into lines at spaces where they are wider than the picture; a row of none has no place for
    them. The image is RGB on white.
    """
    factor = max(1, -(-192 // pictures[0].width))
    width, height = pictures[0].width * factor, pictures[0].height * factor
    font, margin, count = ImageFont.load_default(14), 6, min(columns, len(pictures))
    broken = [_break_lines(caption, font, width) for caption in captions]
    band = 18 * max(text.count("\n") + 1 for text in broken)
    bands = [band * any(broken[start : start + count]) for start in range(0, len(pictures), count)]
    rows = [margin]
    for own in bands:
        rows.append(rows[-1] + own + height + margin)
    sheet = Image.new("RGB", (count * (width + margin) + margin, rows[-1]), "white")
    for i, (picture, text) in enumerate(zip(pictures, broken, strict=True)):
        left, upper = margin + i % count * (width + margin), rows[i // count]
        ImageDraw.Draw(sheet).multiline_text((left, upper - 4), text, fill="black", font=font)
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, upper + bands[i // count]))
    return sheet


def _break_lines(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def overlay_heat_map(image: Image.Image, heat_map: torch.Tensor | np.ndarray, opacity: float = 0.6) -> Image.Image:
    """Lay a map (h, w) in [0, 1], resized bilinearly, over the greyed image, dark blue for 0 to pale yellow for 1.

    `opacity` is the share of the map's colour in the RGB result, in [0, 1].

    Raises ValueError: the map is not two-dimensional, or leaves [0, 1].
    """
    values = np.asarray(heat_map.detach().float().cpu() if torch.is_tensor(heat_map) else heat_map, dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"`heat_map` has to be (h, w) but has the shape {values.shape}.")
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"`heat_map` has to be in [0, 1] but reaches from {values.min()} to {values.max()}.")
    resized = np.asarray(Image.fromarray(values).resize(image.size, Image.Resampling.BILINEAR))
    channels = [np.interp(resized, np.linspace(0, 1, len(HEAT_COLORS)), channel) for channel in zip(*HEAT_COLORS)]
    grey = np.asarray(image.convert("RGB").convert("L"), dtype=np.float32)[..., None]
    blended = (1 - opacity) * grey + opacity * np.stack(channels, axis=-1)
    return Image.fromarray(blended.round().clip(0, 255).astype(np.uint8))
