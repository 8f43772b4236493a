"""Where training pictures come from: a folder with a metadata file, a table or captions, or what `datasets` reads.

Source: [ours].
"""

from __future__ import annotations

import csv
import json
import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import huggingface_hub
from PIL import Image

from programs.picture_files import open_picture
from programs.records import check_text, read_json_lines


logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
METADATA_CSV = "metadata.csv"
CAPTION_EXTENSION = ".txt"
# What counts as a picture in a folder; HEIC too, so that it is refused by name and not passed over.
PICTURES = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .avif .jp2 .heic .heif".split())
BESIDE = "caption"  # how the column of captions beside the images is called


def read_folder(
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


def find_image(folder: Path, file_name: Any, source: str, column: str = "file_name") -> Path:
    """A row's image file, which must lie in the folder itself."""
    check_text(file_name, f"{source}: column {column!r}")
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
        check_text(text, str(path))
        sources.append(str(path))
        records.append({"file_name": str(picture.relative_to(folder)), BESIDE: text})
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _find_spelling(folder: Path, name: str) -> Path:
    """A file by its name as another system spells it: "\\" between folders, accents as one character or as two."""
    path = folder
    if os.path.exists(folder / name):
        return folder / name
    for part in PurePosixPath(name.replace("\\", "/")).parts:
        forms = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        path = next((path / form for form in forms if os.path.exists(path / form)), path / part)
    return path


def is_saved_to_disk(dataset_name: str) -> bool:
    return any((Path(dataset_name) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_dataset(
    dataset_name: str, dataset_config_name: str | None, cache_dir: str | Path | None, image_columns: Mapping[str, str]
) -> datasets.Dataset:
    """The train split, with images as they are stored: encoded. Of each column of images, the flag that names it."""
    try:
        if Path(dataset_name).is_file():
            raise ValueError("it is a file; give the folder that it lies in")
        if is_saved_to_disk(dataset_name):
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


def places_of_files(dataset_name: str, cache_dir: str | Path | None) -> list[Path]:
    """Where files may lie that a data set's rows name: in itself, or in what was downloaded of it."""
    downloads = datasets.config.DOWNLOADED_DATASETS_PATH if cache_dir is None else Path(cache_dir) / "downloads"
    own = Path(dataset_name)
    if not own.is_dir():
        own = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"datasets--{dataset_name.replace('/', '--')}"
    return [own.resolve(), Path(downloads).resolve()]


def stored_image(value: Mapping[str, Any] | None, where: str, places: Sequence[Path]) -> Path | Image.Image:
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise ValueError(f"{where} is empty.")
    if value["bytes"] is not None:
        return open_picture(BytesIO(value["bytes"]), where)
    path = Path(value["path"])
    # A row of a data set from elsewhere may name any file of this machine.
    if not any(path.resolve().is_relative_to(place) for place in places):
        raise ValueError(f"{where} names {value['path']!r}, which is no file in the data set's folder.")
    return path
