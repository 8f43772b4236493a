"""Tests of `pictures.py`."""

import numpy as np
import pytest
import torch
from PIL import Image

from pictures import captioned_pictures, overlay_heat_map, picture_grid


RED, BLUE = (200, 30, 30), (20, 40, 220)


def test_a_grid_has_a_place_for_every_picture():
    rows = [[Image.new("RGB", (64, 96), colour) for colour in row] for row in ((RED, BLUE), (BLUE, RED))]
    grid = picture_grid(rows, ("first", "second"))
    colours = [grid.getpixel((100 + x * 198, 150 + y * 294)) for y in range(2) for x in range(2)]
    assert colours == [RED, BLUE, BLUE, RED]


def test_captions_stand_over_their_pictures_and_are_broken_where_they_are_too_wide():
    pictures = [Image.new("RGB", (192, 192), colour) for colour in (RED, BLUE, RED)]
    many = "a caption of very many words, more than fit into one line or into two"
    sheet = captioned_pictures(pictures, ["one", many, "three"], 2)
    short = captioned_pictures(pictures, ["one", "two", "three"], 2)
    line = 18
    assert sheet.width == short.width == 2 * (192 + 6) + 6
    assert sheet.height == short.height + 2 * 2 * line  # three lines instead of one, in both rows
    assert sheet.getpixel((50, 6 + 3 * line + 50)) == RED and sheet.getpixel((250, 6 + 3 * line + 50)) == BLUE
    written = np.asarray(sheet.convert("L"))[: 3 * line]
    assert (written[:, :198] < 128).any() and (written[2 * line :, 198:] < 128).any()
    assert (written[line:, :198] > 200).all()


def test_small_pictures_are_enlarged_and_a_row_is_no_wider_than_it_has_pictures():
    sheet = captioned_pictures([Image.new("RGB", (64, 64), RED)], ["one"], columns=4)
    assert sheet.size == (192 + 2 * 6, 192 + 2 * 6 + 18)


def test_overlay_is_brighter_where_the_map_is_higher():
    image = Image.new("RGB", (20, 12), RED)
    overlay = overlay_heat_map(image, torch.tensor([[0.0, 1.0]]))
    assert overlay.size == (20, 12) and overlay.mode == "RGB"
    luma = np.asarray(overlay.convert("L"), dtype=int)
    assert (np.diff(luma, axis=1) >= 0).all() and luma[0, -1] - luma[0, 0] > 100
    assert overlay == overlay_heat_map(image, np.array([[0.0, 1.0]]))
    # The image is greyed: its colour does not matter where its brightness is the same.
    grey = image.convert("L").convert("RGB")
    assert overlay_heat_map(image, torch.zeros(2, 2)) == overlay_heat_map(grey, np.zeros((2, 2)))
    assert overlay_heat_map(image, torch.zeros(3, 3), opacity=0.0) == grey


@pytest.mark.parametrize("heat_map", [torch.zeros(1, 4, 4), torch.full((4, 4), 1.1), torch.full((4, 4), float("nan"))])
def test_overlay_refuses_what_is_no_map(heat_map):
    with pytest.raises(ValueError, match="heat_map"):
        overlay_heat_map(Image.new("RGB", (8, 8)), heat_map)
