"""The demo on each embedded base, and what its recipe says of them; nothing is trained here."""

import pytest
import torch
from PIL import Image
from toy_bases import write_random_lora

from families.stable_diffusion import StableDiffusion
from families.stable_diffusion_3 import StableDiffusion3
from families.stable_diffusion_xl import StableDiffusionXL
from toy_portraits import demo
from toy_portraits.pipelines import family_of, load_base
from toy_portraits.recipe import BASE_MODEL, BASES, CLIP, training_flags


@pytest.mark.parametrize("base", BASES)
def test_the_demo_trains_its_base_and_ends_with_the_pictures(base, toy_bases, tmp_path, monkeypatch, capsys):
    commands = []

    def train(command, check):
        commands.append(command)
        write_random_lora(tmp_path / command[command.index("--output_dir") + 1], len(commands), base)

    monkeypatch.setattr(demo.subprocess, "run", train)
    demo.main(["--base", base, "--target", "striped_shirt", "--num_images", "1", "--output_dir", str(tmp_path)])
    assert all(str(BASES[base].folder) in command for command in commands)
    steps = [[command[command.index(f"--stage{n}_steps") + 1] for n in (1, 2)] for command in commands]
    assert steps == [["240", "0"], ["120", "120"]]
    with Image.open(tmp_path / "striped_shirt.png") as picture:
        assert picture.width > 4 * 64
    assert (tmp_path / "striped_shirt_maps.png").is_file()
    assert f"{tmp_path / 'striped_shirt.png'} (" in capsys.readouterr().out


def test_the_recipe_differs_in_the_base_alone(toy_xl):
    flags, others = training_flags("red_hat"), training_flags("red_hat", "sdxl")
    assert flags == training_flags("red_hat", "sd")
    assert flags[:4] == ["--pretrained_model_name_or_path", str(BASE_MODEL), "--clip_model_name_or_path", str(CLIP)]
    assert others[:2] == ["--pretrained_model_name_or_path", str(toy_xl)] and others[2:] == flags[2:]


@pytest.mark.parametrize("base", BASES)
def test_a_base_is_what_its_entry_says(base, toy_bases):
    pipeline = load_base(base)
    family = {"sd": StableDiffusion, "sdxl": StableDiffusionXL, "sd3": StableDiffusion3}[base]
    assert family is family_of(base) and type(pipeline) is family.pipeline_class and pipeline.dtype == torch.float32
    assert type(pipeline.scheduler).__name__.startswith(BASES[base].sampler)
