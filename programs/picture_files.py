"""Pictures as users keep them: opened, made upright, measured, told apart, or refused with a reason. [ours]"""

import hashlib
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError


# Other programs keep a text of megabytes in a PNG, which Pillow refuses; its limit for all texts of a picture stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# How each of EXIF's orientations from 2 on is made upright.
_TURNS = (
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90",
)  # fmt: skip
_UPRIGHT = {orientation: Image.Transpose[turn] for orientation, turn in enumerate(_TURNS, start=2)}
_SIDEWAYS = (5, 6, 7, 8)  # those that swap width and height
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# What Pillow's plugins let out for a damaged file, and its refusal of an absurd size.
_UNREADABLE_IMAGE = (
    Image.DecompressionBombError, Image.DecompressionBombWarning, OSError, SyntaxError, ValueError, TypeError,
    EOFError, IndexError, KeyError, RuntimeError, struct.error,
)  # fmt: skip


def load_picture(picture: Path | Image.Image, source: str) -> Image.Image:
    """Decode a picture, RGB and upright (EXIF orientation applied), on white where it was transparent.

    Args:
        picture: its file, or the picture as of `open_picture`.
        source: where it is named, which errors begin with.

    Raises:
        FileNotFoundError: the file is gone.
        ValueError: the image is broken, too large, or has more than 8 bits in its one channel.
    """
    where = _name(picture, source)
    image = open_picture(picture, where) if isinstance(picture, Path) else picture
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


def upright_size(picture: Path | Image.Image, source: str) -> tuple[int, int]:
    """(width, height) of what `load_picture` returns, from the file's header if that tells it; raises as it does."""
    where = _name(picture, source)
    image = open_picture(picture, where) if isinstance(picture, Path) else picture
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


def content_key(picture: Path | Image.Image, source: str) -> str:
    """SHA-256 of a file's bytes, and for what is none of what `load_picture` returns; raises as that does."""
    if isinstance(picture, Path):
        try:
            return hashlib.sha256(picture.read_bytes()).hexdigest()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_name(picture, source)} does not exist.") from error
        except OSError as error:
            raise ValueError(f"{_name(picture, source)} cannot be read: {error}") from error
    # The pixels of a palette image are numbers that say nothing without the palette, so those in RGB are taken.
    image = load_picture(picture, source)
    header = f"{image.mode} {image.width}x{image.height} "
    return hashlib.sha256(header.encode() + image.tobytes()).hexdigest()


def open_picture(file: Path | BytesIO, where: str) -> Image.Image:
    """Read an image's header; one of a size at which Pillow warns of a decompression bomb is refused."""
    try:
        with _metadata_aside():
            return Image.open(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where} does not exist.") from error
    except UnidentifiedImageError as error:
        with file.open("rb") if isinstance(file, Path) else BytesIO(file.getvalue()) as stream:
            start = stream.read(12)
        if start[4:8] == b"ftyp" and start[8:] in _HEIC_BRANDS:
            raise ValueError(f"{where} is a HEIC picture, which is not read; save it as JPEG or PNG.") from error
        raise ValueError(f"{where} cannot be read: it is no picture of a known format.") from error
    except _UNREADABLE_IMAGE as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def _name(picture: Path | Image.Image, source: str) -> str:
    return f"{source}: the image {picture}" if isinstance(picture, Path) else f"{source}: the image"


@contextmanager
def _metadata_aside() -> Iterator[None]:
    """What is wrong with the texts beside the pixels is nobody's concern here; an absurd size is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
