"""A tiny UNet of two resolutions, with LoRA adapters added through peft, for the tests of what surrounds a UNet."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


TARGETS = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
TOKENS = 7
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def make_unet(**kwargs) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    unet = UNet2DConditionModel(**{**config, **kwargs})
    unet.requires_grad_(False)
    return unet


def add_lora(unet: UNet2DConditionModel, name: str = "default", seed: int = 1) -> None:
    """An adapter which changes the output: peft starts lora_B at zero."""
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS), adapter_name=name)
    for parameter_name, parameter in unet.named_parameters():
        if f"lora_B.{name}." in parameter_name:
            nn.init.normal_(parameter, std=0.3)


@cache
def adapted_unet(*names: str) -> UNet2DConditionModel:
    unet = make_unet()
    for name in names:
        add_lora(unet, name, seed=1 if name == "default" else 2)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".default." in name)
    return unet


@pytest.fixture
def unet():
    return deepcopy(adapted_unet())


@pytest.fixture
def lora_unet():
    return deepcopy(adapted_unet("default"))


@pytest.fixture
def two_adapters():
    """A frozen "stage1" and the trained "default", both active, as in composed alignment."""
    return deepcopy(adapted_unet("stage1", "default"))


def inputs(size=(8, 8), batch_size=2) -> dict:
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(batch_size, 4, *size, generator=generator),
        "timestep": torch.arange(1, batch_size + 1) * 100,
        "encoder_hidden_states": torch.randn(batch_size, TOKENS, 12, generator=generator),
    }


def predict(unet, **kwargs) -> torch.Tensor:
    return unet(**{**inputs(), **kwargs}, return_dict=False)[0]


def flags(unet) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in unet.named_parameters()}


def adapter_states(unet) -> list:
    return [(m.active_adapters, m.disable_adapters) for m in unet.modules() if isinstance(m, BaseTunerLayer)]


def hook_count(unet) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in unet.modules())


def encoder_mask() -> torch.Tensor:
    mask = torch.ones(2, TOKENS)
    mask[0, 5:] = 0
    mask[1, 2:] = 0
    return mask
