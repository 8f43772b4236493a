"""One file in the original layout: diffusers reads it back equal, under the names that the published files have."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)  # fmt: skip
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from programs.original_layout import SD1, SD2, XL, layout_of, one_file, original_weights
from toy_portraits.recipe import BASE_MODEL


CONFIG = {
    "block_out_channels": (8, 16, 16), "layers_per_block": 2, "norm_num_groups": 4, "sample_size": 8,
    "attention_head_dim": 4,
}  # fmt: skip
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def text_encoder(kind, width, **config):
    return kind(
        CLIPTextConfig(
            hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=609,
            max_position_embeddings=32, projection_dim=12, bos_token_id=607, eos_token_id=608, **config,
        )
    )  # fmt: skip


def make_pipeline(layout):
    """Random weights in the blocks that the published model has."""
    blocks, own, parts = (CROSS, CROSS, PLAIN), {"cross_attention_dim": 8}, {}
    if layout is XL:
        blocks = (PLAIN, CROSS, CROSS)
        own = {
            "cross_attention_dim": 24, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 36, "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2, 3),
        }  # fmt: skip
        # diffusers tells both text encoders of a file by their width.
        second = text_encoder(CLIPTextModelWithProjection, 16, hidden_act="gelu")
        parts = {"text_encoder_2": second, "tokenizer_2": CLIPTokenizer.from_pretrained(BASE_MODEL / "tokenizer")}
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **CONFIG, **own, down_block_types=[name.format("Down") for name in blocks],
        up_block_types=[name.format("Up") for name in reversed(blocks)],
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8), down_block_types=["DownEncoderBlock2D"] * 3, layers_per_block=2,
        up_block_types=["UpDecoderBlock2D"] * 3, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    parts |= {
        "unet": unet, "vae": vae, "scheduler": DDIMScheduler(),
        "tokenizer": CLIPTokenizer.from_pretrained(BASE_MODEL / "tokenizer"),
        "text_encoder": text_encoder(CLIPTextModel, 8, hidden_act="gelu" if layout is SD2 else "quick_gelu"),
    }  # fmt: skip
    if layout is XL:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def difference(first, second):
    """The largest of all weights of two pipelines."""
    models = [name for name, part in first.components.items() if isinstance(part, torch.nn.Module)]
    assert models and all(isinstance(second.components[name], torch.nn.Module) for name in models)
    largest = 0.0
    for name in models:
        before, after = first.components[name].state_dict(), second.components[name].state_dict()
        assert before.keys() == after.keys()
        largest = max(largest, *((before[key] - after[key]).abs().max().item() for key in before))
    return largest


@pytest.mark.parametrize("layout", [SD1, SD2, XL], ids=lambda layout: layout.name)
def test_diffusers_reads_back_what_was_written(layout, tmp_path):
    pipeline, file = make_pipeline(layout), tmp_path / "model.safetensors"
    assert layout_of(pipeline) is layout
    pipeline.save_pretrained(tmp_path / "model")
    for weights in Path(tmp_path, "model").rglob("*.safetensors"):
        weights.unlink()
    tensors = one_file(pipeline)
    assert "model.diffusion_model.output_blocks.8.0.skip_connection.weight" in tensors
    # The change to the next resolution stands behind the attention, where there is one.
    assert f"model.diffusion_model.output_blocks.2.{2 if layout is XL else 1}.conv.weight" in tensors
    assert "model.diffusion_model.output_blocks.5.2.conv.weight" in tensors
    assert tensors["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    for prefix in layout.text_encoders.values():
        end = "positional_embedding" if prefix.endswith(".model.") else "text_model.final_layer_norm.bias"
        assert prefix + end in tensors
    save_file(tensors, file)
    read = type(pipeline).from_single_file(str(file), config=str(tmp_path / "model"))
    assert difference(pipeline, read) == 0.0


def test_the_names_of_the_published_model():
    """Some that diffusers tells Stable Diffusion 1.5 by, and the count of its UNet's tensors."""
    with torch.device("meta"):
        state = UNet2DConditionModel(block_out_channels=(32, 64, 128, 128), cross_attention_dim=8).state_dict()
    names = original_weights(SD1, {"unet": state})
    prefix = "model.diffusion_model."
    assert len(names) == 686 and all(name.startswith(prefix) for name in names)
    for name in (
        "output_blocks.11.0.skip_connection.weight", "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.9.0.op.weight", "output_blocks.2.1.conv.weight", "output_blocks.8.2.conv.bias",
        "middle_block.1.proj_out.weight", "middle_block.2.emb_layers.1.bias", "time_embed.2.bias", "out.2.weight",
    ):  # fmt: skip
        assert prefix + name in names


def test_what_the_scheduler_says_is_in_the_file():
    pipeline = make_pipeline(SD1)
    assert not {"v_pred", "ztsnr"} & one_file(pipeline).keys()
    pipeline.scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    tensors = one_file(pipeline)
    assert tensors["v_pred"].shape == tensors["ztsnr"].shape == (0,)


def test_a_layer_without_a_place_is_named():
    with pytest.raises(ValueError, match="UNet's layer class_embedding.linear_1 has no place in the original layout"):
        original_weights(SD1, {"unet": {"class_embedding.linear_1.weight": torch.empty(1)}})
