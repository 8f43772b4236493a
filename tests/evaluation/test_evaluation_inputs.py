"""What an evaluation is about: prompts, LoRAs and masks."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.inputs import find_loras, read_masks, read_prompts
from loras.writing import save_kohya_lora
from programs.loading import InputError
from toy_portraits.recipe import BASE_MODEL, LORA
from training.data import load_rows
from training.flags import ColumnFlags, DataFlags


LORA_FILE = LORA / "pytorch_lora_weights.safetensors"
METADATA = BASE_MODEL.parent / "red_hat" / "metadata.jsonl"
BASE = "a woman, a green jacket"


def flags(**given):
    """The flags of the inputs, not set unless given."""
    names = ("base_prompts", "prompts_file", "target_prompt", "max_prompts", "lora", "checkpoints", "reference_lora")
    return argparse.Namespace(**dict.fromkeys((*names, "toy_prompts")) | given)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_base_prompts_share_the_targets_of_the_flag():
    pairs = read_prompts(flags(base_prompts=[BASE, "a man", BASE], target_prompt=["a red hat", "glasses"]))
    assert [pair.full_prompt for pair in pairs] == [f"{BASE}, a red hat, glasses", "a man, a red hat, glasses"]
    assert len(read_prompts(flags(base_prompts=[BASE, "a man"], target_prompt=["a red hat"], max_prompts=1))) == 1


def test_the_training_data_are_prompts(tmp_path):
    pairs = read_prompts(flags(prompts_file=METADATA))
    assert len(pairs) == len(set(pairs)) > 10
    assert {pair.target_text for pair in pairs} == {"a red hat"}
    lines = [
        {"base_prompt": BASE, "target_prompt": [["a green jacket", "a striped shirt"]], "free_phrases": None},
        {"base_prompt": BASE, "target_prompt": "a coat", "full_prompt": "a woman, a coat"},
        {"base_prompt": "a man, a wall", "base_phrases": ["a man"]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    pairs = read_prompts(flags(prompts_file=path, target_prompt=["a tie"]))
    assert [p.full_prompt for p in pairs] == ["a woman, a striped shirt", "a woman, a coat", "a man, a wall, a tie"]
    assert pairs[2].base_phrases == ("a man",)


@pytest.mark.parametrize(
    "form",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode(),
    ],
    ids=["mark", "windows", "both"],
)
def test_a_prompts_file_is_read_as_the_trainer_reads_its_metadata(tmp_path, form):
    lines = [
        {"file_name": "a.png", "base_prompt": "a man, a \u2028hat\x85", "target_prompt": "a tie", "free_phrases": []},
        {"file_name": "b.png", "base_prompt": BASE, "target_prompt": "a tie", "free_phrases": ["a woman"]},
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path = tmp_path / "metadata.jsonl"
    path.write_bytes(form(text))
    for name in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    trained = load_rows(DataFlags(train_data_dir=str(tmp_path)), ColumnFlags())
    judged = read_prompts(flags(prompts_file=path))
    assert [p.base_prompt for p in judged] == [row.base_prompt for row in trained] == [x["base_prompt"] for x in lines]
    assert [p.free_phrases for p in judged] == [row.free_phrases for row in trained] == [(), ("a woman",)]


def test_a_full_prompt_that_the_pipeline_composes_in_another_way_is_said_so(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    line = {"base_prompt": "a woman in a coat", "target_prompt": "blonde", "full_prompt": "a blonde woman in a coat"}
    path.write_text(json.dumps(line), encoding="utf-8")
    assert read_prompts(flags(prompts_file=path))[0].full_prompt == "a woman in a coat, blonde"
    assert "'a blonde woman in a coat' is drawn as 'a woman in a coat, blonde'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--prompts_file .*: holds no prompts"),
        ("\n \n", "holds no prompts"),
        ("{", "line 1 is not JSON: "),
        ("[1]", r"line 1 must be a JSON object with columns, got \[1\]"),
        ('\n{"target_prompt": "a hat"}', "line 2: 'base_prompt' must be a text, got None"),
        ('{"base_prompt": "a man"}', "line 1: the base prompt 'a man' has no target: give --target_prompt"),
        ('{"base_prompt": "a man", "target_prompt": 3}', "'target_prompt' must be a text"),
        ('{"base_prompt": "a man, a hat", "target_prompt": "a hat"}', "the target 'a hat' is in the base prompt"),
        ('{"base_prompt": "a man in a red hat", "target_prompt": ["a red hat"]}', "'a red hat' is in the base prompt"),
        ('{"base_prompt": "a man", "target_prompt": [["a shirt", "a coat"]]}', "'a shirt' is not in the base prompt"),
        ('{"base_prompt": "a man", "target_prompt": "a hat", "base_phrases": "a man"}', "must be a list of phrases"),
    ],
)
def test_bad_prompts_are_one_line_that_names_the_place(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as found:
        read_prompts(flags(prompts_file=path))
    assert "\n" not in str(found.value) and str(found.value).startswith(f"--prompts_file {path}")


def test_a_missing_prompts_file_and_a_target_that_is_there_already_are_named():
    with pytest.raises(InputError, match="--prompts_file none.jsonl: .*No such file"):
        read_prompts(flags(prompts_file=Path("none.jsonl")))
    with pytest.raises(InputError, match="--base_prompts: the target 'a green jacket' is in the base prompt"):
        read_prompts(flags(base_prompts=[BASE], target_prompt=["a green jacket"]))


# --------------------------------------------------------------------------------------------------------------- LoRAs


@pytest.fixture
def run_folder(tmp_path):
    """The output folder of a training, with two checkpoints and a final LoRA that is the last one's."""
    run = tmp_path / "run"
    for step in (20, 100):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        folder.joinpath(LORA_FILE.name).write_bytes(LORA_FILE.read_bytes())
    run.joinpath(LORA_FILE.name).write_bytes(LORA_FILE.read_bytes())
    return run


def test_loras_have_names_and_the_reference_comes_first(tmp_path):
    kohya = tmp_path / "hair.safetensors"
    save_kohya_lora(LORA_FILE, kohya)
    other = tmp_path / "blonde_hair"
    other.mkdir()
    other.joinpath("x.safetensors").write_bytes(kohya.read_bytes())
    found = find_loras(flags(reference_lora=str(LORA), lora=[str(kohya), str(LORA_FILE), str(other)]))
    assert [(lora.name, lora.role) for lora in found] == [
        ("blonde_hair", "reference"), ("hair", "lora"), ("blonde_hair (2)", "lora"),
    ]  # fmt: skip
    assert [lora.path for lora in found] == [LORA_FILE, kohya, other / "x.safetensors"]
    assert [lora.name for lora in find_loras(flags(lora=[str(LORA_FILE)]))] == ["blonde_hair"]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["original model"], ["original model (2)"]),
        (["a (2)", "a", "b/a"], ["a (2)", "a", "a (3)"]),
        (["a", "b/a", "a (2)", "c/a"], ["a", "a (2)", "a (2) (2)", "a (3)"]),
    ],
)
def test_no_lora_has_the_name_of_another_or_of_the_original_model(tmp_path, given, names):
    for name in given:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        folder.joinpath(LORA_FILE.name).write_bytes(LORA_FILE.read_bytes())
    found = find_loras(flags(lora=[str(tmp_path / name) for name in given]))
    assert [lora.name for lora in found] == names


def test_checkpoints_are_in_the_order_of_their_steps_and_the_final_lora_last(run_folder):
    names = ["checkpoint-20", "checkpoint-100"]
    found = find_loras(flags(checkpoints=run_folder))
    assert [lora.name for lora in found] == names and {lora.role for lora in found} == {"checkpoint"}
    save_kohya_lora(LORA_FILE, run_folder / LORA_FILE.name)
    assert [lora.name for lora in find_loras(flags(checkpoints=run_folder))] == [*names, "final"]


def test_what_is_no_lora_or_no_run_is_one_line(tmp_path, run_folder):
    with pytest.raises(InputError, match="--lora no/such/thing: "):
        find_loras(flags(lora=["no/such/thing"]))
    with pytest.raises(InputError, match=f"--reference_lora {tmp_path}: the folder has no pytorch_lora_weights"):
        find_loras(flags(reference_lora=str(tmp_path)))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no LoRA")
    with pytest.raises(InputError, match=f"--lora {damaged}: no safetensors file"):
        find_loras(flags(lora=[str(damaged)]))
    with pytest.raises(InputError, match="--checkpoints none: no such folder"):
        find_loras(flags(checkpoints=Path("none")))
    with pytest.raises(InputError, match="--checkpoints .*: holds no checkpoint-<step>"):
        find_loras(flags(checkpoints=LORA))
    broken = run_folder / "checkpoint-20" / LORA_FILE.name
    broken.write_bytes(b"no LoRA")
    with pytest.raises(InputError, match=f"--checkpoints {broken}: no safetensors file"):
        find_loras(flags(checkpoints=run_folder))
    broken.unlink()
    with pytest.raises(InputError, match="checkpoint-20 has no pytorch_lora_weights.safetensors"):
        find_loras(flags(checkpoints=run_folder))


# --------------------------------------------------------------------------------------------------------------- masks


def test_masks_are_read_in_the_portraits_size(tmp_path):
    half = np.zeros((4, 4), dtype=np.uint8)
    half[:, 2:] = 255
    for name in ("p000-s7", "p012-s7"):
        Image.fromarray(half).save(tmp_path / f"{name}.png")
    masks = read_masks(tmp_path, ["p000-s7", "p012-s7"], (4, 4))
    assert masks.shape == (2, 4, 4) and (masks == half / 255).all()
    assert read_masks(tmp_path, ["p000-s7"], (16, 8))[0, :, [0, -1]].tolist() == [[0] * 16, [1] * 16]


def test_a_mask_that_is_missing_or_no_picture_is_named(tmp_path):
    with pytest.raises(InputError, match="--region_masks none: no such folder"):
        read_masks(Path("none"), [], (4, 4))
    with pytest.raises(InputError, match="p000-s0.png is missing"):
        read_masks(tmp_path, ["p000-s0"], (4, 4))
    (tmp_path / "p000-s0.png").write_text("no picture")
    with pytest.raises(ValueError, match="p000-s0.png cannot be read"):
        read_masks(tmp_path, ["p000-s0"], (4, 4))
