"""The program that draws, on the toy world."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import draw_spf_portrait
from draw_spf_portrait import parse_args
from families.pipelines import load_drawing_pipeline
from loras.loading import load_lora
from toy_portraits.recipe import BASE_MODEL, LORA


ROOT = Path(__file__).resolve().parents[1]
PROMPT, TARGET = "a portrait of a man, a grey shirt", "blonde hair"
NEEDED = ["--base", str(BASE_MODEL), "--lora", str(LORA), "--prompt", PROMPT, "--target", TARGET]
FEW = ["--num_inference_steps", "3", "--device", "cpu", "--dtype", "float32"]


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def drawn_by_hand(seed, **kwargs):
    pipeline = load_drawing_pipeline(str(BASE_MODEL), torch.float32)
    load_lora(pipeline, str(LORA), "lora")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT, target_prompt=TARGET, num_inference_steps=3, generator=torch.Generator().manual_seed(seed), **kwargs
    )


def test_it_writes_the_pipelines_pictures(tmp_path):
    """As users start it: a real process, which prints each file."""
    command = [sys.executable, "draw_spf_portrait.py", *NEEDED, *FEW, "--output_dir", str(tmp_path), "--seed", "3"]
    printed = subprocess.run([*command, "--num_images", "2"], cwd=ROOT, check=True, capture_output=True, text=True)
    names = [f"{seed:05d}-{kind}.png" for seed in (3, 4) for kind in ("original", "adapted", "map", "guided")]
    assert printed.stdout.split() == [str(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)

    plain = drawn_by_hand(4, compare=True, return_sfcm=True)
    guided = drawn_by_hand(4, sfcm_guidance=1.0)
    drawn = {"original": plain.reference_images, "adapted": plain.images, "guided": guided.images}
    for kind, images in drawn.items():
        # The other process may have another number of threads, and round a pixel to the next grey level.
        assert np.abs(read(tmp_path / f"00004-{kind}.png").astype(int) - np.asarray(images[0])).max() <= 1
    region = read(tmp_path / "00004-map.png")
    assert region.shape == (64, 64, 3) and region.min() == 0 and region.max() > 200
    assert not (read(tmp_path / "00003-guided.png") == read(tmp_path / "00004-guided.png")).all()


def test_settings_are_in_the_pictures_without_folders(tmp_path, capsys):
    draw_spf_portrait.main(parse_args([*NEEDED, *FEW, "--output_dir", str(tmp_path), "--guidance", "0.5"]))
    settings = json.loads(Image.open(tmp_path / "00000-guided.png").text["parameters"])
    assert settings["picture"] == "guided" and settings["guidance"] == 0.5 and settings["seed"] == 0
    assert settings["prompt"] == PROMPT and settings["target"] == TARGET and settings["dtype"] == "float32"
    assert settings["base"] == BASE_MODEL.name and settings["lora"] == LORA.name
    assert str(ROOT) not in json.dumps(settings) and str(tmp_path) not in json.dumps(settings)


def test_without_guidance_there_is_no_guided_picture(tmp_path):
    draw_spf_portrait.main(parse_args([*NEEDED, *FEW, "--output_dir", str(tmp_path), "--guidance", "0"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000-adapted.png", "00000-map.png", "00000-original.png"
    ]  # fmt: skip


def test_a_replaced_phrase_and_the_strength_reach_the_pipeline(tmp_path):
    flags = [*NEEDED, *FEW, "--replaces", "a grey shirt", "--lora_scale", "0.5", "--no_lora_in_negative"]
    draw_spf_portrait.main(parse_args([*flags, "--output_dir", str(tmp_path), "--guidance", "0"]))
    pipeline = load_drawing_pipeline(str(BASE_MODEL), torch.float32)
    load_lora(pipeline, str(LORA), "lora")
    pipeline.set_adapters("lora", 0.5)
    expected = pipeline(
        PROMPT, target_prompt=[("a grey shirt", TARGET)], num_inference_steps=3, adapter_in_unconditional=False,
        generator=torch.Generator().manual_seed(0), compare=True,
    )  # fmt: skip
    assert (read(tmp_path / "00000-adapted.png") == np.asarray(expected.images[0])).all()


def test_what_is_there_stays(tmp_path):
    kept = tmp_path / "00001-map.png"
    kept.write_bytes(b"mine")
    flags = [*NEEDED, *FEW, "--output_dir", str(tmp_path), "--num_images", "2"]
    with pytest.raises(SystemExit, match="00001-map.png is there already; --overwrite replaces it"):
        draw_spf_portrait.main(parse_args(flags))
    assert [path.name for path in tmp_path.iterdir()] == [kept.name] and kept.read_bytes() == b"mine"
    draw_spf_portrait.main(parse_args([*flags, "--overwrite"]))
    assert Image.open(kept).size == (64, 64)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance", "1.5"], "--guidance 1.5: must be from 0 to 1"),
        (["--guidance_exponent", "0"], "--guidance_exponent 0: must be positive"),
        (["--num_inference_steps", "0"], "--num_inference_steps 0: must be at least 1"),
        (["--num_images", "0"], "--num_images 0: must be at least 1"),
        (["--target", " "], "--target is empty"),
        (["--prompt", ""], "--prompt is empty"),
    ],
)
def test_a_wrong_flag_is_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args([*NEEDED, *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora", "no/such/lora.safetensors"], "no/such/lora.safetensors: no file or folder"),
        (["--replaces", "a red hat"], "a red hat"),
        (["--target", PROMPT], "target"),
    ],
)
def test_wrong_input_is_found_before_the_model_is_loaded(tmp_path, flags, message):
    flags = [*NEEDED, *FEW, "--output_dir", str(tmp_path / "out"), *flags, "--base", "no/such/folder"]
    with pytest.raises(SystemExit, match=message):
        draw_spf_portrait.main(parse_args(flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "no/such/folder"], "--base no/such/folder"),
        (["--lora", "no/such/lora.safetensors"], "no/such/lora.safetensors"),
        (["--replaces", "a red hat"], "a red hat"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message) as error:
        draw_spf_portrait.main(parse_args([*NEEDED, *FEW, "--output_dir", str(tmp_path / "out"), *flags]))
    assert "\n" not in str(error.value) and not [*tmp_path.rglob("*.png")]
