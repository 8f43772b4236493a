"""Base models that a user names: loaded, or one line that says why not."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from checked_loading import InputError, load_pipeline


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
