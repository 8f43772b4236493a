"""Tests of reading the training set: real image files, a real saved dataset."""

import io
import json
import os
import unicodedata
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from programs.picture_files import load_picture, upright_size
from training import data as data_module
from training.data import PortraitRow, check_images
from training.flags import ColumnFlags, DataFlags


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


def load_rows(**arguments) -> list[PortraitRow]:
    """The rows, with the flags that are given sorted into their groups."""
    data, columns = (
        group(**{one.name: arguments.pop(one.name) for one in fields(group) if one.name in arguments})
        for group in (DataFlags, ColumnFlags)
    )
    return data_module.load_rows(data, columns, **arguments)


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
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("training.")]
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
    assert row.image == tmp_path / name and upright_size(row.image, row.source) == (6, 4)
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
    assert misspelled == (f"{folder}/metadata.jsonl: the column 'free_phrase' is not read; is 'free_phrases' meant?")
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
        PortraitRow(str(folder / name).replace(end, ".txt"), folder / name, base, "blonde hair", caption=text)
        for name, end, base, text in [
            ("a.jpg", ".jpg", "a woman", "a woman, blonde hair"),
            ("b.png", ".png", "a man, a hat", "a man, a hat"),
            ("sub/c.PNG", ".PNG", "a boy", "a boy"),
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
    assert row.caption == "a woman, blonde hair, a hat" and row.target_prompt == "blonde hair"
    assert row.base_prompt == "a woman, a hat"
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
        assert message == f"--max_train_samples must be at least 1, got {count}"
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
        assert load_picture(row.image, row.source).tobytes() == original.tobytes()


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
