"""The exporter: checkpoints that draw what base and LoRA draw, both formats, and mistakes in one line."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_hub
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_hub import FULL, adapted_unet, draw, save_adapter, save_lora
from test_lora_files import save_lora_of_both_models

import export_spf_portrait_lora as script
from loras import KOHYA_WEIGHTS, LORA_WEIGHTS
from loras.reading import read_lora


ROOT = Path(__file__).resolve().parents[2]
world = test_hub.world
FUSED = 5e-5  # of pixels in [0, 1]: sums in another order; the LoRAs move them by hundreds of times as much

READ = """
import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe).__name__ == "StableDiffusionPipeline" and "pipeline_spf_portrait" not in sys.modules
assert not pipe.get_list_adapters()
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
np.save("image.npy", pipe(sys.argv[2], num_inference_steps=2, output_type="np", generator=generator).images)
"""


def draw_with(world, loras, scales):
    """An image of the base model with LoRAs on it, not fused."""
    pipeline = StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    names = [f"lora_{i}" for i in range(len(loras))]
    for lora, name in zip(loras, names):
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name=name)
    pipeline.set_adapters(names, scales)
    return image_of(pipeline)


def image_of(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(FULL, num_inference_steps=2, output_type="np", generator=generator).images


def export(*flags):
    script.main([str(flag) for flag in flags])


@pytest.mark.slow
def test_a_merged_checkpoint_draws_the_same_with_plain_diffusers_alone(world, tmp_path):
    lora = save_lora_of_both_models(world, tmp_path / "lora", {}, {})
    merged = tmp_path / "merged"
    export("--lora", lora, "--scale", 0.7, "--base_model", world.model, "--output_merged", merged)
    assert json.loads((merged / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert not list(merged.rglob("*.bin")) and list(merged.rglob("*.safetensors"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", READ, str(merged), FULL], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found, expected = np.load(tmp_path / "image.npy"), draw_with(world, [lora], [0.7])
    assert np.abs(found - expected).max() < FUSED
    assert np.abs(draw_with(world, [lora], [1.0]) - expected).max() > 1e-2


def test_several_loras_are_fused_with_a_scale_each(world, tmp_path):
    first = save_lora_of_both_models(world, tmp_path / "first", {}, {})
    second = save_lora(world, tmp_path / "second", target_modules=["to_q", "to_v"], lora_alpha=3)
    flags = ["--lora", first, "--lora", second, "--base_model", world.model, "--output_merged", tmp_path / "merged"]
    export(*flags, "--scale", 0.5, "--scale", -1.5)
    found = image_of(StableDiffusionPipeline.from_pretrained(tmp_path / "merged"))
    assert np.abs(found - draw_with(world, [first, second], [0.5, -1.5])).max() < FUSED
    assert np.abs(found - draw_with(world, [first, second], [1.0, 1.0])).max() > 1e-2
    export(*flags, "--overwrite")
    found = image_of(StableDiffusionPipeline.from_pretrained(tmp_path / "merged"))
    assert np.abs(found - draw_with(world, [first, second], [1.0, 1.0])).max() < FUSED
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "merged"}


def save_dora(world, folder):
    unet = adapted_unet(world, use_dora=True)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "magnitude" in name:
                parameter *= 1.5  # otherwise the magnitude is the one that it starts with
    return save_adapter(unet, folder)


def test_a_dora_is_fused_exactly_alone_and_among_others(world, tmp_path, capsys):
    dora, plain = save_dora(world, tmp_path / "dora"), save_lora(world, tmp_path / "plain")
    flags = ["--base_model", world.model, "--output_merged", tmp_path / "merged", "--lora", dora]
    export(*flags, "--scale", 0.5)
    found = image_of(StableDiffusionPipeline.from_pretrained(tmp_path / "merged"))
    assert np.abs(found - draw_with(world, [dora], [0.5])).max() < FUSED
    assert np.abs(found - draw(world, plain)).max() > 1e-2
    # Weak, for where strong ones are together, sums in another order move the image by more than that.
    export(*flags[:4], "--lora", plain, "--lora", dora, "--scale", 0.1, "--scale", 0.2, "--overwrite")
    found = image_of(StableDiffusionPipeline.from_pretrained(tmp_path / "merged"))
    expected = draw_with(world, [plain, dora], [0.1, 0.2])
    assert np.abs(found - expected).max() < FUSED
    assert np.abs(draw_with(world, [dora, plain], [0.2, 0.1]) - expected).max() > 1e-3
    capsys.readouterr()
    export("--lora", dora, "--output_kohya", tmp_path / KOHYA_WEIGHTS)
    assert "is a DoRA" in capsys.readouterr().err


def test_the_dtype_is_that_of_every_weight_and_nothing_alarms(world, tmp_path, caplog):
    lora, merged = save_lora(world, tmp_path), tmp_path / "above" / "merged"
    logging.getLogger("diffusers").addHandler(caplog.handler)  # its records go no further
    export("--lora", lora, "--base_model", world.model, "--output_merged", merged, "--dtype", "float16")
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert "float32" not in caplog.text
    dtypes = set()
    for path in merged.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]
        dtypes |= {str(tensor.dtype) for tensor in tensors if tensor.is_floating_point()}
    assert dtypes == {"torch.float16"}


def test_kohyas_format_and_back(world, tmp_path, capsys):
    lora, kohya = save_lora(world, tmp_path / "lora"), tmp_path / "new" / "x.safetensors"
    export("--lora", lora.parent, "--output_kohya", kohya)
    assert capsys.readouterr().out.strip() == str(kohya)
    export("--lora", kohya, "--output_diffusers", tmp_path / "back")
    back = tmp_path / "back" / LORA_WEIGHTS
    assert capsys.readouterr().out.strip() == str(back)
    assert np.abs(draw(world, back) - draw(world, lora)).max() < FUSED
    assert {layer.alpha for layer in read_lora(back).layers["unet"].values()} == {8}
    merged = tmp_path / "merged"
    export("--lora", kohya, "--base_model", world.model, "--output_merged", merged)
    assert np.abs(image_of(StableDiffusionPipeline.from_pretrained(merged)) - draw(world, lora)).max() < FUSED


def test_mistakes_are_one_line_and_change_nothing(world, tmp_path):
    lora, kohya, folder = save_lora(world, tmp_path / "lora"), tmp_path / "k.safetensors", tmp_path / "folder"
    export("--lora", lora, "--output_kohya", kohya)
    content = kohya.read_bytes()
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work", encoding="utf-8")
    text, wide = tmp_path / "text.safetensors", tmp_path / "wide.safetensors"
    text.write_text("no tensors", encoding="utf-8")
    (tmp_path / "d.safetensors").mkdir()
    wider = {key: torch.cat([x, x], 1) if ".down." in key else x for key, x in load_file(lora).items()}
    save_file(wider, wide)
    merged = ["--base_model", world.model, "--output_merged", tmp_path / "merged"]
    new = tmp_path / "new.safetensors"
    cases = {
        f"--output_kohya: {kohya} is there already": ["--lora", lora, "--output_kohya", kohya],
        f"--output_diffusers: {lora} is there already": ["--lora", kohya, "--output_diffusers", lora.parent],
        f"--output_diffusers: {lora} is in diffusers' format": ["--lora", lora, "--output_diffusers", new],
        f"--output_kohya: {kohya} is in kohya's format": ["--lora", kohya, "--output_kohya", new],
        f"--output_kohya {tmp_path}/d.safetensors: is a folder": [
            "--lora", lora, "--output_kohya", tmp_path / "d.safetensors"
        ],
        f"{tmp_path}/none: no such file": ["--lora", tmp_path / "none", "--output_diffusers", new],
        f"{text}: no safetensors file, and a pickle is not read (Error": ["--lora", text, "--output_diffusers", new],
        f"--output_merged {folder}: is there already, and is no checkpoint": [
            "--lora", lora, *merged[:3], folder, "--overwrite"
        ],
        f"--output_merged: {world.model} is there already": ["--lora", lora, *merged[:3], world.model],
        "--base_model /nowhere: ": ["--lora", lora, "--base_model", "/nowhere", *merged[2:]],
        f"{wide}: is for another architecture: unet.down_blocks.0.": ["--lora", wide, *merged],
    }  # fmt: skip
    for message, flags in cases.items():
        with pytest.raises(SystemExit) as stop:
            export(*flags)
        assert stop.value.code.startswith(f"export_spf_portrait_lora.py: error: {message}"), stop.value.code
        assert "\n" not in stop.value.code
    assert kohya.read_bytes() == content and [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "merged").exists() and not new.exists()


def test_a_textual_inversion_in_the_file_is_left_out_with_a_warning(world, tmp_path, capsys):
    lora, kohya = save_lora(world, tmp_path / "lora"), tmp_path / "k.safetensors"
    export("--lora", lora, "--output_kohya", kohya)
    save_file({**load_file(kohya), "bundle_emb.mytok.clip_l": torch.ones(2, 8)}, kohya)
    export("--lora", f'"{kohya}"', "--output_diffusers", tmp_path / "back")
    assert f"warning: {kohya} holds a textual inversion (mytok)" in capsys.readouterr().err
    assert np.abs(draw(world, tmp_path / "back" / LORA_WEIGHTS) - draw(world, lora)).max() < FUSED


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = script.parse_args("--lora x --base_model ~/base --output_merged ~/merged".split())
    assert (args.base_model, args.output_merged) == (str(tmp_path / "base"), tmp_path / "merged")


@pytest.mark.parametrize("flags", [["--help"], ["--wrong"]])
def test_flags_are_read_before_libraries_are_imported(flags):
    """What takes seconds to import cannot be imported here."""
    block = "import sys; sys.modules |= dict.fromkeys(['torch', 'diffusers', 'transformers', 'peft', 'safetensors']); "
    code = f"{block}import runpy; runpy.run_path({str(ROOT / 'export_spf_portrait_lora.py')!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == (0 if flags == ["--help"] else 2), result.stderr
    assert "Traceback" not in result.stderr and "usage:" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora a", "nothing to write"),
        ("--lora a --output_merged b", "needs the --base_model"),
        ("--lora a --output_kohya b.safetensors --scale 2", "are for --output_merged"),
        ("--lora a --lora b --output_kohya b.safetensors", "take one --lora"),
        ("--lora a --output_kohya b.safetensors --output_diffusers c", "one of the two formats already"),
        ("--lora a --lora b --base_model c --output_merged d --scale 1", "1 --scale for 2 --lora"),
        ("--lora a --output_kohya b", "has to end in .safetensors"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(flags.split())
    assert message in capsys.readouterr().err.splitlines()[-1]
