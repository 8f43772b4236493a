"""Tests of `spf_output.py`."""

import numpy as np
import pytest
from pipeline_world import BASE, OTHER, TARGET, draw

from pictures import captioned_pictures, overlay_heat_map


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_visualize_shows_everything_with_its_words(world, output_type, monkeypatch):
    shown = {}

    def remember(pictures, captions, columns):
        shown.update(captions=list(captions), pictures=list(pictures))
        return captioned_pictures(pictures, captions, columns)

    monkeypatch.setattr("pictures.captioned_pictures", remember)
    output = draw(
        world.ours, [BASE, OTHER], target_prompt=TARGET, compare=True, return_sfcm=True, output_type=output_type
    )
    picture = world.ours.visualize(output, 1)
    assert picture.mode == "RGB" and picture.width == 4 * 198 + 6
    distances = output.phrase_distances[1]
    captions = [f"a man ({distances[0]:.2f})", f"a purple hat ({distances[1]:.2f})"]
    assert shown["captions"] == ["original model", TARGET, "SFCM", f"{TARGET} (target)", *captions]
    images = draw(world.ours, [BASE, OTHER], target_prompt=TARGET, output_type="pil").images
    assert np.abs(np.asarray(shown["pictures"][1], int) - np.asarray(images[1], int)).max() <= 1
    assert shown["pictures"][4] == overlay_heat_map(shown["pictures"][0], output.phrase_maps[1, 0])


def test_visualize_of_less(world):
    assert world.ours.visualize(draw(world.ours, BASE, compare=True)).width == 2 * 198 + 6
    maps = draw(world.ours, BASE, return_sfcm=True)
    assert world.ours.visualize(maps, columns=9).width == 5 * 198 + 6
    with pytest.raises(ValueError, match="return_sfcm"):
        world.ours.visualize(draw(world.ours, BASE))
    with pytest.raises(ValueError, match="latent"):
        world.ours.visualize(draw(world.ours, BASE, compare=True, output_type="latent"))
    for index in (1, -1):
        with pytest.raises(IndexError, match=f"no image {index}: the output has 1"):
            world.ours.visualize(maps, index)
