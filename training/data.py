"""The portraits and their prompts: a folder or a `datasets` id in, checked rows out. [ours]

A folder holds images and a `metadata.jsonl`, one JSON object a line: `file_name`, `base_prompt`, `target_prompt` and,
if wanted, `full_prompt`, `base_phrases` and `free_phrases` (lists), and `mask_file_name`. A target prompt is a string,
added to the base prompt, or a list of such strings and of [replaced phrase, target] pairs. A `metadata.csv` with these
columns does as well, lists as JSON spells them; or, with one target for all, a caption beside each image.
"""

import difflib
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from programs.picture_files import load_picture, upright_size
from programs.records import Target, check_text, read_phrases, read_target
from training.flags import ColumnFlags, DataFlags
from training.sources import (
    BESIDE,
    find_image,
    is_saved_to_disk,
    places_of_files,
    read_dataset,
    read_folder,
    stored_image,
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PortraitRow:
    """One training portrait.

    Attributes:
        source: where the row was read, "data/metadata.jsonl, line 3" or "dataset 'x', row 2"; errors begin with it.
        image, mask: a file, or the image of a `datasets` row, decoded when it is first needed and then kept in memory.
            A mask is bright where the target is.
        target_prompt: the target, or several; a pair is (replaced phrase, target).
        full_prompt, base_phrases: if the set gives them.
        free_phrases: phrases of the base prompt that may change along with the target.
        caption: what the base prompt is to be made of, which may say the target; None for a row that has a base
            prompt.
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


@dataclass(frozen=True)
class _Table:
    """The records of a folder or a data set, what errors call them, and where pictures and texts are."""

    origin: str | Path
    sources: Sequence[str]
    records: Sequence[Mapping[str, Any]]
    columns: Sequence[str]
    find_picture: Callable[[Mapping[str, Any], str, str], Path | Image.Image]
    image_column: str
    mask_column: str
    text_column: str
    has_captions: bool


def load_rows(
    data: DataFlags, columns: ColumnFlags, *, cache_dir: str | Path | None = None, with_masks: bool = False,
    seed: int = 0,
) -> list[PortraitRow]:  # fmt: skip
    """Read and check the training set. No image is decoded here, see `check_images`.

    Args:
        data, columns: the flags. A folder's images are always in `file_name`, its masks in `mask_file_name`.
        with_masks: whether every row must have a mask; otherwise none is looked at.
        seed: of the choice of --max_train_samples rows, which stay in their own order, if the set is larger.

    Returns:
        At least one row. That of a caption has the caption as its base prompt, with the target still in it. Images of
        the folder that are in no row, and columns that may be misspelled, are warned of.

    Raises:
        ValueError: an option or a row is wrong; the message names the flag, or the file and line.
        FileNotFoundError: the folder, its prompts, an image or the dataset does not exist.
    """
    if (data.train_data_dir is None) == (data.dataset_name is None):
        raise ValueError("Give either --train_data_dir or --dataset_name, and not both.")
    if data.dataset_config_name is not None and (data.dataset_name is None or is_saved_to_disk(data.dataset_name)):
        raise ValueError(
            f"--dataset_config_name {data.dataset_config_name!r} needs a --dataset_name that has configurations."
        )
    if data.target_prompt is not None:
        check_text(data.target_prompt, "--target_prompt")
    if data.dataset_name is None:
        table = _folder_table(data, columns)
    else:
        table = _dataset_table(data, columns, cache_dir, with_masks)
    chosen, most = range(len(table.records)), data.max_train_samples
    if not chosen:
        raise ValueError(f"{table.origin} has no rows.")
    if most is not None and most < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, most))
    _check_columns(table, columns)
    return [
        _read_row(table, table.records[i], table.sources[i], columns, data.target_prompt, with_masks) for i in chosen
    ]


def _folder_table(data: DataFlags, columns: ColumnFlags) -> _Table:
    folder, (text_column, has_captions) = Path(data.train_data_dir), _text_column(columns)
    lists = (columns.target_prompt_column, columns.base_phrases_column, columns.free_phrases_column)
    origin, sources, records = read_folder(folder, data.caption_extension, lists)
    if origin == folder:
        if data.target_prompt is None or has_captions:
            raise ValueError(
                f"--train_data_dir {folder} has captions beside its images, which need --target_prompt and no "
                "--caption_column."
            )
        text_column, has_captions = BESIDE, True

    def find(record: Mapping[str, Any], column: str, source: str) -> Path:
        return find_image(folder, _required(record, column, source), source, column)

    names = sorted({column for record in records for column in record})
    return _Table(origin, sources, records, names, find, "file_name", "mask_file_name", text_column, has_captions)


def _dataset_table(data: DataFlags, columns: ColumnFlags, cache_dir: str | Path | None, with_masks: bool) -> _Table:
    name, images = data.dataset_name, {"image_column": columns.image_column}
    if with_masks:
        images["mask_column"] = columns.mask_column
    records = read_dataset(name, data.dataset_config_name, cache_dir, images)
    folders = places_of_files(name, cache_dir)

    def find(record: Mapping[str, Any], column: str, source: str) -> Path | Image.Image:
        return stored_image(record[column], f"{source}: column {column!r}", folders)

    sources, names = [f"dataset {name!r}, row {i}" for i in range(len(records))], records.column_names
    places = columns.image_column, columns.mask_column, *_text_column(columns)
    return _Table(f"dataset {name!r}", sources, records, names, find, *places)


def _text_column(columns: ColumnFlags) -> tuple[str, bool]:
    """Where the base prompts are, and whether they have to be made of captions."""
    if columns.caption_column is None:
        return columns.base_prompt_column, False
    return columns.caption_column, True


def _check_columns(table: _Table, columns: ColumnFlags) -> None:
    """Refuse names of columns that no row has, and warn of those that may be misspelled."""
    optional = {
        "full_prompt": columns.full_prompt_column,
        "base_phrases": columns.base_phrases_column,
        "free_phrases": columns.free_phrases_column,
    }
    for name, column in optional.items():
        # A row may leave these out, but a name that was given by hand is in no row only if it is misspelled.
        if column != name and column not in table.columns:
            raise ValueError(f"{table.origin}: --{name}_column {column!r} is no column; it has {table.columns}.")
    read = (table.image_column, table.mask_column, table.text_column, columns.target_prompt_column)
    known = {*read, *optional.values()}
    for column in sorted({*table.columns} - known):
        for meant in difflib.get_close_matches(column, known - {*table.columns}, n=1, cutoff=0.8):
            logger.warning("%s: the column %r is not read; is %r meant?", table.origin, column, meant)


def _read_row(
    table: _Table, record: Mapping[str, Any], source: str, columns: ColumnFlags, target_prompt: str | None,
    with_masks: bool,
) -> PortraitRow:  # fmt: skip
    image = table.find_picture(record, table.image_column, source)
    mask = table.find_picture(record, table.mask_column, source) if with_masks else None
    flag = "--caption_column" if table.has_captions else "--base_prompt_column"
    base_prompt = _required(record, table.text_column, source, flag)
    check_text(base_prompt, f"{source}: column {table.text_column!r}")
    target = _choose_target(record, columns.target_prompt_column, target_prompt, source)

    def read(column: str, check: Callable[[Any, str], Any], *nothing: Any) -> Any:
        value = record.get(column)
        return None if value is None or value in nothing else check(value, f"{source}: column {column!r}")

    full_prompt, base_phrases, free_phrases = (
        read(columns.full_prompt_column, check_text),
        read(columns.base_phrases_column, read_phrases),
        read(columns.free_phrases_column, read_phrases, []),  # that none may change can be said either way
    )
    caption = base_prompt if table.has_captions else None
    return PortraitRow(
        source, image, base_prompt, target, full_prompt, base_phrases, free_phrases or (), mask, caption
    )


def _choose_target(record: Mapping[str, Any], column: str, target_prompt: str | None, source: str) -> Any:
    """The row's own target, or the one of the whole set."""
    if target_prompt is not None and record.get(column) is None:
        return target_prompt
    value = _required(record, column, source, "--target_prompt_column and --target_prompt")
    target = read_target(value, f"{source}: column {column!r}")
    if target_prompt is not None and target not in (target_prompt, [target_prompt]):
        raise ValueError(f"{source}: column {column!r} says {target!r}, and --target_prompt says {target_prompt!r}.")
    return target


def _required(record: Mapping[str, Any], column: str, source: str, flag: str | None = None) -> Any:
    if column not in record:
        advice = "" if flag is None else f"; see {flag}"
        inside = [name for name, value in record.items() if isinstance(value, Mapping) and column in value]
        advice += f"; it lies inside of {inside[0]!r}, and has to be a column of its own" if inside else ""
        raise ValueError(f"{source}: no column {column!r}{advice}. It has {list(record)}.")
    return record[column]


def load_mask(row: PortraitRow) -> Image.Image:
    """Decode a row's mask: one channel of 8 bits, upright, as large as the row's image.

    Raises:
        FileNotFoundError: the file is gone.
        ValueError: the mask is broken, black all over, or not of its image's size.
    """
    where = f"{row.source}: the mask" + (f" {row.mask}" if isinstance(row.mask, Path) else "")
    mask = load_picture(row.mask, f"{row.source}: as mask").convert("L")
    size = upright_size(row.image, row.source)
    if mask.size != size:
        raise ValueError(f"{where} has {mask.width}x{mask.height} pixels, and its image {size}.")
    if mask.getextrema()[1] == 0:
        raise ValueError(f"{where} is black: it shows the target nowhere.")
    return mask


def check_images(rows: Iterable[PortraitRow]) -> None:
    """Decode every image and mask, so that a broken one is found now and not after an hour. Raises what `load_mask`
    does.
    """
    for row in rows:
        load_picture(row.image, row.source)
        if row.mask is not None:
            load_mask(row)
