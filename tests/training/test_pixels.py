"""Tests of what a picture becomes, and of the sizes it can have."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from training.flags import INTERPOLATION_MODES
from training.pixels import nearest_bucket, parse_aspect_ratio_buckets, preprocess_image


def test_pixels_are_scaled_to_plus_and_minus_one():
    image = Image.new("RGB", (2, 2))
    image.putpixel((1, 0), (255, 51, 0))
    pixels = preprocess_image(image, (2, 2))
    assert pixels.shape == (3, 2, 2) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    torch.testing.assert_close(pixels[:, 0, 1], torch.tensor([1, 51 / 127.5 - 1, -1]))
    torch.testing.assert_close(pixels[:, 1, 0], torch.full((3,), -1.0))


@pytest.mark.parametrize("size", [(30, 10), (10, 30)])
def test_the_centre_is_cropped(size):
    """A red middle square between blue sides; nothing of the sides is left, and nothing of the middle lost."""
    image = Image.new("RGB", size, "blue")
    corner = ((size[0] - 10) // 2, (size[1] - 10) // 2)
    image.paste("red", (*corner, corner[0] + 10, corner[1] + 10))
    image.putpixel(corner, (0, 255, 0))
    pixels = preprocess_image(image, (10, 10))
    assert pixels[:, 0, 0].tolist() == [-1, 1, -1]
    assert pixels[:, 1:, :].flatten(1).unique(dim=1).tolist() == [[1], [-1], [-1]]


@pytest.mark.parametrize("size", [(3, 3), (5, 9), (200, 100), (1, 40_000)])
def test_any_size_is_fitted(size):
    image = Image.new("RGB", size, (255, 255, 255))
    for height, width in ((16, 16), (24, 8), (7, 40)):
        pixels = preprocess_image(image, (height, width), centering=(1.0, 1.0))
        assert pixels.shape == (3, height, width)
        assert (pixels == 1).all()


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def unchanged(image: Image.Image, box: tuple[int, int, int, int]) -> torch.Tensor:
    """The pixels of a part of the image, in [-1, 1] without any resize."""
    return torch.tensor(np.array(image.crop(box))).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("centering", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5), (0.25, 0.75)])
@pytest.mark.parametrize("size", [(12, 20), (12, 12)])
def test_the_crop_lies_where_it_should(centering, size):
    """The image is as high, or as wide, as the size, so that nothing but the crop happens."""
    height, width = size
    wide, high = noise((width + 8, height)), noise((width, height + 8))
    left, top = int(8 * centering[0]), int(8 * centering[1])
    pixels = preprocess_image(wide, size, centering=centering)
    torch.testing.assert_close(pixels, unchanged(wide, (left, 0, left + width, height)), atol=0, rtol=0)
    pixels = preprocess_image(high, size, centering=centering)
    torch.testing.assert_close(pixels, unchanged(high, (0, top, width, top + height)), atol=0, rtol=0)


def test_a_crop_is_resized_too():
    """The ends of a picture four times as wide as high, at half its size; a resize looks a little over the edge."""
    image = Image.new("RGB", (64, 16), "black")
    image.paste("red", (0, 0, 24, 16))
    image.paste("blue", (40, 0, 64, 16))
    left = preprocess_image(image, (8, 8), centering=(0.0, 0.5))
    right = preprocess_image(image, (8, 8), centering=(1.0, 0.5))
    assert left.flatten(1).unique(dim=1).tolist() == [[1], [-1], [-1]]
    assert right.flatten(1).unique(dim=1).tolist() == [[-1], [-1], [1]]


@pytest.mark.parametrize("size", [(10, 10), (12, 7), (6, 20)])
def test_a_mirrored_portrait_is_the_mirror_of_the_portrait(size):
    """Of the same part: the mirror comes after the crop."""
    image = noise((31, 23))
    for centering in ((0.0, 0.0), (0.8, 0.3)):
        plain = preprocess_image(image, size, centering=centering)
        mirrored = preprocess_image(image, size, centering=centering, flip=True)
        assert torch.equal(mirrored, plain.flip(2)) and mirrored.is_contiguous()
        assert not torch.equal(mirrored, plain)


def test_lanczos_is_what_is_meant_if_nothing_is_said():
    """The pixels of Pillow's own resize, to the bit."""
    image = noise((40, 40))
    pixels = {name: preprocess_image(image, (12, 12), interpolation=name) for name in INTERPOLATION_MODES}
    assert torch.equal(preprocess_image(image, (12, 12)), pixels["lanczos"])
    assert len({tuple(each.flatten().tolist()) for each in pixels.values()}) == len(INTERPOLATION_MODES) == 6
    for name, each in pixels.items():
        resized = image.resize((12, 12), Image.Resampling[name.upper()])
        torch.testing.assert_close(each, unchanged(resized, (0, 0, 12, 12)), atol=0, rtol=0)


def test_buckets_as_they_are_written():
    assert parse_aspect_ratio_buckets("512,512;640,448", 64) == ((512, 512), (640, 448))
    assert parse_aspect_ratio_buckets(" 64 , 128 ", 8) == ((64, 128),)
    assert parse_aspect_ratio_buckets("640,448;448,640", 64) == ((640, 448), (448, 640))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got ''"),
        (";", "got ''"),
        ("512,512;", "got ''"),
        ("512", "got '512'"),
        ("512,512,512", "got '512,512,512'"),
        ("512x512", "got '512x512'"),
        ("512,512 640,448", "got '512,512 640,448'"),
        ("512,512;a,448", "got 'a,448'"),
        ("512,-512", "got '512,-512'"),
        ("512,512.0", "got '512,512.0'"),
        ("5_12,512", "got '5_12,512'"),
        ("٥١٢,512", "got '٥١٢,512'"),
        ("512," + "9" * 5000, "got '512,99999"),
        ("512,512;0,512", "'0,512' must be positive multiples of 64"),
        ("512,0", "'512,0' must be positive multiples of 64"),
        ("512,512;640,440", "'640,440' must be positive multiples of 64"),
        ("640,448;512,512; 640,448", "names ' 640,448' twice"),
        ("512,512;0512,512", "names '0512,512' twice"),
    ],
)
def test_buckets_that_are_none(text, message):
    with pytest.raises(ValueError) as error:
        parse_aspect_ratio_buckets(text, 64)
    assert str(error.value).startswith("--aspect_ratio_buckets") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("image_size", "bucket"),
    [
        ((500, 500), (512, 512)),
        ((300, 420), (640, 448)),
        ((420, 300), (448, 640)),
        ((10, 4000), (640, 448)),
        ((4000, 10), (448, 640)),
        # The border lies at the root of 640 / 448, 1.1952: halfway by its logarithm, and not at 1.2143.
        ((1000, 1195), (512, 512)),
        ((1000, 1196), (640, 448)),
        ((1195, 1000), (512, 512)),
        ((1196, 1000), (448, 640)),
    ],
)
def test_the_nearest_bucket(image_size, bucket):
    buckets = [(448, 640), (512, 512), (640, 448)]
    for order in itertools.permutations(buckets):
        assert order[nearest_bucket(image_size, order)] == bucket


def test_the_size_decides_between_buckets_of_one_shape():
    buckets = [(1024, 1024), (256, 256), (512, 512)]
    sizes = [(3000, 3000), (600, 500), (10, 10), (300, 290)]
    assert [nearest_bucket(size, buckets) for size in sizes] == [0, 2, 1, 1]
    # As near by shape, one wider and one higher: the area decides here too, and if that is equal, the order.
    assert nearest_bucket((100, 100), [(200, 100), (50, 100)]) == 1
    for sides in ((3, 7), (11, 13), (449, 641)):
        assert nearest_bucket((100, 100), [sides, sides[::-1]]) == 0
        assert nearest_bucket((100, 100), [sides[::-1], sides]) == 0
