"""From pictures to pixels: cut to one of several sizes, resized, mirrored; masks likewise. [ours]

Legend: H/W size in pixels.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from PIL import Image, ImageOps

from training.flag_rules import refuse


def preprocess_image(
    image: Image.Image, size: tuple[int, int], *, flip: bool = False, centering: tuple[float, float] = (0.5, 0.5),
    interpolation: str = "lanczos",
) -> torch.Tensor:  # fmt: skip
    """Pixels as the VAE takes them: the largest part of an RGB image with the shape of `size`, resized to it.

    Args:
        size: (H, W), each at least 1.
        flip: mirror it, left for right, after the crop.
        centering: (x, y) in [0, 1]: where the part lies. x = 0 cuts at the right only, y = 0 at the bottom.
        interpolation: one of `flags.INTERPOLATION_MODES`.

    Returns: (3, H, W) float32 in [-1, 1].
    """
    # One resize of the part: resizing first would make a huge image of a very narrow one.
    image = ImageOps.fit(image, size[::-1], Image.Resampling[interpolation.upper()], centering=centering)
    if flip:
        image = ImageOps.mirror(image)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def preprocess_mask(
    mask: Image.Image, size: tuple[int, int], *, flip: bool = False, centering: tuple[float, float] = (0.5, 0.5)
) -> torch.Tensor:
    """(1, H, W) float32 in [0, 1]: the part of a mask that `preprocess_image` takes of its image."""
    pixels = preprocess_image(mask.convert("RGB"), size, flip=flip, centering=centering, interpolation="box")
    return pixels[:1] / 2 + 0.5


def micro_conditioning(
    image_size: tuple[int, int], size: tuple[int, int], *, flip: bool = False,
    centering: tuple[float, float] = (0.5, 0.5),
) -> tuple[float, ...]:  # fmt: skip
    """What Stable Diffusion XL is told of the part of an image that `preprocess_image` takes.

    Args:
        image_size: (width, height) of the image, upright.

    Returns: height and width of the image, top and left of the part in pixels of the image as it is resized and, where
        that is asked for, mirrored, and H, W.
    Source: Podell et al., arXiv 2307.01952, section 2.2.
    """
    (image_width, image_height), (height, width), (x, y) = image_size, size, centering
    scale = max(width / image_width, height / image_height)
    top, left = (image_height * scale - height) * y, (image_width * scale - width) * (1 - x if flip else x)
    return tuple(map(float, (image_height, image_width, round(top), round(left), height, width)))


def whole_picture(size: tuple[int, int]) -> tuple[float, ...]:
    """`micro_conditioning` of a picture that is drawn, and so is as large as it is and whole."""
    return micro_conditioning(size[::-1], size)


def parse_aspect_ratio_buckets(text: str, multiple: int) -> tuple[tuple[int, int], ...]:
    """The (H, W) of --aspect_ratio_buckets such as "512,512;640,448", whose sides must be multiples of `multiple`.

    Raises ValueError: names the flag and the part that is wrong.
    """
    buckets: list[tuple[int, int]] = []
    for part in text.split(";"):
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*,\s*([0-9]{1,6})\s*", part)
        form = "height,width in pixels, several separated by ';', as in '512,512;640,448'"
        refuse(match is None, f"--aspect_ratio_buckets takes {form}; got {part!r}.")
        bucket = (int(match[1]), int(match[2]))
        wrong = min(bucket) < 1 or any(side % multiple for side in bucket)
        refuse(wrong, f"--aspect_ratio_buckets: {part!r} must be positive multiples of {multiple}.")
        refuse(bucket in buckets, f"--aspect_ratio_buckets names {part!r} twice.")
        buckets.append(bucket)
    return tuple(buckets)


def nearest_bucket(image_size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> int:
    """The index of the bucket, one of (H, W), for which least of an image of (width, height) is cropped.

    Its aspect ratio is nearest on a logarithmic scale; of equally near ones, its area, and else it is the first.
    """
    image_width, image_height = image_size

    def distance(index: int) -> tuple[Fraction, int]:
        height, width = buckets[index]
        # Exact, and in the order of the logarithms: rounding would decide between a bucket and the same one turned.
        ratio = Fraction(image_width * height, image_height * width)
        return max(ratio, 1 / ratio), abs(height * width - image_height * image_width)

    return min(range(len(buckets)), key=distance)
