"""A training, an evaluation and a page on a base model in one file: the numbers of its folder, to the bit."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_train import make_flags, train

import app
import evaluate_spf_portrait
import train_spf_portrait_lora
from loras import LORA_WEIGHTS
from programs.loading import load_pipeline
from programs.original_layout import one_file
from toy_portraits.recipe import BASE_MODEL, LORA
from training.sharing import UNPUBLISHED


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    """The toy base model in one file."""
    file = tmp_path_factory.mktemp("toy") / "toy.safetensors"
    save_file(one_file(load_pipeline(StableDiffusionPipeline, str(BASE_MODEL), torch.float32)), file)
    return file


@pytest.fixture(scope="module")
def file(world, tmp_path_factory):
    """The tiny model of a training in one file."""
    file = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_file(one_file(load_pipeline(StableDiffusionPipeline, str(world.model), torch.float32)), file)
    return file


def test_a_training_is_that_of_the_folder(world, file, tmp_path, caplog):
    one = {"pretrained_model_name_or_path": file, "base_config": world.model}
    caplog.set_level("INFO")
    folder, single = train(world, tmp_path / "folder"), train(world, tmp_path / "single", **one)
    before, after = load_file(folder / LORA_WEIGHTS), load_file(single / LORA_WEIGHTS)
    assert before.keys() == after.keys()
    assert max((before[name] - after[name]).abs().max().item() for name in before) == 0.0
    card, load = (single / "README.md").read_text(), "StableDiffusionPipeline.from_single_file("
    assert "base_config" in UNPUBLISHED and str(file.parent) not in card
    assert f"{load}'path/to/{file.name}', config='path/to/{world.model.name}', dtype=torch.float16)" in card
    assert f"DiffusionPipeline.from_pipe({load}{str(file)!r}, config={str(world.model)!r}), custom_" in caplog.text


def test_a_dry_run_prints_what_it_does_of_the_folder(world, file, tmp_path, capsys):
    printed = []
    for changes in ({}, {"pretrained_model_name_or_path": file, "base_config": world.model}):
        train_spf_portrait_lora.main(make_flags(world, tmp_path / "out", dry_run=True, **changes))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "CLIP distance" in printed[0]


def test_an_evaluation_measures_the_same(toy_file, tmp_path):
    flags = ["--toy", "blonde_hair", "--lora", str(LORA), "--max_prompts", "1", "--num_seeds", "1"]
    flags += ["--num_inference_steps", "1", "--num_resamples", "1", "--device", "cpu"]
    one = ["--pretrained_model_name_or_path", str(toy_file), "--base_config", str(BASE_MODEL)]
    pictures = []
    for name, own in (("folder", []), ("single", one)):
        evaluate_spf_portrait.main([*flags, *own, "--output_dir", str(tmp_path / name)])
        found = sorted((tmp_path / name / "pictures").rglob("*.png"))
        pictures.append([(path.name, path.read_bytes()) for path in found])
    assert pictures[0] == pictures[1] and len(pictures[0]) >= 4


def test_a_page_is_built_on_it(toy_file, monkeypatch):
    built = []

    class Launched:
        def launch(self, **options):
            built.append(options)

    def build(slot, prompt, target):
        built.append(slot.pipeline)
        return Launched()

    monkeypatch.setattr(app, "build_demo", build)
    app.main(["--base_model", str(toy_file), "--base_config", str(BASE_MODEL), "--lora", str(LORA), "--device", "cpu"])
    assert type(built[0]).__name__ == "SPFPortraitPipeline" and len(built) == 2
