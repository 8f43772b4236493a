"""The pipeline that draws with a base model: of the family that its files tell, or a line that says why none."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl as stock_module
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from test_house import ROOT
from test_original_layout import difference, make_pipeline

from families.pipelines import load_drawing_pipeline
from pipeline_spf_portrait import SPFPortraitPipeline
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from programs.loading import InputError, without_false_alarms
from programs.original_layout import SD1, SD2, XL, one_file


@pytest.fixture(scope="module", params=[SD1, SD2, XL], ids=lambda layout: layout.name)
def model(request, tmp_path_factory):
    """A tiny model of a family, as a folder and as one file. No test may change it."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = make_pipeline(request.param)
    pipeline.save_pretrained(folder / "model")
    save_file(one_file(pipeline), folder / "model.safetensors")
    return SimpleNamespace(
        pipeline=pipeline, folder=folder / "model", file=folder / "model.safetensors",
        kind=SPFPortraitXLPipeline if request.param is XL else SPFPortraitPipeline,
    )  # fmt: skip


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl") / "model"
    make_pipeline(XL).save_pretrained(folder)
    return folder


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_folder_and_its_file_are_of_one_class(model):
    folder = load_drawing_pipeline(str(model.folder), torch.float32)
    file = load_drawing_pipeline(str(model.file), torch.float32, base_config=str(model.folder))
    assert type(folder) is type(file) is model.kind
    assert difference(folder, model.pipeline) == difference(file, model.pipeline) == 0.0
    # Pictures of Stable Diffusion stay what they were to the bit, so they are decoded as before.
    assert folder.vae.use_slicing == file.vae.use_slicing == (model.kind is SPFPortraitXLPipeline)


def test_an_id_of_the_hub_is_of_its_class(xl, tmp_path):
    """In a process of its own, for the libraries keep that there is no network here."""
    code = "import torch; from families.pipelines import load_drawing_pipeline; "
    code += "print(type(load_drawing_pipeline('user/model', torch.float32)).__name__)"
    with HubServer("user", "token") as hub:
        hub.repos["user/model"] = {str(file.relative_to(xl)): file.read_bytes() for file in xl.rglob("*.*")}
        hub.add_commit("user/model")
        environment = hub.environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "SPFPortraitXLPipeline", done.stderr


def test_no_watermark_changes_a_picture(xl, monkeypatch):
    class Watermarker:
        """As that of the package `invisible-watermark`, which diffusers takes wherever it is installed."""

        def apply_watermark(self, images):
            return images * 0

    monkeypatch.setattr(stock_module, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(stock_module, "StableDiffusionXLWatermarker", Watermarker, raising=False)
    pipeline = load_drawing_pipeline(str(xl), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a man", num_inference_steps=1, output_type="np").images.std() > 0.01


def test_half_precision_is_decoded_in_float32_without_a_false_alarm(xl, capfd, recwarn):
    """Where the VAE would overflow, as the published one does."""
    with without_false_alarms():
        pipeline = load_drawing_pipeline(str(xl), torch.float16)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.vae.config.force_upcast
        seen = []
        pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        options = {"num_inference_steps": 1, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
        images = pipeline("a man", compare=True, **options).images
    assert seen == [torch.float32] * 2 and images.std() > 0.01
    assert pipeline.vae.dtype == torch.float16
    assert "kept in float32" not in capfd.readouterr().err
    assert not [warning for warning in recwarn if "upcast_vae" in str(warning.message)]


# --------------------------------------------------------------------------------------------------------- bad input


def refusal(name, base_config=None):
    with pytest.raises(InputError, match=f"^--base_model {name}[:,] ") as error:
        load_drawing_pipeline(str(name), torch.float32, base_config=base_config and str(base_config))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_refiner_is_refused_before_its_weights_are_read(xl, tmp_path):
    refiner = shutil.copytree(xl, tmp_path / "refiner", ignore=shutil.ignore_patterns("*.safetensors"))
    change(refiner / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    assert "the refiner of Stable Diffusion XL, which only goes over pictures: use its base model" in refusal(refiner)


def test_a_model_for_inpainting_is_refused_before_its_weights_are_read(model, tmp_path):
    painter = shutil.copytree(model.folder, tmp_path / "painter", ignore=shutil.ignore_patterns("*.safetensors"))
    change(painter / "unet" / "config.json", in_channels=9)
    assert "it takes 9 channels and not 4 (9 are for inpainting): no model for text to image" in refusal(painter)
    weights = load_file(model.file)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    weights[name] = torch.zeros(len(weights[name]), 9, 3, 3)
    save_file(weights, tmp_path / "painter.safetensors")
    said = refusal(tmp_path / "painter.safetensors", model.folder)
    assert "its UNet takes 9 channels and not 4 (9 are for inpainting): no model for text to image" in said


def test_a_family_that_is_not_known_says_which_are(tmp_path):
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    said = refusal(folder)
    assert "is a FluxPipeline; known are Stable Diffusion 1.x, 2.x, XL, 3 and 3.5" in said
