"""LoRA files of SDXL: both formats and both spellings of its layers, loaded, converted, merged, or refused by name."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from pipeline_world import make_components
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdxl_world import MODELS, draw_sdxl, make_sdxl, save_sdxl_lora, with_copies
from test_lora_files import PROGRAMS, save_lora_of_both_models
from test_prompts import write_vocabulary
from transformers import CLIPTokenizer

import export_spf_portrait_lora as script
from lora_layers import LoraLayer, check_loadable
from loras import LORA_WEIGHTS
from loras.kohya_names import kohya_names, parse_kohya_key
from loras.loading import load_lora, merge_loras
from loras.reading import read_lora
from loras.writing import save_diffusers_lora, save_kohya_lora
from pipeline_spf_portrait import SPFPortraitPipeline


SCALES = [0.5, -0.25]
FUSED = 1e-3  # of the largest latent: sums in another order, after two steps of a random UNet


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A tiny SDXL and a tiny Stable Diffusion, here and as folders, with a LoRA of each. No test may change it."""
    folder = tmp_path_factory.mktemp("sdxl_world")
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), model_max_length=77)
    sdxl, components = make_sdxl(tokenizer), make_components(tokenizer)
    sd = StableDiffusionPipeline(**components)
    sdxl.save_pretrained(folder / "sdxl")
    sd.save_pretrained(folder / "sd")
    lora = save_sdxl_lora(sdxl, folder / "lora")
    save_kohya_lora(lora, folder / "kohya.safetensors")
    sd_lora = save_lora_of_both_models(SimpleNamespace(components=components), folder / "sd_lora", {}, {})
    save_kohya_lora(sd_lora, folder / "sd_kohya.safetensors")
    return SimpleNamespace(
        sdxl=sdxl, sd=sd, folder=folder, lora=lora, kohya=folder / "kohya.safetensors", sd_lora=sd_lora,
        sd_kohya=folder / "sd_kohya.safetensors", without=draw_sdxl(sdxl), tokenizer=tokenizer,
    )  # fmt: skip


def stock(path):
    return lambda pipeline: pipeline.load_lora_weights(path.parent, weight_name=path.name)


def ours(path):
    return lambda pipeline: load_lora(pipeline, str(path), "x")


def difference(found, expected):
    return (found - expected).abs().max().item()


def content(path):
    """All numbers of a file: of each layer its tensors and what they are multiplied with."""
    return {
        (model, name): (layer.down, layer.up, layer.alpha)
        for model, group in read_lora(path).layers.items()
        for name, layer in group.items()
    }


def assert_same_content(found, expected):
    found, expected = content(found), content(expected)
    assert found.keys() == expected.keys()
    for place, (down, up, alpha) in expected.items():
        own = found[place]
        assert torch.equal(own[0], down) and torch.equal(own[1], up) and own[2] == alpha, place


# ------------------------------------------------------------------------------------------------------- both formats


def test_kohyas_format_and_back_is_the_same_to_the_bit(world, tmp_path):
    back = save_diffusers_lora(world.kohya, tmp_path)
    assert_same_content(world.kohya, world.lora)
    assert_same_content(back, world.lora)
    expected = draw_sdxl(world.sdxl, stock(world.lora))
    assert difference(expected, world.without) > 1e-1
    ways = {"kohya, stock": stock(world.kohya), "back, stock": stock(back)}
    ways |= {"kohya": ours(world.kohya), "diffusers": ours(world.lora), "back": ours(back)}
    assert {way: difference(draw_sdxl(world.sdxl, load), expected) for way, load in ways.items()} == dict.fromkeys(
        ways, 0.0
    )


@pytest.mark.parametrize("models", [("unet",), ("text_encoder_2",), ("unet", "text_encoder")], ids="-".join)
def test_not_every_model_has_a_part(world, tmp_path, models):
    lora = save_sdxl_lora(world.sdxl, tmp_path, models=models)
    kohya = tmp_path / "kohya.safetensors"
    save_kohya_lora(lora, kohya)
    expected = draw_sdxl(world.sdxl, stock(lora))
    assert difference(expected, world.without) > 1e-3
    assert difference(draw_sdxl(world.sdxl, ours(kohya)), expected) == 0.0
    assert difference(draw_sdxl(world.sdxl, stock(kohya)), expected) == 0.0


NAMES = {
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k":
        "input_blocks_4_1_transformer_blocks_0_attn2_to_k",
    "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
    "down_blocks.2.resnets.0.conv_shortcut": "input_blocks_7_0_skip_connection",
    "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj": "middle_block_1_transformer_blocks_1_ff_net_0_proj",
    "mid_block.resnets.0.time_emb_proj": "middle_block_0_emb_layers_1",
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_out.0":
        "output_blocks_2_1_transformer_blocks_0_attn1_to_out_0",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.2.resnets.2.conv1": "output_blocks_8_0_in_layers_2",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}  # fmt: skip


def test_names_are_the_published_ones(world):
    names = load_file(world.kohya)
    unet = read_lora(world.lora).layers["unet"]
    for layer, name in NAMES.items():
        assert layer in unet and f"lora_unet_{name}.lora_down.weight" in names
        for spelled in (name, layer.replace(".", "_")):
            assert parse_kohya_key(f"lora_unet_{spelled}.alpha") == ("unet", layer, "alpha")
    for prefix in ("lora_te1_text_model_", "lora_te2_text_model_"):
        assert f"{prefix}encoder_layers_1_self_attn_q_proj.lora_up.weight" in names
        assert f"{prefix}encoder_layers_0_mlp_fc1.alpha" in names
    assert "lora_te2_text_projection.lora_down.weight" in names
    assert "text_encoder_2.text_projection.lora_A.weight" in load_file(world.lora)
    assert "text_projection" in read_lora(world.kohya).layers["text_encoder_2"]
    with safe_open(world.kohya, "pt") as file:
        assert file.metadata() == {
            "ss_base_model_version": "sdxl_base_v1-0", "ss_network_alpha": "1.0", "ss_network_dim": "2",
            "ss_network_module": "networks.lora", "ss_v2": "False",
        }  # fmt: skip


def test_every_layer_of_the_published_unet_goes_to_its_original_name_and_back():
    with init_empty_weights():
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    kinds = torch.nn.Linear | torch.nn.Conv2d
    layers = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
    layer = LoraLayer(torch.ones(2, 2048), torch.ones(2, 2), 1.0)
    names = kohya_names({"unet": dict.fromkeys(layers, layer)}, "SDXL")
    assert len(layers) == len(set(names.values())) == 794
    assert not any(re.search("(down|up|mid)_block|resnets|attentions|samplers", name) for name in names.values())
    for (model, name), own in names.items():
        assert parse_kohya_key(f"{own}.alpha") == (model, name, "alpha")


def respell(path, target, change):
    save_file({change(key): tensor for key, tensor in load_file(path).items()}, target)
    return target


def in_diffusers_words(path):
    """The names of kohya's format that diffusers' own converter would give, by those of ours."""
    layers = read_lora(path)
    names = kohya_names(layers.layers, layers.family)
    return {name: f"lora_unet_{layer.replace('.', '_')}" for (model, layer), name in names.items() if model == "unet"}


def test_both_spellings_of_the_unet_are_the_same_layers(world, tmp_path):
    words = in_diffusers_words(world.lora)

    def change(key):
        name, _, rest = key.partition(".")
        return f"{words.get(name, name)}.{rest}"

    other = respell(world.kohya, tmp_path / "x.safetensors", change)
    names = load_file(other)
    assert any("down_blocks" in name for name in names) and not any("input_blocks" in name for name in names)
    assert_same_content(other, world.lora)
    assert read_lora(other).family == "SDXL"
    expected = draw_sdxl(world.sdxl, stock(world.lora))
    assert difference(draw_sdxl(world.sdxl, ours(other)), expected) == 0.0
    again = tmp_path / "again.safetensors"
    save_kohya_lora(save_diffusers_lora(other, tmp_path / "back"), again)
    assert load_file(again).keys() == load_file(world.kohya).keys()


def test_what_diffusers_own_converter_writes_is_read(world, tmp_path):
    """It has no names of original blocks, and the rank for an alpha."""
    state = load_file(save_sdxl_lora(world.sdxl, tmp_path / "a", {m: {"lora_alpha": 2} for m in MODELS}))
    path = tmp_path / "x.safetensors"
    save_file(convert_state_dict_to_kohya(state), path)
    assert_same_content(path, tmp_path / "a" / LORA_WEIGHTS)


def test_a_layer_that_the_original_unet_does_not_have_keeps_its_name(world, tmp_path):
    odd, path = "unet.down_blocks.1.resnets.0.odd", tmp_path / LORA_WEIGHTS
    more = {f"{odd}.lora_A.weight": torch.ones(2, 4), f"{odd}.lora_B.weight": torch.ones(4, 2)}
    save_file({**load_file(world.lora), **more}, path)
    save_kohya_lora(path, tmp_path / "x.safetensors")
    assert_same_content(tmp_path / "x.safetensors", path)


def test_a_layer_under_two_names_is_refused(world, tmp_path):
    (ours_, theirs), *_ = in_diffusers_words(world.lora).items()
    state = load_file(world.kohya)
    path, key = tmp_path / "x.safetensors", f"{theirs}.lora_down.weight"
    save_file({**state, key: state[f"{ours_}.lora_down.weight"].clone()}, path)
    with pytest.raises(ValueError, match=rf"^{path}: layer 'unet\.\S+' is there under two names, one of them 'lora_"):
        save_diffusers_lora(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["input_blocks_0_1_op", "middle_block_3_proj_in", "output_blocks_2_2_proj_in"])
def test_a_block_that_no_original_unet_has_is_refused(tmp_path, name):
    path, layer = tmp_path / "x.safetensors", f"lora_unet_{name}"
    save_file({f"{layer}.lora_down.weight": torch.ones(2, 4), f"{layer}.lora_up.weight": torch.ones(4, 2)}, path)
    with pytest.raises(ValueError, match="is no layer of Stable Diffusion 1.x, 2.x, XL or 3"):
        read_lora(path)


def test_other_blocks_than_the_published_ones_keep_diffusers_names(world, tmp_path):
    """An SDXL with attention everywhere and one layer a block: every reader takes these names alike."""
    other = make_sdxl(
        world.tokenizer, block_out_channels=(8, 16), layers_per_block=1, transformer_layers_per_block=(1, 2),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=(2, 4),
    )  # fmt: skip
    lora, kohya = save_sdxl_lora(other, tmp_path), tmp_path / "x.safetensors"
    save_kohya_lora(lora, kohya)
    assert not any("input_blocks" in name for name in load_file(kohya))
    assert_same_content(kohya, lora)
    expected = draw_sdxl(other, stock(lora))
    assert difference(draw_sdxl(other, stock(kohya)), expected) == 0.0
    assert difference(draw_sdxl(other, ours(kohya)), expected) == 0.0


# ------------------------------------------------------------------------------------------- ranks, alphas, old names


def test_each_layer_of_every_model_has_its_own_rank_and_alpha(world, tmp_path):
    changes = {
        "unet": {"rank_pattern": {"attn1.to_q": 3}, "alpha_pattern": {"attn2.to_v": 4, "conv1": 8}},
        "text_encoder": {"alpha_pattern": {"fc1": 4}},
        "text_encoder_2": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"0.*v_proj": 16}},
    }
    lora, kohya = save_sdxl_lora(world.sdxl, tmp_path, changes), tmp_path / "kohya.safetensors"
    save_kohya_lora(lora, kohya)
    expected = draw_sdxl(world.sdxl, stock(lora))
    # Of powers of two nothing is rounded.
    assert difference(draw_sdxl(world.sdxl, stock(kohya)), expected) < 1e-5
    assert difference(draw_sdxl(world.sdxl, ours(kohya)), expected) < 1e-5
    assert difference(draw_sdxl(world.sdxl, stock(save_diffusers_lora(kohya, tmp_path / "back"))), expected) < 1e-5
    assert difference(draw_sdxl(world.sdxl, stock(world.lora)), expected) > 1e-2


def test_alphas_that_differ_in_a_kohya_file_are_those_of_its_layers(world, tmp_path):
    def change(key, tensor):
        return tensor * (1 + sum(map(ord, key.split(".")[0])) % 4) if key.endswith(".alpha") else tensor

    kohya = tmp_path / "x.safetensors"
    save_file({key: change(key, tensor) for key, tensor in load_file(world.kohya).items()}, kohya)
    given = {key.removesuffix(".alpha"): v.item() for key, v in load_file(kohya).items() if key.endswith("alpha")}
    layers = read_lora(kohya)
    names = kohya_names(layers.layers, layers.family)
    assert {names[place]: alpha for place, (_, _, alpha) in content(kohya).items()} == given
    assert set(given.values()) == {1, 2, 3, 4}
    back = save_diffusers_lora(kohya, tmp_path / "back")
    assert_same_content(back, kohya)
    pipeline = with_copies(world.sdxl)
    load_lora(pipeline, str(kohya), "x")
    scales = {
        names[model, name.removeprefix("text_model.")]: module.scaling["x"] * 2
        for model in MODELS
        for name, module in pipeline.components[model].named_modules()
        if hasattr(module, "scaling")
    }
    assert scales == given
    assert difference(draw_sdxl(world.sdxl, stock(back)), draw_sdxl(world.sdxl, ours(kohya))) == 0.0


def test_diffusers_own_names_are_those_of_the_same_layers(world, tmp_path):
    other = save_sdxl_lora(world.sdxl, tmp_path, rename=convert_state_dict_to_diffusers)
    assert load_file(other).keys() != load_file(world.lora).keys()
    assert_same_content(other, world.lora)


# ------------------------------------------------------------------------------------------------- loaded and merged


def test_a_lora_is_loaded_next_to_another_and_replaces_it(world):
    pipeline = with_copies(world.sdxl)
    load_lora(pipeline, str(world.lora), "one")
    load_lora(pipeline, str(world.kohya), "two")
    assert pipeline.get_active_adapters() == ["two"]
    assert pipeline.get_list_adapters() == {model: ["one", "two"] for model in MODELS}
    with pytest.raises(ValueError):
        load_lora(pipeline, str(world.sd_lora), "three")
    assert pipeline.get_active_adapters() == ["two"]
    assert pipeline.get_list_adapters() == {model: ["one", "two"] for model in MODELS}


def test_merged_loras_draw_as_active_ones(world, tmp_path):
    second = save_sdxl_lora(world.sdxl, tmp_path, {"unet": {"lora_alpha": 2}}, models=("unet", "text_encoder_2"))

    def both(pipeline):
        load_lora(pipeline, str(world.kohya), "one")
        load_lora(pipeline, str(second), "two")
        pipeline.set_adapters(["one", "two"], SCALES)

    merged = with_copies(world.sdxl)
    merge_loras(merged, [str(world.kohya), str(second)], SCALES)
    assert not merged.get_list_adapters()
    layers, changed = [read_lora(lora).layers for lora in (world.kohya, second)], 0
    for model in MODELS:
        before = dict(world.sdxl.components[model].named_parameters())
        for name, weight in merged.components[model].named_parameters():
            expected, layer = before[name].detach().clone(), name.removesuffix(".weight").removeprefix("text_model.")
            for lora, scale in zip(layers, SCALES, strict=True):
                if name.endswith(".weight") and (found := lora.get(model, {}).get(layer)):
                    product = found.up.flatten(1) @ found.down.flatten(1)
                    expected += scale * found.alpha / found.rank * product.reshape(expected.shape)
                    changed += 1
            assert (weight - expected).abs().max() < 1e-6, (model, name)
    assert changed == sum(len(group) for lora in layers for group in lora.values())
    expected = draw_sdxl(world.sdxl, both)
    size = expected.abs().max().item()
    assert difference(draw_sdxl(merged), expected) / size < FUSED < difference(expected, world.without) / size


# ------------------------------------------------------------------------------------------- of the other family

SD = "Stable Diffusion 1.x or 2.x"
OF_SDXL = f"this is an SDXL LoRA, and the base model is {SD}"
OF_SD = f"this is a {SD} LoRA, and the base model is SDXL"


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_a_lora_for_the_other_family_is_refused_by_name(world, form):
    mine, theirs = getattr(world, form), getattr(world, f"sd_{form}")
    custom = SPFPortraitPipeline(**{**world.sd.components, "requires_safety_checker": False})
    cases = [
        (lambda: load_lora(world.sd, str(mine), "x"), f"{mine}: {OF_SDXL}"),
        (lambda: merge_loras(world.sd, [str(mine)], [1.0]), f"{mine}: {OF_SDXL}"),
        (lambda: custom.load_lora_weights(mine), f"The LoRA {mine}: {OF_SDXL}"),
    ]
    if form == "kohya":
        cases.append((lambda: load_lora(world.sdxl, str(theirs), "x"), f"{theirs}: {OF_SD}"))
    for load, message in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            load()
    assert not world.sd.get_list_adapters() and not world.sdxl.get_list_adapters()


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_a_custom_pipeline_can_check_what_diffusers_made_of_a_file(world, form):
    modules = {name: dict(world.sdxl.components[name].named_modules()) for name in MODELS}
    options = {"unet_config": world.sdxl.unet.config, "return_lora_metadata": True}
    state = StableDiffusionXLPipeline.lora_state_dict(getattr(world, form), **options)
    check_loadable(*state, modules)
    with pytest.raises(ValueError, match="there is no layer text_encoder_2.encoder"):
        check_loadable(*state, {**modules, "text_encoder_2": {}})
    others = {name: dict(world.sd.components[name].named_modules()) for name in MODELS[:2]}
    with pytest.raises(ValueError, match=f"^{OF_SDXL}$"):
        check_loadable(*state, others)


@pytest.mark.parametrize("program", ["page", "merged", "evaluation", "reference", "stage1"])
def test_every_program_refuses_it_on_a_stable_diffusion(world, tmp_path, monkeypatch, program):
    module, before, after = PROGRAMS[program]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        module.main([str(flag) for flag in (*before, world.kohya, *after)])
    assert stop.value.code.endswith(f" {world.kohya}: {OF_SDXL}") and "\n" not in stop.value.code


# What a file of one layer tells of itself by a name or a width.
TELLING = {
    "unet.add_embedding.linear_1": (34, "SDXL"),
    "unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_q": (16, "SDXL"),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (2048, "SDXL"),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (768, SD),
    "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": (1024, SD),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (16, None),
    "text_encoder.encoder.layers.0.mlp.fc1": (16, None),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (16, "SDXL"),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (16, SD),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (16, "SDXL"),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": (16, "SDXL"),
    "lora_te2_text_projection": (16, "SDXL"),
    "lora_unet_middle_block_1_proj_in": (16, "SDXL"),
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k": (768, SD),
    "lora_unet_output_blocks_11_1_transformer_blocks_0_attn2_to_k": (1024, SD),
    "lora_unet_mid_block_attentions_0_proj_in": (16, None),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (768, SD),
}


@pytest.mark.parametrize("layer", TELLING)
def test_the_family_is_told_from_the_file(world, tmp_path, layer):
    width, family = TELLING[layer]
    path, is_kohya = tmp_path / "x.safetensors", layer.startswith("lora_")
    down, up = ("lora_down", "lora_up") if is_kohya else ("lora_A", "lora_B")
    save_file({f"{layer}.{down}.weight": torch.ones(2, width), f"{layer}.{up}.weight": torch.ones(4, 2)}, path)
    assert read_lora(path).family == family
    for pipeline, own, message in ((world.sd, SD, OF_SDXL), (world.sdxl, "SDXL", OF_SD)):
        with pytest.raises(ValueError) as raised:
            load_lora(pipeline, str(path), "x")
        assert (str(raised.value) == f"{path}: {message}") == (family not in (None, own))


def test_the_only_text_encoder_tells_more_than_the_published_names_of_blocks(tmp_path):
    path, state = tmp_path / "x.safetensors", {}
    for layer in ("lora_unet_middle_block_1_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"):
        state |= {f"{layer}.lora_down.weight": torch.ones(2, 16), f"{layer}.lora_up.weight": torch.ones(4, 2)}
    save_file(state, path)
    assert read_lora(path).family == SD


def test_names_of_the_layers_tell_more_than_those_of_the_text_encoder(tmp_path):
    """Some trainers of diffusers call the one text encoder of Stable Diffusion the first."""
    path, unet = tmp_path / "x.safetensors", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    state = {}
    for layer, width in ((unet, 768), ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 16)):
        state |= {f"{layer}.lora_down.weight": torch.ones(2, width), f"{layer}.lora_up.weight": torch.ones(4, 2)}
    save_file(state, path)
    assert read_lora(path).family == SD


@pytest.mark.parametrize("prefix", ["lora_te1_", "lora_unet_"])
def test_the_pipeline_tells_the_family_from_the_names_before_diffusers_changes_them(world, tmp_path, prefix):
    """A LoRA whose layers would all fit: the first text encoder alone, or no text encoder at all."""
    layer = "text_model_encoder_layers_0_mlp_fc1" if prefix == "lora_te1_" else "mid_block_attentions_0_proj_in"
    model, name = parse_kohya_key(f"{prefix}{layer}.alpha")[:2]
    module = dict(world.sd.components[model].named_modules())
    shape = next(m for key, m in module.items() if key.removeprefix("text_model.") == name).weight.shape
    state = {
        f"{prefix}{layer}.lora_down.weight": torch.ones(2, *shape[1:]),
        f"{prefix}{layer}.lora_up.weight": torch.ones(shape[0], 2, *[1] * (len(shape) - 2)),
        f"{prefix}{layer}.alpha": torch.tensor(1.0),
    }
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    copies = {part: copy.deepcopy(world.sd.components[part]) for part in ("unet", "text_encoder")}
    custom = SPFPortraitPipeline(**{**world.sd.components, **copies, "requires_safety_checker": False})
    for given, options, called in (
        (path, {}, path), (tmp_path, {"weight_name": path.name}, path), (dict(state), {}, ""),
    ):  # fmt: skip
        if prefix == "lora_te1_":
            message = f"^The LoRA{' ' * bool(called)}{re.escape(str(called))}: {OF_SDXL}$"
            with pytest.raises(ValueError, match=message):
                custom.load_lora_weights(given, **options)
            assert not custom.get_list_adapters()
        else:
            custom.load_lora_weights(given, **options)
            custom.unload_lora_weights()


# ---------------------------------------------------------------------------------------------------- the program


def export(*flags):
    script.main([str(flag) for flag in flags])


def test_the_program_converts_and_merges(world, tmp_path):
    kohya, back, merged = tmp_path / "k.safetensors", tmp_path / "back", tmp_path / "merged"
    export("--lora", world.lora, "--output_kohya", kohya)
    assert kohya.read_bytes() == world.kohya.read_bytes()
    export("--lora", kohya, "--output_diffusers", back)
    assert_same_content(back / LORA_WEIGHTS, world.lora)
    export("--lora", kohya, "--scale", 0.5, "--base_model", world.folder / "sdxl", "--output_merged", merged)
    pipeline = StableDiffusionXLPipeline.from_pretrained(merged, add_watermarker=False)
    assert pipeline.config.force_zeros_for_empty_prompt is world.sdxl.config.force_zeros_for_empty_prompt

    expected = with_copies(world.sdxl)
    merge_loras(expected, [str(world.lora)], [0.5])
    for model in MODELS:
        found = pipeline.components[model].state_dict()
        for name, weight in expected.components[model].state_dict().items():
            assert torch.equal(found[name], weight), name


def test_the_program_names_the_family_of_a_lora_and_writes_nothing(world, tmp_path):
    for base, lora, message in (("sd", world.kohya, OF_SDXL), ("sdxl", world.sd_kohya, OF_SD)):
        flags = ["--lora", lora, "--base_model", world.folder / base, "--output_merged", tmp_path / "merged"]
        with pytest.raises(SystemExit) as stop:
            export(*flags)
        assert stop.value.code == f"export_spf_portrait_lora.py: error: {lora}: {message}"
    assert not list(tmp_path.iterdir())
