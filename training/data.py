"""The portraits and their prompts: a folder or a `datasets` id in; checked rows, pixels, batches, drawn latents out.

A folder holds images and a `metadata.jsonl`, one JSON object a line: `file_name`, `base_prompt`, `target_prompt` and,
if wanted, `full_prompt`, `base_phrases` and `free_phrases` (lists), and `mask_file_name`. A target prompt is a string,
added to the base prompt, or a list of such strings and of [replaced phrase, target] pairs. A `metadata.csv` with these
columns does as well, lists as JSON spells them; or, with one target for all, a caption beside each image.

Legend: C channels, H/W size in pixels, of latents where it says so. Paper: arXiv 2504.00396.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import json
import logging
import os
import random
import re
import struct
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import datasets
import huggingface_hub
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

logger = logging.getLogger(__name__)

Target = str | tuple[str, str]  # an addition, or (replaced phrase, target)

METADATA = "metadata.jsonl"
METADATA_CSV = "metadata.csv"
CAPTION_EXTENSION = ".txt"
# What counts as a picture in a folder; HEIC too, so that it is refused by name and not passed over.
PICTURES = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .avif .jp2 .heic .heif".split())
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb
INTERPOLATION_MODES: dict[str, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "nearest": Image.Resampling.NEAREST,
}
# The values of EXIF's orientation, and how each is made upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # those that swap width and height
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_ORIENTATIONS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts of a PNG that can say it
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# What Pillow's plugins let out for a damaged file, and its refusal of an absurd size.
_UNREADABLE_IMAGE = (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    RuntimeError,
    struct.error,
)


@dataclass(frozen=True)
class PortraitRow:
    """One training portrait.

    Args:
        source: where the row was read, "data/metadata.jsonl, line 3" or "dataset 'x', row 2"; errors begin with it.
        image: the file, or the image of a `datasets` row, decoded when it is first needed and then kept in memory.
        base_prompt: the base prompt.
        target_prompt: the target, or several; a pair is (replaced phrase, target).
        full_prompt: base and target in one prompt, if the set gives it.
        base_phrases: the phrases of the base prompt that are to be preserved, if the set gives them.
        free_phrases: those of its phrases that may change along with the target.
        mask: a picture that is bright where the target is, if the set gives it; like `image`.
        caption: the caption that the base prompt is to be made of, which may say the target; None for a row that has a
            base prompt.
    """

    source: str
    image: Path | Image.Image
    base_prompt: str
    target_prompt: str | list[Target]
    full_prompt: str | None = None
    base_phrases: tuple[str, ...] | None = None
    free_phrases: tuple[str, ...] = ()
    mask: Path | Image.Image | None = None
    caption: str | None = None


def load_rows(
    *,
    train_data_dir: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    cache_dir: str | Path | None = None,
    image_column: str = "image",
    base_prompt_column: str = "base_prompt",
    caption_column: str | None = None,
    caption_extension: str = CAPTION_EXTENSION,
    target_prompt_column: str = "target_prompt",
    full_prompt_column: str = "full_prompt",
    base_phrases_column: str = "base_phrases",
    free_phrases_column: str = "free_phrases",
    mask_column: str = "mask",
    with_masks: bool = False,
    target_prompt: str | None = None,
    max_train_samples: int | None = None,
    seed: int = 0,
) -> list[PortraitRow]:
    """Read and check the training set. No image is decoded here, see `check_images`.

    Args:
        train_data_dir: a folder with images and a `metadata.jsonl`, a `metadata.csv`, or captions beside the images.
            Either this or `dataset_name`.
        dataset_name: a dataset of the Hub, a local folder that `datasets.load_dataset` reads, or one that
            `save_to_disk` wrote; its "train" split is taken.
        dataset_config_name: configuration of that dataset.
        cache_dir: where `datasets` keeps its downloads.
        image_column: column of images, for `dataset_name`; a folder's is always `file_name`.
        base_prompt_column: column of base prompts.
        caption_column: column of captions that may say the target, instead.
        caption_extension: ending of the captions beside the images; such captions may say the target, too.
        target_prompt_column: column of target prompts; may be absent if `target_prompt` is given.
        full_prompt_column: column of full prompts; a row may leave it out.
        base_phrases_column: column of lists of phrases; a row may leave it out.
        free_phrases_column: column of lists of phrases that may change; a row may leave it out.
        mask_column: column of images that show where the target is, for `dataset_name`; a folder's is always
            `mask_file_name`.
        with_masks: whether every row must have such a mask; otherwise none is looked at.
        target_prompt: one target for the whole set.
        max_train_samples: a seeded choice of this many rows, in their own order, if the set is larger.
        seed: seed of that choice.

    Returns:
        At least one row. That of a caption has the caption as its base prompt, with the target still in it. Images of
        the folder that are in no row, and columns that may be misspelled, are warned of.

    Raises:
        ValueError: an option or a row is wrong; the message names the flag, or the file and line.
        FileNotFoundError: the folder, its prompts, an image or the dataset does not exist.

    Source: [ours].
    """
    if (train_data_dir is None) == (dataset_name is None):
        raise ValueError("Give either --train_data_dir or --dataset_name, and not both.")
    if dataset_config_name is not None and (dataset_name is None or _is_saved_to_disk(dataset_name)):
        raise ValueError(
            f"--dataset_config_name {dataset_config_name!r} needs a --dataset_name that has configurations."
        )
    if max_train_samples is not None and max_train_samples < 1:
        raise ValueError(f"--max_train_samples must be at least 1, got {max_train_samples}.")
    if target_prompt is not None:
        _check_text(target_prompt, "--target_prompt")

    if train_data_dir is not None:
        folder = Path(train_data_dir)
        lists = (target_prompt_column, base_phrases_column, free_phrases_column)
        origin, sources, table = _read_folder(folder, caption_extension, lists)
        if origin == folder:
            if target_prompt is None or caption_column is not None:
                raise ValueError(
                    f"--train_data_dir {folder} has captions beside its images, which need --target_prompt and no "
                    "--caption_column."
                )
            caption_column = _BESIDE
        columns = sorted({column for record in table for column in record})
    else:
        origin = f"dataset {dataset_name!r}"
        images = {"image_column": image_column} | ({"mask_column": mask_column} if with_masks else {})
        table = _read_dataset(dataset_name, dataset_config_name, cache_dir, images)
        places = _places_of_files(dataset_name, cache_dir)
        sources = [f"{origin}, row {i}" for i in range(len(table))]
        columns = table.column_names
    chosen = range(len(table))
    if not chosen:
        raise ValueError(f"{origin} has no rows.")
    if max_train_samples is not None and max_train_samples < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, max_train_samples))
    text_column = base_prompt_column if caption_column is None else caption_column
    optional = {
        "full_prompt": full_prompt_column,
        "base_phrases": base_phrases_column,
        "free_phrases": free_phrases_column,
    }
    for name, column in optional.items():
        # A row may leave these out, but a name that was given by hand is in no row only if it is misspelled.
        if column != name and column not in columns:
            raise ValueError(f"{origin}: --{name}_column {column!r} is no column; it has {columns}.")
    files = ("file_name", "mask_file_name") if train_data_dir is not None else (image_column, mask_column)
    _warn_of_columns(origin, columns, (*files, text_column, target_prompt_column, *optional.values()))

    rows = []
    for i in chosen:
        source, record = sources[i], table[i]
        if train_data_dir is not None:
            image = _find_image(folder, _required(record, "file_name", source), source)
        else:
            image = _stored_image(record[image_column], f"{source}: column {image_column!r}", places)
        mask = None
        if with_masks and train_data_dir is not None:
            mask = _find_image(folder, _required(record, "mask_file_name", source), source, "mask_file_name")
        elif with_masks:
            mask = _stored_image(record[mask_column], f"{source}: column {mask_column!r}", places)
        flag = "--base_prompt_column" if caption_column is None else "--caption_column"
        base_prompt = _required(record, text_column, source, flag)
        _check_text(base_prompt, f"{source}: column {text_column!r}")
        caption = None if caption_column is None else base_prompt
        target = _choose_target(record, target_prompt_column, target_prompt, source)
        full_prompt = record.get(full_prompt_column)
        if full_prompt is not None:
            _check_text(full_prompt, f"{source}: column {full_prompt_column!r}")
        base_phrases = record.get(base_phrases_column)
        if base_phrases is not None:
            base_phrases = read_phrases(base_phrases, f"{source}: column {base_phrases_column!r}")
        free_phrases = record.get(free_phrases_column)
        if free_phrases not in (None, []):  # that none may change can be said either way
            free_phrases = read_phrases(free_phrases, f"{source}: column {free_phrases_column!r}")
        free = free_phrases or ()
        rows.append(PortraitRow(source, image, base_prompt, target, full_prompt, base_phrases, free, mask, caption))
    return rows


def load_image(row: PortraitRow, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a row's image.

    Args:
        row: the row.
        max_pixels: largest width * height; a larger image is refused without decoding it. Pillow's own limit,
            `PIL.Image.MAX_IMAGE_PIXELS`, holds besides.

    Returns:
        The image in RGB and upright (EXIF orientation applied), on white where it was transparent.

    Raises:
        FileNotFoundError: the file is gone.
        ValueError: the image is broken, too large, or has more than 8 bits in its one channel.

    Source: [ours].
    """
    where = _name_image(row)
    image = _open_image(row.image, where) if isinstance(row.image, Path) else row.image
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{where} has {width}x{height} pixels, more than the {max_pixels} allowed.")
    if image.mode.startswith(("I", "F")):
        # Pillow would clip these to 255, which is a white image for most.
        raise ValueError(f"{where} has the mode {image.mode!r}; save it with 8 bits a channel.")
    try:
        with _metadata_aside():
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation)
            # Pillow's own turning writes the whole EXIF back, and fails at what else is in there.
            if orientation in _UPRIGHT:
                image = image.transpose(_UPRIGHT[orientation])
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except _UNREADABLE_IMAGE as error:
        raise ValueError(f"{where} cannot be decoded: {error}") from error


def load_mask(row: PortraitRow) -> Image.Image:
    """Decode a row's mask.

    Args:
        row: a row that has one.

    Returns:
        One channel of 8 bits, upright, as large as the row's image.

    Raises:
        FileNotFoundError: the file is gone.
        ValueError: the mask is broken, black all over, or not of its image's size.

    Source: [ours].
    """
    where = f"{row.source}: the mask" + (f" {row.mask}" if isinstance(row.mask, Path) else "")
    mask = load_image(replace(row, image=row.mask, source=f"{row.source}: as mask")).convert("L")
    if mask.size != upright_size(row):
        raise ValueError(f"{where} has {mask.width}x{mask.height} pixels, and its image {upright_size(row)}.")
    if mask.getextrema()[1] == 0:
        raise ValueError(f"{where} is black: it shows the target nowhere.")
    return mask


def check_images(rows: Iterable[PortraitRow]) -> None:
    """Decode every image and mask, so that a broken one is found now and not after an hour.

    Args:
        rows: the rows.

    Raises:
        FileNotFoundError, ValueError: as `load_image` and `load_mask`, for the first one that does not decode.

    Source: [ours].
    """
    for row in rows:
        load_image(row)
        if row.mask is not None:
            load_mask(row)


def upright_size(row: PortraitRow) -> tuple[int, int]:
    """Size of a row's image as `load_image` returns it, from the file's header where that tells it.

    Args:
        row: the row.

    Returns:
        (width, height) with the EXIF orientation applied.

    Raises:
        FileNotFoundError: the file is gone.
        ValueError: the image is broken.

    Source: [ours].
    """
    where = _name_image(row)
    image = _open_image(row.image, where) if isinstance(row.image, Path) else row.image
    try:
        with _metadata_aside():
            if image.format == "TIFF":
                # Pillow turns a TIFF while it decodes it; until then its size may be the turned one or not.
                image.load()
            width, height = image.size
            sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    except _UNREADABLE_IMAGE as error:
        raise ValueError(f"{where} cannot be decoded: {error}") from error
    return (height, width) if sideways else (width, height)


def content_key(row: PortraitRow) -> str:
    """A name for what a row's image shows: a picture that changed under its old name has another.

    Args:
        row: the row.

    Returns:
        SHA-256 in hexadecimal digits: of the file's bytes; for an image of a `datasets` row, of the size and pixels
        that `load_image` returns.

    Raises:
        FileNotFoundError: the file is gone.
        ValueError: the file cannot be read, or the image is one that `load_image` refuses.

    Source: [ours].
    """
    if isinstance(row.image, Path):
        try:
            return hashlib.sha256(row.image.read_bytes()).hexdigest()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_name_image(row)} does not exist.") from error
        except OSError as error:
            raise ValueError(f"{_name_image(row)} cannot be read: {error}") from error
    # The pixels of a palette image are numbers that say nothing without the palette, so those in RGB are taken.
    image = load_image(row)
    header = f"{image.mode} {image.width}x{image.height} "
    return hashlib.sha256(header.encode() + image.tobytes()).hexdigest()


def preprocess_image(
    image: Image.Image,
    size: tuple[int, int],
    *,
    flip: bool = False,
    centering: tuple[float, float] = (0.5, 0.5),
    interpolation: str = "lanczos",
) -> torch.Tensor:
    """Pixels as the VAE takes them: the largest part of the image with the shape of `size`, resized to it.

    Args:
        image: RGB.
        size: (H, W), each at least 1.
        flip: mirror it, left for right, after the crop.
        centering: (x, y) in [0, 1]: where the part lies. x = 0 cuts at the right only, x = 1 at the left, y = 0 at the
            bottom, y = 1 at the top.
        interpolation: a key of `INTERPOLATION_MODES`.

    Returns:
        (3, H, W) float32 in [-1, 1].

    Raises:
        ValueError: `centering` or `interpolation` is none of these.

    Source: [ours].
    """
    if interpolation not in INTERPOLATION_MODES:
        raise ValueError(f"interpolation must be one of {list(INTERPOLATION_MODES)}, got {interpolation!r}.")
    if not all(0 <= value <= 1 for value in centering):
        # Pillow would crop the centre instead.
        raise ValueError(f"centering must lie in [0, 1], got {centering}.")
    height, width = size
    # One resize of the part: resizing first would make a huge image of a very narrow one.
    image = ImageOps.fit(image, (width, height), INTERPOLATION_MODES[interpolation], centering=centering)
    if flip:
        image = ImageOps.mirror(image)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def preprocess_mask(
    mask: Image.Image, size: tuple[int, int], *, flip: bool = False, centering: tuple[float, float] = (0.5, 0.5)
) -> torch.Tensor:
    """The part of a mask that `preprocess_image` takes of its image with the same arguments.

    Args:
        mask: one channel.
        size, flip, centering: as there.

    Returns:
        (1, H, W) float32 in [0, 1].

    Source: [ours].
    """
    pixels = preprocess_image(mask.convert("RGB"), size, flip=flip, centering=centering, interpolation="box")
    return pixels[:1] / 2 + 0.5


def parse_aspect_ratio_buckets(text: str, multiple: int) -> tuple[tuple[int, int], ...]:
    """Read the sizes of --aspect_ratio_buckets.

    Args:
        text: "512,512;640,448", height and width of each, as diffusers' training scripts spell it.
        multiple: what every side must be a multiple of.

    Returns:
        The (H, W) in the order given, at least one, all different.

    Raises:
        ValueError: names the flag and the part that is wrong.

    Source: [ours].
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

    Source: [ours].
    """
    image_width, image_height = image_size

    def distance(index: int) -> tuple[Fraction, int]:
        height, width = buckets[index]
        # Exact, and in the order of the logarithms: rounding would decide between a bucket and the same one turned.
        ratio = Fraction(image_width * height, image_height * width)
        return max(ratio, 1 / ratio), abs(height * width - image_height * image_width)

    return min(range(len(buckets)), key=distance)


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """The samples of one training step; a pure function, so that a resumed run goes on exactly where it stopped.

    Args:
        step: global step, from 0.
        batch_size: samples of a step, over all processes and accumulated batches.
        count: size of the set, at least 1.
        seed: seed of the order.

    Returns:
        `batch_size` indices in [0, count). Each epoch has an order of its own; a batch at its end runs on into the
        next, so every sample comes exactly once an epoch.

    Source: [ours].
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(position // count, count, seed)[position % count] for position in positions]


def bucketed_batch_indices(step: int, batch_size: int, buckets: Sequence[int], seed: int) -> list[int]:
    """The samples of one training step, all of one bucket; a pure function like `batch_indices`.

    Args:
        step: global step, from 0.
        batch_size: samples of a step, over all processes and accumulated batches.
        buckets: the bucket of each sample, at least one.
        seed: seed of the order.

    Returns:
        `batch_size` indices in [0, len(buckets)). With one bucket in use, those of `batch_indices`. With several, each
        comes once per sample of its own in len(buckets) steps, in an order that differs each time, so that every
        sample comes exactly `batch_size` times in them, and no sample again before all others of its bucket.

    Source: [ours].
    """
    count = len(buckets)
    if len(set(buckets)) == 1:
        return batch_indices(step, batch_size, count, seed)
    cycle, position = divmod(step, count)
    turns = [buckets[i] for i in _epoch_order(cycle, count, derive_seed(seed, "turns of buckets"))]
    bucket = turns[position]
    samples = [i for i in range(count) if buckets[i] == bucket]
    batch = cycle * len(samples) + turns[:position].count(bucket)
    chosen = batch_indices(batch, batch_size, len(samples), derive_seed(seed, f"bucket {bucket}"))
    return [samples[i] for i in chosen]


def revisited_batch(step: int, kept: int, visits: int, seed: int) -> int:
    """The batch of a step, where each comes several times; a pure function like `batch_indices`.

    A cycle has `kept * visits` steps: so many batches one after another, and then the same ones again, shuffled anew
    each time, so that steps side by side differ.

    Args:
        step: from 0.
        kept: batches of a cycle, at least 1.
        visits: how often each comes, at least 1; with 1 batches are steps.
        seed: seed of the order.

    Returns:
        Number of the batch, from 0, with no gap between cycles.

    Source: [ours].
    """
    cycle, place = divmod(step, kept * visits)
    visit, place = divmod(place, kept)
    if visit > 0:
        place = _epoch_order(cycle * visits + visit, kept, derive_seed(seed, "revisited batches"))[place]
    return cycle * kept + place


def draw_latents(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    height: int,
    width: int,
    batch_size: int,
    advance: Callable[[int], object] = lambda count: None,
) -> torch.Tensor:
    """Draw one portrait per prompt and keep its latents; whether an adapter is active is the caller's choice.

    Args:
        pipeline: a Stable Diffusion pipeline.
        prompts: at least one.
        seeds: of each portrait's noise, drawn on the CPU, so that neither the batch size nor the device changes it.
        num_inference_steps: steps of the pipeline's scheduler.
        guidance_scale: scale of classifier-free guidance.
        height: in pixels.
        width: in pixels.
        batch_size: portraits drawn at once.
        advance: told how many were drawn, each time some are.

    Returns:
        (len(prompts), C, H, W) float32 on the CPU, scaled as the UNet takes them, without gradient.

    Source: [ours] the alignment source `generated`.
    """
    scale, latents = pipeline.vae_scale_factor, []
    shape = (pipeline.unet.config.in_channels, height // scale, width // scale)
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch_size]]
        # In half precision some versions of torch draw other and much coarser noise.
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        output = pipeline(
            chunk,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            latents=noise.to(pipeline.unet.device, pipeline.unet.dtype),
            generator=generators,
            output_type="latent",
        )
        latents.append(output.images.float().cpu())
        advance(len(chunk))
    return torch.cat(latents)


@lru_cache(maxsize=32)  # two epochs of each of several buckets
def _epoch_order(epoch: int, count: int, seed: int) -> tuple[int, ...]:
    # A text as seed is hashed, so neighbouring seeds and epochs have nothing in common.
    return tuple(random.Random(f"{seed} {epoch}").sample(range(count), count))


def derive_seed(seed: int, purpose: str) -> int:
    """A seed of 64 bits that has nothing in common with those of other seeds or purposes. Source: [ours]."""
    return random.Random(f"{seed} {purpose}").getrandbits(64)


_BESIDE = "caption"  # how the column of captions beside the images is called


def _read_folder(
    folder: Path, caption_extension: str, lists: Sequence[str]
) -> tuple[Path, list[str], list[dict[str, Any]]]:
    """What a folder's prompts were read from (the folder itself: captions), the source of each row, and the rows."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--train_data_dir {folder} is not a folder.")
    pictures = list(_find_pictures(folder))
    captioned = [picture for picture in pictures if picture.with_suffix(caption_extension).is_file()]
    files = [folder / name for name in (METADATA, METADATA_CSV) if (folder / name).is_file()]
    if len(files) == 2:
        raise ValueError(f"--train_data_dir {folder} has a {METADATA} and a {METADATA_CSV}: keep the one that counts.")
    if not files and not captioned:
        state = f"has no {METADATA}" if any(folder.iterdir()) else "is empty"
        raise FileNotFoundError(
            f"--train_data_dir {folder} {state}; it needs images and a {METADATA}, one JSON object a line with "
            f"'file_name', 'base_prompt' and 'target_prompt', or a {METADATA_CSV} with these columns, or a caption "
            f"beside each image, a.png and a{caption_extension} (--caption_extension). Folders that `datasets` reads "
            "in another form are for --dataset_name."
        )
    if not files:
        return folder, *_read_captions(folder, pictures, captioned, caption_extension)
    if captioned and caption_extension != CAPTION_EXTENSION:
        raise ValueError(f"--caption_extension {caption_extension}: {files[0]} gives the prompts; keep one of both.")
    if captioned:
        logger.warning("%s gives the prompts; the captions beside the images are not read", files[0])
    sources, records = (
        _read_csv(files[0], lists) if files[0].name == METADATA_CSV else read_json_lines(files[0], str(files[0]))
    )
    _warn_of_pictures(folder, pictures, files[0], records)
    return files[0], sources, records


def read_json_lines(path: Path, name: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The objects of a file of JSON lines, with or without a byte order mark.

    Args:
        path: the file, in UTF-8; empty lines are passed over.
        name: what sources and errors call it.

    Returns:
        The source of each object, such as "data/metadata.jsonl, line 3", and the objects.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no JSON object with columns.

    Source: [ours].
    """
    sources, records = [], []
    # Lines of bytes: those of a text also end at separators that a JSON string may hold.
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if not line.strip():
            continue
        source = f"{name}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:  # broken JSON or broken UTF-8
            raise ValueError(f"{source} is not JSON: {error}") from error
        if not (isinstance(record, dict) and record):
            raise ValueError(f"{source} must be a JSON object with columns, got {record!r}.")
        sources.append(source)
        records.append(record)
    return sources, records


def _read_csv(path: Path, lists: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The same of a table whose first line names the columns; `lists` are those that may hold lists, as JSON."""
    sources, records, header, before = [], [], None, 0
    reader = csv.reader(StringIO(_read_text(path), newline=""), strict=True)
    try:
        for cells in reader:
            source, before = f"{path}, line {before + 1}", reader.line_num
            if not any(cells):
                continue
            if header is None:
                header = [name.strip() for name in cells]
                if len({*header}) < len(header):
                    raise ValueError(f"{source} names a column twice: {header}.")
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{source} has {len(cells)} cells for the {len(header)} columns {header}; a text with commas "
                    'stands in quotes, "a man, a hat".'
                )
            sources.append(source)
            records.append({name: cell for name, cell in zip(header, cells) if cell.strip()})
            for name in {*lists} & {*records[-1]}:
                if records[-1][name].lstrip().startswith("["):
                    records[-1][name] = _read_list(records[-1][name], f"{source}: column {name!r}")
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return sources, records


def _read_list(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no list as JSON spells it: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _read_captions(
    folder: Path, pictures: Sequence[Path], captioned: Sequence[Path], extension: str
) -> tuple[list[str], list[dict[str, Any]]]:
    """The same of captions beside the images: one text a file, whose lines are one caption."""
    without = sorted(str(picture.relative_to(folder)) for picture in {*pictures} - {*captioned})
    if without:
        raise FileNotFoundError(
            f"--train_data_dir {folder}: {len(without)} of {len(pictures)} images have no caption beside them that "
            f"ends in {extension} (--caption_extension): {_some(without)}."
        )
    sources, records = [], []
    for picture in pictures:
        path = picture.with_suffix(extension)
        text = " ".join(_read_text(path).split())
        _check_text(text, str(path))
        sources.append(str(path))
        records.append({"file_name": str(picture.relative_to(folder)), _BESIDE: text})
    return sources, records


def _find_pictures(folder: Path) -> Iterator[Path]:
    """The images of a folder and of those in it, in the order of their names; hidden ones are none."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)
        if path.suffix.lower() in PICTURES and not hidden and path.is_file():
            yield path


def _warn_of_pictures(folder: Path, pictures: Iterable[Path], origin: Path, records: Iterable[Mapping]) -> None:
    """Warn of images that no row names, as a mask or otherwise."""

    def plain(name: Any) -> str:
        parts = PurePosixPath(folder.resolve(), str(name).replace("\\", "/")).parts
        return unicodedata.normalize("NFC", "/".join(parts))

    named = {plain(record.get(column)) for record in records for column in ("file_name", "mask_file_name")}
    unused = [name for name in (str(path.relative_to(folder)) for path in pictures) if plain(name) not in named]
    if unused:
        logger.warning("%d images of %s are in no row of %s: %s", len(unused), folder, origin.name, _some(unused))


def _warn_of_columns(origin: str, columns: Iterable[str], known: Iterable[str]) -> None:
    """Warn of a column that is not read, where its name is nearly that of one that would be."""
    columns = {*columns}
    for column in sorted(columns - {*known}):
        for meant in difflib.get_close_matches(column, {*known} - columns, n=1, cutoff=0.8):
            logger.warning("%s: the column %r is not read; is %r meant?", origin, column, meant)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _is_saved_to_disk(dataset_name: str) -> bool:
    return any((Path(dataset_name) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _read_dataset(
    dataset_name: str, dataset_config_name: str | None, cache_dir: str | Path | None, image_columns: Mapping[str, str]
) -> datasets.Dataset:
    """The train split, with images as they are stored: encoded. Of each column of images, the flag that names it."""
    try:
        if Path(dataset_name).is_file():
            raise ValueError("it is a file; give the folder that it lies in")
        if _is_saved_to_disk(dataset_name):
            dataset = datasets.load_from_disk(dataset_name)
        else:
            cache = None if cache_dir is None else str(cache_dir)
            dataset = datasets.load_dataset(dataset_name, dataset_config_name, split="train", cache_dir=cache)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, IndexError) as error:
        # An IndexError is what comes of a set that was saved without rows.
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"--dataset_name {dataset_name!r} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise ValueError(f"--dataset_name {dataset_name!r} has no split 'train'; it has {sorted(dataset)}.")
        dataset = dataset["train"]
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    for flag, column in image_columns.items():
        if column not in images:
            raise ValueError(
                f"--dataset_name {dataset_name!r} has no images in --{flag} {column!r}; columns of images: "
                f"{images}, all columns: {dataset.column_names}."
            )
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset.with_format(None)


def _places_of_files(dataset_name: str, cache_dir: str | Path | None) -> list[Path]:
    """Where files may lie that a data set's rows name: in itself, or in what was downloaded of it."""
    downloads = datasets.config.DOWNLOADED_DATASETS_PATH if cache_dir is None else Path(cache_dir) / "downloads"
    own = Path(dataset_name)
    if not own.is_dir():
        own = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"datasets--{dataset_name.replace('/', '--')}"
    return [own.resolve(), Path(downloads).resolve()]


def _stored_image(value: Mapping[str, Any] | None, where: str, places: Sequence[Path]) -> Path | Image.Image:
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise ValueError(f"{where} is empty.")
    if value["bytes"] is not None:
        return _open_image(BytesIO(value["bytes"]), where)
    path = Path(value["path"])
    # A row of a data set from elsewhere may name any file of this machine.
    if not any(path.resolve().is_relative_to(place) for place in places):
        raise ValueError(f"{where} names {value['path']!r}, which is no file in the data set's folder.")
    return path


def _name_image(row: PortraitRow) -> str:
    """How an error names a row's image."""
    return f"{row.source}: the image {row.image}" if isinstance(row.image, Path) else f"{row.source}: the image"


@contextmanager
def _metadata_aside() -> Iterator[None]:
    """What is wrong with the texts beside the pixels is nobody's concern here; an absurd size is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _open_image(file: Path | BytesIO, where: str) -> Image.Image:
    """Read an image's header."""
    start = b""
    try:
        with nullcontext(file) if isinstance(file, BytesIO) else file.open("rb") as stream:
            start = stream.read(12)
            if start.startswith(_PNG):
                file = BytesIO(_without_texts(start + stream.read()))
        with _metadata_aside():
            return Image.open(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where} does not exist.") from error
    except UnidentifiedImageError as error:
        if start[4:8] == b"ftyp" and start[8:] in _HEIC_BRANDS:
            raise ValueError(f"{where} is a HEIC picture, which is not read; save it as JPEG or PNG.") from error
        raise ValueError(f"{where} cannot be read: it is no picture of a known format.") from error
    except _UNREADABLE_IMAGE as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def _without_texts(png: bytes) -> bytes:
    """A PNG without the texts that other programs keep in it, for Pillow refuses a picture for long ones."""
    parts, start = [png[:8]], 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        text = png[start + 4 : start + 8] in (b"tEXt", b"zTXt", b"iTXt")
        if not text or png.startswith(_PNG_ORIENTATIONS, start + 8):
            parts.append(png[start:end])
        start = end
    return b"".join(parts)


def _find_image(folder: Path, file_name: Any, source: str, column: str = "file_name") -> Path:
    """A row's image file, which must lie in the folder itself."""
    _check_text(file_name, f"{source}: column {column!r}")
    root, relative = folder.resolve(), Path(file_name)
    if relative.is_absolute():
        if not relative.is_relative_to(root) and not relative.is_relative_to(folder.absolute()):
            raise ValueError(f"{source}: the {column} {file_name!r} is not in the folder {folder}.")
        relative = relative.relative_to(root if relative.is_relative_to(root) else folder.absolute())
    if relative.anchor or ".." in str(relative).replace("\\", "/").split("/"):
        raise ValueError(f"{source}: the {column} {file_name!r} leads out of the folder.")
    path = _find_spelling(folder, str(relative))
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # also a loop of links, a name too long, a NUL in the name
        raise FileNotFoundError(f"{source}: there is no image {folder / relative}.") from error
    if not resolved.is_relative_to(root):
        raise ValueError(
            f"{source}: the {column} {file_name!r} is a link that leads out of the folder, to {resolved}."
        )
    if not resolved.is_file():
        raise ValueError(f"{source}: the image {path} is not a file.")
    return path


def _find_spelling(folder: Path, name: str) -> Path:
    """A file by its name as another system spells it: "\\" between folders, accents as one character or as two."""
    path = folder
    if os.path.exists(folder / name):
        return folder / name
    for part in PurePosixPath(name.replace("\\", "/")).parts:
        forms = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        path = next((path / form for form in forms if os.path.exists(path / form)), path / part)
    return path


def _required(record: Mapping[str, Any], column: str, source: str, flag: str | None = None) -> Any:
    if column not in record:
        advice = "" if flag is None else f"; see {flag}"
        inside = [name for name, value in record.items() if isinstance(value, Mapping) and column in value]
        advice += f"; it lies inside of {inside[0]!r}, and has to be a column of its own" if inside else ""
        raise ValueError(f"{source}: no column {column!r}{advice}. It has {list(record)}.")
    return record[column]


def _check_text(value: Any, where: str) -> None:
    if not (isinstance(value, str) and value.strip()):
        raise ValueError(f"{where} must be a text that is not empty, got {value!r}.")


def _choose_target(
    record: Mapping[str, Any], column: str, target_prompt: str | None, source: str
) -> str | list[Target]:
    """The row's own target, or the one of the whole set."""
    if target_prompt is not None and record.get(column) is None:
        return target_prompt
    value = _required(record, column, source, "--target_prompt_column and --target_prompt")
    target = read_target(value, f"{source}: column {column!r}")
    if target_prompt is not None and target not in (target_prompt, [target_prompt]):
        raise ValueError(f"{source}: column {column!r} says {target!r}, and --target_prompt says {target_prompt!r}.")
    return target


def read_phrases(value: Any, where: str) -> tuple[str, ...]:
    """A list of phrases as JSON spells it; a ValueError that begins with `where` if it is none. Source: [ours]."""
    if not (isinstance(value, list) and value):
        raise ValueError(f"{where} must be a list of phrases, got {value!r}.")
    for phrase in value:
        _check_text(phrase, where)
    return tuple(value)


def read_target(value: Any, where: str) -> str | list[Target]:
    """A target as JSON spells it, pairs as tuples.

    Args:
        value: a text, or a list of texts and of [phrase, target].
        where: what an error begins with.

    Returns:
        The text, or the list.

    Raises:
        ValueError: neither.

    Source: [ours].
    """
    if not isinstance(value, list):
        _check_text(value, where)
        return value
    if not value:
        raise ValueError(f"{where} must hold a target, got [].")
    targets: list[Target] = []
    for item in value:
        if isinstance(item, list) and len(item) != 2:
            raise ValueError(f"{where}: a replacement is [phrase, target], got {item!r}.")
        for text in item if isinstance(item, list) else [item]:
            _check_text(text, where)
        targets.append(tuple(item) if isinstance(item, list) else item)
    return targets
