"""The evaluation on an SDXL base, as a folder and as one file: the report is of what diffusers itself draws."""

import json

import numpy as np
import pytest
import torch
from drawing_world import load_stock, write_sdxl
from PIL import Image
from safetensors.torch import save_file
from sdxl_world import MODELS
from test_evaluate import evaluate
from test_report import check_page, read_page

from evaluation.report import PICTURE_HEADERS
from loras.writing import save_kohya_lora
from toy_portraits.recipe import BASE_MODEL


# Of the second, both tokenizers count the words differently.
PROMPTS = ["a woman, a green jacket, a purple background", "a man!!, a white jacket"]
TARGET = "blonde hair"
NAMES = [f"p{prompt:03d}-s{seed}" for prompt in range(2) for seed in (5, 6)]
SHORT = ("--num_inference_steps", 2, "--num_resamples", 20, "--device", "cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_sdxl(tmp_path_factory.mktemp("sdxl"))


def flags_of(form):
    model, config = form
    return ["--pretrained_model_name_or_path", model, *([] if config is None else ["--base_config", config])]


@pytest.fixture(scope="module")
def reports(world, tmp_path_factory):
    """By what the base model is: the same LoRA in both formats, judged on two prompts with two seeds."""
    folders = {}
    for form in world.forms:
        folders[form] = tmp_path_factory.mktemp("reports") / form
        evaluate(
            *flags_of(world.forms[form]), "--lora", world.lora, "--lora", world.kohya, "--base_prompts", *PROMPTS,
            "--target_prompt", TARGET, "--num_seeds", 2, "--seed", 5, "--clip_model_name_or_path", BASE_MODEL / "clip",
            "--batch_size", 1, "--num_pictures", 2, *SHORT, "--output_dir", folders[form],
        )  # fmt: skip
    return folders


def read(folder, kind):
    return np.stack([np.asarray(Image.open(folder / f"{name}-{kind}.png"), dtype=int) for name in NAMES])


def drawn(pipeline, prompts):
    """What a pipeline draws of each prompt with each seed, as the evaluation has it if nothing is said of it."""
    pictures = [
        pipeline(
            prompt, num_inference_steps=2, guidance_scale=5.0, generator=[torch.Generator().manual_seed(seed)]
        ).images[0]
        for prompt in prompts
        for seed in (5, 6)
    ]
    return np.stack([np.asarray(picture, dtype=int) for picture in pictures])


@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_pictures_are_diffusers_own(world, reports, form):
    original, adapted = (reports[form] / "pictures" / name for name in ("00-original_model", "01-lora"))
    full = [f"{prompt}, {TARGET}" for prompt in PROMPTS]
    stock, with_lora = load_stock(world), load_stock(world, *MODELS)
    # Of the model's own size, without a watermark.
    assert read(original, "base").shape == (4, 32, 32, 3)
    assert np.abs(read(original, "base") - drawn(stock, PROMPTS)).max() == 0
    # The LoRA is in the UNet and in both text encoders, and the original model has it in none of them.
    assert np.abs(read(original, "full") - drawn(stock, full)).max() <= 1
    assert np.abs(read(adapted, "base") - drawn(with_lora, PROMPTS)).max() <= 1
    assert np.abs(read(adapted, "full") - drawn(with_lora, full)).max() <= 1
    for left_out in MODELS:
        others = load_stock(world, *(name for name in MODELS if name != left_out))
        assert np.abs(read(adapted, "base") - drawn(others, PROMPTS)).max() > 1, left_out
    assert np.abs(read(adapted, "full") - read(adapted, "base")).max() > 10


def test_a_file_and_its_folder_have_one_report(reports):
    """The weights are equal; a sum may be rounded in another way where they lie elsewhere in memory."""
    for path in (reports["folder"] / "pictures").rglob("*.*"):
        pair = (path, reports["file"] / path.relative_to(reports["folder"]))
        if path.suffix == ".npy":
            assert np.abs(np.subtract(*map(np.load, pair))).max() < 1e-4
        else:
            assert np.abs(np.subtract(*(np.asarray(Image.open(one), dtype=int) for one in pair))).max() <= 1
    folder, file = (json.loads((reports[form] / "metrics.json").read_text())["loras"] for form in ("folder", "file"))
    for own, other in zip(folder, file, strict=True):
        assert own["measures"].keys() == other["measures"].keys()
        for name, estimate in own["measures"].items():
            assert other["measures"][name]["value"] == pytest.approx(estimate["value"], abs=0.02), name


def test_the_report_shows_the_base_and_both_formats_alike(world, reports):
    document = json.loads((reports["file"] / "metrics.json").read_text())
    page = read_page(reports["file"] / "report.html")
    check_page(page, document)
    assert len(page.addresses) == 1 + 2 * 2 * len(PICTURE_HEADERS)
    assert document["settings"]["pretrained_model_name_or_path"] == str(world.forms["file"][0])
    assert (document["settings"]["guidance_scale"], document["settings"]["region"]) == (5.0, "sfcm")
    original, own, kohya = (lora["measures"] for lora in document["loras"])
    assert original["base_change"]["value"] == 0 and own["base_change"]["value"] > 1
    assert "clip_t_inside" in own
    for name in own:
        assert kohya[name]["value"] == pytest.approx(own[name]["value"], abs=0.02), name


def test_half_precision_draws_as_well(world, tmp_path, capfd):
    evaluate(
        *flags_of(world.forms["file"]), "--lora", world.kohya, "--base_prompts", PROMPTS[0], "--target_prompt", TARGET,
        "--num_seeds", 1, "--dtype", "float16", *SHORT, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    picture = np.asarray(Image.open(tmp_path / "out" / "pictures" / "01-kohya" / "p000-s0-full.png"))
    assert picture.std() > 1
    said = capfd.readouterr().err
    assert "upcast_vae" not in said and "kept in float32" not in said


@pytest.mark.parametrize("is_kohya", [False, True], ids=["diffusers", "kohya"])
@pytest.mark.parametrize("base", ["SDXL", "Stable Diffusion"])
def test_a_lora_of_the_other_family_is_refused_by_name(world, base, is_kohya, tmp_path, capsys):
    # One layer of Stable Diffusion 1.5 tells by its width.
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight"
    wrong, kohya = tmp_path / "sd.safetensors", tmp_path / "sd_kohya.safetensors"
    save_file({layer.format("A"): torch.ones(2, 768), layer.format("B"): torch.ones(320, 2)}, wrong)
    save_kohya_lora(wrong, kohya)
    wrong = kohya if is_kohya else wrong
    message = "this is a Stable Diffusion 1.x or 2.x LoRA, and the base model is SDXL"
    flags = flags_of(world.forms["folder"])
    if base != "SDXL":
        wrong, flags = world.kohya if is_kohya else world.lora, flags_of((BASE_MODEL, None))
        message = "this is an SDXL LoRA, and the base model is Stable Diffusion"
    with pytest.raises(SystemExit) as stop:
        evaluate(
            *flags, "--lora", wrong, "--base_prompts", "a man", "--target_prompt", TARGET,
            "--output_dir", tmp_path / "out",
        )  # fmt: skip
    assert message in stop.value.code and str(wrong) in stop.value.code and "\n" not in stop.value.code
    assert "drawing" not in capsys.readouterr().out
