"""Base models that a user names: loaded, or one line that says why not."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import app
import evaluate_spf_portrait
import export_spf_portrait_lora
import train_spf_portrait_lora
from programs.loading import check_model_name
from toy_portraits.recipe import BASE_MODEL, HERE, LORA


def test_what_can_be_an_id_of_the_hub_is_left_to_the_hub(tmp_path):
    for name in ("user/name", "name", "user/model-v1.5", str(tmp_path)):
        check_model_name(name)


def page(model, out):
    return app, ["--base_model", model]


def export(model, out):
    return export_spf_portrait_lora, ["--base_model", model, "--lora", str(LORA), "--output_merged", str(out)]


def evaluate(model, out):
    flags = ["--toy", "blonde_hair", "--lora", str(LORA), "--output_dir", str(out)]
    return evaluate_spf_portrait, [*flags, "--pretrained_model_name_or_path", model]


def train(model, out):
    flags = ["--train_data_dir", str(HERE / "blonde_hair"), "--resolution", "64", "--output_dir", str(out)]
    clip = ["--clip_model_name_or_path", str(BASE_MODEL / "clip")]
    return train_spf_portrait_lora, [*flags, *clip, "--pretrained_model_name_or_path", model]


def refusal(program, model, out):
    module, flags = program(str(model), out)
    with pytest.raises(SystemExit) as stop:
        module.main(flags)
    assert f"model_name_or_path {model}: " in stop.value.code or f"--base_model {model}: " in stop.value.code
    assert "\n" not in stop.value.code
    return stop.value.code


@pytest.mark.parametrize("program", [page, export, evaluate, train])
def test_a_file_or_folder_that_is_not_there_is_named(program, tmp_path):
    for missing in ("v1-6.safetensors", tmp_path / "model.ckpt", tmp_path / "folder"):
        assert ": no such file or folder" in refusal(program, missing, tmp_path / "out")


@pytest.mark.parametrize(
    ("flag", "kind"),
    [("pretrained_vae", "AutoencoderKL"), ("tiny_vae", "AutoencoderTiny"), ("clip", None)],
)
def test_the_file_of_a_part_is_refused_with_the_way_to_convert_it(flag, kind, tmp_path):
    file = tmp_path / "part.safetensors"
    file.touch()
    module, flags = train(str(BASE_MODEL), tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        module.main([*flags, "--stage2_objective", "paper", f"--{flag}_model_name_or_path", str(file)])
    assert f"--{flag}_model_name_or_path {file}: a single file, and a folder is needed" in stop.value.code
    assert kind is None or f"`{kind}.from_single_file(...)" in stop.value.code


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    """The toy base model with its UNet's weights in a pickle, which runs code when it is read."""
    model = tmp_path_factory.mktemp("pickled") / "model"
    shutil.copytree(BASE_MODEL, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    return model


@pytest.mark.parametrize("program", [page, export, evaluate])
def test_a_pickle_is_not_read(program, pickled, tmp_path):
    StableDiffusionPipeline.from_pretrained(pickled, safety_checker=None)  # diffusers itself reads it
    assert "pickles, such as .bin, are not read" in refusal(program, pickled, tmp_path / "out")
