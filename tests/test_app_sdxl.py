"""The page on an SDXL base, as a folder and as one file."""

import pytest
import torch
from drawing_world import write_sdxl
from safetensors.torch import save_file

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
    message = f"--lora: {path}: this is a Stable Diffusion LoRA, and the base model is SDXL"
    assert stop.value.code == f"app.py: error: {message}"
    with pytest.raises(SystemExit, match="this is an SDXL LoRA, and the base model is Stable Diffusion"):
        app.main(["--lora", str(world.kohya), "--device", "cpu"])
