"""Tests of `data.py`: real image files, a real saved dataset, a real (tiny, random) Stable Diffusion pipeline."""

import copy
import io
import itertools
import json
import os
import random
import struct
import unicodedata
import warnings
import zlib
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, PngImagePlugin
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.data import (
    INTERPOLATION_MODES,
    PortraitRow,
    batch_indices,
    bucketed_batch_indices,
    check_images,
    content_key,
    draw_latents,
    load_image,
    load_rows,
    nearest_bucket,
    parse_aspect_ratio_buckets,
    preprocess_image,
    upright_size,
)


ROW = {"file_name": "0.png", "base_prompt": "a woman, a green jacket", "target_prompt": "blonde hair"}


def write_image(path: Path, size: tuple[int, int] = (6, 4), color="red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_folder(folder: Path, rows: list[dict | str | bytes], images: int = 1) -> Path:
    """A folder with `images` pictures 0.png, 1.png, … and the given lines; a dict is a row."""
    folder.mkdir(exist_ok=True)
    for i in range(images):
        write_image(folder / f"{i}.png")
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    lines = [line if isinstance(line, bytes) else line.encode() for line in lines]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def changed(**changes) -> dict:
    """ROW with changes; None removes a column."""
    return {key: value for key, value in {**ROW, **changes}.items() if value is not None}


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(kind: type[Exception], **arguments) -> str:
    """The one-line message with which `load_rows` refuses its arguments."""
    with pytest.raises(kind) as error:
        load_rows(**arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def row_of(image: Path | Image.Image) -> PortraitRow:
    return PortraitRow("somewhere, line 7", image, "a woman", "a hat")


def warned(caplog) -> list[str]:
    """What `data.py` has warned of since the last call."""
    messages = [record.getMessage() for record in caplog.records if record.name == "training.data"]
    caplog.clear()
    return messages


# --------------------------------------------------------------------------------------------------------- a folder


def test_a_folder_with_every_column(tmp_path):
    second = changed(
        file_name="more/1.png",
        target_prompt=[["a green jacket", "a suit"], "a hat"],
        full_prompt="a woman, a suit, a hat",
        base_phrases=["a woman"],
        free_phrases=["a green jacket"],
        caption="is not looked at",
    )
    folder = write_folder(tmp_path / "set", [ROW, "", second])
    write_image(folder / "more" / "1.png")
    assert load_rows(train_data_dir=str(folder)) == [
        PortraitRow(
            source=f"{folder}/metadata.jsonl, line 1",
            image=folder / "0.png",
            base_prompt="a woman, a green jacket",
            target_prompt="blonde hair",
            full_prompt=None,
            base_phrases=None,
        ),
        PortraitRow(
            source=f"{folder}/metadata.jsonl, line 3",
            image=folder / "more" / "1.png",
            base_prompt="a woman, a green jacket",
            target_prompt=[("a green jacket", "a suit"), "a hat"],
            full_prompt="a woman, a suit, a hat",
            base_phrases=("a woman",),
            free_phrases=("a green jacket",),
        ),
    ]


def test_columns_by_other_names(tmp_path):
    row = {"file_name": "0.png", "text": "a man", "change": "a hat", "both": "a man, a hat", "parts": ["a man"]}
    row["loose"] = ["man"]
    folder = write_folder(tmp_path, [row])
    (loaded,) = load_rows(
        train_data_dir=folder,
        base_prompt_column="text",
        target_prompt_column="change",
        full_prompt_column="both",
        base_phrases_column="parts",
        free_phrases_column="loose",
    )
    assert loaded.base_prompt == "a man" and loaded.target_prompt == "a hat"
    assert loaded.full_prompt == "a man, a hat" and loaded.base_phrases == ("a man",)
    assert loaded.free_phrases == ("man",)


@pytest.mark.parametrize("name", ["full_prompt_column", "base_phrases_column", "free_phrases_column"])
def test_an_optional_column_by_a_wrong_name_is_an_error(tmp_path, name):
    folder = write_folder(tmp_path, [ROW])
    message = refusal(ValueError, train_data_dir=folder, **{name: "wrong"})
    assert f"--{name} 'wrong'" in message and "['base_prompt', 'file_name', 'target_prompt']" in message


def test_null_is_an_absent_column(tmp_path):
    line = json.dumps({**ROW, "full_prompt": None, "base_phrases": None, "free_phrases": None})
    none_free = json.dumps({**ROW, "free_phrases": []})
    row, other = load_rows(train_data_dir=write_folder(tmp_path, [line, none_free]))
    assert row.full_prompt is None and row.base_phrases is None and row.free_phrases == other.free_phrases == ()


def test_text_as_windows_and_other_tools_write_it(tmp_path):
    # A byte order mark, CRLF, and a line separator that JSON allows inside a string.
    line = json.dumps(changed(base_prompt="a café,\u2028a cup"), ensure_ascii=False)
    folder = write_folder(tmp_path, [b"\xef\xbb\xbf" + line.encode() + b"\r", b"\r"])
    (row,) = load_rows(train_data_dir=folder)
    assert row.base_prompt == "a café,\u2028a cup"


def test_one_target_for_the_whole_set(tmp_path):
    folder = write_folder(
        tmp_path, [changed(target_prompt=None), changed(target_prompt="a hat"), changed(target_prompt=["a hat"])]
    )
    rows = load_rows(train_data_dir=folder, target_prompt="a hat")
    assert [row.target_prompt for row in rows] == ["a hat", "a hat", ["a hat"]]


def test_a_target_that_contradicts_the_flag(tmp_path):
    folder = write_folder(tmp_path, [changed(target_prompt="a hat"), ROW])
    message = refusal(ValueError, train_data_dir=folder, target_prompt="a hat")
    assert message.startswith(f"{folder}/metadata.jsonl, line 2: ")
    assert "'blonde hair'" in message and "--target_prompt says 'a hat'" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'file_name': 1}", "is not JSON"),
        (json.dumps(ROW)[:-1], "is not JSON"),
        (b'{"file_name": "\xff"}', "is not JSON"),
        ("[1]", r"must be a JSON object with columns, got \[1\]"),
        ("{}", "must be a JSON object with columns"),
        (changed(file_name=None), r"no column 'file_name'. It has \['base_prompt', 'target_prompt'\]"),
        (changed(base_prompt=None), "no column 'base_prompt'; see --base_prompt_column. It has"),
        (changed(target_prompt=None), "no column 'target_prompt'; see --target_prompt_column and --target_prompt"),
        (changed(base_prompt=3), "column 'base_prompt' must be a text that is not empty, got 3"),
        (changed(base_prompt=" "), "column 'base_prompt' must be a text that is not empty, got ' '"),
        (changed(base_prompt=["a"]), "column 'base_prompt' must be a text"),
        (changed(target_prompt=""), "column 'target_prompt' must be a text that is not empty"),
        (changed(target_prompt={"a": "b"}), "column 'target_prompt' must be a text"),
        (changed(target_prompt=[]), "column 'target_prompt' must hold a target"),
        (changed(target_prompt=["a", ""]), "column 'target_prompt' must be a text that is not empty, got ''"),
        (changed(target_prompt=[["a", "b", "c"]]), r"a replacement is \[phrase, target\], got \['a', 'b', 'c'\]"),
        (changed(target_prompt=[["a"]]), r"a replacement is \[phrase, target\], got \['a'\]"),
        (changed(target_prompt=[["a", 1]]), "column 'target_prompt' must be a text that is not empty, got 1"),
        (changed(full_prompt=" "), "column 'full_prompt' must be a text"),
        (changed(base_phrases="a woman"), "column 'base_phrases' must be a list of phrases, got 'a woman'"),
        (changed(base_phrases=[]), "column 'base_phrases' must be a list of phrases"),
        (changed(base_phrases=["a", 1]), "column 'base_phrases' must be a text that is not empty, got 1"),
        (changed(free_phrases="a woman"), "column 'free_phrases' must be a list of phrases, got 'a woman'"),
        (changed(free_phrases=["a", ""]), "column 'free_phrases' must be a text that is not empty, got ''"),
        (changed(file_name=7), "column 'file_name' must be a text"),
        (changed(file_name="../0.png"), r"file_name '../0.png' leads out of the folder"),
        (changed(file_name="a/../../0.png"), "leads out of the folder"),
        (changed(file_name=os.path.abspath("0.png")), "0.png' is not in the folder"),
        (changed(file_name="."), "is not a file"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, line, message):
    folder = write_folder(tmp_path, [ROW, line])
    with pytest.raises(ValueError, match=message) as error:
        load_rows(train_data_dir=folder)
    assert str(error.value).startswith(f"{folder}/metadata.jsonl, line 2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file_name", ["none.png", "0.png/0.png", "a\0b.png", "x" * 300 + ".png"])
def test_a_missing_image_is_named(tmp_path, file_name):
    folder = write_folder(tmp_path, [ROW, changed(file_name=file_name)])
    message = refusal(FileNotFoundError, train_data_dir=folder)
    assert message.startswith(f"{folder}/metadata.jsonl, line 2: there is no image {folder / file_name}")


def test_links_may_not_lead_out_of_the_folder(tmp_path):
    outside = write_image(tmp_path / "secret" / "0.png")
    folder = write_folder(tmp_path / "set", [changed(file_name="link.png")])
    (folder / "link.png").symlink_to(folder / "0.png")
    assert load_rows(train_data_dir=folder)[0].image == folder / "link.png"
    for link, target, file_name in (("out.png", outside, "out.png"), ("away", outside.parent, "away/0.png")):
        (folder / link).symlink_to(target)
        write_folder(folder, [changed(file_name=file_name)])
        message = refusal(ValueError, train_data_dir=folder)
        assert f"'{file_name}' is a link that leads out of the folder" in message
    (folder / "loop.png").symlink_to(folder / "loop.png")
    write_folder(folder, [changed(file_name="loop.png")])
    assert "there is no image" in refusal(FileNotFoundError, train_data_dir=folder)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("sub/a.png", "sub\\a.png"),
        ("sub/a.png", "{folder}/sub/a.png"),
        (unicodedata.normalize("NFD", "zoë/é.png"), unicodedata.normalize("NFC", "zoë/é.png")),
        (unicodedata.normalize("NFC", "zoë/é.png"), unicodedata.normalize("NFD", "zoë\\é.png")),
        ("a\\b.png", "a\\b.png"),
    ],
)
def test_a_name_as_other_systems_write_it(tmp_path, name, written, caplog):
    write_image(tmp_path / name)
    write_folder(tmp_path, [changed(file_name=written.format(folder=tmp_path))], images=0)
    (row,) = load_rows(train_data_dir=tmp_path)
    assert row.image == tmp_path / name and upright_size(row) == (6, 4)
    assert warned(caplog) == []


@pytest.mark.parametrize("written", ["..\\a.png", "sub\\..\\..\\a.png", "{folder}/../a.png", "{folder}x/a.png"])
def test_no_spelling_leads_out_of_the_folder(tmp_path, written):
    folder = write_folder(tmp_path / "set", [changed(file_name=written.format(folder=tmp_path / "set"))])
    write_image(tmp_path / "a.png")
    message = refusal(ValueError, train_data_dir=folder)
    assert "leads out of the folder" in message or "is not in the folder" in message


def test_a_relative_folder_takes_absolute_names(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set", [changed(file_name=str(tmp_path / "set" / "0.png"))])
    monkeypatch.chdir(tmp_path)
    (row,) = load_rows(train_data_dir="set")
    assert row.image == Path("set", "0.png") and folder.is_dir()


def test_what_a_row_does_not_use_is_warned_of(tmp_path, caplog):
    folder = write_folder(tmp_path / "set", [changed(free_phrase=["a green jacket"], note="mine")], images=3)
    write_image(folder / "more" / "4.jpg")
    for hidden in (".thumbs/5.png", "__MACOSX/6.png", "._0.png"):
        write_image(folder / hidden)
    load_rows(train_data_dir=folder)
    unused, misspelled = warned(caplog)
    assert unused == f"3 images of {folder} are in no row of metadata.jsonl: 1.png, 2.png, more/4.jpg"
    assert misspelled == (
        f"{folder}/metadata.jsonl: the column 'free_phrase' is not read; is 'free_phrases' meant?"
    )
    masked = write_folder(tmp_path / "masked", [changed(mask_file_name="1.png")], images=2)
    load_rows(train_data_dir=masked)
    load_rows(train_data_dir=write_folder(tmp_path / "two", [ROW, changed(file_name="1.png")], 2), max_train_samples=1)
    assert warned(caplog) == []


def write_csv(folder: Path, text: str, images: int = 1) -> Path:
    write_folder(folder, [], images)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_bytes(text.encode())
    return folder


def test_a_table_of_prompts(tmp_path):
    text = (
        "\ufefffile_name,base_prompt,target_prompt,base_phrases,full_prompt\r\n"
        '0.png,"a woman, a ""green"" jacket",blonde hair,,\r\n\r\n'
        '1.png,"a woman,\r\na hat","[[""a hat"", ""a tie""]]","[""a woman"", ""a hat""]","a woman, a tie"\r\n'
    )
    folder = write_csv(tmp_path, text, images=2)
    first, second = load_rows(train_data_dir=folder)
    assert first == PortraitRow(
        f"{folder}/metadata.csv, line 2", folder / "0.png", 'a woman, a "green" jacket', "blonde hair"
    )
    assert second.source == f"{folder}/metadata.csv, line 4" and second.target_prompt == [("a hat", "a tie")]
    assert second.base_phrases == ("a woman", "a hat") and second.full_prompt == "a woman, a tie"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,base_prompt\n0.png,a man, a hat\n", "metadata.csv, line 2 has 3 cells for the 2 columns.*quotes"),
        ("file_name,base_prompt\n0.png\n", "metadata.csv, line 2 has 1 cells for the 2 columns"),
        ("file_name;base_prompt\n0.png;a woman\n", r"no column 'file_name'. It has \['file_name;base_prompt'\]"),
        ("file_name,file_name\n0.png,0.png\n", "line 1 names a column twice"),
        ("file_name,base_prompt,base_phrases\n0.png,a hat,[a hat]\n", "line 2: column 'base_phrases' is no list"),
        ("file_name,base_prompt,base_phrases\n0.png,a hat,a hat\n", "column 'base_phrases' must be a list of phrases"),
        ('file_name,base_prompt\n0.png,"a woman\n', "metadata.csv, line 2: unexpected end of data"),
        ("file_name,base_prompt\n0.png,\n", "line 2: no column 'base_prompt'; see --base_prompt_column"),
        ("file_name,base_prompt\n", "has no rows"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_rows(train_data_dir=write_csv(tmp_path, text), target_prompt="blonde hair")
    assert "\n" not in str(error.value)


def test_a_table_in_another_encoding(tmp_path):
    folder = write_csv(tmp_path, "")
    (folder / "metadata.csv").write_bytes("file_name,base_prompt".encode("utf-16"))
    assert "metadata.csv is not UTF-8" in refusal(ValueError, train_data_dir=folder)


def test_two_tables_are_one_too_many(tmp_path):
    folder = write_folder(tmp_path, [ROW])
    (folder / "metadata.csv").write_text("file_name,base_prompt\n")
    assert "has a metadata.jsonl and a metadata.csv: keep the one" in refusal(ValueError, train_data_dir=folder)


def write_captions(folder: Path, captions: dict[str, bytes]) -> Path:
    """Pictures by name, each with its caption beside it in a .txt file."""
    for name, text in captions.items():
        write_image(folder / name).with_suffix(".txt").write_bytes(text)
    return folder


def test_captions_beside_the_images(tmp_path):
    captions = {"b.png": b"\xef\xbb\xbfa man,\r\na hat\r\n", "a.jpg": b"a woman, blonde hair", "sub/c.PNG": b"a boy"}
    folder = write_captions(tmp_path, captions)
    (folder / "notes.txt").write_text("belongs to no picture")
    assert load_rows(train_data_dir=folder, target_prompt="blonde hair") == [
        PortraitRow(str(folder / name).replace(end, ".txt"), folder / name, text, "blonde hair", caption=text)
        for name, end, text in [
            ("a.jpg", ".jpg", "a woman, blonde hair"),
            ("b.png", ".png", "a man, a hat"),
            ("sub/c.PNG", ".PNG", "a boy"),
        ]
    ]
    (folder / "a.txt").rename(folder / "a.caption")
    for name in ("b.png", "sub/c.PNG"):
        (folder / name).unlink()
    (row,) = load_rows(train_data_dir=folder, target_prompt="blonde hair", caption_extension=".caption")
    assert row.source == str(folder / "a.caption")


def test_captions_that_cannot_be_used(tmp_path):
    folder = write_captions(tmp_path, {"a.png": b"a man", "b.png": b"a boy"})
    assert "need --target_prompt" in refusal(ValueError, train_data_dir=folder)
    arguments = {"train_data_dir": folder, "target_prompt": "blonde hair"}
    assert "no --caption_column" in refusal(ValueError, caption_column="text", **arguments)
    (folder / "b.txt").write_bytes(b" \n")
    assert f"{folder / 'b.txt'} must be a text that is not empty" in refusal(ValueError, **arguments)
    (folder / "b.txt").unlink()
    message = refusal(FileNotFoundError, **arguments)
    assert "1 of 2 images have no caption beside them that ends in .txt (--caption_extension): b.png" in message
    (folder / "b.txt").write_bytes("für".encode("latin-1"))
    assert f"{folder / 'b.txt'} is not UTF-8" in refusal(ValueError, **arguments)


def test_a_metadata_file_comes_before_captions(tmp_path, caplog):
    folder = write_folder(tmp_path, [ROW])
    write_captions(folder, {"0.png": b"a man"})
    (row,) = load_rows(train_data_dir=folder)
    assert row.base_prompt == ROW["base_prompt"] and row.caption is None
    (message,) = warned(caplog)
    assert message == f"{folder}/metadata.jsonl gives the prompts; the captions beside the images are not read"
    (folder / "0.cap").write_text("a man")
    message = refusal(ValueError, train_data_dir=folder, caption_extension=".cap")
    assert f"--caption_extension .cap: {folder}/metadata.jsonl gives the prompts" in message


def test_a_column_of_captions(tmp_path):
    folder = write_folder(tmp_path, [changed(base_prompt=None, text="a woman, blonde hair, a hat")])
    (row,) = load_rows(train_data_dir=folder, caption_column="text")
    assert row.base_prompt == row.caption == "a woman, blonde hair, a hat" and row.target_prompt == "blonde hair"
    message = refusal(ValueError, train_data_dir=folder, caption_column="caption")
    assert "no column 'caption'; see --caption_column. It has" in message


def test_the_folder_itself_may_be_a_link(tmp_path):
    folder = write_folder(tmp_path / "set", [ROW])
    (tmp_path / "link").symlink_to(folder)
    assert len(load_rows(train_data_dir=tmp_path / "link")) == 1


def test_a_folder_that_holds_nothing(tmp_path):
    assert f"--train_data_dir {tmp_path / 'none'}" in refusal(FileNotFoundError, train_data_dir=tmp_path / "none")
    file = write_image(tmp_path / "file.png")
    assert "is not a folder" in refusal(FileNotFoundError, train_data_dir=file)
    (tmp_path / "empty").mkdir()
    assert "is empty; it needs images and a metadata.jsonl" in refusal(
        FileNotFoundError, train_data_dir=tmp_path / "empty"
    )
    message = refusal(FileNotFoundError, train_data_dir=tmp_path)
    assert "has no metadata.jsonl" in message and "'file_name', 'base_prompt' and 'target_prompt'" in message
    folder = write_folder(tmp_path / "bare", ["", "  "])
    assert refusal(ValueError, train_data_dir=folder) == f"{folder}/metadata.jsonl has no rows."


def test_a_choice_of_rows(tmp_path):
    rows = [changed(file_name=f"{i}.png") for i in range(12)]
    folder = write_folder(tmp_path, rows, images=12)

    def choose(count, seed=0):
        return [int(row.image.stem) for row in load_rows(train_data_dir=folder, max_train_samples=count, seed=seed)]

    assert choose(12) == choose(13) == choose(None) == list(range(12))
    assert len(set(choose(5))) == 5 and choose(5) == sorted(choose(5)) == choose(5)
    assert choose(5) != list(range(5))
    assert choose(5) != choose(5, seed=1)


def test_flags_are_named(tmp_path):
    folder = write_folder(tmp_path, [ROW])
    assert "either --train_data_dir or --dataset_name" in refusal(ValueError)
    assert "and not both" in refusal(ValueError, train_data_dir=folder, dataset_name="a/b")
    for count in (0, -1):
        message = refusal(ValueError, train_data_dir=folder, max_train_samples=count)
        assert message == f"--max_train_samples must be at least 1, got {count}."
    message = refusal(ValueError, train_data_dir=folder, target_prompt=" ")
    assert message == "--target_prompt must be a text that is not empty, got ' '."
    assert "--dataset_config_name 'x'" in refusal(ValueError, train_data_dir=folder, dataset_config_name="x")


# ---------------------------------------------------------------------------------------------------- datasets' own


def make_dataset(**columns) -> datasets.Dataset:
    pixels = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    rows = {
        "image": [Image.fromarray(pixels[0]), Image.fromarray(pixels[1])],
        "base_prompt": ["a woman, a coat", "a man, a coat"],
        "target_prompt": [[["a coat", "a suit"]], [["a coat", "a dress"]]],
        "base_phrases": [["a woman"], None],
        **columns,
    }
    types = {"image": datasets.Image()} if isinstance(rows["image"][0], Image.Image) else {}
    dataset = datasets.Dataset.from_dict({name: value for name, value in rows.items() if value is not None})
    return dataset.cast(datasets.Features({**dataset.features, **types}))


def test_a_dataset_from_disk(tmp_path):
    dataset = make_dataset()
    # The format is saved too; rows must not come as arrays for it.
    dataset.with_format("numpy").save_to_disk(tmp_path / "saved")
    rows = load_rows(dataset_name=str(tmp_path / "saved"))
    assert [row.source for row in rows] == [f"dataset '{tmp_path / 'saved'}', row {i}" for i in range(2)]
    assert [row.target_prompt for row in rows] == [[("a coat", "a suit")], [("a coat", "a dress")]]
    assert [row.base_phrases for row in rows] == [("a woman",), None]
    check_images(rows)
    for row, original in zip(rows, dataset["image"], strict=True):
        assert isinstance(row.image, Image.Image)
        assert load_image(row).tobytes() == original.tobytes()


def test_the_train_split_of_a_dataset_dict(tmp_path):
    splits = datasets.DatasetDict(train=make_dataset(), test=make_dataset().select([0]))
    splits.save_to_disk(tmp_path / "splits")
    assert len(load_rows(dataset_name=str(tmp_path / "splits"))) == 2
    del splits["train"]
    splits.save_to_disk(tmp_path / "no_train")
    message = refusal(ValueError, dataset_name=str(tmp_path / "no_train"))
    assert "has no split 'train'; it has ['test']" in message


def test_a_folder_read_by_load_dataset(tmp_path):
    folder = write_folder(tmp_path / "set", [ROW, changed(file_name="1.png", target_prompt="a hat")], images=2)
    rows = load_rows(dataset_name=str(folder), cache_dir=tmp_path / "cache")
    assert (tmp_path / "cache").is_dir()
    assert [(row.image, row.target_prompt) for row in rows] == [
        (folder / "0.png", "blonde hair"),
        (folder / "1.png", "a hat"),
    ]
    (row,) = load_rows(dataset_name=str(folder), cache_dir=tmp_path / "cache", max_train_samples=1)
    assert row in rows


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({}, {"image_column": "picture"}, "no images in --image_column 'picture'; columns of images: ['image']"),
        ({}, {"image_column": "base_prompt"}, "no images in --image_column 'base_prompt'"),
        ({}, {"base_prompt_column": "text"}, "row 0: no column 'text'; see --base_prompt_column. It has ['image', "),
        ({"target_prompt": None}, {}, "row 0: no column 'target_prompt'"),
        ({"target_prompt": ["a hat", None]}, {}, "row 1: column 'target_prompt' must be a text"),
        ({"base_prompt": ["a man", ""]}, {}, "row 1: column 'base_prompt' must be a text"),
        ({}, {"dataset_config_name": "x"}, "--dataset_config_name 'x' needs a --dataset_name that has configurations"),
        ({}, {"full_prompt_column": "text"}, "--full_prompt_column 'text' is no column"),
    ],
)
def test_a_wrong_dataset_is_named(tmp_path, columns, arguments, message):
    make_dataset(**columns).save_to_disk(tmp_path / "saved")
    assert message in refusal(ValueError, dataset_name=str(tmp_path / "saved"), **arguments)


def test_a_dataset_without_rows_or_images(tmp_path):
    make_dataset().select([]).save_to_disk(tmp_path / "saved")
    make_dataset().select([]).to_parquet(tmp_path / "parquet" / "train.parquet")
    for name in ("saved", "parquet"):
        message = refusal(ValueError, dataset_name=str(tmp_path / name), cache_dir=tmp_path / "cache")
        assert message.startswith(f"--dataset_name '{tmp_path / name}' cannot be read: ")
    holes = make_dataset().to_list()
    holes[1]["image"] = None
    datasets.Dataset.from_list(holes, features=make_dataset().features).save_to_disk(tmp_path / "holes")
    assert "row 1: column 'image' is empty" in refusal(ValueError, dataset_name=str(tmp_path / "holes"))


def test_a_dataset_that_is_not_there(tmp_path):
    message = refusal(FileNotFoundError, dataset_name=str(tmp_path / "none"), cache_dir=tmp_path)
    assert message.startswith(f"--dataset_name '{tmp_path / 'none'}' cannot be read: ")
    message = refusal(ValueError, dataset_name="nobody/nothing-of-the-kind", cache_dir=tmp_path)
    assert message.startswith("--dataset_name 'nobody/nothing-of-the-kind' cannot be read: ")
    folder = write_folder(tmp_path / "set", [ROW])
    message = refusal(ValueError, dataset_name=str(folder), dataset_config_name="other", cache_dir=tmp_path / "cache")
    assert "cannot be read" in message and "'other'" in message


def save_paths(folder: Path, paths: list[str]) -> Path:
    """A parquet file whose rows name their pictures by path."""
    rows = {"image": [{"path": path, "bytes": None} for path in paths], "base_prompt": ["a woman"] * len(paths)}
    features = datasets.Features({"image": datasets.Image(), "base_prompt": datasets.Value("string")})
    folder.mkdir(exist_ok=True)
    # `to_parquet` would put the pictures' bytes into the file.
    pq.write_table(datasets.Dataset.from_dict(rows, features).data.table, folder / "data.parquet")
    return folder


def test_a_dataset_names_files_of_its_own_alone(tmp_path):
    secret = write_image(tmp_path / "secret.png")
    folder = tmp_path / "set"
    write_image(folder / "pictures" / "a.png")
    arguments = {"dataset_name": str(folder), "target_prompt": "blonde hair", "cache_dir": tmp_path / "cache"}
    inside = str(folder / "pictures" / "a.png")
    save_paths(folder, [inside])
    (row,) = load_rows(**arguments)
    assert row.image == Path(inside)
    (folder / "link").symlink_to(secret)
    for path in (str(secret), f"{folder}/../secret.png", str(folder / "link"), "/etc/passwd", "secret.png"):
        save_paths(folder, [inside, path])
        message = refusal(ValueError, **arguments)
        assert f"dataset {str(folder)!r}, row 1: column 'image' names {path!r}, which is no file in" in message


def test_a_file_of_a_dataset_is_no_dataset(tmp_path):
    file = save_paths(tmp_path / "set", ["a.png"]) / "data.parquet"
    assert "it is a file; give the folder that it lies in" in refusal(ValueError, dataset_name=str(file))


def test_a_caption_inside_another_column(tmp_path):
    image = {"bytes": encode(Image.new("RGB", (6, 4))), "path": None}
    features = datasets.Features({"image": datasets.Image(), "json": {"base_prompt": datasets.Value("string")}})
    rows = {"image": [image], "json": [{"base_prompt": "a woman"}]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "set")
    message = refusal(ValueError, dataset_name=str(tmp_path / "set"), target_prompt="blonde hair")
    assert "no column 'base_prompt'; see --base_prompt_column; it lies inside of 'json'" in message


@pytest.mark.parametrize("cut", [20, -200])
def test_a_broken_image_of_a_dataset(tmp_path, cut):
    noisy = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    stored = [{"bytes": encode(Image.fromarray(noisy)), "path": None}] * 2
    stored[1] = {"bytes": stored[0]["bytes"][:cut], "path": None}
    features = datasets.Features(
        {"image": datasets.Image(), "base_prompt": datasets.Value("string"), "target_prompt": datasets.Value("string")}
    )
    values = {"image": stored, "base_prompt": ["a man"] * 2, "target_prompt": ["a hat"] * 2}
    datasets.Dataset.from_dict(values, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"^dataset '.*saved', row 1: "):
        check_images(load_rows(dataset_name=str(tmp_path / "saved")))


# ----------------------------------------------------------------------------------------------------------- images


def test_an_image_is_upright_and_rgb(tmp_path):
    image = Image.new("RGB", (2, 1), "black")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "0.png", exif=exif)
    loaded = load_image(row_of(tmp_path / "0.png"))
    assert loaded.mode == "RGB" and loaded.size == (1, 2)
    assert loaded.getpixel((0, 0)) == (255, 0, 0) and loaded.getpixel((0, 1)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "RGB"])
def test_every_usual_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("0.tif" if mode == "CMYK" else "0.png")
    Image.new("RGB", (3, 2), "white").convert(mode).save(path)
    loaded = load_image(row_of(path))
    assert loaded.mode == "RGB" and loaded.getcolors() == [(6, (255, 255, 255))]


def test_what_is_transparent_lies_on_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.save(tmp_path / "0.png")
    loaded = load_image(row_of(tmp_path / "0.png"))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (255, 0, 0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image.convert("P").save(tmp_path / "1.png", transparency=bytes([0] * 200 + [255] * 56))
        load_image(row_of(tmp_path / "1.png"))


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
    row = row_of(path)
    image = load_image(row)
    assert image.size == upright_size(row) == ((32, 16) if orientation < 5 else (16, 32))
    assert np.array_equal(image, load_image(row_of(plain)))


def test_broken_exif_is_nobodys_concern(tmp_path):
    exif = bytearray(odd_exif(6))
    exif[14:16] = struct.pack("<H", 40)  # more entries than there are
    path = tmp_path / "a.jpg"
    Image.new("RGB", (6, 4), "red").save(path, exif=bytes(exif))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load_image(row_of(path)).size == upright_size(row_of(path)) == (4, 6)


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
    row = row_of(tmp_path / "a.png")
    assert upright_size(row) == (6, 4) and load_image(row).getpixel((0, 0)) == (255, 0, 0)


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
    row = row_of(tmp_path / "a.png")
    assert load_image(row).size == upright_size(row) == (4, 6)


@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_heic_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100)
    with pytest.raises(ValueError, match="a.* is a HEIC picture, which is not read; save it as JPEG or PNG"):
        load_image(row_of(path))


def test_a_decoded_image_of_ones_own():
    assert load_image(row_of(Image.new("L", (2, 2), 7))).getcolors() == [(4, (7, 7, 7))]


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_deep_images_are_refused_rather_than_clipped(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "0.tif")
    with pytest.raises(ValueError, match=f"0.tif has the mode '{mode}'; save it with 8 bits"):
        load_image(row_of(tmp_path / "0.tif"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_found(tmp_path, kind):
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    content = encode(noisy, kind)
    folder = write_folder(tmp_path, [ROW, changed(file_name="1.png")])
    (folder / "1.png").write_bytes(content)
    rows = load_rows(train_data_dir=folder)
    check_images(rows)
    # The header is whole, so only decoding tells.
    (folder / "1.png").write_bytes(content[: len(content) // 2])
    rows = load_rows(train_data_dir=folder)
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 2: the image .*1\.png cannot be") as error:
        check_images(rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_a_file_that_is_no_image(tmp_path, content):
    (tmp_path / "0.png").write_bytes(content)
    with pytest.raises(ValueError, match="somewhere, line 7: the image .*0.png cannot be read"):
        check_images([row_of(tmp_path / "0.png")])


def test_a_damaged_chunk_is_found(tmp_path):
    """Pillow lets a SyntaxError out while it decodes this one."""
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))
    content = bytearray(encode(noisy))
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    content[second : second + 4] = b"\0\1\2\3"
    (tmp_path / "0.png").write_bytes(content)
    with pytest.raises(ValueError, match="0.png cannot be decoded: broken PNG file") as error:
        load_image(row_of(tmp_path / "0.png"))
    assert isinstance(error.value.__cause__, SyntaxError)


def test_an_image_that_went_away(tmp_path):
    with pytest.raises(FileNotFoundError, match="somewhere, line 7: the image .*0.png does not exist"):
        load_image(row_of(tmp_path / "0.png"))


def test_a_large_image_is_not_decoded(tmp_path, monkeypatch):
    write_image(tmp_path / "0.png", size=(6, 4))
    assert load_image(row_of(tmp_path / "0.png"), max_pixels=24).size == (6, 4)

    def decode(self):
        raise AssertionError("The image was decoded.")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(ValueError, match="0.png has 6x4 pixels, more than the 23 allowed"):
        load_image(row_of(tmp_path / "0.png"), max_pixels=23)


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
        load_image(row_of(tmp_path / "0.png"))


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


def test_an_unknown_interpolation():
    with pytest.raises(ValueError, match=r"interpolation must be one of \['lanczos', .*\], got 'Lanczos'"):
        preprocess_image(Image.new("RGB", (4, 4)), (4, 4), interpolation="Lanczos")


@pytest.mark.parametrize("centering", [(-0.01, 0.5), (0.5, 1.01), (float("nan"), 0.5)])
def test_a_crop_outside_of_the_image(centering):
    with pytest.raises(ValueError, match=r"centering must lie in \[0, 1\], got \("):
        preprocess_image(Image.new("RGB", (4, 4)), (4, 4), centering=centering)


# ------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_the_upright_size_is_that_of_the_loaded_image(tmp_path, kind, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    (tmp_path / "0").write_bytes(encode(noise((6, 4)), kind, exif=exif))
    sideways = orientation is not None and orientation >= 5
    assert upright_size(row_of(tmp_path / "0")) == ((4, 6) if sideways else (6, 4))
    # An image of a `datasets` row, before it is decoded and after.
    row = row_of(Image.open(tmp_path / "0"))
    for _ in range(2):
        assert upright_size(row) == load_image(row).size == ((4, 6) if sideways else (6, 4))


def test_the_upright_size_needs_no_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG"):
        (tmp_path / "0").write_bytes(encode(Image.new("RGB", (6, 4)), kind, exif=exif))
        assert upright_size(row_of(tmp_path / "0")) == (4, 6)


def test_the_upright_size_of_a_broken_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="somewhere, line 7: the image .*0.png does not exist"):
        upright_size(row_of(tmp_path / "0.png"))
    (tmp_path / "0.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="somewhere, line 7: the image .*0.png cannot be read"):
        upright_size(row_of(tmp_path / "0.png"))
    content = encode(noise((64, 64)))
    (tmp_path / "0.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="somewhere, line 7: the image .*0.png cannot be decoded"):
        upright_size(row_of(tmp_path / "0.png"))


def test_a_changed_picture_has_another_key(tmp_path):
    row = row_of(tmp_path / "0.png")
    noise((6, 4)).save(row.image)
    before = content_key(row)
    assert content_key(row) == before and len(before) == 64 and int(before, 16)
    noise((6, 4), seed=1).save(row.image)
    assert content_key(row) != before


def test_a_picture_keeps_its_key_under_another_name(tmp_path):
    noise((6, 4)).save(tmp_path / "0.png")
    noise((6, 4)).save(tmp_path / "1.png")
    rows = [row_of(tmp_path / "0.png"), PortraitRow("elsewhere, line 1", tmp_path / "1.png", "a man", "a cap")]
    assert content_key(rows[0]) == content_key(rows[1])


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
    keys = [content_key(row_of(image)) for image in images]
    assert len(set(keys)) == len(images)
    assert keys == [content_key(row_of(image)) for image in images]
    assert content_key(row_of(Image.open(io.BytesIO(encode(noise((6, 4))))))) == keys[0]


def test_the_key_of_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="somewhere, line 7: the image .*0.png does not exist"):
        content_key(row_of(tmp_path / "0.png"))
    with pytest.raises(ValueError, match="somewhere, line 7: the image .* cannot be read: .*Is a directory"):
        content_key(row_of(tmp_path))


# ---------------------------------------------------------------------------------------------------------- buckets


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


# ---------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("batch_size", "count"), [(1, 5), (2, 5), (5, 5), (4, 6), (7, 3), (3, 1)])
def test_every_sample_comes_once_an_epoch(batch_size, count):
    steps = 4 * count
    stream = [i for step in range(steps) for i in batch_indices(step, batch_size, count, seed=3)]
    assert len(stream) == steps * batch_size
    epochs = [stream[start : start + count] for start in range(0, len(stream), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_the_order_is_new_each_epoch_and_for_each_seed():
    def epoch(number, seed):
        return batch_indices(number, 50, 50, seed)

    orders = [epoch(number, seed) for number in range(3) for seed in (-1, 0, 1)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert list(range(50)) not in orders


def test_a_batch_depends_on_its_step_alone():
    forward = [batch_indices(step, 3, 7, seed=0) for step in range(20)]
    backward = [batch_indices(step, 3, 7, seed=0) for step in reversed(range(20))]
    assert forward == backward[::-1]


def test_a_batch_does_not_touch_the_global_random_state():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    batch_indices(0, 3, 7, seed=5)
    assert random.random() == expected


@pytest.mark.parametrize("bucket", [0, 3])
@pytest.mark.parametrize(("batch_size", "count"), [(1, 5), (4, 6), (7, 3), (3, 1)])
def test_one_bucket_changes_nothing(bucket, batch_size, count):
    for seed in (0, 7):
        for step in (*range(30), 10**12):
            expected = batch_indices(step, batch_size, count, seed)
            assert bucketed_batch_indices(step, batch_size, [bucket] * count, seed) == expected


BUCKETS = [1, 0, 1, 1, 4, 0, 1, 1, 4, 0, 1]  # of 11 samples: six, three and two


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
@pytest.mark.parametrize("first_cycle", [0, 10**9])
def test_every_bucket_and_sample_has_its_share(batch_size, first_cycle):
    count = len(BUCKETS)
    for cycle in range(first_cycle, first_cycle + 4):
        batches = [bucketed_batch_indices(cycle * count + i, batch_size, BUCKETS, seed=3) for i in range(count)]
        assert all(len(batch) == batch_size and len({BUCKETS[i] for i in batch}) == 1 for batch in batches)
        turns = [BUCKETS[batch[0]] for batch in batches]
        assert [turns.count(bucket) for bucket in (0, 1, 4)] == [3, 6, 2]
        assert Counter(i for batch in batches for i in batch) == dict.fromkeys(range(count), batch_size)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_no_sample_comes_again_before_the_others_of_its_bucket(batch_size):
    stream = [i for step in range(66) for i in bucketed_batch_indices(step, batch_size, BUCKETS, seed=3)]
    for bucket in (0, 1, 4):
        own = [i for i, other in enumerate(BUCKETS) if other == bucket]
        drawn = [i for i in stream if BUCKETS[i] == bucket]
        epochs = [drawn[start : start + len(own)] for start in range(0, len(drawn), len(own))]
        assert all(sorted(epoch) == own for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_turns_of_the_buckets_are_new_each_cycle_and_for_each_seed():
    buckets = [0, 1, 2] * 20
    turns = {
        tuple(buckets[bucketed_batch_indices(60 * cycle + i, 1, buckets, seed)[0]] for i in range(60))
        for cycle in range(3)
        for seed in (-1, 0, 1)
    }
    assert len(turns) == 9


def test_buckets_of_one_size_have_orders_of_their_own():
    """Else the batches of one would be told by those of the other."""
    buckets = [0] * 40 + [1] * 40
    stream = [bucketed_batch_indices(step, 1, buckets, seed=0)[0] for step in range(80)]
    assert [i for i in stream if i < 40] != [i - 40 for i in stream if i >= 40]


def test_a_bucketed_batch_depends_on_its_arguments_alone():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    forward = [bucketed_batch_indices(step, 3, BUCKETS, seed=0) for step in range(40)]
    backward = [bucketed_batch_indices(step, 3, tuple(BUCKETS), seed=0) for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert random.random() == expected


# ---------------------------------------------------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)
    text_config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts=("a", "b", "c"), **changes) -> torch.Tensor:
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 24, "batch_size": 2}
    options["seeds"] = range(5, 5 + len(prompts))
    return draw_latents(pipeline, prompts, **{**options, **changes})


def test_latents_do_not_depend_on_the_batch_size(pipeline):
    latents = draw(pipeline)
    assert latents.shape == (3, 4, 8, 12) and latents.dtype == torch.float32 and not latents.requires_grad
    for batch_size in (1, 3, 8):
        torch.testing.assert_close(draw(pipeline, batch_size=batch_size), latents, atol=1e-5, rtol=0)


def test_each_portrait_has_its_own_seed(pipeline):
    latents = draw(pipeline, prompts=["a", "a", "a"])
    differences = [(latents[i] - latents[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(differences) > 0.1
    torch.testing.assert_close(draw(pipeline, prompts=["a"], seeds=[6])[0], latents[1], atol=1e-5, rtol=0)
    assert (draw(pipeline, prompts=["b", "a", "a"])[0] - latents[0]).abs().max() > 1e-4


def test_half_precision_starts_from_the_same_noise(pipeline, monkeypatch):
    """Rounded, and not drawn in another way."""
    call, started = type(pipeline).__call__, []

    def watched(self, *args, **kwargs):
        started.append(kwargs["latents"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(pipeline), "__call__", watched)
    draw(pipeline, prompts=["a", "b"])
    draw(copy.deepcopy(pipeline).to(torch.bfloat16), prompts=["a", "b"])
    noise = torch.stack([torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    assert torch.equal(started[0], noise) and torch.equal(started[1], noise.bfloat16())


def test_latents_are_what_the_pipeline_decodes(pipeline):
    (latents,) = draw(pipeline, prompts=["a"]).split(1)
    image = pipeline(
        "a",
        num_inference_steps=2,
        guidance_scale=3.0,
        height=16,
        width=24,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), image, atol=1e-5, rtol=0)
