"""The custom pipelines and LoRA files of Stable Diffusion 3: loaded with all that they hold, or refused."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from pipeline_world import make_components
from safetensors.torch import load_file, save_file
from sd3_lora_world import MODELS, draw_sd3, make_sd3, save_sd3_lora, with_copies
from sdxl_world import make_sdxl, save_sdxl_lora
from test_hub import save_lora
from test_prompts import write_vocabulary
from test_sd3_lora_files import one_layer, written
from test_sdxl_export import custom as custom_sdxl
from test_sdxl_lora_files import difference, ours
from transformers import CLIPTokenizer

from evaluation.drawing import on_pipeline
from evaluation.inputs import LoraSource
from lora_layers import SD3, SDXL, STABLE_DIFFUSION
from loras.loading import load_lora
from loras.slot import LoraSlot
from loras.writing import save_kohya_lora
from pipeline_spf_portrait import SPFPortraitPipeline
from pipeline_spf_portrait_3 import SPFPortrait3Pipeline


def custom(pipeline):
    copies = {name: copy.deepcopy(pipeline.components[name]) for name in MODELS}
    own = SPFPortrait3Pipeline(**{**pipeline.components, **copies})
    own.set_progress_bar_config(disable=True)
    return own


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A tiny model of each family in its custom pipeline, and a LoRA for each of widths that tell it."""
    folder = tmp_path_factory.mktemp("sd3_pipelines")
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), model_max_length=77)
    sd3 = make_sd3(tokenizer)
    wide = SimpleNamespace(components=make_components(tokenizer, cross_attention_dim=768))
    wider, cross = make_sdxl(tokenizer, cross_attention_dim=2048), {"unet": {"target_modules": ["attn2.to_k"]}}
    loras = {
        SD3: save_sd3_lora(sd3, folder / "sd3"),
        STABLE_DIFFUSION: save_lora(wide, folder / "sd"),
        SDXL: save_sdxl_lora(wider, folder / "xl", cross, models=("unet",)),
    }
    for family in (STABLE_DIFFUSION, SDXL):
        loras[f"{family}, kohya"] = loras[family].with_name("kohya.safetensors")
        save_kohya_lora(loras[family], loras[f"{family}, kohya"])
    bases = {
        SD3: custom(sd3),
        STABLE_DIFFUSION: SPFPortraitPipeline(**make_components(tokenizer)),
        SDXL: custom_sdxl(make_sdxl(tokenizer)),
    }
    return SimpleNamespace(sd3=sd3, loras=loras, bases=bases, without=draw_sd3(sd3))


def stock_run(pipeline):
    """Latents of what is on a pipeline, drawn by the stock class."""
    own = with_copies(pipeline)
    return draw_sd3(own)


def test_a_lora_is_loaded_as_the_stock_pipeline_loads_it(world):
    path = world.loras[SD3]
    expected = draw_sd3(world.sd3, lambda own: own.load_lora_weights(path.parent, weight_name=path.name))
    for given in (str(path), path.parent, load_file(path)):
        own = custom(world.sd3)
        own.load_lora_weights(given, adapter_name="x")
        assert own.get_list_adapters() == {model: ["x"] for model in MODELS}
        if not isinstance(given, dict):  # which has no alphas
            assert difference(stock_run(own), expected) == 0.0
    assert difference(expected, world.without) > 1e-1


def test_a_dora_is_loaded_with_its_magnitudes(world, tmp_path):
    """transformers alone leaves those of text encoders out."""

    def grow(_, model):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "magnitude" in key:
                    parameter *= 1.1

    path = save_sd3_lora(world.sd3, tmp_path, {model: {"use_dora": True} for model in MODELS}, change=grow)
    own = custom(world.sd3)
    own.load_lora_weights(str(path))
    found = {(name, key): v for name in MODELS for key, v in own.components[name].state_dict().items()}
    magnitudes = {key: tensor for key, tensor in load_file(path).items() if "magnitude" in key}
    assert {key.split(".")[0] for key in magnitudes} == set(MODELS)
    for key, magnitude in magnitudes.items():
        model, _, name = key.partition(".")
        (tensor,) = [v for (m, n), v in found.items() if m == model and n.startswith(f"{name}.")]
        assert torch.equal(tensor.reshape(-1), magnitude.reshape(-1)), key
    assert difference(stock_run(own), draw_sd3(world.sd3, ours(path))) == 0.0


# That of Stable Diffusion 3 has no other form.
OTHERS = [(SDXL, form, SD3) for form in ("", ", kohya")] + [(STABLE_DIFFUSION, form, SD3) for form in ("", ", kohya")]
OTHERS += [(SD3, "", STABLE_DIFFUSION), (SD3, "", SDXL)]


@pytest.mark.parametrize(("of", "form", "base"), OTHERS)
def test_a_lora_of_another_family_is_called_by_its_name(world, of, form, base):
    path, pipeline = world.loras[of + form], world.bases[base]
    said = f"this is {'an' if of == SDXL else 'a'} {of} LoRA, and the base model is {base}"

    def evaluate():
        with on_pipeline(pipeline, LoraSource("x", path, "lora"), 1.0):
            pass

    # diffusers leaves kohya's names as they are here, and those of this UNet alone may be of either family.
    by_names = said.replace(f"{STABLE_DIFFUSION} LoRA", "LoRA of a UNet") if form else said
    for attempt, message in (
        (lambda: pipeline.load_lora_weights(path), f"The LoRA {path}: {by_names}"),
        (lambda: load_lora(pipeline, str(path), "x"), f"{path}: {said}"),
        (lambda: LoraSlot(pipeline).use(str(path)), f"{path}: {said}"),
        (evaluate, f"{path}: {said}"),
    ):
        with pytest.raises(ValueError) as raised:
            attempt()
        assert str(raised.value).endswith(message) and "\n" not in str(raised.value)
    assert not pipeline.get_list_adapters()


# What each custom pipeline says of a file's names.
NAMES = {
    "transformer.single_transformer_blocks.0.attn.to_q": dict.fromkeys(
        (SD3, STABLE_DIFFUSION, SDXL), "this is a Flux LoRA, and the base model is {}"
    ),
    "lora_unet_joint_blocks_0_x_block_attn_qkv": {
        SD3: "the original model's names, as sd-scripts writes them",
        STABLE_DIFFUSION: f"this is a {SD3} LoRA, and the base model is {{}}",
    },
    "diffusion_model.joint_blocks.0.x_block.attn.qkv": {SD3: "the original model's names"},
    "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": {SD3: "has layers of T5"},
    "transformer.transformer_blocks.7.attn.to_q": {SD3: "there is no layer transformer.transformer_blocks.7."},
    "lora_unet_mid_block_attentions_0_proj_in": {SD3: "this is a LoRA of a UNet, and the base model is {}"},
    "lora_te_text_model_encoder_layers_0_mlp_fc1": {
        SD3: f"this is a {STABLE_DIFFUSION} LoRA, and the base model is {{}}",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_diffusers_would_pass_over_is_refused(world, tmp_path, name):
    path = tmp_path / "x.safetensors"
    save_file(one_layer(name, ("lora_down", "lora_up") if name.startswith("lora_") else ("lora_A", "lora_B")), path)
    for base, said in NAMES[name].items():
        pipeline = world.bases[base]
        with pytest.raises(ValueError, match=re.escape(said.format(base))) as raised:
            pipeline.load_lora_weights(path)
        assert str(raised.value).startswith(f"The LoRA {path}: ") and "\n" not in str(raised.value)
        assert not pipeline.get_list_adapters()


def test_a_part_that_does_not_fit_leaves_nothing_behind(world, tmp_path):
    """A transformer's layers that fit, beside a text encoder's that do not."""
    path = tmp_path / "x.safetensors"
    written(path)(world.loras[SD3])
    layer = "text_encoder_2.text_model.encoder.layers.7.self_attn.q_proj"
    save_file(load_file(path) | one_layer(layer), path)
    own = world.bases[SD3]
    with pytest.raises(ValueError, match="there is no layer text_encoder_2.encoder.layers.7.self_attn.q_proj"):
        own.load_lora_weights(path)
    assert not own.get_list_adapters()
