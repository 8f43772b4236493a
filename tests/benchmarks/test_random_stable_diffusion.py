"""The random models in the configuration of the published ones: how large they are, and that their folders load."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

from benchmarks import random_stable_diffusion as random_models


# Counted in the published weights.
COUNTS = {
    "sd": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", random_models.WRITERS)
def test_modules_are_as_large_as_the_published_ones(family):
    with torch.device("meta"):
        makers = {
            "sd": lambda: random_models.make_pipeline(random_models.make_unet()),
            "sdxl": lambda: random_models.make_xl_pipeline(random_models.make_xl_unet()),
        }
        pipeline = makers[family]()
    found = {name: getattr(pipeline, name) for name in COUNTS[family]}
    counted = {name: sum(p.numel() for p in module.parameters()) for name, module in found.items()}
    assert counted == COUNTS[family]


TINY_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2,
             "projection_dim": 8}  # fmt: skip
TINY_UNET = {"block_out_channels": (32, 32, 32), "attention_head_dim": 2, "transformer_layers_per_block": 1}


@pytest.mark.parametrize("family", random_models.WRITERS)
def test_what_is_written_loads_in_half_precision(family, tmp_path, monkeypatch):
    """With fewer channels; all else is as it is."""
    for name in ("TEXT", "TEXT_2", "VISION"):
        monkeypatch.setattr(random_models, name, getattr(random_models, name) | TINY_TEXT)
    small = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 6 * 256 + 8}
    monkeypatch.setattr(random_models, "UNET_XL", random_models.UNET_XL | TINY_UNET | small)
    make_vae, unet = random_models.AutoencoderKL, random_models.UNet2DConditionModel
    channels = {"block_out_channels": (32,) * 4}
    monkeypatch.setattr(random_models, "AutoencoderKL", lambda **given: make_vae(**given | channels))
    if family == "sd":
        small = channels | {"cross_attention_dim": 16}
        monkeypatch.setattr(random_models, "UNet2DConditionModel", lambda **given: unet(**given | small))
    random_models.WRITERS[family](tmp_path)
    kind = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[family]
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.float16, torch.int64}, path
    pipeline = kind.from_pretrained(tmp_path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a woman", num_inference_steps=1, height=64, width=64, output_type="np").images
    assert picture.shape == (1, 64, 64, 3) and pipeline.tokenizer.model_max_length == 77
    assert torch.get_default_dtype() == torch.float32
    if family == "sdxl":
        assert type(pipeline.scheduler) is EulerDiscreteScheduler and pipeline.tokenizer_2.pad_token == "!"
        assert pipeline.config.force_zeros_for_empty_prompt and pipeline.vae.config.force_upcast
        assert pipeline.vae.config.scaling_factor == 0.13025
