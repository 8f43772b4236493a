"""Tests of what the trainer makes of users' words: captions that say the target, contradictions, weights, paths."""

import logging
from pathlib import Path

import numpy as np
import pytest
from test_train import make_flags, train, write_data

from prompts import make_prompt_pair
from training.alignment_prompts import thin_out
from training.arguments import parse_args
from training.data import take_targets_out
from training.inputs import check_inputs


CAPTION = "a woman, red hair, a brown jacket"


def write_captions(folder: Path, captions: list[str]) -> Path:
    """Six pictures, and a caption beside each."""
    write_data(folder, [])
    (folder / "metadata.jsonl").unlink()
    for i in range(6):
        (folder / f"{i}.txt").write_text(captions[i % len(captions)])
    return folder


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# -------------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("target", "base_prompt"),
    [
        ("red hair", "a woman, a brown jacket"),
        (["red hair", "a brown jacket"], "a woman"),
        ([("a brown jacket", "a suit"), "red hair"], "a woman, a brown jacket"),
        ("a hat", CAPTION),
    ],
)
def test_a_captions_base_prompt_does_not_say_the_target(target, base_prompt):
    assert take_targets_out(CAPTION, target, "captions.csv, line 2") == base_prompt


def test_a_caption_of_the_target_alone_is_named():
    with pytest.raises(ValueError, match="^captions.csv, line 2: the caption 'Red hair.' says nothing but"):
        take_targets_out("Red hair.", "red hair", "captions.csv, line 2")


def test_a_dry_run_says_what_is_taken_out_of_captions(world, tmp_path, capsys):
    data = write_captions(tmp_path / "data", [CAPTION, "a woman,\na brown jacket", "a man"])
    train(world, tmp_path / "output", train_data_dir=data, target_prompt="red hair", dry_run=True)
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{data / '0.txt'}\n"
        f"  caption      {CAPTION}  (the target is taken out)\n"
        "  base prompt  a woman, a brown jacket\n"
        "  full prompt  a woman, a brown jacket, red hair\n"
    )
    assert f"{data / '1.txt'}\n  caption      a woman, a brown jacket\n  base prompt  a woman, a brown" in printed
    assert printed.count("  base prompt") == 3 and "6 portraits, 2 different pairs of prompts." in printed


def test_a_column_of_captions_trains_as_its_base_prompts_would(world, tmp_path):
    prompts = ["a woman, a brown jacket", "a man"]
    rows = [{"file_name": f"{i}.png", "base_prompt": prompts[i % 2]} for i in range(6)]
    captions = [{"file_name": row["file_name"], "text": f"red hair, {row['base_prompt']}"} for row in rows]
    flags = {"target_prompt": "red hair", "dry_run": True}
    fingerprints = []
    for name, own, changes in (("base", rows, {}), ("captions", captions, {"caption_column": "text"})):
        given = make_flags(world, tmp_path, train_data_dir=write_data(tmp_path / name, own), **flags, **changes)
        fingerprints.append(check_inputs(parse_args(given)).data_fingerprint)
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_column": "text", "base_prompt_column": "x"}, "--caption_column takes the place of --base_prompt"),
        ({"caption_extension": "txt"}, "--caption_extension must be an ending such as .txt, got 'txt'"),
        ({"caption_extension": "."}, "--caption_extension must be an ending such as .txt, got '.'"),
        ({"caption_extension": ".a", "train_data_dir": None, "dataset_name": "x"}, "is for the captions of --train"),
        ({"caption_column": "text"}, "line 1: no column 'text'; see --caption_column"),
    ],
)
def test_wrong_flags_of_captions_are_named(refusal, changes, message):
    assert message in refusal(**changes)


# ----------------------------------------------------------------------------------------------------- other words


def test_what_may_contradict_the_target_is_said(world, tmp_path, capsys, caplog):
    hair = {"base_prompt": "a woman,\n black hair", "target_prompt": "red hair"}
    replaced = {"base_prompt": "a man, black hair", "target_prompt": [["black hair", "red hair"]]}
    rows = [{"file_name": f"{i}.png", **(replaced if i == 5 else hair)} for i in range(6)]
    data = write_data(tmp_path / "data", rows)
    train(world, tmp_path / "output", train_data_dir=data, dry_run=True)
    printed = capsys.readouterr().out
    assert printed.count("may contradict the target 'red hair'") == 1
    assert "  base prompt  a woman, black hair\n" in printed
    (message,) = warnings_of(caplog)
    assert message.startswith("5 of 6 rows: 'black hair' may contradict the target 'red hair'")
    assert '[["black hair", "red hair"]]' in message


def test_weights_in_captions_are_said_to_be_words(world, tmp_path, caplog):
    data = write_captions(tmp_path / "data", ["a man, (a coat:1.2), ((a wall))", "a woman", "a boy, <lora:x:1>"])
    train(world, tmp_path / "output", train_data_dir=data, target_prompt="red hair", dry_run=True)
    (message,) = warnings_of(caplog)
    assert message.startswith(f"{data / '0.txt'}: '(a coat:1.2)' is read as words (4 of 6 rows)")


def test_a_phrase_that_stands_twice_may_be_replaced_once(world, tmp_path, capsys):
    row = {"base_prompt": "a hat, a man, a hat", "target_prompt": [["a hat", "a red coat"]]}
    rows = [{"file_name": f"{i}.png", **row} for i in range(6)]
    train(world, tmp_path / "output", train_data_dir=write_data(tmp_path / "data", rows), dry_run=True)
    assert "  phrase       a hat  (tokens " in capsys.readouterr().out


def test_a_copy_of_a_replaced_phrase_is_protected_in_every_drawn_prompt():
    pair = make_prompt_pair("a hat, a man, a wall, a hat", [("a hat", "a red coat")])
    random = np.random.default_rng(0)
    drawn = [thin_out(pair, 0.3, random) for _ in range(300)]
    assert all(("a hat" in own.base_phrases) == (own.base_prompt.count("a hat") == 2) for own in drawn)
    assert {own.base_prompt for own in drawn} >= {"a hat, a man, a hat", "a hat, a hat", "a hat, a man"}
