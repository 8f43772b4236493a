"""LoRA files of Stable Diffusion 3: loaded, written, merged as diffusers has them, or refused by name."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from pipeline_world import make_components
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sd3_lora_world import MODELS, draw_sd3, make_sd3, save_sd3_lora, with_copies
from sdxl_world import make_sdxl, save_sdxl_lora
from test_hub import save_lora
from test_prompts import write_vocabulary
from test_sdxl_lora_files import assert_same_content, content, difference, ours, stock
from transformers import CLIPTokenizer

from lora_layers import FLUX, SD3, LoraLayer, check_loadable, find_family
from loras import LORA_WEIGHTS
from loras.loading import load_lora, merge_loras
from loras.reading import read_lora
from loras.slot import LoraSlot
from loras.writing import save_diffusers_lora, save_kohya_lora, write_diffusers_lora


SCALES = [0.5, -0.25]
FUSED = 1e-3  # of the largest latent: sums in another order, after two steps of a random transformer
SD, XL = "Stable Diffusion 1.x or 2.x", "SDXL"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """Tiny models of three families with a LoRA of each; the published widths tell those of a UNet. No test may change
    it.
    """
    folder = tmp_path_factory.mktemp("sd3_world")
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), model_max_length=77)
    sd3 = make_sd3(tokenizer)
    cross = {"unet": {"target_modules": ["attn2.to_k", "attn2.to_v"]}}
    wide = SimpleNamespace(components=make_components(tokenizer, cross_attention_dim=768))
    sdxl = make_sdxl(tokenizer, cross_attention_dim=2048)
    loras = {
        SD3: save_sd3_lora(sd3, folder / "lora"),
        SD: save_lora(wide, folder / "sd_lora"),
        XL: save_sdxl_lora(sdxl, folder / "xl_lora", cross, models=("unet",)),
    }
    for family in (SD, XL):
        save_kohya_lora(loras[family], folder / f"{family}.safetensors")
        loras[f"{family}, kohya"] = folder / f"{family}.safetensors"
    bases = {SD3: sd3, SD: StableDiffusionPipeline(**make_components(tokenizer)), XL: make_sdxl(tokenizer)}
    return SimpleNamespace(
        sd3=sd3, lora=loras[SD3], loras=loras, bases=bases, tokenizer=tokenizer, folder=folder, without=draw_sd3(sd3)
    )


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def written(path, change=lambda key: key, metadata=None, models=MODELS):
    """The tensors of a file under other names, at another place, with metadata of their own."""

    def write(source):
        tensors = {change(key): v for key, v in load_file(source).items() if key.startswith(tuple(models))}
        save_file(tensors, path, None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)})
        return path

    return write


# ------------------------------------------------------------------------------------------------- loaded and written


def test_the_stock_pipeline_and_ours_load_it_alike(world):
    expected = draw_sd3(world.sd3, stock(world.lora))
    assert difference(expected, world.without) > 1e-1
    assert difference(draw_sd3(world.sd3, ours(world.lora)), expected) == 0.0
    lora = read_lora(world.lora)
    assert lora.family == SD3 and lora.reads_as_meant and not lora.is_kohya
    kinds = torch.nn.Linear | torch.nn.Conv2d
    for model in MODELS:
        layers = [name for name, module in world.sd3.components[model].named_modules() if isinstance(module, kinds)]
        assert lora.layers[model].keys() == {name.removeprefix("text_model.") for name in layers}


@pytest.mark.parametrize("models", [("transformer",), ("text_encoder_2",), ("transformer", "text_encoder")])
def test_not_every_model_has_a_part(world, tmp_path, models):
    lora = save_sd3_lora(world.sd3, tmp_path, models=models)
    expected = draw_sd3(world.sd3, stock(lora))
    assert difference(expected, world.without) > 1e-3
    assert difference(draw_sd3(world.sd3, ours(lora)), expected) == 0.0


def adapted(world, changes=None, change=lambda name, model: None):
    """Copies of the models with a LoRA each, and what a file of it is written from."""
    models, parts = {}, {}
    for name in MODELS:
        models[name] = copy.deepcopy(world.sd3.components[name])
        torch.manual_seed(len(name))
        targets = ["attn.to_q", "attn2.to_out.0", "add_k_proj"] if name == "transformer" else ["q_proj", "fc1"]
        config = {"r": 2, "lora_alpha": 3, "target_modules": targets, "init_lora_weights": False}
        models[name].add_adapter(LoraConfig(**{**config, **(changes or {})}), "default")
        change(name, models[name])
        state = get_peft_model_state_dict(models[name], adapter_name="default")
        parts[name] = (state, models[name].peft_config["default"])
    return models, parts


def test_what_is_written_is_drawn_by_the_stock_pipeline_as_it_was_adapted(world, tmp_path):
    """All three models, another alpha than the rank, and ranks and alphas of layers of their own."""
    patterns = {
        "rank_pattern": {"attn.to_q": 4, "fc1": 3},
        "alpha_pattern": {"transformer_blocks.1.attn.add_k_proj": 16, "1.self_attn.q_proj": 8},
    }
    models, parts = adapted(world, patterns)
    path = write_diffusers_lora(tmp_path / "a", parts)
    expected = draw_sd3(world.sd3, lambda pipeline: pipeline.register_modules(**models))
    assert difference(expected, world.without) > 1e-1
    assert difference(draw_sd3(world.sd3, stock(path)), expected) == 0.0
    assert difference(draw_sd3(world.sd3, ours(path)), expected) == 0.0
    found = content(path)
    down, _, alpha = found["transformer", "transformer_blocks.1.attn.add_k_proj"]
    assert (len(down), alpha) == (2, 16.0)
    down, _, alpha = found["text_encoder", "encoder.layers.1.self_attn.q_proj"]
    assert (len(down), alpha) == (2, 8.0)
    assert len(found["text_encoder_2", "encoder.layers.0.mlp.fc1"][0]) == 3
    # Everything that is saved is the same in each process, and nothing else lies there.
    assert write_diffusers_lora(tmp_path / "b", parts).read_bytes() == path.read_bytes()
    assert [file.name for file in (tmp_path / "a").iterdir()] == [LORA_WEIGHTS]
    names = list(load_file(path))
    assert names == sorted(names) and names[-1].startswith("transformer.transformer_blocks.1.")


def test_a_file_that_cannot_be_written_whole_leaves_the_former(world, tmp_path, monkeypatch):
    _, parts = adapted(world)
    path = write_diffusers_lora(tmp_path, parts)
    before = path.read_bytes()

    def break_off(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(StableDiffusion3Pipeline, "save_lora_weights", break_off)
    with pytest.raises(OSError, match="no space left"):
        write_diffusers_lora(tmp_path, parts)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [LORA_WEIGHTS]


def test_a_file_without_metadata_takes_the_rank_as_alpha(world, tmp_path):
    """As other trainers write it, with text encoders' names of any version of transformers."""
    own = save_sd3_lora(world.sd3, tmp_path / "own", {model: {"lora_alpha": 2} for model in MODELS})
    expected = draw_sd3(world.sd3, stock(own))
    plain = written(tmp_path / "plain.safetensors")(own)
    assert difference(draw_sd3(world.sd3, stock(plain)), expected) == 0.0
    flat = written(tmp_path / "flat.safetensors", lambda key: key.replace(".text_model.", "."))(own)
    for path in (plain, flat):
        assert_same_content(path, own)
        assert difference(draw_sd3(world.sd3, ours(path)), expected) == 0.0


def test_metadata_that_is_not_whole_is_completed(world, tmp_path):
    lacking = {key: value for key, value in metadata_of(world.lora).items() if not key.endswith(".lora_alpha")}
    path = written(tmp_path / "x.safetensors", metadata=lacking)(world.lora)
    back = save_diffusers_lora(path, tmp_path / "back")
    assert metadata_of(back)["transformer.lora_alpha"] == 2 != metadata_of(world.lora)["transformer.lora_alpha"]
    assert_same_content(back, path)
    assert not read_lora(path).reads_as_meant and read_lora(back).reads_as_meant
    expected = draw_sd3(world.sd3, stock(back))
    assert difference(draw_sd3(world.sd3, ours(path)), expected) == 0.0


def test_diffusers_own_names_are_those_of_the_same_layers(world, tmp_path):
    other = save_sd3_lora(world.sd3, tmp_path, rename=convert_state_dict_to_diffusers)
    assert load_file(other).keys() != load_file(world.lora).keys()
    assert_same_content(other, world.lora)


def test_rslora_divides_by_the_root_of_the_rank(world, tmp_path):
    models, parts = adapted(world, {"use_rslora": True})
    path = write_diffusers_lora(tmp_path, parts)
    expected = draw_sd3(world.sd3, lambda pipeline: pipeline.register_modules(**models))
    assert difference(draw_sd3(world.sd3, ours(path)), expected) == 0.0
    assert {alpha for _, _, alpha in content(path).values()} == {3 * 2**0.5}


def test_a_dora_is_loaded_and_merged_with_its_magnitudes(world, tmp_path):
    def grow(_, model):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "magnitude" in key:
                    parameter *= 1.1

    models, parts = adapted(world, {"use_dora": True}, grow)
    path = write_diffusers_lora(tmp_path, parts)
    assert read_lora(path).is_dora
    expected = draw_sd3(world.sd3, lambda pipeline: pipeline.register_modules(**models))
    assert difference(draw_sd3(world.sd3, ours(path)), expected) == 0.0
    plain = {key: tensor for key, tensor in load_file(path).items() if "magnitude" not in key}
    assert len(plain) < len(load_file(path))
    merged = with_copies(world.sd3)
    merge_loras(merged, [str(path)], [1.0])
    size = expected.abs().max().item()
    assert difference(draw_sd3(merged), expected) / size < FUSED < difference(expected, world.without) / size


# ------------------------------------------------------------------------------------------------------------ merged


def test_merged_loras_draw_as_active_ones(world, tmp_path):
    second = save_sd3_lora(world.sd3, tmp_path, {"transformer": {"lora_alpha": 2}}, models=MODELS[::2])

    def both(pipeline):
        load_lora(pipeline, str(world.lora), "one")
        load_lora(pipeline, str(second), "two")
        pipeline.set_adapters(["one", "two"], SCALES)

    merged = with_copies(world.sd3)
    merge_loras(merged, [str(world.lora), str(second)], SCALES)
    assert not merged.get_list_adapters()
    layers, changed = [read_lora(lora).layers for lora in (world.lora, second)], 0
    for model in MODELS:
        before = dict(world.sd3.components[model].named_parameters())
        for name, weight in merged.components[model].named_parameters():
            expected, layer = before[name].detach().clone(), name.removesuffix(".weight").removeprefix("text_model.")
            for lora, scale in zip(layers, SCALES, strict=True):
                if name.endswith(".weight") and (found := lora.get(model, {}).get(layer)):
                    product = found.up.flatten(1) @ found.down.flatten(1)
                    expected += scale * found.alpha / found.rank * product.reshape(expected.shape)
                    changed += 1
            assert (weight - expected).abs().max() < 1e-6, (model, name)
    assert changed == sum(len(group) for lora in layers for group in lora.values())
    expected = draw_sd3(world.sd3, both)
    size = expected.abs().max().item()
    assert difference(draw_sd3(merged), expected) / size < FUSED < difference(expected, world.without) / size


def test_a_slot_exchanges_loras_and_keeps_the_former(world, tmp_path):
    second = save_sd3_lora(world.sd3, tmp_path, {"transformer": {"lora_alpha": 2}}, models=("transformer",))
    pipeline = with_copies(world.sd3)
    slot = LoraSlot(pipeline)
    slot.use(str(world.lora))
    slot.use(str(second))
    assert pipeline.get_list_adapters() == {"transformer": ["lora_2"]}
    with pytest.raises(ValueError, match=f"this is an SDXL LoRA, and the base model is {SD3}"):
        slot.use(str(world.loras[XL]))
    assert pipeline.get_active_adapters() == ["lora_2"]
    assert difference(draw_sd3(pipeline), draw_sd3(world.sd3, stock(second))) == 0.0
    slot.use("")
    assert difference(draw_sd3(pipeline), world.without) == 0.0


# ------------------------------------------------------------------------------------------- of the other families


def refused(path, pipeline):
    """What is said of a file; the pipeline has nothing of it then."""
    with pytest.raises(ValueError) as raised:
        load_lora(pipeline, str(path), "x")
    said = str(raised.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and len(said) < 400
    assert not pipeline.get_list_adapters()
    return said.removeprefix(f"{path}: ")


# That of Stable Diffusion 3 has no other form.
OTHERS = [(XL, form, SD3) for form in ("", ", kohya")] + [(SD, form, SD3) for form in ("", ", kohya")]
OTHERS += [(SD3, "", SD), (SD3, "", XL)]


@pytest.mark.parametrize(("of", "form", "base"), OTHERS)
def test_a_lora_of_another_family_is_called_by_its_name(world, of, form, base):
    said = f"this is {'an' if of == XL else 'a'} {of} LoRA, and the base model is {base}"
    path, pipeline = world.loras[of + form], world.bases[base]
    assert refused(path, pipeline) == said
    # The same of what the class of the base model makes of the file, as the custom pipelines check it.
    modules = {
        name: dict(model.named_modules())
        for name, model in pipeline.components.items()
        if name in (*MODELS, "unet") and model is not None
    }
    family = read_lora(path).family
    state, alphas = load_file(path), None
    if base != SD3 and not form:
        state, alphas, *_ = type(pipeline).lora_state_dict(path)
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        check_loadable(state, alphas, None, modules, family)


@pytest.mark.parametrize("is_kohya", [False, True])
def test_a_lora_of_a_unet_that_may_be_of_either_family_is_none_here(world, tmp_path, is_kohya):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    name = f"lora_unet_{layer.replace('.', '_')}" if is_kohya else f"unet.{layer}"
    sides = ("lora_down", "lora_up") if is_kohya else ("lora_A", "lora_B")
    state = {f"{name}.{side}.weight": torch.ones(2, 2) for side in sides}
    save_file(state, tmp_path / "x.safetensors")
    said = f"this is a LoRA of a UNet, and the base model is {SD3}"
    assert refused(tmp_path / "x.safetensors", world.sd3) == said
    modules = {name: dict(world.sd3.components[name].named_modules()) for name in MODELS}
    with pytest.raises(ValueError, match=f"^{said}$"):
        check_loadable(state, None, None, modules)


def test_text_encoders_alone_may_be_of_either_family(world, tmp_path):
    """Both of SDXL's are Stable Diffusion 3's, so their layers fit."""
    torch.manual_seed(0)
    state = {
        f"lora_te{number}_text_model_encoder_layers_0_self_attn_v_proj.lora_{side}.weight": torch.randn(shape)
        for number, size in ((1, 16), (2, 12))
        for side, shape in (("down", (2, size)), ("up", (size, 2)))
    }
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    assert read_lora(path).family == XL
    drawn = draw_sd3(world.sd3, ours(path))
    assert difference(drawn, world.without) > 1e-3
    assert difference(draw_sd3(world.sd3, stock(save_diffusers_lora(path, tmp_path / "back"))), drawn) == 0.0


def linear_layers(model):
    """Its layers as a LoRA of rank 1 without weights."""
    return {
        name: LoraLayer(torch.empty(1, module.in_features, device="meta"), torch.empty(0, 1, device="meta"), 1.0)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def test_the_published_widths_and_names_tell_flux_from_stable_diffusion_3():
    with init_empty_weights():
        flux = linear_layers(FluxTransformer2DModel(guidance_embeds=True))
        medium = linear_layers(
            SD3Transformer2DModel(
                num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=8,
                dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
            )
        )  # fmt: skip
        large = linear_layers(
            SD3Transformer2DModel(
                num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=8,
                qk_norm="rms_norm",
            )
        )  # fmt: skip

    def family(layers, pattern):
        found = {name: layer for name, layer in layers.items() if re.search(pattern, name)}
        assert found
        return find_family({"transformer": found})

    for pattern in (r"attn\.to_q$", "^transformer_blocks.*add_k_proj$", "^single", "guidance_embedder", "ff", ""):
        assert family(flux, pattern) == FLUX, pattern
    for layers in (medium, large):
        for name in layers:
            assert find_family({"transformer": {name: layers[name]}}) == SD3, name
    # A model that has its widths and names, and more blocks.
    longer = {name.replace("blocks.18.", "blocks.59."): layer for name, layer in flux.items()}
    assert family(longer, "^transformer_blocks") == SD3


FLUX_LAYERS = {
    "transformer.single_transformer_blocks.0.attn.to_q": 16,
    "transformer.single_transformer_blocks.37.proj_mlp": 16,
    "transformer.transformer_blocks.0.attn.to_k": 3072,
    "transformer.x_embedder": 16,
}


@pytest.mark.parametrize("layer", FLUX_LAYERS)
def test_a_flux_lora_is_called_by_its_name(world, tmp_path, layer):
    width = FLUX_LAYERS[layer]
    state = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    said = "this is a Flux LoRA, and only those of Stable Diffusion 1.x, 2.x, XL or 3 are read"
    for base in world.bases.values():
        assert refused(path, base) == said
    modules = {name: dict(world.sd3.components[name].named_modules()) for name in MODELS}
    with pytest.raises(ValueError, match=f"^this is a Flux LoRA, and the base model is {SD3}$"):
        check_loadable(state, None, None, modules)


def test_another_width_or_number_of_blocks_is_one_line(world, tmp_path):
    wider = make_sd3(world.tokenizer, with_t5=False, num_attention_heads=4, caption_projection_dim=32)
    path = save_sd3_lora(wider, tmp_path / "wide", models=("transformer",))
    assert re.search(r"is for another architecture: transformer\.\S+ has .* features, not ", refused(path, world.sd3))
    deeper = make_sd3(world.tokenizer, with_t5=False, num_layers=3)
    path = save_sd3_lora(deeper, tmp_path / "deep", models=("transformer",))
    assert "there is no layer transformer.transformer_blocks." in refused(path, world.sd3)


# ------------------------------------------------------------------------------------------ names of no reader, damage


def one_layer(name, sides=("lora_A", "lora_B")):
    return {f"{name}.{side}.weight": torch.ones(16, 16) for side in sides}


NAMES = {
    "lora_unet_joint_blocks_0_x_block_attn_qkv": "the original model's names, as sd-scripts writes them",
    "diffusion_model.joint_blocks.0.x_block.attn.qkv": "the original model's names, as sd-scripts writes them",
    "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": "has layers of T5",
    "diffusion_model.transformer_blocks.0.attn.to_q": "is no LoRA weight of Stable Diffusion's",
    "transformer.joint_transformer_blocks.0.attn.to_q": "is no LoRA weight of Stable Diffusion's",
    "transformer_blocks.0.attn.to_q": "is no LoRA weight of Stable Diffusion's",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "is no weight that a LoRA of Stable Diffusion",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_diffusers_passes_over_are_refused(world, tmp_path, name):
    """The stock pipeline says nothing of them, and loads nothing."""
    path, is_kohya = tmp_path / "x.safetensors", name.startswith("lora_")
    state = one_layer(name, ("lora_down", "lora_up") if is_kohya else ("lora_A", "lora_B"))
    save_file(state | {key: v for key, v in load_file(world.lora).items() if not is_kohya}, path)
    for base in world.bases.values():
        assert NAMES[name] in refused(path, base)
    own = copy.deepcopy(world.sd3.transformer)
    modules = {"transformer": dict(own.named_modules())}
    if "joint_blocks" in name or "text_encoder_3" in name:
        with pytest.raises(ValueError, match=NAMES[name]):
            check_loadable(state, None, None, modules)


def spoiled(world, path, value, part="lora_B"):
    tensors = {key: tensor.clone() for key, tensor in load_file(world.lora).items()}
    tensors[f"transformer.transformer_blocks.1.attn.add_v_proj.{part}.weight"].view(-1)[-1] = value
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(metadata_of(world.lora))})


def test_what_is_damaged_is_one_line_with_file_and_layer(world, tmp_path):
    path, layer = tmp_path / "x.safetensors", "transformer.transformer_blocks.1.attn.add_v_proj"
    for value, part, kind in ((float("nan"), "lora_B", "NaN"), (float("-inf"), "lora_A", "infinite")):
        spoiled(world, path, value, part)
        assert refused(path, world.sd3) == f"its weights are not numbers ({kind}) in layer {layer}"
        with pytest.raises(ValueError, match=f"^{path}: its weights are not numbers"):
            merge_loras(world.sd3, [str(path)], [1.0])
    path.write_bytes(world.lora.read_bytes()[:-100])
    assert refused(path, world.sd3).startswith("no safetensors file, and a pickle is not read")
    save_file({k: v for k, v in load_file(world.lora).items() if k != f"{layer}.lora_A.weight"}, path)
    assert refused(path, world.sd3) == f"layer {layer!r} has no lora_down"
    alpha = metadata_of(world.lora) | {"transformer.lora_alpha": float("inf")}
    assert re.match(r"its alpha is not a number \(inf\) in layer", refused(
        written(path, metadata=alpha)(world.lora), world.sd3
    ))  # fmt: skip
    # A transformer's layers are found by the file's tensors.
    fewer = metadata_of(world.lora) | {"text_encoder_2.target_modules": ["q_proj"]}
    assert re.match(r"its metadata names \d+ of its \d+ layers", refused(
        written(path, metadata=fewer)(world.lora), world.sd3
    ))  # fmt: skip


def test_there_is_no_form_of_kohyas(world, tmp_path):
    """ComfyUI knows no metadata of it: what is no rank there is a strength."""
    for number, (changes, end) in enumerate((
        ({"lora_alpha": 2}, ""), ({}, ", at strength 0.5"),
        ({"alpha_pattern": {"to_q": 2}}, ", with alphas that are its ranks"),
    )):  # fmt: skip
        lora = save_sd3_lora(world.sd3, tmp_path / str(number), {"transformer": changes}, models=("transformer",))
        said = f"{lora}: Stable Diffusion 3 has no LoRA in kohya's format: ComfyUI reads diffusers' own file{end}"
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            save_kohya_lora(lora, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
