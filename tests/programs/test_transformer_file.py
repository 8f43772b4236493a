"""A Stable Diffusion 3 whose transformer is one file: in every program what its folder is, or refused in one line."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3ControlNetModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type
from safetensors.torch import load_file, save_file
from sd3_world import make_transformer, write_sd3, write_sd3_lora
from test_hub import FULL, code_blocks, make_facts
from test_loading import evaluate, export, page, refusal, train
from test_original_layout import difference

import app
import draw_spf_portrait
import evaluate_spf_portrait
import export_spf_portrait_lora
from draw_spf_portrait import parse_args
from families.find import check_model, find_base
from families.hub_names import STABLE_DIFFUSION_3
from families.pipelines import load_drawing_pipeline
from families.stable_diffusion_3 import StableDiffusion3
from loras.card import write_model_card
from programs.loading import InputError, load_pipeline
from programs.original_layout import UNET, transformer_weights
from programs.single_file import find_single_file
from toy_portraits.recipe import BASE_MODEL
from training.caches import module_fingerprint


ROOT = Path(__file__).resolve().parents[2]
NAME = "sd3.safetensors"
KINDS = {"3.5 medium": {}, "3.5 large": {"dual_attention_layers": ()}}
FLUX = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
KINDS["3"] = {"dual_attention_layers": (), "qk_norm": None}


def write_file(path, folder, prefix="", change=lambda tensors: tensors):
    """The transformer of a folder as one file in the original layout."""
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors = {prefix + name: tensor.contiguous() for name, tensor in transformer_weights(state).items()}
    save_file(change(tensors), path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder, and its transformer as a file beside another one, whose own transformer has other weights."""
    folder = tmp_path_factory.mktemp("transformers")
    model, other = write_sd3(folder / "model"), write_sd3(folder / "other")
    path = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    file, lora = write_file(folder / NAME, model), write_sd3_lora(folder / "lora")
    return SimpleNamespace(folder=model, file=file, config=other, lora=lora)


def load(name, config=None, dtype=torch.float32, kind=None, **parts):
    base = find_base(str(name), "base_model", base_config=None if config is None else str(config), without=parts)
    return load_pipeline(kind or base.family.pipeline_class, str(name), dtype, file=base.file, **parts)


# ---------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("prefix", ["", UNET], ids=["alone", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_back_what_was_written(tmp_path, kind, prefix):
    folder = write_sd3(tmp_path / "model", with_t5=False, **KINDS[kind])
    file = write_file(tmp_path / NAME, folder, prefix)
    before, after = load(folder).transformer, load(file, folder).transformer
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight), name
    assert module_fingerprint(before) == module_fingerprint(after)  # so they share what a cache keeps of them
    names = load_file(file).keys()
    assert (f"{prefix}joint_blocks.1.x_block.attn2.qkv.weight" in names) == (kind == "3.5 medium")
    assert (f"{prefix}joint_blocks.3.context_block.attn.ln_k.weight" in names) == (kind != "3")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("sd3", {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}),
        (
            "sd35_medium",
            {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
             "dual_attention_layers": tuple(range(13))},
        ),
        (
            "sd35_large",
            {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_published_ones_are_told_by_their_blocks(tmp_path, kind, config):
    """In their own sizes they are to diffusers what they are to us."""
    with torch.device("meta"):
        state = SD3Transformer2DModel(**config, caption_projection_dim=64 * config["num_attention_heads"]).state_dict()
    tensors = transformer_weights(state)
    assert infer_diffusers_model_type(tensors) == kind
    save_file({name: torch.zeros(1) for name in tensors}, tmp_path / NAME)
    repository = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    message = f"is Stable Diffusion 3, and its configuration is that of {repository}, where --base_config may name"
    with pytest.raises(InputError, match=message):  # there is no network here
        load(tmp_path / NAME)


def test_the_file_is_its_folder(world):
    folder, file = load(world.folder), load(world.file, world.config)
    assert difference(folder, file) == 0.0
    assert difference(folder, load(world.config)) == 1.0
    assert dict(folder.scheduler.config) == dict(file.scheduler.config)
    pictures = []
    for pipeline in (folder, file):
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "output_type": "np", "compare": True}
        output = pipeline(
            "a woman, a green jacket", target_prompt="a red hat", generator=torch.Generator().manual_seed(0), **options
        )
        pictures.append(np.concatenate([output.images, output.reference_images]))
    assert np.abs(pictures[0] - pictures[1]).max() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, {"default": torch.bfloat16, "text_encoder_3": torch.float32}])
def test_half_precision(world, dtype):
    folder, file = load(world.folder, dtype=dtype), load(world.file, world.config, dtype)
    assert difference(folder, file) == 0.0
    for name, model in folder.components.items():
        if isinstance(model, torch.nn.Module):
            assert file.components[name].dtype == model.dtype


def test_its_text_part_needs_no_weight_of_the_file(world, monkeypatch):
    monkeypatch.setattr(SD3Transformer2DModel, "from_single_file", lambda *given, **options: pytest.fail("was read"))
    pipeline = load(world.file, world.config, transformer=None, vae=None)
    assert pipeline.transformer is None and pipeline.vae is None and pipeline.text_encoder_3 is not None


def test_a_configuration_without_t5(world, tmp_path):
    config = write_sd3(tmp_path / "model", with_t5=False)
    pipeline = load(world.file, config)
    assert pipeline.text_encoder_3 is None and difference_of_transformers(pipeline, load(world.folder)) == 0.0


def difference_of_transformers(*pipelines):
    before, after = (pipeline.transformer.state_dict() for pipeline in pipelines)
    assert before.keys() == after.keys()
    return max((before[name] - after[name]).abs().max().item() for name in before)


def test_what_is_known_without_weights_is_that_of_the_folder(world):
    folder, file = check_model(str(world.folder)), check_model(str(world.file), base_config=str(world.config))
    assert folder[0] is file[0] is StableDiffusion3
    for name in ("side", "side_multiple"):
        assert getattr(folder[1], name) == getattr(file[1], name)
    configs = (own[1].denoiser_config for own in (folder, file))
    configs = [{name: value for name, value in config.items() if not name.startswith("_")} for config in configs]
    assert configs[0] == configs[1]
    # What an SD model's file would say of its prediction is nothing here.
    assert file[1].file.scheduler == {}


def test_other_models_in_the_file_are_not_read(world, tmp_path):
    others = {"first_stage_model.decoder.conv_in.weight": torch.zeros(3), "text_encoders.clip_l.x": torch.zeros(3)}
    others["text_encoders.t5xxl.y"] = torch.zeros(3, dtype=torch.float8_e4m3fn)
    for prefix in ("", UNET):
        file = write_file(tmp_path / NAME, world.folder, prefix, lambda tensors: tensors | others)
        assert difference(load(world.folder), load(file, world.config)) == 0.0


def test_the_configuration_comes_from_the_hubs_cache(world, tmp_path):
    """Written as a download leaves it; the network is off."""
    repository = tmp_path / "models--user--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(world.config, repository / "snapshots" / ("0" * 40))
    file = find_single_file(str(world.file), "user/name", cache_dir=str(tmp_path), revision="main")
    assert file.config == "user/name" and Path(file.folder).parts[-2] == "snapshots"
    loaded = load_pipeline(StableDiffusion3Pipeline, str(world.file), torch.float32, file=file)
    assert difference(load(world.folder), loaded) == 0.0


# ---------------------------------------------------------------------------------------------------------- programs


def test_loras_are_merged_into_it_as_into_the_folder(world, tmp_path):
    flags = ["--lora", str(world.lora), "--scale", "0.5", "--dtype", "bfloat16", "--output_merged"]
    one = ["--base_model", str(world.file), "--base_config", str(world.config)]
    merged = []
    for name, own in (("folder", ["--base_model", str(world.folder)]), ("file", one)):
        export_spf_portrait_lora.main([*own, *flags, str(tmp_path / name)])
        merged.append(StableDiffusion3Pipeline.from_pretrained(tmp_path / name, dtype=torch.bfloat16))
    assert difference(*merged) == 0.0
    assert difference_of_transformers(load(world.file, world.config, torch.bfloat16), merged[1]) > 0
    with pytest.raises(SystemExit, match="a model with a transformer is written into a folder"):
        export_spf_portrait_lora.main([*one, *flags, str(tmp_path / "x.safetensors")])


def test_it_is_drawn_with(world, tmp_path):
    flags = ["--lora", str(world.lora), "--prompt", "a woman, a hat", "--target", "red hair", "--device", "cpu"]
    flags += ["--num_inference_steps", "1", "--dtype", "float32"]
    pictures = []
    for name, own in (("folder", [world.folder]), ("file", [world.file, "--base_config", world.config])):
        place = tmp_path / name
        draw_spf_portrait.main(parse_args([*flags, "--base", *map(str, own), "--output_dir", str(place)]))
        pictures.append([np.asarray(draw_spf_portrait.Image.open(path)) for path in sorted(place.iterdir())])
    assert len(pictures[0]) == 4
    for before, after in zip(*pictures, strict=True):
        assert np.array_equal(before, after)


def test_an_evaluation_measures_the_same(tmp_path):
    sizes = {"sample_size": 32, "pos_embed_max_size": 32}  # for pictures as large as the judge's
    folder, lora = write_sd3(tmp_path / "model", **sizes), write_sd3_lora(tmp_path / "lora", **sizes)
    file, pictures = write_file(tmp_path / NAME, folder), []
    flags = ["--toy", "blonde_hair", "--lora", str(lora), "--max_prompts", "1", "--num_seeds", "1", "--device", "cpu"]
    flags += ["--num_inference_steps", "1", "--num_resamples", "1", "--pretrained_model_name_or_path"]
    for name, own in (("folder", [folder]), ("file", [file, "--base_config", folder])):
        evaluate_spf_portrait.main([*flags, *map(str, own), "--output_dir", str(tmp_path / name)])
        found = sorted((tmp_path / name / "pictures").rglob("*.png"))
        pictures.append([(path.name, path.read_bytes()) for path in found])
    assert pictures[0] == pictures[1] and len(pictures[0]) == 4


def test_a_page_is_built_on_it(world, monkeypatch):
    built = []
    launched = SimpleNamespace(launch=lambda **options: None)
    monkeypatch.setattr(app, "build_demo", lambda slot, *others: (built.append(slot.pipeline), launched)[1])
    flags = ["--base_model", world.file, "--base_config", world.config, "--lora", world.lora, "--device", "cpu"]
    app.main([str(flag) for flag in flags])
    assert type(built[0]).__name__ == "SPFPortrait3Pipeline"
    assert load_drawing_pipeline(str(world.file), torch.float32, base_config=str(world.config)).vae.use_slicing


def test_the_code_of_its_card_runs(world, tmp_path):
    output = shutil.copytree(world.lora, tmp_path / "output")
    file = find_single_file(str(world.file), str(world.config))
    facts = make_facts(base_model=f"path/to/{NAME}", pictures=(), repo_id=None, has_kohya=False)
    text = write_model_card(output, facts, STABLE_DIFFUSION_3, file).read_text(encoding="utf-8")
    blocks = code_blocks(SimpleNamespace(text=text))
    load_it = (
        f"StableDiffusion3Pipeline.from_pretrained('path/to/other', transformer="
        f"SD3Transformer2DModel.from_single_file('path/to/{NAME}', config='path/to/other', subfolder='transformer', "
        f"dtype=torch.bfloat16), dtype=torch.bfloat16)"
    )
    for block in blocks:
        ast.parse(block)
        assert load_it in block and str(tmp_path) not in block
    assert "from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline\n" in blocks[0]
    code = "\n".join(blocks).replace('.to("cuda")', "").replace("torch.bfloat16", "torch.float32")
    code = code.replace("images[0]\n", "images[0]\nstock = pipe\n", 1)
    code = code.replace(").images[0]", ", num_inference_steps=1).images[0]")
    code = code.replace("compare=True)", "compare=True, num_inference_steps=1)")
    for name, place in (("other", world.config), (NAME, world.file), ("pipeline_spf_portrait_3.py", ROOT)):
        code = code.replace(f"path/to/{name}", str(place / name if place == ROOT else place))
    code += (
        f"\nimport numpy\nfor i, own in enumerate((stock, pipe)):\n"
        f"    own.set_progress_bar_config(disable=True)\n"
        f"    images = own({FULL!r}, num_inference_steps=2, output_type='np', "
        f"generator=torch.Generator().manual_seed(0)).images\n    numpy.save(f'{{i}}.npy', images)\n"
        f"print(type(pipe).__name__)\n"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=os.environ | {"HF_HOME": str(tmp_path / "hub")},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().splitlines()[-1] == "SPFPortrait3Pipeline"
    expected = load(world.folder, kind=StableDiffusion3Pipeline)
    expected.load_lora_weights(output)
    expected.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = expected(FULL, num_inference_steps=2, output_type="np", generator=generator).images
    for i in range(2):
        assert np.abs(np.load(tmp_path / f"{i}.npy") - images).max() == 0.0


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("program", [page, evaluate, export, train])
def test_every_program_says_what_is_wrong_in_one_line(program, world, tmp_path):
    def with_config(model, out):
        module, flags = program(model, out)
        return module, [*flags, "--base_config", str(config)]

    config = shutil.copytree(world.config, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    said = refusal(with_config, world.file, tmp_path / "out")
    assert f"is the transformer alone, and --base_config {config} has no weights of its text_encoder in saf" in said
    config = BASE_MODEL
    said = refusal(with_config, world.file, tmp_path / "out")
    assert f"is Stable Diffusion 3, and {config} is the configuration of a StableDiffusionPipeline" in said
    said = refusal(program, world.file, tmp_path / "out")
    assert "is Stable Diffusion 3 with other blocks than the published ones have: --base_config is needed" in said
    gguf = tmp_path / "sd3.gguf"
    gguf.write_bytes(b"GGUF")
    assert "GGUF, whose weights are quantised, is not read" in refusal(program, gguf, tmp_path / "out")


@pytest.mark.parametrize("prefix", ["", UNET], ids=["alone", "prefix"])
@pytest.mark.parametrize(
    ("remove", "change", "message"),
    [
        ("pos_embed", {}, "{}pos_embed is missing in it, which {} configures"),
        ("x_embedder", {}, "{}x_embedder.proj.weight is missing in it, which {} configures"),
        ("joint_blocks.3", {}, "{}joint_blocks.3.x_block.adaLN_modulation.1.weight is missing in it"),
        ("", {"y_embedder.mlp.0.bias": torch.zeros(7)}, r"{}y_embedder.mlp.0.bias is \(7,\) in it, and \(16,\) as {}"),
        ("", {"joint_blocks.4.x_block.attn.qkv.bias": torch.zeros(48)}, "{}joint_blocks.4.x.* in no transformer as"),
        ("", {"joint_blocks.3.x_block.attn2.qkv.bias": torch.zeros(48)}, "{}joint_blocks.3.*attn2.* is in it, and in"),
        (
            "",
            {"joint_blocks.0.x_block.mlp.fc1.bias": torch.zeros(64, dtype=torch.float8_e4m3fn)},
            "{}joint_blocks.0.x_block.mlp.fc1.bias is F8_E4M3 in it, and weights are read in float32, float16 or",
        ),
        ("", {"context_embedder.weight": torch.zeros(4, 4, dtype=torch.uint8)}, "{}context_embedder.weight is U8 in"),
        ("", {"joint_blocks.0.x_block.attn.qkv.lora_A.weight": torch.zeros(2, 2)}, "in one file but a LoRA"),
    ],
)
def test_what_does_not_fit_is_named_before_weights_are_read(
    world, tmp_path, monkeypatch, prefix, remove, change, message
):
    monkeypatch.setattr(SD3Transformer2DModel, "from_single_file", lambda *given, **options: pytest.fail("was read"))
    start = prefix + remove if remove else "nothing"
    others = {prefix + name: tensor for name, tensor in change.items()}

    def changed(tensors):
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(start)} | others

    file = write_file(tmp_path / NAME, world.folder, prefix, changed)
    for attempt in (load, lambda name, config: check_model(str(name), base_config=str(config))):
        with pytest.raises(InputError, match=message.format(prefix, world.config)) as error:
            attempt(file, world.config)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_another_transformer_than_the_configured_one(world, tmp_path):
    """Both ways: what the file has too much would be left out without a word that stops."""
    plain = write_sd3(tmp_path / "plain", with_t5=False, qk_norm=None)
    with pytest.raises(InputError, match="attn.ln_k.weight is in it, and in no transformer as .*plain configures it"):
        load(world.file, plain)
    with pytest.raises(InputError, match="attn.ln_q.weight is missing in it, which"):
        load(write_file(tmp_path / NAME, plain), world.config)
    large = write_sd3(tmp_path / "large", with_t5=False, dual_attention_layers=())
    with pytest.raises(InputError, match=r"adaLN_modulation.1.weight is \(144, 16\) in it, and \(96, 16\) as .*large"):
        load(world.file, large)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "but a transformer of Flux"),
        (lambda: {f"{UNET}double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "but a transformer of Flux"),
        (
            lambda: FluxTransformer2DModel(
                num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=8,
                pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
            ).state_dict(),
            "but a transformer of Flux",
        ),
        (
            lambda: SD3ControlNetModel(
                num_layers=1, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=8,
                caption_projection_dim=8, pooled_projection_dim=8,
            ).state_dict(),
            "but a ControlNet",
        ),
        (lambda: make_transformer().state_dict(), "but a transformer under diffusers' own names: give the folder of"),
        (lambda: {"transformer.x.lora_A.weight": torch.zeros(1)}, "but a LoRA"),
        (lambda: {"lora_unet_joint_blocks_0_x.lora_up.weight": torch.zeros(1)}, "but a LoRA"),
    ],
    ids=["flux", "flux with a prefix", "flux of diffusers", "controlnet", "sd3 of diffusers", "lora", "kohya"],
)  # fmt: skip
def test_what_is_taken_for_a_base_model_is_called_by_its_name(world, tmp_path, tensors, message):
    save_file({name: tensor.contiguous() for name, tensor in tensors().items()}, tmp_path / NAME)
    with pytest.raises(InputError, match=f"--base_model .*: no base model in one file {message}"):
        load(tmp_path / NAME, world.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_index.json": {"text_encoder": [None, None]}}, "a Stable Diffusion 3 without its text_encoder, by"),
        ({"model_index.json": {"tokenizer_2": [None, None]}}, "a Stable Diffusion 3 without its tokenizer_2, by"),
        (
            {"model_index.json": FLUX},
            "is Stable Diffusion 3, and .* is the configuration of a FluxPipeline",
        ),
    ],
)
def test_what_cannot_be_its_configuration(world, tmp_path, changes, message):
    config = shutil.copytree(world.config, tmp_path / "config")
    for name, values in changes.items():
        (config / name).write_text(json.dumps(json.loads((config / name).read_text()) | values))
    with pytest.raises(InputError, match=message) as error:
        load(world.file, config)
    assert str(config) in str(error.value) and "\n" not in str(error.value)


def test_a_part_that_comes_from_elsewhere_needs_no_weights_there(world, tmp_path):
    config = shutil.copytree(world.config, tmp_path / "config")
    next((config / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="has no weights of its vae in safetensors"):
        load(world.file, config)
    vae = load(world.folder).vae
    assert load(world.file, config, vae=vae).vae is vae
    with pytest.raises(InputError, match="--variant fp16"):
        check_model(str(world.file), base_config=str(world.config), variant="fp16")
