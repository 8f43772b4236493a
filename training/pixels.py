"""From pictures to pixels: cut to one of several sizes, resized, mirrored; masks likewise. [ours]

Legend: H/W size in pixels.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from PIL import Image, ImageOps

from training.flag_rules import INTERPOLATION_MODES


def preprocess_image(
    image: Image.Image, size: tuple[int, int], *, flip: bool = False, centering: tuple[float, float] = (0.5, 0.5),
    interpolation: str = "lanczos",
) -> torch.Tensor:  # fmt: skip
    """Pixels as the VAE takes them: the largest part of an RGB image with the shape of `size`, resized to it.

    Args:
        size: (H, W), each at least 1.
        flip: mirror it, left for right, after the crop.
        centering: (x, y) in [0, 1]: where the part lies. x = 0 cuts at the right only, x = 1 at the left, y = 0 at the
            bottom, y = 1 at the top.
        interpolation: a key of `INTERPOLATION_MODES`.

    Returns: (3, H, W) float32 in [-1, 1].
    Raises ValueError: `centering` or `interpolation` is none of these.
    """
    if interpolation not in INTERPOLATION_MODES:
        raise ValueError(f"interpolation must be one of {list(INTERPOLATION_MODES)}, got {interpolation!r}.")
    if not all(0 <= value <= 1 for value in centering):
        # Pillow would crop the centre instead.
        raise ValueError(f"centering must lie in [0, 1], got {centering}.")
    height, width = size
    # One resize of the part: resizing first would make a huge image of a very narrow one.
    image = ImageOps.fit(image, (width, height), Image.Resampling[interpolation.upper()], centering=centering)
    if flip:
        image = ImageOps.mirror(image)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def preprocess_mask(
    mask: Image.Image, size: tuple[int, int], *, flip: bool = False, centering: tuple[float, float] = (0.5, 0.5)
) -> torch.Tensor:
    """The part of a mask that `preprocess_image` takes of its image with the same arguments, (1, H, W) float32 in [0,
    1].
    """
    pixels = preprocess_image(mask.convert("RGB"), size, flip=flip, centering=centering, interpolation="box")
    return pixels[:1] / 2 + 0.5


def parse_aspect_ratio_buckets(text: str, multiple: int) -> tuple[tuple[int, int], ...]:
    """The different (H, W) of --aspect_ratio_buckets in their order, from "512,512;640,448", sides multiples of
    `multiple`.

    Raises ValueError: names the flag and the part that is wrong.
    """
    buckets: list[tuple[int, int]] = []
    for part in text.split(";"):
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*,\s*([0-9]{1,6})\s*", part)
        if match is None:
            raise ValueError(
                "--aspect_ratio_buckets takes height,width in pixels, several separated by ';', as in "
                f"'512,512;640,448'; got {part!r}."
            )
        bucket = (int(match[1]), int(match[2]))
        if min(bucket) < 1 or any(side % multiple for side in bucket):
            raise ValueError(f"--aspect_ratio_buckets: {part!r} must be positive multiples of {multiple}.")
        if bucket in buckets:
            raise ValueError(f"--aspect_ratio_buckets names {part!r} twice.")
        buckets.append(bucket)
    return tuple(buckets)


def nearest_bucket(image_size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> int:
    """The bucket for which least of an image is cropped.

    Args:
        image_size: (width, height) of the upright image, as Pillow and `upright_size` give it.
        buckets: their (H, W), at least one.

    Returns:
        Index of the bucket whose aspect ratio is nearest, on a logarithmic scale; of equally near ones, of the one
        whose area is nearest to the image's; of several such, of the first.
    """
    image_width, image_height = image_size

    def distance(index: int) -> tuple[Fraction, int]:
        height, width = buckets[index]
        # Exact, and in the order of the logarithms: rounding would decide between a bucket and the same one turned.
        ratio = Fraction(image_width * height, image_height * width)
        return max(ratio, 1 / ratio), abs(height * width - image_height * image_width)

    return min(range(len(buckets)), key=distance)
