"""A tiny SDXL as users have it, for the programs that draw: a folder, one file, and LoRAs in both formats."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from sdxl_world import MODELS, save_sdxl_lora
from test_original_layout import make_pipeline
from transformers import CLIPTokenizer

from loras.writing import save_kohya_lora
from programs.original_layout import XL, one_file
from toy_portraits.recipe import BASE_MODEL


def write_sdxl(folder: Path) -> SimpleNamespace:
    """`forms` are the flags of a base model, by what it is; its pictures are of 32 pixels."""
    pipeline = make_pipeline(XL)
    words = write_tokenizer(folder / "tokenizer")
    pipeline.tokenizer = CLIPTokenizer.from_pretrained(words)
    pipeline.tokenizer_2 = CLIPTokenizer.from_pretrained(words, pad_token="!")
    with torch.no_grad():  # the initial spread makes all prompts look the same to the UNet
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            encoder.get_input_embeddings().weight.mul_(50)
    pipeline.save_pretrained(folder / "sdxl")
    save_file(one_file(pipeline), folder / "sdxl.safetensors")
    lora, kohya = save_sdxl_lora(pipeline, folder / "lora"), folder / "kohya.safetensors"
    save_kohya_lora(lora, kohya)
    forms = {"folder": (folder / "sdxl", None), "file": (folder / "sdxl.safetensors", folder / "sdxl")}
    return SimpleNamespace(model=folder / "sdxl", forms=forms, lora=lora, kohya=kohya)


def write_tokenizer(folder: Path) -> Path:
    """The toy world's, in which the last of its tokens is "!!", as one of the published ones: padding with "!" makes
    that one two.
    """
    shutil.copytree(BASE_MODEL / "tokenizer", folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    last = "".join(model["merges"].pop())
    model["merges"].append(["!", "!</w>"])
    model["vocab"]["!!</w>"] = model["vocab"].pop(last)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def load_stock(world: SimpleNamespace, *parts: str) -> StableDiffusionXLPipeline:
    """diffusers' own pipeline, with the LoRA in these models."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(world.model, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    if parts:
        pipeline.load_lora_weights(world.lora.parent, adapter_name="it")
        pipeline.set_adapters("it", {name: float(name in parts) for name in MODELS})
    return pipeline
