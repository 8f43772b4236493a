"""Stable Diffusion 3 through the exporter, and its card on the Hub: what is written is drawn by plain diffusers."""

import ast
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hub_server import HubServer
from huggingface_hub import ModelCard
from sd3_lora_world import MODELS, draw_sd3, make_sd3, save_sd3_lora, with_copies
from test_hub import BASE, FULL, LOAD, SECRET, TARGET, code_blocks, make_facts
from test_prompts import write_vocabulary
from test_sd3_lora_files import written
from test_sdxl_export import export, stopped
from test_sdxl_lora_files import assert_same_content, difference
from transformers import CLIPTokenizer

from families.hub_names import STABLE_DIFFUSION_3
from loras import CARD, LORA_WEIGHTS, hub
from loras.card import write_model_card
from loras.loading import load_lora, merge_loras
from training.sharing import pipeline_code


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A tiny Stable Diffusion 3, here and as a folder, and a LoRA for it. No test may change it."""
    folder = tmp_path_factory.mktemp("sd3_export")
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), model_max_length=77)
    sd3 = make_sd3(tokenizer)
    sd3.save_pretrained(folder / "sd3")
    lora = save_sd3_lora(sd3, folder / "lora")
    return SimpleNamespace(sd3=sd3, folder=folder / "sd3", lora=lora, tokenizer=tokenizer, without=draw_sd3(sd3))


# ------------------------------------------------------------------------------------------------------ the exporter


def test_loras_are_merged_into_a_folder_with_a_scale_each(world, tmp_path):
    second, merged = save_sd3_lora(world.sd3, tmp_path / "b", models=("transformer",)), tmp_path / "merged"
    flags = ["--lora", world.lora, "--lora", second, "--base_model", world.folder, "--output_merged", merged]
    export(*flags, "--scale", 0.5, "--scale", -0.25)
    assert json.loads((merged / "model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline"
    found, expected = StableDiffusion3Pipeline.from_pretrained(merged), with_copies(world.sd3)
    found.set_progress_bar_config(disable=True)
    merge_loras(expected, [str(world.lora), str(second)], [0.5, -0.25])
    for name in (*MODELS, "text_encoder_3", "vae"):
        own = found.components[name].state_dict()
        for key, weight in expected.components[name].state_dict().items():
            assert torch.equal(own[key], weight), (name, key)
    assert found.scheduler.config.shift == 3.0 and not found.get_list_adapters()
    assert difference(draw_sd3(found), draw_sd3(expected)) == 0.0

    def both(pipeline):
        load_lora(pipeline, str(world.lora), "one")
        load_lora(pipeline, str(second), "two")
        pipeline.set_adapters(["one", "two"], [0.5, -0.25])

    active = draw_sd3(world.sd3, both)
    size = active.abs().max().item()
    assert difference(draw_sd3(found), active) / size < 1e-3 < difference(active, world.without) / size


@pytest.mark.parametrize("with_t5", [True, False])
def test_all_models_are_merged_in_the_dtype_that_is_asked_for(world, tmp_path, with_t5):
    base = world.folder
    if not with_t5:
        make_sd3(world.tokenizer, with_t5=False).save_pretrained(base := tmp_path / "base")
    merged = tmp_path / "merged"
    export("--lora", world.lora, "--base_model", base, "--output_merged", merged, "--dtype", "bfloat16")
    # diffusers itself has to be told that there is none.
    without = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    found = StableDiffusion3Pipeline.from_pretrained(merged, dtype=torch.bfloat16, **without)
    expected = with_copies(world.sd3)
    merge_loras(expected, [str(world.lora)], [1.0])
    assert (found.text_encoder_3 is None) == (not with_t5)
    for name in (*MODELS, *(["text_encoder_3"] if with_t5 else [])):
        own = found.components[name].state_dict()
        for key, weight in expected.components[name].state_dict().items():
            assert torch.equal(own[key], weight.to(torch.bfloat16)), (name, key)
    files = {path.relative_to(merged).parts[0]: path for path in merged.rglob("*.safetensors")}
    assert ("text_encoder_3" in files) == with_t5


def test_what_there_is_none_of_is_refused_before_anything_is_written(world, tmp_path):
    flags = ["--lora", world.lora, "--base_model", world.folder]
    said = stopped(*flags, "--output_merged", tmp_path / "x.safetensors")
    assert said == f"--output_merged {tmp_path}/x.safetensors: a model with a transformer is written into a folder"
    said = stopped("--lora", world.lora, "--output_kohya", tmp_path / "new" / "x.safetensors")
    assert said == (
        f"--output_kohya: {world.lora}: Stable Diffusion 3 has no LoRA in kohya's format: ComfyUI reads diffusers' "
        "own file, at strength 0.5"
    )
    said = stopped("--lora", world.lora, "--output_diffusers", tmp_path / "new")
    assert said == f"--output_diffusers: {world.lora} is in diffusers' format already"
    assert not list(tmp_path.iterdir())


def test_text_encoders_alone_go_from_kohyas_format_into_diffusers(world, tmp_path):
    lora = save_sd3_lora(world.sd3, tmp_path / "own", {name: {"lora_alpha": 2} for name in MODELS}, models=MODELS[1:])
    kohya, back = tmp_path / "k.safetensors", tmp_path / "back"
    words = {"text_encoder.": "lora_te1_", "text_encoder_2.": "lora_te2_", "lora_A": "lora_down", "lora_B": "lora_up"}

    def change(key):
        for word, other in words.items():
            key = key.replace(word, other)
        layer, side, weight = key.rsplit(".", 2)
        return f"{layer.replace('.', '_')}.{side}.{weight}"

    written(kohya, change)(lora)
    export("--lora", kohya, "--output_diffusers", back)
    assert_same_content(back / LORA_WEIGHTS, lora)
    drawn = draw_sd3(world.sd3, lambda pipeline: pipeline.load_lora_weights(back, weight_name=LORA_WEIGHTS))
    expected = draw_sd3(world.sd3, lambda pipeline: pipeline.load_lora_weights(lora.parent, weight_name=LORA_WEIGHTS))
    assert difference(drawn, expected) == 0.0 < difference(drawn, world.without)


def test_another_familys_lora_is_one_line(world, tmp_path):
    state = written(tmp_path / "x.safetensors", lambda key: f"transformer.single_{key.partition('.')[2]}")
    state(save_sd3_lora(world.sd3, tmp_path / "own", {"transformer": {"target_modules": ["attn.to_q"]}}, MODELS[:1]))
    flags = ["--base_model", world.folder, "--output_merged", tmp_path / "merged"]
    said = stopped("--lora", tmp_path / "x.safetensors", *flags)
    assert said == (
        f"{tmp_path}/x.safetensors: this is a Flux LoRA, and only those of Stable Diffusion 1.x, 2.x, XL or 3 are read"
    )
    assert not (tmp_path / "merged").exists()


# ------------------------------------------------------------------------------------------------------------ the card


def write_card(folder, **changes):
    names = STABLE_DIFFUSION_3
    facts = {"base_model": "stabilityai/stable-diffusion-3.5-medium", "licence": names.licence, "has_kohya": False}
    return write_model_card(folder, make_facts(**{**facts, **changes}), names)


def test_the_card_is_for_stable_diffusion_3(tmp_path):
    card = ModelCard.load(write_card(tmp_path))
    assert card.data.tags[:3] == ["text-to-image", "sd3", "sd3-diffusers"]
    assert card.data.base_model == "stabilityai/stable-diffusion-3.5-medium"
    assert (card.data.license, card.data.license_name) == ("other", "stabilityai-ai-community")
    link = card.data.license_link
    assert link.startswith("https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/")
    assert f"[`stabilityai-ai-community`]({link}); the terms" in card.text
    stock, custom = code_blocks(card)
    assert "from diffusers import StableDiffusion3Pipeline\n" in stock
    assert "pipe = StableDiffusion3Pipeline.from_pretrained('stabilityai/stable-diffusion-3.5-medium', dtype=" in stock
    for block in (stock, custom):
        ast.parse(block)
        assert "torch.bfloat16" in block and "float16" not in block.replace("bfloat16", "")
    for other in ("ComfyUI", "A1111", "kohya", "DDIM", "UNet", "StableDiffusionPipeline"):
        assert other not in card.text
    card = ModelCard.load(write_card(tmp_path, repo_id=None))
    assert "custom_pipeline='path/to/pipeline_spf_portrait_3.py'" in code_blocks(card)[1]


@pytest.mark.parametrize("licence", ["cc-by-4.0", "other"])
def test_a_licence_of_the_users_own_is_named_alone(tmp_path, licence):
    card = ModelCard.load(write_card(tmp_path, licence=licence))
    assert card.data.license == licence and "license_name" not in card.data.to_dict()
    assert f"\n`{licence}`; the terms" in card.text and "stabilityai-ai-community" not in card.text


@pytest.mark.slow
def test_a_push_is_loaded_by_the_examples_of_its_card(world, tmp_path):
    """The process knows neither this repository nor the folder it lies in."""
    output, code, elsewhere = tmp_path / "output", pipeline_code(STABLE_DIFFUSION_3), tmp_path / "elsewhere"
    save_sd3_lora(world.sd3, output, models=("transformer",))
    write_card(output, base_model=str(world.folder), pictures=())
    elsewhere.mkdir()
    with HubServer("tester", SECRET) as server:
        with server.here(tmp_path / "pusher"):
            repo_id = hub.create_hub_repo("x", SECRET, False)
            hub.push_lora(output, repo_id, SECRET, code, [])
        assert server.repos["tester/x"].keys() == {CARD, LORA_WEIGHTS, *code}
        blocks = code_blocks(SimpleNamespace(text=(output / CARD).read_text(encoding="utf-8")))
        blocks = [re.sub(r'dtype=torch.bfloat16|\.to\("cuda"\)', "", block).replace(", )", ")") for block in blocks]
        # One step is enough to show that they run.
        blocks = [block.replace(").images[0]", ", num_inference_steps=1).images[0]") for block in blocks]
        blocks = [block.replace("compare=True)", "compare=True, num_inference_steps=1)") for block in blocks]
        blocks = [block.replace("\n    ,\n", "\n") for block in blocks]
        run = subprocess.run(
            [sys.executable, "-P", "-c", LOAD, json.dumps([blocks, LORA_WEIGHTS, [FULL, BASE, TARGET]])],
            cwd=elsewhere, env=server.environment(tmp_path / "reader") | {"PYTHONPATH": ""}, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().splitlines()[-1] == "SPFPortrait3Pipeline False"  # the siblings came from the repository
    stock, custom, custom_full, without, again = np.load(elsewhere / "images.npy")
    own = with_copies(world.sd3)
    plain = image(own)
    own.load_lora_weights(output, weight_name=LORA_WEIGHTS)
    expected = image(own)
    size = np.abs(expected - plain).max()
    assert size > 1e-3
    for name, drawn in {"stock": stock, "custom": custom, "full": custom_full, "again": again}.items():
        assert np.abs(drawn - expected).max() < 1e-2 * size, name
    assert np.abs(without - plain).max() < 1e-2 * size


def image(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline(FULL, num_inference_steps=2, output_type="np", generator=generator).images
