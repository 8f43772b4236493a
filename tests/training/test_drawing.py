"""Tests of drawn portraits, with a real (tiny, random) Stable Diffusion pipeline."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.drawing import draw_latents


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)
    text_config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts=("a", "b", "c"), **changes) -> torch.Tensor:
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 24, "batch_size": 2}
    options["seeds"] = range(5, 5 + len(prompts))
    return draw_latents(pipeline, prompts, **{**options, **changes})


def test_latents_do_not_depend_on_the_batch_size(pipeline):
    latents = draw(pipeline)
    assert latents.shape == (3, 4, 8, 12) and latents.dtype == torch.float32 and not latents.requires_grad
    for batch_size in (1, 3, 8):
        torch.testing.assert_close(draw(pipeline, batch_size=batch_size), latents, atol=1e-5, rtol=0)


def test_each_portrait_has_its_own_seed(pipeline):
    latents = draw(pipeline, prompts=["a", "a", "a"])
    differences = [(latents[i] - latents[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(differences) > 0.1
    torch.testing.assert_close(draw(pipeline, prompts=["a"], seeds=[6])[0], latents[1], atol=1e-5, rtol=0)
    assert (draw(pipeline, prompts=["b", "a", "a"])[0] - latents[0]).abs().max() > 1e-4


def test_half_precision_starts_from_the_same_noise(pipeline, monkeypatch):
    """Rounded, and not drawn in another way."""
    call, started = type(pipeline).__call__, []

    def watched(self, *args, **kwargs):
        started.append(kwargs["latents"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(pipeline), "__call__", watched)
    draw(pipeline, prompts=["a", "b"])
    draw(copy.deepcopy(pipeline).to(torch.bfloat16), prompts=["a", "b"])
    noise = torch.stack([torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    assert torch.equal(started[0], noise) and torch.equal(started[1], noise.bfloat16())


def test_latents_are_what_the_pipeline_decodes(pipeline):
    (latents,) = draw(pipeline, prompts=["a"]).split(1)
    image = pipeline(
        "a",
        num_inference_steps=2,
        guidance_scale=3.0,
        height=16,
        width=24,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), image, atol=1e-5, rtol=0)
