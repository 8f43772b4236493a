"""Write Stable Diffusion 1.5 with random weights: `python benchmarks/random_stable_diffusion.py --output_dir FOLDER`.

Every module has the configuration of the published model, so that time and memory of the training script are those of
the real thing and nothing in it can be particular to the toy world. A CLIP ViT-L/14 with random weights lies in the
folder's `clip`. The tokenizer is the toy world's, with 77 tokens. Nothing it draws means anything.

Source: [ours].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy_portraits.recipe import BASE_MODEL


TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
TEXT["eos_token_id"] = 2  # as published: the end is then found as the highest id
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"patch_size": 14, "projection_dim": 768}


def make_unet() -> UNet2DConditionModel:
    """860M parameters; the defaults of the class are those of Stable Diffusion 1 but for two."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def make_pipeline(unet: UNet2DConditionModel, tokenizer: CLIPTokenizer | None = None) -> StableDiffusionPipeline:
    """The UNet with a VAE of 84M parameters and 8 pixels a latent, and a text encoder of 123M."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)), tokenizer=tokenizer, unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def make_clip() -> CLIPModel:
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=768))


def write_model(folder: Path) -> None:
    """Write the pipeline's folder in half precision, and CLIP beside it."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BASE_MODEL / "tokenizer", model_max_length=77)
    make_pipeline(make_unet(), tokenizer).to(dtype=torch.float16).save_pretrained(folder)
    for part in (make_clip().half(), tokenizer, CLIPImageProcessorPil()):
        part.save_pretrained(folder / "clip")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write; about 3 GB.")
    write_model(parser.parse_args().output_dir)
