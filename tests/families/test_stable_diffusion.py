"""Tests of `families/find.py` and `families/stable_diffusion.py`, on the toy base model."""

import json
import shutil

import pytest
import torch
from tiny_unet import inputs, make_unet, predict

from families.find import check_model, find_family
from families.prompt_embeds import PromptEmbeds
from families.stable_diffusion import StableDiffusion
from families.stable_diffusion_xl import StableDiffusionXL
from pipeline_spf_portrait import SPFPortraitPipeline
from programs.loading import InputError
from prompts import make_prompt_pair, tokenize_prompt_pair
from toy_portraits.recipe import BASE_MODEL
from training.prompt_table import make_prompt_table
from training.sharing import pipeline_code


UNET = {"_class_name": "UNet2DConditionModel"}
XL = UNET | {"addition_embed_type": "text_time"}


@pytest.fixture(scope="module")
def pipeline():
    return SPFPortraitPipeline.from_pretrained(BASE_MODEL, safety_checker=None)


def configs_only(folder, **changes):
    """The toy base model without weights, some of its configurations changed: file without .json -> values."""
    model = folder / "model"
    shutil.copytree(BASE_MODEL, model, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, values in changes.items():
        path = model / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return model


# ------------------------------------------------------------------------------------------------------------ finding


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "SPFPortraitPipeline", ["pipeline", "Own"], None])
def test_the_denoiser_says_the_family_and_not_the_pipelines_name(name):
    assert find_family({"_class_name": name}, UNET | {"addition_embed_type": None}) is StableDiffusion
    assert find_family({"_class_name": name}, {}) is StableDiffusion


@pytest.mark.parametrize(
    ("index", "config", "message"),
    [
        ({"_class_name": "KolorsPipeline", "text_encoder": ["kolors", "ChatGLMModel"]}, XL, "Pipeline, with other"),
        ({"text_encoder": [None, None], "text_encoder_2": ["transformers", "CLIPTextModel"]}, XL, "refiner"),
        ({"_class_name": "UnCLIPPipeline"}, UNET | {"addition_embed_type": "image"}, "UNet2DConditionModel of a UnC"),
        ({"_class_name": "FluxPipeline"}, {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel of a F"),
    ],
)
def test_other_families_are_refused(index, config, message):
    with pytest.raises(ValueError, match=message):
        find_family(index, config)


def test_sdxl_is_a_family_whatever_its_pipeline_is_called():
    encoders = {name: ["transformers", "CLIPTextModel"] for name in ("text_encoder", "text_encoder_2")}
    for name in ("StableDiffusionXLPipeline", "SPFPortraitXLPipeline", None):
        assert find_family({"_class_name": name, **encoders}, XL) is StableDiffusionXL


def test_what_is_known_without_weights(tmp_path):
    family, facts = check_model(str(configs_only(tmp_path)))
    assert family is StableDiffusion
    assert facts.denoiser_config["in_channels"] == 4 and facts.denoiser_config["addition_embed_type"] is None
    assert facts.noise.num_train_timesteps == 1000 and facts.text_configs[0].model_type == "clip_text_model"
    config = json.loads((BASE_MODEL / "vae" / "config.json").read_text())
    levels = len(config["block_out_channels"]) + len(facts.denoiser_config["block_out_channels"])
    assert facts.side_multiple == 2 ** (levels - 2)
    (tokenizer,) = facts.tokenizers
    assert tokenizer.model_max_length == facts.text_configs[0].max_position_embeddings


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"unet/config": {"addition_embed_type": "image"}}, {}, ", unet: the UNet2DConditionModel of a Stable"),
        ({"unet/config": {"in_channels": 9}}, {}, ", unet: it takes 9 channels and not 4"),
        ({"vae/config": {"latent_channels": 16}}, {}, ", vae: has 16 latent channels, the denoiser 4"),
        (
            {"scheduler/scheduler_config": {"prediction_type": "sample"}},
            {},
            ": no training for prediction_type 'sam",
        ),
        (
            {"scheduler/scheduler_config": {"_class_name": "FlowMatchEulerDiscreteScheduler"}},
            {},
            ": no training with the noise of a FlowMatchEulerDiscreteScheduler",
        ),
        ({}, {"vae": "none"}, "--pretrained_vae_model_name_or_path none: "),
        ({}, {"tiny_vae": "vae"}, "--tiny_vae_model_name_or_path .*vae: not an AutoencoderTiny but 'AutoencoderKL'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, flags, message):
    model = str(configs_only(tmp_path, **changes))
    flags = {name: f"{model}/{value}" for name, value in flags.items() if value == "vae"} or flags
    with pytest.raises(InputError, match=message):
        check_model(model, **flags)


def test_a_prediction_type_of_the_flag_is_the_one_that_counts(tmp_path):
    model = configs_only(tmp_path, **{"scheduler/scheduler_config": {"prediction_type": "sample"}})
    check_model(str(model), prediction_type="v_prediction")


@pytest.mark.parametrize("part", ["model_index.json", "unet", "vae", "scheduler", "tokenizer", "text_encoder"])
def test_a_part_that_is_missing_is_named(tmp_path, part):
    model = configs_only(tmp_path)
    (shutil.rmtree if (model / part).is_dir() else type(model).unlink)(model / part)
    with pytest.raises(InputError, match=f"^--pretrained_model_name_or_path {model}.*{part}"):
        check_model(str(model))


# ---------------------------------------------------------------------------------------------------- Stable Diffusion


def test_the_names_are_those_of_the_components_and_the_shared_code(pipeline):
    assert StableDiffusion.pipeline_class is type(pipeline)
    for name in (StableDiffusion.denoiser, *StableDiffusion.text_encoders, *StableDiffusion.tokenizers):
        assert getattr(pipeline, name) is not None
    assert pipeline_code(StableDiffusion.hub)["pipeline.py"].name == "pipeline_spf_portrait.py"


def test_prompts_are_encoded_as_the_stock_pipeline_does(pipeline):
    prompts = ["a woman, a hat", ""]
    ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = StableDiffusion.encode(pipeline, ids)
        expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    assert torch.equal(embeds.states, expected) and embeds.pooled is None


def test_tokens_are_located_by_its_one_tokenizer(pipeline):
    pair = make_prompt_pair("a woman, a green hat", "red hair")
    assert StableDiffusion.locate(pair, (pipeline.tokenizer,)) == tokenize_prompt_pair(pair, pipeline.tokenizer)


def test_training_and_pipeline_have_the_same_distances(pipeline):
    pairs = [make_prompt_pair(base, "red hair") for base in ("a woman, a green hat", "a man, a white jacket")]
    tokens = [StableDiffusion.locate(pair, (pipeline.tokenizer,)) for pair in pairs]
    table = make_prompt_table(StableDiffusion, pipeline, pairs, tokens)
    drawn = pipeline(
        [pair.base_prompt for pair in pairs],
        target_prompt="red hair",
        return_sfcm=True,
        num_inference_steps=1,
        output_type="latent",
    )
    assert table.distances.min() > 1e-3 and torch.equal(table.distances, drawn.phrase_distances)


def test_predictions_are_the_unets(unet):
    batch = inputs()
    embeds = PromptEmbeds(batch["encoder_hidden_states"])
    assert torch.equal(StableDiffusion.predict(unet, batch["sample"], batch["timestep"], embeds), predict(unet))


def test_pictures_become_latents_and_pictures_again(pipeline):
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    latents = StableDiffusion.to_latents(pipeline.vae, pixels)
    with torch.no_grad():
        mode = pipeline.vae.encode(pixels).latent_dist.mode()
        decoded = pipeline.vae.decode(mode).sample
    assert latents.dtype == torch.float32 and not latents.requires_grad
    assert torch.equal(latents, mode * pipeline.vae.config.scaling_factor)
    pictures = StableDiffusion.to_pixels(pipeline.vae, latents.requires_grad_())
    torch.testing.assert_close(pictures, decoded, rtol=1e-4, atol=1e-4)
    assert pictures.requires_grad


def test_attention_of_every_layer_that_looks_at_the_prompt_is_captured(unet):
    with StableDiffusion.capture(unet).store() as store, store.record():
        predict(unet)
    assert len(store.pop().queries) == 7


def test_a_lora_lies_on_the_projections_of_attention():
    cross, every = (StableDiffusion.lora_targets(make_unet(), kind) for kind in ("cross", "all"))
    assert len(cross) == 7 * 4 and len(every) == 2 * len(cross) and every[: len(cross)] == cross
    assert {name.split(".attn")[1] for name in every} == {
        f"{number}.{projection}" for number in "12" for projection in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert all(make_unet().get_submodule(name) is not None for name in every[:2])
