"""The page on an SDXL base, as a folder and as one file, in Chromium against a server in a process of its own."""

import pytest
import torch
from drawing_world import load_stock, write_sdxl
from safetensors.torch import save_file
from test_app import FEW, PROMPT, TARGET, Page, browser, difference, direct, serving  # noqa: F401 (a fixture)

import app
from app import check_lengths
from families.pipelines import load_drawing_pipeline
from loras.loading import load_lora
from loras.slot import LoraSlot


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def pipeline(world):
    """With the LoRA. No test may change it."""
    pipeline = load_drawing_pipeline(str(world.model), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    load_lora(pipeline, str(world.lora), "it")
    return pipeline


def wrong_lora(folder):
    """One layer of Stable Diffusion 1.5, which tells by its width."""
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight"
    path = folder / "sd.safetensors"
    save_file({layer.format("A"): torch.ones(2, 768), layer.format("B"): torch.ones(320, 2)}, path)
    return path


def test_every_tokenizer_has_to_take_a_text(pipeline):
    """The second one has a token of its own where the first joins two."""
    tokenizers = app.Page(LoraSlot(pipeline)).tokenizers
    check_lengths({"Prompt": "a " * 28 + "!!"}, tokenizers)
    check_lengths({"Prompt": "a " * 29 + "!!"}, tokenizers[:1])
    with pytest.raises(ValueError, match="^Prompt: 31 tokens are more than the 30 that"):
        check_lengths({"Prompt": "a " * 29 + "!!"}, tokenizers)


def test_a_lora_of_the_other_family_ends_the_program_with_one_line(world, tmp_path):
    path = wrong_lora(tmp_path)
    with pytest.raises(SystemExit) as stop:
        app.main(["--base_model", str(world.model), "--lora", str(path), "--device", "cpu"])
    message = f"--lora: {path}: this is a Stable Diffusion 1.x or 2.x LoRA, and the base model is SDXL"
    assert stop.value.code == f"app.py: error: {message}"
    with pytest.raises(SystemExit, match="this is an SDXL LoRA, and the base model is Stable Diffusion"):
        app.main(["--lora", str(world.kohya), "--device", "cpu"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_page_draws_what_the_pipeline_draws(world, pipeline, browser, form, tmp_path):  # noqa: F811
    model, config = world.forms[form]
    flags = ["--base_model", model, "--lora", world.lora, *([] if config is None else ["--base_config", config])]
    with serving(tmp_path, *flags) as address:
        page = Page(browser, address)
        page.fill_prompt()
        found, expected = page.draw(1), direct(pipeline, 1)
        assert found["adapted"].size == (32, 32)
        assert difference(found["original"], expected.reference_images[0]) <= 1
        assert difference(found["adapted"], expected.images[0]) <= 1
        assert difference(found["original"], found["adapted"]) > 10
        assert difference(found["overview"], pipeline.visualize(expected)) <= 1
        # The original model has the LoRA in none of its parts.
        options = {"num_inference_steps": FEW, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(1)}
        assert difference(found["original"], load_stock(world)(PROMPT, **options).images[0]) <= 1

        # A LoRA of the other family is refused, and the former one stays; kohya's format draws as diffusers'.
        path = wrong_lora(tmp_path)
        page.fill("LoRA", str(path))
        page.button.click()
        assert page.error() == f"{path}: this is a Stable Diffusion 1.x or 2.x LoRA, and the base model is SDXL"
        page.fill("LoRA", str(world.kohya))
        page.set_number("LoRA strength", 0.5)
        weaker = page.draw(2)["adapted"]
        assert difference(weaker, direct(pipeline, 2, target_scale=0.5).images[0]) <= 1
        assert difference(weaker, direct(pipeline, 2).images[0]) > 1
        page.fill("LoRA", "")
        without = page.draw(3)["adapted"]
        full = PROMPT.replace("black hair", TARGET)
        options["generator"].manual_seed(3)
        assert difference(without, load_stock(world)(full, **options).images[0]) <= 1
        assert page.elsewhere == [] and page.failures == []
        page.page.close()
