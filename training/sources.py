"""Where training pictures come from: a folder with metadata or captions, or what `datasets` reads. [ours]"""

import csv
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import huggingface_hub
from PIL import Image

from programs.picture_files import open_picture
from programs.records import check_text, read_json_lines
from training.flag_rules import refuse
from training.flags import ColumnFlags, DataFlags


logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
METADATA_CSV = "metadata.csv"
# What counts as a picture in a folder; HEIC too, so that it is refused by name and not passed over.
PICTURES = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .avif .jp2 .heic .heif".split())
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX/)")
BESIDE = "caption"  # how the column of captions beside the images is called
Records = tuple[list[str], list[dict[str, Any]]]  # what errors call each, and each


class Table(NamedTuple):
    """The records of a folder or a data set.

    Attributes:
        origin, sources: what errors call all of them, and each.
        names: of the columns that there are.
        columns: the flags, as they are for this table.
        find_picture: the picture that a value names, of a column, in the record of a source.
    """

    origin: str | Path
    sources: Sequence[str]
    records: Sequence[Mapping[str, Any]]
    names: Sequence[str]
    columns: ColumnFlags
    find_picture: Callable[[Any, str, str], Path | Image.Image]


def read_folder(data: DataFlags, columns: ColumnFlags) -> Table:
    """The records of --train_data_dir, whose images are in `file_name` and masks in `mask_file_name`."""
    folder, extension = Path(data.train_data_dir), data.caption_extension
    if not folder.is_dir():
        raise FileNotFoundError(f"--train_data_dir {folder} is not a folder.")
    columns = replace(columns, image_column="file_name", mask_column="mask_file_name")
    pictures = _find_pictures(folder)
    captioned = [picture for picture in pictures if picture.with_suffix(extension).is_file()]
    files = [folder / name for name in (METADATA, METADATA_CSV) if (folder / name).is_file()]
    both = len(files) == 2
    refuse(both, f"--train_data_dir {folder} has a {METADATA} and a {METADATA_CSV}: keep the one that counts.")
    if not files and not captioned:
        state = f"has no {METADATA}" if any(folder.iterdir()) else "is empty"
        raise FileNotFoundError(
            f"--train_data_dir {folder} {state}; it needs images and a {METADATA}, one JSON object a line with "
            f"'file_name', 'base_prompt' and 'target_prompt', or a {METADATA_CSV} with these columns, or a caption "
            f"beside each image, a.png and a{extension} (--caption_extension). Folders that `datasets` reads "
            "in another form are for --dataset_name."
        )
    if files:
        (origin,) = files
        other = captioned and extension != DataFlags.caption_extension
        refuse(other, f"--caption_extension {extension}: {origin} gives the prompts; keep one of both.")
        if captioned:
            logger.warning("%s gives the prompts; the captions beside the images are not read", origin)
        lists = (columns.target_prompt_column, columns.base_phrases_column, columns.free_phrases_column)
        read = read_json_lines(origin, str(origin)) if origin.name == METADATA else _read_csv(origin, lists)
        _warn_of_pictures(folder, pictures, origin, read[1])
    else:
        origin, read = folder, _read_captions(folder, pictures, captioned, extension)
        refuse(
            data.target_prompt is None or columns.caption_column is not None,
            f"--train_data_dir {folder} has captions beside its images, which need --target_prompt and no "
            "--caption_column.",
        )
        columns = replace(columns, caption_column=BESIDE, base_prompt_column=ColumnFlags.base_prompt_column)
    names = sorted({name for record in read[1] for name in record})
    return Table(origin, *read, names, columns, lambda *where: find_image(folder, *where))


def find_image(folder: Path, file_name: Any, column: str, source: str) -> Path:
    """A row's image file, which must lie in the folder itself."""
    check_text(file_name, f"{source}: column {column!r}")
    root, relative = folder.resolve(), Path(file_name)
    where = f"{source}: the {column} {file_name!r}"
    if relative.is_absolute():
        around = next((place for place in (root, folder.absolute()) if relative.is_relative_to(place)), None)
        refuse(around is None, f"{where} is not in the folder {folder}.")
        relative = relative.relative_to(around)
    out = relative.anchor or ".." in str(relative).replace("\\", "/").split("/")
    refuse(out, f"{where} leads out of the folder.")
    path = _find_spelling(folder, str(relative))
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # also a loop of links, a name too long, a NUL in the name
        raise FileNotFoundError(f"{source}: there is no image {folder / relative}.") from error
    out = not resolved.is_relative_to(root)
    refuse(out, f"{where} is a link that leads out of the folder, to {resolved}.")
    refuse(not resolved.is_file(), f"{source}: the image {path} is not a file.")
    return path


def _read_csv(path: Path, lists: Sequence[str]) -> Records:
    """A table whose first line names the columns; `lists` are those that may hold lists, as JSON."""
    rows, before = [], 0
    reader = csv.reader(StringIO(_read_text(path), newline=""), strict=True)
    try:
        for cells in reader:
            if any(cells):
                rows.append((f"{path}, line {before + 1}", cells))
            before = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    if not rows:
        return [], []
    (source, first), *rows = rows
    header, records = [name.strip() for name in first], []
    refuse(len({*header}) < len(header), f"{source} names a column twice: {header}.")
    for source, cells in rows:
        refuse(
            len(cells) != len(header),
            f"{source} has {len(cells)} cells for the {len(header)} columns {header}; a text with commas stands in "
            'quotes, "a man, a hat".',
        )
        record = {name: cell for name, cell in zip(header, cells) if cell.strip()}
        for name in {*lists} & {*record}:
            if record[name].lstrip().startswith("["):
                try:
                    record[name] = json.loads(record[name])
                except ValueError as error:
                    where = f"{source}: column {name!r}"
                    raise ValueError(f"{where} is no list as JSON spells it: {error}") from error
        records.append(record)
    return [source for source, _ in rows], records


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _read_captions(folder: Path, pictures: Sequence[Path], captioned: Sequence[Path], extension: str) -> Records:
    """Captions beside the images: one text a file, whose lines are one caption."""
    without = sorted(str(picture.relative_to(folder)) for picture in {*pictures} - {*captioned})
    if without:
        raise FileNotFoundError(
            f"--train_data_dir {folder}: {len(without)} of {len(pictures)} images have no caption beside them that "
            f"ends in {extension} (--caption_extension): {_some(without)}."
        )
    sources, records = [str(picture.with_suffix(extension)) for picture in pictures], []
    for picture, source in zip(pictures, sources):
        text = check_text(" ".join(_read_text(Path(source)).split()), source)
        records.append({"file_name": str(picture.relative_to(folder)), BESIDE: text})
    return sources, records


def _find_pictures(folder: Path) -> list[Path]:
    """The images of a folder and of those in it, in the order of their names; hidden ones are none."""
    pictures = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURES and path.is_file())
    return [path for path in pictures if not HIDDEN.search(path.relative_to(folder).as_posix())]


def _warn_of_pictures(folder: Path, pictures: Iterable[Path], origin: Path, records: Iterable[Mapping]) -> None:
    """Warn of images that no row names, as a mask or otherwise."""

    def plain(name: Any) -> str:
        return unicodedata.normalize("NFC", str(PurePosixPath(folder.resolve(), str(name).replace("\\", "/"))))

    named = {plain(record.get(column)) for record in records for column in ("file_name", "mask_file_name")}
    unused = [name for name in (str(path.relative_to(folder)) for path in pictures) if plain(name) not in named]
    if unused:
        logger.warning("%d images of %s are in no row of %s: %s", len(unused), folder, origin.name, _some(unused))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _find_spelling(folder: Path, name: str) -> Path:
    """A file by its name as another system spells it: "\\" between folders, accents as one character or as two."""
    if os.path.exists(folder / name):
        return folder / name
    path = folder
    for part in PurePosixPath(name.replace("\\", "/")).parts:
        forms = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        path = next((path / form for form in forms if os.path.exists(path / form)), path / part)
    return path


def read_dataset(data: DataFlags, columns: ColumnFlags, cache_dir: str | Path | None, with_masks: bool) -> Table:
    """The train split of --dataset_name, with images as they are stored: encoded."""
    name = data.dataset_name
    try:
        if Path(name).is_file():
            raise ValueError("it is a file; give the folder that it lies in")
        if is_saved_to_disk(name):
            dataset = datasets.load_from_disk(name)
        else:
            cache = None if cache_dir is None else str(cache_dir)
            dataset = datasets.load_dataset(name, data.dataset_config_name, split="train", cache_dir=cache)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, IndexError) as error:
        # An IndexError is what comes of a set that was saved without rows.
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"--dataset_name {name!r} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(dataset, datasets.DatasetDict):
        refuse("train" not in dataset, f"--dataset_name {name!r} has no split 'train'; it has {sorted(dataset)}.")
        dataset = dataset["train"]
    images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    for flag in ("image_column", "mask_column") if with_masks else ("image_column",):
        column = getattr(columns, flag)
        refuse(
            column not in images,
            f"--dataset_name {name!r} has no images in --{flag} {column!r}; columns of images: {images}, all "
            f"columns: {dataset.column_names}.",
        )
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    # Where files may lie that its rows name: in itself, or in what was downloaded of it.
    own = Path(name)
    if not own.is_dir():
        own = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    downloads = datasets.config.DOWNLOADED_DATASETS_PATH if cache_dir is None else Path(cache_dir) / "downloads"
    places, origin = [own.resolve(), Path(downloads).resolve()], f"dataset {name!r}"
    return Table(
        origin, [f"{origin}, row {i}" for i in range(len(dataset))], dataset.with_format(None), dataset.column_names,
        columns, lambda value, column, source: _stored_image(value, f"{source}: column {column!r}", places),
    )  # fmt: skip


def is_saved_to_disk(dataset_name: str) -> bool:
    return any((Path(dataset_name) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _stored_image(value: Mapping[str, Any] | None, where: str, places: Sequence[Path]) -> Path | Image.Image:
    refuse(value is None or (value["bytes"] is None and value["path"] is None), f"{where} is empty.")
    if value["bytes"] is not None:
        return open_picture(BytesIO(value["bytes"]), where)
    path = Path(value["path"])
    # A row of a data set from elsewhere may name any file of this machine.
    inside = any(path.resolve().is_relative_to(place) for place in places)
    refuse(not inside, f"{where} names {value['path']!r}, which is no file in the data set's folder.")
    return path
