"""LoRAs and base models that a user names: whole on the pipeline, or one line that says why not."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline

from checked_loading import InputError, find_lora, load_lora, load_pipeline
from toy_portraits.recipe import BASE_MODEL, LORA


LORA_FILE = LORA / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_pipeline(StableDiffusionPipeline, str(BASE_MODEL), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def without_lora(pipeline):
    yield
    pipeline.unload_lora_weights()


def draw(pipeline):
    options = {"num_inference_steps": 1, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a woman, blonde hair", **options).images


def write_lora(path, change):
    """The toy LoRA with each name and tensor changed."""
    tensors = safetensors.torch.load_file(LORA_FILE)
    safetensors.torch.save_file(dict(change(key, tensor.clone()) for key, tensor in tensors.items()), path)
    return path


def test_a_lora_is_loaded_from_file_and_folder(pipeline):
    before = draw(pipeline)
    load_lora(pipeline, str(LORA_FILE), "file")
    assert pipeline.get_active_adapters() == ["file"]
    from_file = draw(pipeline)
    assert (from_file != before).any()
    load_lora(pipeline, str(LORA), "folder")
    assert pipeline.get_active_adapters() == ["folder"]
    assert (draw(pipeline) == from_file).all()


# What a file of another kind holds, and what is said of it.
WRONG = {
    "another_layer": (lambda key, tensor: (key.replace("down_blocks.0", "down_blocks.9"), tensor), "24 of its 28"),
    "another_model": (lambda key, tensor: (key.replace("unet.", "transformer."), tensor), "0 of its 28 layers"),
    "shape": (lambda key, tensor: (key, torch.cat([tensor, tensor], 1)), "size mismatch for down_blocks.0"),
    "no_lora": (lambda key, tensor: (key.replace("lora", "weight"), tensor), "Invalid LoRA"),
}


@pytest.mark.parametrize("former", [False, True], ids=["without_another", "with_another"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_lora_that_does_not_fit_is_one_line_and_leaves_the_former(pipeline, tmp_path, kind, former):
    if former:
        load_lora(pipeline, str(LORA), "former")
    before = draw(pipeline)
    change, message = WRONG[kind]
    path = write_lora(tmp_path / "x.safetensors", change)
    with pytest.raises(InputError) as raised:
        load_lora(pipeline, str(path), "new")
    assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert pipeline.get_active_adapters() == (["former"] if former else [])
    assert (draw(pipeline) == before).all()
    load_lora(pipeline, str(LORA), "next")
    assert pipeline.get_active_adapters() == ["next"]


def test_what_is_no_lora_file_is_named(pipeline, tmp_path):
    damaged, text, empty, several = (tmp_path / n for n in ("a.safetensors", "a.txt", "empty", "several"))
    damaged.write_bytes(b"no tensors at all")
    text.write_text("text", encoding="utf-8")
    empty.mkdir()
    several.mkdir()
    for name in ("one", "two"):
        shutil.copy(LORA_FILE, several / f"{name}.safetensors")
    cases = {
        damaged: "header",
        text: "not a .safetensors file",
        empty: "0 .safetensors files",
        several: "2 .safetensors files",
        tmp_path / "missing": "no such file or folder",
        "missing.safetensors": "no such file or folder",
        "nobody/": "no such file or folder",
        "nobody/nothing": "offline",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message) as raised:
            load_lora(pipeline, str(path), "new")
        assert str(raised.value).startswith(f"{path}: ")


def test_where_a_lora_is_looked_for(tmp_path):
    assert find_lora("user/name") == ("user/name", None)
    assert find_lora("user/name/folder/a.safetensors") == ("user/name", "folder/a.safetensors")
    shutil.copy(LORA_FILE, tmp_path / "only.safetensors")
    assert find_lora(str(tmp_path)) == (str(tmp_path), "only.safetensors")
    shutil.copy(LORA_FILE, tmp_path)
    assert find_lora(str(tmp_path)) == (str(tmp_path), LORA_FILE.name)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"addition_embed_type": "text_time"}, "not Stable Diffusion"), ({"in_channels": 9}, "not Stable Diffusion")],
)
def test_another_base_model_is_refused_before_it_is_loaded(tmp_path, config, message):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=f"^--base_model {tmp_path}: {message}"):
        load_pipeline(StableDiffusionPipeline, str(tmp_path), torch.float32)


def test_a_missing_base_model_is_named(tmp_path):
    with pytest.raises(InputError, match="^--base_model .*nowhere: "):
        load_pipeline(StableDiffusionPipeline, str(tmp_path / "nowhere"), torch.float32)
