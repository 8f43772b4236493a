"""The portraits and their prompts: a folder or a `datasets` id in, checked rows out. [ours]

A folder holds images and a `metadata.jsonl`, one JSON object a line: `file_name`, `base_prompt`, `target_prompt` and,
if wanted, `full_prompt`, `base_phrases` and `free_phrases` (lists), and `mask_file_name`. A target prompt is a string,
added to the base prompt, or a list of such strings and of [replaced phrase, target] pairs. A `metadata.csv` with these
columns does as well, lists as JSON spells them; or, with one target for all, a caption beside each image.
"""

import difflib
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from programs.picture_files import load_picture, upright_size
from programs.records import Target, check_text, read_phrases, read_target
from training.flag_rules import refuse
from training.flags import ColumnFlags, DataFlags
from training.sources import Table, is_saved_to_disk, read_dataset, read_folder
from wording import take_out


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PortraitRow:
    """One training portrait.

    Attributes:
        source: where the row was read, "data/metadata.jsonl, line 3" or "dataset 'x', row 2"; errors begin with it.
        image, mask: a file, or the image of a `datasets` row, decoded when it is first needed and then kept in memory.
            A mask is bright where the target is.
        target_prompt: the target, or several; a pair is (replaced phrase, target).
        free_phrases: phrases of the base prompt that may change along with the target.
        caption: what the base prompt was made of, if it was.
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
    data: DataFlags, columns: ColumnFlags, *, cache_dir: str | Path | None = None, with_masks: bool = False,
    seed: int = 0,
) -> list[PortraitRow]:  # fmt: skip
    """Read and check the training set, at least one row. No image is decoded here, see `check_images`.

    Images of the folder that are in no row, and columns that may be misspelled, are warned of.

    Args:
        with_masks: whether every row must have a mask; otherwise none is looked at.
        seed: of the choice of --max_train_samples rows, which stay in their own order, if the set is larger.

    Raises:
        ValueError: an option or a row is wrong; the message names the flag, or the file and line.
        FileNotFoundError: the folder, its prompts, an image or the dataset does not exist.
    """
    name, config, target_prompt = data.dataset_name, data.dataset_config_name, data.target_prompt
    one_too_many = (data.train_data_dir is None) == (name is None)
    refuse(one_too_many, "Give either --train_data_dir or --dataset_name, and not both.")
    lost = config is not None and (name is None or is_saved_to_disk(name))
    refuse(lost, f"--dataset_config_name {config!r} needs a --dataset_name that has configurations.")
    if target_prompt is not None:
        check_text(target_prompt, "--target_prompt")
    table = read_folder(data, columns) if name is None else read_dataset(data, columns, cache_dir, with_masks)
    chosen, most = range(len(table.records)), data.max_train_samples
    refuse(not chosen, f"{table.origin} has no rows.")
    if most is not None and most < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, most))
    _check_columns(table)
    return [_read_row(table, table.records[i], table.sources[i], target_prompt, with_masks) for i in chosen]


def _check_columns(table: Table) -> None:
    """Refuse names of columns that no row has, and warn of those that may be misspelled."""
    columns = table.columns
    for name in ("full_prompt_column", "base_phrases_column", "free_phrases_column"):
        column = getattr(columns, name)
        # A row may leave these out, but a name that was given by hand is in no row only if it is misspelled.
        wrong = column != getattr(ColumnFlags, name) and column not in table.names
        refuse(wrong, f"{table.origin}: --{name} {column!r} is no column; it has {table.names}.")
    known = {*vars(columns).values()} - {None}
    for column in sorted({*table.names} - known):
        for meant in difflib.get_close_matches(column, known - {*table.names}, n=1, cutoff=0.8):
            logger.warning("%s: the column %r is not read; is %r meant?", table.origin, column, meant)


def _read_row(
    table: Table, record: Mapping[str, Any], source: str, target_prompt: str | None, with_masks: bool
) -> PortraitRow:
    columns = table.columns

    def picture(column: str) -> Path | Image.Image:
        return table.find_picture(_required(record, column, source), column, source)

    def read(column: str, check: Callable[[Any, str], Any], *nothing: Any) -> Any:
        value = record.get(column)
        return None if value is None or value in nothing else check(value, f"{source}: column {column!r}")

    image, mask = picture(columns.image_column), picture(columns.mask_column) if with_masks else None
    flag = "base_prompt_column" if columns.caption_column is None else "caption_column"
    column, caption = getattr(columns, flag), None
    base_prompt = check_text(_required(record, column, source, f"--{flag}"), f"{source}: column {column!r}")
    target = _choose_target(record, columns.target_prompt_column, target_prompt, source)
    if flag == "caption_column":
        base_prompt, caption = take_targets_out(base_prompt, target, source), base_prompt
    return PortraitRow(
        source,
        image,
        base_prompt,
        target,
        full_prompt=read(columns.full_prompt_column, check_text),
        base_phrases=read(columns.base_phrases_column, read_phrases),
        free_phrases=read(columns.free_phrases_column, read_phrases, []) or (),  # [] says that none may change
        mask=mask,
        caption=caption,
    )


def take_targets_out(caption: str, target: str | list[Target], source: str) -> str:
    """The base prompt in a caption: what is left without the targets that are added."""
    base_prompt = caption
    for text in [target] if isinstance(target, str) else target:
        base_prompt = take_out(base_prompt, text) if isinstance(text, str) else base_prompt
    refuse(not base_prompt, f"{source}: the caption {caption!r} says nothing but the target")
    return base_prompt


def _choose_target(record: Mapping[str, Any], column: str, target_prompt: str | None, source: str) -> Any:
    """The row's own target, or the one of the whole set."""
    if target_prompt is not None and record.get(column) is None:
        return target_prompt
    value = _required(record, column, source, "--target_prompt_column and --target_prompt")
    target = read_target(value, f"{source}: column {column!r}")
    other = target_prompt is not None and target not in (target_prompt, [target_prompt])
    refuse(other, f"{source}: column {column!r} says {target!r}, and --target_prompt says {target_prompt!r}.")
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
    refuse(mask.size != size, f"{where} has {mask.width}x{mask.height} pixels, and its image {size}.")
    refuse(mask.getextrema()[1] == 0, f"{where} is black: it shows the target nowhere.")
    return mask


def check_images(rows: Iterable[PortraitRow]) -> None:
    """Decode every image and mask, so that a broken one is found now and not after an hour; raises as `load_mask`."""
    for row in rows:
        load_picture(row.image, row.source)
        if row.mask is not None:
            load_mask(row)
