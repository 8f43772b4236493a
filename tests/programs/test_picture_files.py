"""Tests of reading pictures: real files of many formats, whole and broken."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from programs.picture_files import content_key, load_picture, upright_size


SOURCE = "somewhere, line 7"


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def load(picture: Path | Image.Image) -> Image.Image:
    return load_picture(picture, SOURCE)


def size_of(picture: Path | Image.Image) -> tuple[int, int]:
    return upright_size(picture, SOURCE)


def key_of(picture: Path | Image.Image) -> str:
    return content_key(picture, SOURCE)


def test_an_image_is_upright_and_rgb(tmp_path):
    image = Image.new("RGB", (2, 1), "black")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "0.png", exif=exif)
    loaded = load(tmp_path / "0.png")
    assert loaded.mode == "RGB" and loaded.size == (1, 2)
    assert loaded.getpixel((0, 0)) == (255, 0, 0) and loaded.getpixel((0, 1)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "RGB"])
def test_every_usual_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("0.tif" if mode == "CMYK" else "0.png")
    Image.new("RGB", (3, 2), "white").convert(mode).save(path)
    loaded = load(path)
    assert loaded.mode == "RGB" and loaded.getcolors() == [(6, (255, 255, 255))]


def test_what_is_transparent_lies_on_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.save(tmp_path / "0.png")
    loaded = load(tmp_path / "0.png")
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (255, 0, 0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image.convert("P").save(tmp_path / "1.png", transparency=bytes([0] * 200 + [255] * 56))
        load(tmp_path / "1.png")


def odd_exif(orientation: int) -> bytes:
    """EXIF with a value in it that Pillow cannot write."""
    entries = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0) + struct.pack("<HHII", 0x103, 4, 1, 70_000)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_odd_tag_does_not_matter(tmp_path, kind, orientation):
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 32, 3), np.uint8))
    path = tmp_path / f"a.{kind.lower()}"
    stored.save(path, kind, exif=odd_exif(orientation))
    plain = tmp_path / f"b.{kind.lower()}"
    exif = Image.Exif()
    exif[0x112] = orientation
    stored.save(plain, kind, exif=exif)
    row = path
    image = load(row)
    assert image.size == size_of(row) == ((32, 16) if orientation < 5 else (16, 32))
    assert np.array_equal(image, load(plain))


def test_broken_exif_is_nobodys_concern(tmp_path):
    exif = bytearray(odd_exif(6))
    exif[14:16] = struct.pack("<H", 40)  # more entries than there are
    path = tmp_path / "a.jpg"
    Image.new("RGB", (6, 4), "red").save(path, exif=bytes(exif))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load(path).size == size_of(path) == (4, 6)


@pytest.mark.parametrize("after_pixels", [False, True])
def test_long_texts_of_a_png_are_passed_over(tmp_path, after_pixels):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "x" * 2_000_000, zip=True)
    texts.add_itxt("workflow", "x" * 2_000_000, zip=True)
    content = encode(Image.new("RGB", (6, 4), "red"), pnginfo=texts)
    if after_pixels:
        header, start = 8 + 25, content.index(b"IDAT") - 4
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        content = content[:header] + content[start:end] + content[header:start] + content[end:]
    (tmp_path / "a.png").write_bytes(content)
    row = tmp_path / "a.png"
    assert size_of(row) == (6, 4) and load(row).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("keyword", ["XML:com.adobe.xmp", "Raw profile type exif"])
def test_the_orientation_in_a_text_of_a_png_counts(tmp_path, keyword):
    texts = PngImagePlugin.PngInfo()
    if keyword.startswith("XML"):
        texts.add_itxt(keyword, '<rdf:Description tiff:Orientation="6"/>')
    else:
        exif = Image.Exif()
        exif[0x112] = 6
        hexadecimal = exif.tobytes().hex()
        texts.add_text(keyword, f"\nexif\n{len(hexadecimal) // 2:8}\n{hexadecimal}", zip=True)
    (tmp_path / "a.png").write_bytes(encode(Image.new("RGB", (6, 4)), pnginfo=texts))
    row = tmp_path / "a.png"
    assert load(row).size == size_of(row) == (4, 6)


@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_heic_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100)
    with pytest.raises(ValueError, match="a.* is a HEIC picture, which is not read; save it as JPEG or PNG"):
        load(path)


def test_a_decoded_image_of_ones_own():
    assert load(Image.new("L", (2, 2), 7)).getcolors() == [(4, (7, 7, 7))]


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_deep_images_are_refused_rather_than_clipped(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "0.tif")
    with pytest.raises(ValueError, match=f"0.tif has the mode '{mode}'; save it with 8 bits"):
        load(tmp_path / "0.tif")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_a_file_that_is_no_image(tmp_path, content):
    (tmp_path / "0.png").write_bytes(content)
    with pytest.raises(ValueError, match="somewhere, line 7: the image .*0.png cannot be read"):
        load(tmp_path / "0.png")


def test_a_damaged_chunk_is_found(tmp_path):
    """Pillow lets a SyntaxError out while it decodes this one."""
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))
    content = bytearray(encode(noisy))
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    content[second : second + 4] = b"\0\1\2\3"
    (tmp_path / "0.png").write_bytes(content)
    with pytest.raises(ValueError, match="0.png cannot be decoded: broken PNG file") as error:
        load(tmp_path / "0.png")
    assert isinstance(error.value.__cause__, SyntaxError)


def test_an_image_that_went_away(tmp_path):
    with pytest.raises(FileNotFoundError, match="somewhere, line 7: the image .*0.png does not exist"):
        load(tmp_path / "0.png")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused(tmp_path, side, monkeypatch):
    """The first of these sizes is one that Pillow itself would only warn of."""
    content = bytearray(encode(Image.new("RGB", (1, 1))))
    header = content.index(b"IHDR")
    content[header + 4 : header + 12] = side.to_bytes(4, "big") * 2
    content[header + 17 : header + 21] = zlib.crc32(content[header : header + 17]).to_bytes(4, "big")
    (tmp_path / "0.png").write_bytes(content)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(ValueError, match=r"0.png cannot be read: Image size \(\d+ pixels\) exceeds limit"):
        load(tmp_path / "0.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_the_upright_size_is_that_of_the_loaded_image(tmp_path, kind, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    (tmp_path / "0").write_bytes(encode(noise((6, 4)), kind, exif=exif))
    sideways = orientation is not None and orientation >= 5
    assert size_of(tmp_path / "0") == ((4, 6) if sideways else (6, 4))
    # An image of a `datasets` row, before it is decoded and after.
    row = Image.open(tmp_path / "0")
    for _ in range(2):
        assert size_of(row) == load(row).size == ((4, 6) if sideways else (6, 4))


def test_the_upright_size_needs_no_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG"):
        (tmp_path / "0").write_bytes(encode(Image.new("RGB", (6, 4)), kind, exif=exif))
        assert size_of(tmp_path / "0") == (4, 6)


def test_the_upright_size_of_a_broken_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="somewhere, line 7: the image .*0.png does not exist"):
        size_of(tmp_path / "0.png")
    (tmp_path / "0.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="somewhere, line 7: the image .*0.png cannot be read"):
        size_of(tmp_path / "0.png")
    content = encode(noise((64, 64)))
    (tmp_path / "0.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="somewhere, line 7: the image .*0.png cannot be decoded"):
        size_of(tmp_path / "0.png")


def test_a_changed_picture_has_another_key(tmp_path):
    row = tmp_path / "0.png"
    noise((6, 4)).save(row)
    before = key_of(row)
    assert key_of(row) == before and len(before) == 64 and int(before, 16)
    noise((6, 4), seed=1).save(row)
    assert key_of(row) != before


def test_a_picture_keeps_its_key_under_another_name(tmp_path):
    noise((6, 4)).save(tmp_path / "0.png")
    noise((6, 4)).save(tmp_path / "1.png")
    assert key_of(tmp_path / "0.png") == content_key(tmp_path / "1.png", "elsewhere, line 1")


def test_the_key_of_an_image_of_a_data_set():
    """Whatever changes what is loaded changes the key: pixels, shape, palette, transparency, orientation."""
    grey = Image.new("P", (6, 4), 1)
    grey.putpalette([0, 0, 0, 9, 9, 9])
    red = grey.copy()
    red.putpalette([0, 0, 0, 255, 0, 0])
    turned = Image.Exif()
    turned[0x0112] = 3
    clear = noise((6, 4)).convert("RGBA")
    clear.putalpha(128)
    jpegs = [io.BytesIO(encode(noise((6, 4)), "JPEG", **options)) for options in ({}, {"exif": turned})]
    images = [
        noise((6, 4)),
        noise((6, 4), seed=1),
        noise((6, 4)).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        Image.new("RGB", (6, 4)),
        Image.new("RGB", (4, 6)),
        grey,
        red,
        clear,
        *map(Image.open, jpegs),
    ]
    keys = [key_of(image) for image in images]
    assert len(set(keys)) == len(images)
    assert keys == [key_of(image) for image in images]
    assert key_of(Image.open(io.BytesIO(encode(noise((6, 4)))))) == keys[0]


def test_the_key_of_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="somewhere, line 7: the image .*0.png does not exist"):
        key_of(tmp_path / "0.png")
    with pytest.raises(ValueError, match="somewhere, line 7: the image .* cannot be read: .*Is a directory"):
        key_of(tmp_path)
