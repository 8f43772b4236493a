"""One file as a base model: in every program what its folder is, and what cannot be one is refused in one line."""

import json
import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_loading import evaluate, export, page, refusal, train
from test_original_layout import difference, make_pipeline

import export_spf_portrait_lora
from families.find import check_model, find_base
from families.stable_diffusion import StableDiffusion
from families.stable_diffusion_xl import StableDiffusionXL
from loras import LORA_WEIGHTS
from programs.loading import InputError, load_pipeline
from programs.original_layout import SD1, SD2, XL, one_file
from programs.single_file import find_single_file
from toy_portraits.recipe import BASE_MODEL, LORA
from training.caches import module_fingerprint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy base model with its LoRA fused in, exported as a folder and as one file; configurations alone."""
    folder = tmp_path_factory.mktemp("files")
    found = SimpleNamespace(folder=folder / "merged", file=folder / "merged.safetensors", config=folder / "config")
    flags = ["--base_model", str(BASE_MODEL), "--lora", str(LORA), "--scale", "0.7", "--output_merged"]
    for place in (found.folder, found.file):
        export_spf_portrait_lora.main([*flags, str(place)])
    shutil.copytree(BASE_MODEL, found.config, ignore=shutil.ignore_patterns("*.safetensors", "clip"))
    return found


def load(name, config=None, *, cache_dir=None, prediction_type=None, **parts):
    base = find_base(
        str(name), "base_model", base_config=None if config is None else str(config), without=parts,
        cache_dir=cache_dir, prediction_type=prediction_type,
    )  # fmt: skip
    return load_pipeline(base.family.pipeline_class, str(name), torch.float32, file=base.file, **parts)


def changed(world, path, remove=(), metadata=None, **tensors):
    """A copy of the file without tensors whose names begin with `remove`, and with others."""
    kept = {name: tensor for name, tensor in load_file(world.file).items() if not name.startswith(tuple(remove))}
    save_file(kept | tensors, path, metadata)
    return path


# ---------------------------------------------------------------------------------------------------------- equality


def test_the_file_is_its_folder(world):
    with safe_open(world.file, "pt") as file:
        names = set(file.keys())
    assert "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight" in names
    folder, file = load(world.folder), load(world.file, world.config)
    assert difference(folder, file) == 0.0
    assert difference(load(BASE_MODEL), file) > 0
    assert dict(folder.scheduler.config) == dict(file.scheduler.config)
    # So they share what a cache keeps of them.
    for name in ("unet", "vae", "text_encoder"):
        assert module_fingerprint(getattr(folder, name)) == module_fingerprint(getattr(file, name))
    images = []
    for pipeline in (folder, file):
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "output_type": "np", "compare": True}
        output = pipeline(
            "a woman, a green jacket", target_prompt="a red hat", generator=torch.Generator().manual_seed(0), **options
        )
        images.append(np.concatenate([output.images, output.reference_images]))
    assert np.abs(images[0] - images[1]).max() == 0.0


def test_half_precision_and_parts(world):
    file, parts = find_single_file(str(world.file), str(world.config)), {"unet": None, "vae": None}
    half = load_pipeline(StableDiffusionPipeline, str(world.file), torch.float16, file=file, **parts)
    assert half.unet is None and half.vae is None and half.text_encoder.dtype == torch.float16


def test_what_is_known_without_weights_is_that_of_the_folder(world):
    folder, file = check_model(str(world.folder)), check_model(str(world.file), base_config=str(world.config))
    assert folder[0] is file[0]
    for name in ("denoiser_config", "side_multiple", "side"):
        before, after = getattr(folder[1], name), getattr(file[1], name)
        if isinstance(before, dict):
            before, after = ({k: v for k, v in one.items() if not k.startswith("_")} for one in (before, after))
        assert before == after


# ---------------------------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize("program", [page, evaluate, export, train])
def test_every_program_says_what_is_wrong_in_one_line(program, world, tmp_path):
    shutil.copy(world.file, tmp_path / "model.ckpt")
    torn, lora = tmp_path / "torn.safetensors", tmp_path / "lora.safetensors"
    torn.write_bytes(world.file.read_bytes()[:5000])
    shutil.copy(LORA / LORA_WEIGHTS, lora)
    for file, message in (
        (tmp_path / "model.ckpt", "a pickle, such as .ckpt, is not read"),
        (torn, ""),
        (lora, "no base model in one file"),
        (world.file, "is Stable Diffusion 1.x, and its configuration is that of stable-diffusion-v1-5/"),
    ):
        said = refusal(program, file, tmp_path / "out")
        assert message in said, said
    assert "--base_config may name another" in said  # there is no network here
    assert not (tmp_path / "out").exists() or program is evaluate


@pytest.mark.parametrize("program", [page, evaluate, export, train])
def test_the_flag_is_for_one_file_and_names_a_configuration(program, world, tmp_path):
    def with_config(config):
        def named(model, out):
            module, flags = program(model, out)
            return module, [*flags, "--base_config", str(config)]

        return named

    said = refusal(with_config(world.config), world.folder, tmp_path / "out")
    assert said.endswith(f"--base_config {world.config} is for a base model in one file")
    said = refusal(with_config(tmp_path / "none"), world.file, tmp_path / "out")
    assert f"--base_config {tmp_path}/none: no such folder" in said
    for name in (tmp_path / "mistyped.safetensors", "mistyped.ckpt", "./mistyped"):
        said = refusal(with_config(world.config), name, tmp_path / "out")
        assert said.endswith(f"{name}: no such file") and "--base_config" not in said
    said = refusal(with_config(world.config), "user/name", tmp_path / "out")
    assert said.endswith(f"--base_config {world.config} is for a base model in one file")
    (tmp_path / "empty").mkdir()
    said = refusal(with_config(tmp_path / "empty"), world.file, tmp_path / "out")
    assert said.endswith(f"--base_config {tmp_path}/empty: there is no model_index.json in it")


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remove": ["model.diffusion_model."]}, "no base model in one file"),
        ({"remove": ["cond_stage_model."]}, "no text encoder of a family that is known: Stable Diffusion 1.x, "),
        ({"remove": ["first_stage_model.decoder.conv_in"]}, "decoder.conv_in.weight is missing in it"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(48, 9, 3, 3)},
            "its UNet takes 9 channels and not 4",
        ),
        (
            {"model.diffusion_model.time_embed.2.bias": torch.zeros(7)},
            r"model.diffusion_model.time_embed.2.bias is \(7,\) in it, and \(192,\) as",
        ),
        (
            {"remove": ["cond_stage_model."], "conditioner.embedders.0.model.ln_final.bias": torch.zeros(7)},
            "the refiner of Stable Diffusion XL is no base model",
        ),
        ({"edm_mean": torch.zeros(1, 4, 1, 1)}, "edm_mean in it says that it was trained on another noise"),
        ({"edm_std": torch.zeros(1, 4, 1, 1)}, "edm_std in it says that it was trained on another noise"),
    ],
)
def test_what_does_not_fit_is_named_before_weights_are_read(world, tmp_path, change, message):
    file = changed(world, tmp_path / "x.safetensors", **change)
    for attempt in (load, lambda name, config: check_model(str(name), base_config=str(config))):
        with pytest.raises(InputError, match=message) as error:
            attempt(file, world.config)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("layout", [SD2, XL], ids=lambda layout: layout.name)
def test_another_family_than_the_configurations(layout, world, tmp_path):
    file = tmp_path / "x.safetensors"
    pipeline = make_pipeline(layout)
    save_file(one_file(pipeline), file)
    message = "x.safetensors: is Stable Diffusion XL, and .* is the configuration of a StableDiffusionPipeline"
    with pytest.raises(InputError, match=message if layout is XL else "has|is missing in it|in it, and"):
        load(file, world.config)
    pipeline.save_pretrained(tmp_path / "model")
    assert difference(pipeline, load(file, tmp_path / "model")) == 0.0
    family, _ = check_model(str(file), base_config=str(tmp_path / "model"))
    assert family is (StableDiffusionXL if layout is XL else StableDiffusion)


def test_another_vae_may_take_the_place_of_none(world, tmp_path):
    file = changed(world, tmp_path / "x.safetensors", remove=["first_stage_model."])
    family, _ = check_model(str(file), base_config=str(world.config), vae=str(BASE_MODEL / "vae"))
    assert family.denoiser == "unet"
    vae = load(BASE_MODEL).vae
    assert load(file, world.config, vae=vae).vae is vae
    with pytest.raises(InputError, match="first_stage_model.* is missing in it"):
        load(file, world.config)


def test_a_variant_means_nothing(world):
    with pytest.raises(InputError, match="--variant fp16"):
        check_model(str(world.file), base_config=str(world.config), variant="fp16")


# -------------------------------------------------------------------------------------- configuration and prediction


def test_the_configuration_comes_from_the_hubs_cache(world, tmp_path):
    """Written as a download leaves it; the network is off."""
    repository = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(world.config, repository / "snapshots" / ("0" * 40))
    file = find_single_file(str(world.file), None, cache_dir=str(tmp_path))
    assert file.folder == snapshot_download(SD1.repository, cache_dir=tmp_path)
    assert difference(load(world.folder), load(world.file, cache_dir=str(tmp_path))) == 0.0


def test_what_the_file_says_of_the_prediction_is_heeded(world, tmp_path, caplog):
    plain = load(world.file, world.config).scheduler
    assert (plain.config.prediction_type, plain.config.rescale_betas_zero_snr) == ("epsilon", False)
    by_key = changed(world, tmp_path / "key.safetensors", v_pred=torch.empty(0), ztsnr=torch.empty(0))
    by_metadata = changed(world, tmp_path / "meta.safetensors", metadata={"modelspec.prediction_type": "v"})
    for file, zero_snr in ((by_key, True), (by_metadata, False)):
        scheduler = load(file, world.config).scheduler
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.rescale_betas_zero_snr is zero_snr
        assert scheduler.config.timestep_spacing == ("trailing" if zero_snr else "leading")
        check_model(str(file), base_config=str(world.config))
        assert file.name not in caplog.text
        check_model(str(file), base_config=str(world.config), prediction_type="epsilon")
        said = f"{file} says that its UNet predicts v_prediction, and --prediction_type epsilon is taken"
        assert said in caplog.text
        caplog.clear()


def test_a_scheduler_without_zero_snr_gives_way(world, tmp_path):
    config = shutil.copytree(world.config, tmp_path / "config")
    path = config / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "PNDMScheduler"}))
    assert type(load(world.file, config).scheduler).__name__ == "DDIMScheduler"  # as model_index.json says
    index = config / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    assert type(load(world.file, config).scheduler).__name__ == "PNDMScheduler"
    file = changed(world, tmp_path / "x.safetensors", v_pred=torch.empty(0), ztsnr=torch.empty(0))
    scheduler = load(file, config).scheduler
    assert isinstance(scheduler, DDIMScheduler) and scheduler.alphas_cumprod[-1] == 0


def test_stable_diffusion_2_that_does_not_say_is_warned_of(tmp_path, caplog):
    pipeline, file = make_pipeline(SD2), tmp_path / "x.safetensors"
    pipeline.save_pretrained(tmp_path / "model")
    save_file(one_file(pipeline), file)
    with caplog.at_level(logging.WARNING):
        load(file, tmp_path / "model")
        check_model(str(file), base_config=str(tmp_path / "model"))
    assert caplog.text.count("does not say what its UNet predicts") == 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_exported_stable_diffusion_2_says_what_it_predicts(prediction, tmp_path, caplog):
    folder, file, lora = map(tmp_path.joinpath, ("model", "x.safetensors", LORA_WEIGHTS))
    pipeline = make_pipeline(SD2)
    pipeline.scheduler = DDIMScheduler(prediction_type=prediction)
    pipeline.save_pretrained(folder)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}, lora)
    flags = ["--base_model", folder, "--lora", lora, "--output_merged", file]
    export_spf_portrait_lora.main([str(flag) for flag in flags])
    said = {"format": "pt", "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon"}
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == said
    # The order is not one of chance.
    assert json.dumps(said, separators=(",", ":")).encode() in file.read_bytes()
    path = folder / "scheduler" / "scheduler_config.json"
    other = "epsilon" if prediction == "v_prediction" else "v_prediction"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": other}))
    with caplog.at_level(logging.WARNING):
        assert load(file, folder).scheduler.config.prediction_type == prediction
    assert "does not say" not in caplog.text


def test_stable_diffusion_2_of_which_a_flag_says_it_is_not_warned_of(tmp_path, caplog):
    pipeline, file = make_pipeline(SD2), tmp_path / "x.safetensors"
    pipeline.save_pretrained(tmp_path / "model")
    save_file(one_file(pipeline), file)
    with caplog.at_level(logging.WARNING):
        load(file, tmp_path / "model", prediction_type="v_prediction")
        check_model(str(file), base_config=str(tmp_path / "model"), prediction_type="v_prediction")
    assert "does not say" not in caplog.text


def test_a_kept_prediction_comes_back(tmp_path):
    pipeline, file = make_pipeline(SD1), tmp_path / "x.safetensors"
    pipeline.scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    pipeline.save_pretrained(tmp_path / "model")
    save_file(one_file(pipeline), file)
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    assert load(file, tmp_path / "model").scheduler.config.prediction_type == "v_prediction"
    assert isinstance(load(file, tmp_path / "model").unet, UNet2DConditionModel)
