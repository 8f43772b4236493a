"""SDXL through the exporter: both formats, DoRA, a base and a merged model in one file; the other family by name."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from pipeline_world import make_components
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdxl_world import MODELS, draw_sdxl, make_sdxl, save_sdxl_lora, with_copies
from test_hub import save_lora
from test_prompts import write_vocabulary
from test_sdxl_lora_files import assert_same_content, difference, in_diffusers_words, ours
from transformers import CLIPTokenizer

import export_spf_portrait_lora as script
from evaluation.drawing import on_pipeline
from evaluation.inputs import LoraSource
from loras import LORA_WEIGHTS
from loras.kohya_names import in_text_model
from loras.loading import load_lora, merge_loras
from loras.reading import read_lora
from loras.slot import LoraSlot
from loras.writing import save_kohya_lora
from pipeline_spf_portrait import SPFPortraitPipeline
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from programs.original_layout import one_file


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A tiny SDXL, here, as a folder and as one file, and a LoRA for it in both formats. No test may change it."""
    folder = tmp_path_factory.mktemp("sdxl_export")
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), model_max_length=77)
    sdxl = make_sdxl(tokenizer)
    sdxl.save_pretrained(folder / "sdxl")
    save_file(one_file(sdxl), folder / "sdxl.safetensors")
    lora = save_sdxl_lora(sdxl, folder / "lora")
    save_kohya_lora(lora, folder / "kohya.safetensors")
    return SimpleNamespace(
        sdxl=sdxl, folder=folder / "sdxl", file=folder / "sdxl.safetensors", lora=lora, tokenizer=tokenizer,
        kohya=folder / "kohya.safetensors", without=draw_sdxl(sdxl),
    )  # fmt: skip


def export(*flags):
    script.main([str(flag) for flag in flags])


def stopped(*flags):
    with pytest.raises(SystemExit) as stop:
        export(*flags)
    assert "\n" not in stop.value.code
    return stop.value.code.removeprefix("export_spf_portrait_lora.py: error: ")


def weights(pipeline):
    """All numbers of a pipeline's models by name."""
    models = (*MODELS, "vae")
    return {(name, key): v for name in models for key, v in pipeline.components[name].state_dict().items()}


def assert_same_weights(found, expected):
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys()
    assert [place for place, tensor in expected.items() if not torch.equal(found[place], tensor)] == []


# ---------------------------------------------------------------------------------------------------------- kohya


def with_alphas(world, path, spelling, alphas):
    """The kohya file with other alphas, layer by layer, and the UNet's names in a spelling."""
    words = in_diffusers_words(world.lora) if spelling == "down_blocks" else {}
    state = {}
    for number, (key, tensor) in enumerate(sorted(load_file(world.kohya).items())):
        name, _, rest = key.partition(".")
        tensor = torch.tensor(float(alphas[number % len(alphas)])) if rest == "alpha" else tensor
        state[f"{words.get(name, name)}.{rest}"] = tensor
    save_file(state, path)
    return path


@pytest.mark.parametrize("spelling", ["input_blocks", "down_blocks"])
def test_a_published_kohya_lora_goes_both_ways_and_draws_the_same(world, tmp_path, spelling):
    kohya = with_alphas(world, tmp_path / "k.safetensors", spelling, [1, 4, 2, 8])
    names = load_file(kohya)
    assert any(spelling in name for name in names) and any(name.startswith("lora_te2_") for name in names)
    assert len({layer.alpha for group in read_lora(kohya).layers.values() for layer in group.values()}) == 4
    back, again = tmp_path / "back", tmp_path / "again.safetensors"
    export("--lora", kohya, "--output_diffusers", back)
    export("--lora", back, "--output_kohya", again)
    assert_same_content(back / LORA_WEIGHTS, kohya)
    expected = draw_sdxl(world.sdxl, ours(kohya))
    assert difference(expected, draw_sdxl(world.sdxl, ours(world.kohya))) > 1e-2
    assert difference(draw_sdxl(world.sdxl, ours(back / LORA_WEIGHTS)), expected) == 0.0
    # One alpha for all there; powers of two are not rounded.
    assert difference(draw_sdxl(world.sdxl, ours(again)), expected) == 0.0
    assert load_file(again).keys() == load_file(world.kohya).keys()


# -------------------------------------------------------------------------------------------------- merged, one file


def test_merged_into_a_folder_and_into_one_file(world, tmp_path):
    """Both from a base model in a folder and from one in a file; all four are equal, in the published layout."""
    expected = with_copies(world.sdxl)
    merge_loras(expected, [str(world.lora)], [0.5])
    bases = {"folder": ["--base_model", world.folder]}
    bases["file"] = ["--base_model", world.file, "--base_config", world.folder]
    for name, base in bases.items():
        folder, file = tmp_path / name, tmp_path / f"{name}.safetensors"
        for merged in (folder, file):
            export("--lora", world.kohya, "--scale", 0.5, *base, "--output_merged", merged)
        assert_same_weights(StableDiffusionXLPipeline.from_pretrained(folder), expected)
        single = StableDiffusionXLPipeline.from_single_file(str(file), config=str(world.folder))
        assert_same_weights(single, expected)
        assert difference(draw_sdxl(single), draw_sdxl(expected)) == 0.0
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
    for name in (
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight",
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.conv_in.weight",
    ):
        assert name in names
    assert file.read_bytes() == (tmp_path / "folder.safetensors").read_bytes()


# -------------------------------------------------------------------------------------------------------------- DoRA


@pytest.fixture(scope="module")
def dora(world, tmp_path_factory):
    """A DoRA on all three models whose magnitudes are not those that it starts with, and what it draws."""
    adapted = with_copies(world.sdxl)

    def grow(name, model):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "magnitude" in key:
                    parameter *= 1.1
        adapted.register_modules(**{name: model})

    changes = {model: {"use_dora": True} for model in MODELS}
    path = save_sdxl_lora(world.sdxl, tmp_path_factory.mktemp("dora"), changes, change=grow)
    return SimpleNamespace(path=path, drawn=draw_sdxl(adapted))


def custom(pipeline):
    copies = {name: copy.deepcopy(pipeline.components[name]) for name in MODELS}
    own = SPFPortraitXLPipeline(**{**pipeline.components, **copies}, add_watermarker=False)
    own.set_progress_bar_config(disable=True)
    return own


def test_a_dora_is_loaded_with_its_magnitudes(world, dora):
    """transformers alone leaves those of text encoders out, and says so in its log only."""
    assert difference(dora.drawn, world.without) > 1e-1
    assert difference(draw_sdxl(world.sdxl, ours(dora.path)), dora.drawn) == 0.0
    for own in (str(dora.path), dora.path.parent):
        pipeline = custom(world.sdxl)
        pipeline.load_lora_weights(own)
        found = weights(pipeline)
        magnitudes = {key: tensor for key, tensor in load_file(dora.path).items() if "magnitude" in key}
        assert {key.split(".")[0] for key in magnitudes} == set(MODELS)
        for key, magnitude in magnitudes.items():
            model, _, name = key.partition(".")
            name = name if model != "text_encoder" else name.removeprefix("text_model.")
            (tensor,) = [v for (m, n), v in found.items() if m == model and n.startswith(f"{name}.")]
            assert torch.equal(tensor.reshape(-1), magnitude.reshape(-1)), key


def test_a_dora_is_merged_and_goes_into_no_other_format_unwarned(world, dora, tmp_path, capsys):
    export("--lora", dora.path, "--base_model", world.folder, "--output_merged", tmp_path / "merged")
    found = weights(StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged"))
    before, checked = weights(world.sdxl), 0
    for model, group in read_lora(dora.path).layers.items():
        for name, layer in group.items():
            place = model, f"{in_text_model(name) if model == 'text_encoder_2' else name}.weight"
            product = layer.up.flatten(1) @ layer.down.flatten(1)
            sums = before[place].flatten(1) + layer.alpha / layer.rank * product
            expected = layer.magnitude.reshape(-1, 1) / sums.norm(dim=1, keepdim=True) * sums
            assert (found[place].flatten(1) - expected).abs().max() < 1e-5, place
            checked += 1
    assert checked == sum("magnitude" in key for key in load_file(dora.path)) > 100
    capsys.readouterr()
    export("--lora", dora.path, "--output_kohya", tmp_path / "k.safetensors")
    assert "is a DoRA" in capsys.readouterr().err
    scales = [name for name in load_file(tmp_path / "k.safetensors") if name.endswith(".dora_scale")]
    assert {name.split("_")[1] for name in scales} == {"unet", "te1", "te2"}
    said = stopped("--lora", tmp_path / "k.safetensors", "--output_diffusers", tmp_path / "back")
    assert said.startswith(f"{tmp_path}/k.safetensors: a DoRA in kohya's format ('lora_")


# ------------------------------------------------------------------------------------------------- the other family

SD, XL = "Stable Diffusion 1.x or 2.x", "SDXL"


@pytest.fixture(scope="module")
def families(world, tmp_path_factory):
    """A pipeline of each family, as a folder too, and a LoRA of the published widths for each in both formats."""
    folder, found = tmp_path_factory.mktemp("families"), {}
    cross = {"unet": {"target_modules": ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]}}
    wide = SimpleNamespace(components=make_components(world.tokenizer, cross_attention_dim=768))
    sd = SPFPortraitPipeline(**make_components(world.tokenizer))
    sd.save_pretrained(folder / "sd")
    found[SD] = SimpleNamespace(pipeline=sd, folder=folder / "sd", lora=save_lora(wide, folder / "sd_lora"))
    lora = save_sdxl_lora(
        make_sdxl(world.tokenizer, cross_attention_dim=2048), folder / "xl_lora", cross, models=("unet",)
    )
    found[XL] = SimpleNamespace(pipeline=custom(world.sdxl), folder=world.folder, lora=lora)
    for family in found.values():
        family.kohya = family.lora.with_name("kohya.safetensors")
        save_kohya_lora(family.lora, family.kohya)
    return found


@pytest.mark.parametrize("form", ["lora", "kohya"])
@pytest.mark.parametrize(("of", "base"), [(XL, SD), (SD, XL)])
def test_a_lora_of_the_other_family_is_called_by_its_name(families, tmp_path, of, base, form):
    path, own = getattr(families[of], form), families[base]
    said = f"this is {'an' if of == XL else 'a'} {of} LoRA, and the base model is {base}"
    evaluated = LoraSource("x", path, "lora")

    def evaluate():
        with on_pipeline(own.pipeline, evaluated, 1.0):
            pass

    for attempt, message in (
        (lambda: own.pipeline.load_lora_weights(path), f"The LoRA {path}: {said}"),
        (lambda: load_lora(own.pipeline, str(path), "x"), f"{path}: {said}"),
        (lambda: LoraSlot(own.pipeline).use(str(path)), f"{path}: {said}"),
        (evaluate, f"{path}: {said}"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)) as raised:
            attempt()
        assert str(raised.value).endswith(message) and "\n" not in str(raised.value)
    merged = tmp_path / "merged"
    assert stopped("--lora", path, "--base_model", own.folder, "--output_merged", merged) == f"{path}: {said}"
    assert not merged.exists() and not own.pipeline.get_list_adapters()
