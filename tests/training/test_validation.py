"""Tests of the pictures that a run draws of itself."""

import numpy as np
from PIL import Image
from test_inputs import changed_rows
from test_train import CARD, RUN_FILE, WEIGHTS, difference, files, train, watch, write_data

import train_spf_portrait_lora as script
from pipeline_spf_portrait import SPFPortraitPipeline


def test_validation_does_not_change_the_training(world, trained, tmp_path):
    flags = {"stage2_objective": "both"}
    output = train(world, tmp_path / "output", num_validation_images=1, validation_steps=1, **flags)
    pictures = {f"validation/step_{step:06d}.png" for step in range(5)} | {"validation/alignment.png"}
    assert files(output) == {WEIGHTS, CARD, RUN_FILE, f"stage1/{WEIGHTS}", *pictures}
    assert difference(output, trained(**flags)) == 0


def test_validation_shows_the_original_model_and_the_adapted_one(world, tmp_path):
    output = train(world, tmp_path / "output", num_validation_images=1, learning_rate=1.0, stage2_steps=0)
    columns = {}
    for step in (0, 2):
        with Image.open(output / f"validation/step_{step:06d}.png") as image:
            columns[step] = [np.asarray(image.crop((6 + 198 * i, 22, 198 + 198 * i, 214))) for i in range(4)]
    assert np.array_equal(columns[0][0], columns[2][0]), "the original model changed"
    assert np.array_equal(columns[0][0], columns[0][1]), "a fresh LoRA is not the original model"
    assert not np.array_equal(columns[2][0], columns[2][1])
    assert not np.array_equal(columns[2][1], columns[2][2]), "the target is not in the full prompt's picture"


def test_validation_takes_prompts_of_its_own(world, tmp_path, monkeypatch):
    inputs = watch(monkeypatch, script, "check_inputs")
    flags = {"validation_base_prompt": "a man, a scarf", "validation_target_prompt": "a red hat"}
    train(world, tmp_path / "output", num_validation_images=1, stage1_steps=1, stage2_steps=0, **flags)
    assert inputs[0].validation_pair.full_prompt == "a man, a scarf, a red hat"


def test_the_pictures_protect_the_phrases_of_the_data(world, tmp_path, monkeypatch):
    outputs = watch(monkeypatch, SPFPortraitPipeline, "__call__")
    data = write_data(tmp_path / "data", changed_rows(base_phrases=["hat"]))
    flags = {"num_validation_images": 1, "stage1_steps": 1, "stage2_steps": 0}
    train(world, tmp_path / "output", train_data_dir=data, **flags)
    assert outputs[1].phrases == [("hat",)]
