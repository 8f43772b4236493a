"""The nodes in a real ComfyUI, where there is one, with models of random weights in Stable Diffusion 1.5's layout.

`COMFYUI_PATH=~/ComfyUI COMFYUI_PYTHON=~/ComfyUI/.venv/bin/python pytest -s -m slow tests/comfyui`
"""

import json
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_server import COMFYUI, PYTHON, ROOT, comfyui, graph_of, needs_comfyui
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from loras.writing import save_kohya_lora, write_diffusers_lora
from pipeline_spf_portrait import SPFPortraitPipeline
from programs.original_layout import file_metadata, one_file


pytestmark = [pytest.mark.slow, needs_comfyui]
WORKFLOW = ROOT / "comfyui" / "example_workflows" / "lora-kept-to-its-region-sd15.json"
CHECKPOINT, LORA = "v1-5-pruned-emaonly.safetensors", "blonde_hair.safetensors"
BASE, TARGET, NEGATIVE = "a photo of a man, a grey suit", "blonde hair", "blurry"
STEPS, SEED, CFG, SIZE = 8, 7, 5.0, 128


def own_pipeline() -> SPFPortraitPipeline:
    """Random weights, in the published model's widths where ComfyUI tells models apart by them, small elsewhere."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8, block_out_channels=(320, 640), layers_per_block=1, attention_head_dim=8,
        cross_attention_dim=768, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, projection_dim=768,
        eos_token_id=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
        steps_offset=1,
    )
    pipeline = SPFPortraitPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), unet=unet, scheduler=scheduler,
        tokenizer=CLIPTokenizer.from_pretrained(Path(COMFYUI) / "comfy" / "sd1_tokenizer", model_max_length=77),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """ComfyUI with a checkpoint and a LoRA as users have them, and our pipeline with the same weights."""
    folder = tmp_path_factory.mktemp("comfyui") / "base"
    pipeline = own_pipeline()
    (folder / "models" / "checkpoints").mkdir(parents=True)
    (folder / "models" / "loras").mkdir()
    tensors = {name: tensor.contiguous().clone() for name, tensor in one_file(pipeline).items()}
    save_file(tensors, folder / "models" / "checkpoints" / CHECKPOINT, file_metadata(pipeline))
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    own = folder.parent / "lora"
    save_kohya_lora(
        write_diffusers_lora(own, {"unet": (get_peft_model_state_dict(pipeline.unet), config)}),
        folder / "models" / "loras" / LORA,
    )
    with comfyui(folder) as server:
        yield server, pipeline


def sampled(**nodes) -> dict[str, dict]:
    """A graph that samples with its node "guider" and writes the latents at node "save"."""
    prompts = {"full": f"{BASE}, {TARGET}", "base": BASE, "negative": NEGATIVE}
    encoded = {
        name: {"class_type": "CLIPTextEncode", "inputs": {"clip": ["checkpoint", 1], "text": text}}
        for name, text in prompts.items()
    }
    return encoded | nodes | {
        "checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": SEED}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "sigmas": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["checkpoint", 0], "scheduler": "simple", "steps": STEPS, "denoise": 1.0},
        },
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": SIZE, "height": SIZE, "batch_size": 1}},
        "sample": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0],
                "latent_image": ["empty", 0],
            },
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "latents/test"}},
    }  # fmt: skip


def kept(guidance: float, **changes) -> dict[str, dict]:
    """A graph with a LoRA kept to its region."""
    inputs = {
        "model": ["checkpoint", 0], "lora_name": LORA, "lora_strength": 1.0, "full_prompt": ["full", 0],
        "base_prompt": ["base", 0], "negative": ["negative", 0], "cfg": CFG, "guidance": guidance, "exponent": 2.0,
        "compared_with": "words", "lora_in_negative": True,
    }  # fmt: skip
    return sampled(guider={"class_type": "SPFPortraitLoraKeptToRegion", "inputs": inputs | changes})


def stock() -> dict[str, dict]:
    """A graph with ComfyUI's own nodes: the LoRA loaded, and its guider."""
    return sampled(
        lora={
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["checkpoint", 0], "lora_name": LORA, "strength_model": 1.0},
        },
        guider={
            "class_type": "CFGGuider",
            "inputs": {"model": ["lora", 0], "positive": ["full", 0], "negative": ["negative", 0], "cfg": CFG},
        },
    )


def latents_of(server, graph: dict[str, dict]) -> torch.Tensor:
    (path,) = server.files(server.queue(graph), "save")
    return load_file(path)["latent_tensor"]


def own_latents(pipeline, guidance: float, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=generator)
    timesteps = [999 - int(step * 1000 / STEPS) for step in range(STEPS)]
    output = pipeline(
        BASE, target_prompt=TARGET, negative_prompt=NEGATIVE, guidance_scale=CFG, latents=noise, timesteps=timesteps,
        sfcm_guidance=guidance, output_type="latent", **kwargs,
    )  # fmt: skip
    return output.images / pipeline.vae.config.scaling_factor


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("changes", "kwargs"),
    [
        ({}, {}),
        ({"compared_with": "paths", "lora_in_negative": False},
         {"sfcm_mode": "averaged", "adapter_in_unconditional": False}),
        ({"compared_with": "both", "exponent": 4.0, "lora_strength": 0.5},
         {"sfcm_mode": "averaged_both", "sfcm_guidance_exponent": 4.0, "target_scale": 0.5}),
    ],
)  # fmt: skip
def test_latents_are_those_of_our_pipeline(world, guidance, changes, kwargs):
    server, pipeline = world
    theirs, ours = latents_of(server, kept(guidance, **changes)), own_latents(pipeline, guidance, **kwargs)
    unguided = own_latents(pipeline, 1.0 - guidance, **kwargs)
    error, effect = (theirs - ours).abs().max(), (unguided - ours).abs().max()
    print(f"\ns = {guidance}, {changes}: {error:.1e} of {ours.abs().max():.2f}; another s changes {effect:.1e}")
    assert error < 2e-5 * ours.abs().max()
    if guidance != 0.5:
        assert effect > 50 * error


def test_no_guidance_is_stock(world):
    server, _ = world
    theirs, own = latents_of(server, stock()), latents_of(server, kept(0.0))
    print(f"\ns = 0 against the stock nodes: {(theirs - own).abs().max():.1e}")
    assert torch.equal(theirs, own)
    # What was switched is back: the next run without the LoRA knows nothing of it.
    off = {"lora_strength": 0.0, "lora_in_negative": False}
    without = latents_of(server, kept(0.0, **off))
    assert not torch.allclose(without, own, atol=1e-2)
    latents_of(server, kept(1.0))
    # Another width of the batch, so that the server does not answer from its cache.
    assert torch.equal(latents_of(server, kept(0.0, **off, exponent=3.0)), without)


def test_the_example_workflow_draws(world):
    """The file that users open, with its own names of checkpoint and LoRA; fewer steps and pixels."""
    server, _ = world
    graph = graph_of(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.get("/object_info"))
    kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
    kinds["BasicScheduler"]["steps"], kinds["EmptyLatentImage"]["width"] = 3, SIZE
    kinds["EmptyLatentImage"]["height"] = SIZE // 2
    entry = server.queue(graph)
    pictures = {
        node["inputs"]["filename_prefix"]: np.asarray(Image.open(*server.files(entry, number)))
        for number, node in graph.items()
        if node["class_type"] == "SaveImage"
    }
    assert {name: picture.shape for name, picture in pictures.items()} == {
        "kept-to-region": (SIZE // 2, SIZE, 3), "region": (SIZE // 2, SIZE, 3)
    }  # fmt: skip
    region = pictures["region"]
    assert region.min() == 0 and region.max() == 255 and (region[..., :1] == region).all()


def test_every_example_workflow_is_a_template_and_fits_the_nodes(world):
    server, _ = world
    (listed,) = server.get("/workflow_templates").values()
    assert sorted(listed) == sorted(path.stem for path in WORKFLOW.parent.glob("*.json"))
    known = server.get("/object_info")
    for path in WORKFLOW.parent.glob("*.json"):
        for node in graph_of(json.loads(path.read_text(encoding="utf-8")), known).values():
            described = known[node["class_type"]]["input"]
            assert described["required"].keys() <= node["inputs"].keys(), (path, node)
            assert node["inputs"].keys() <= (described["required"] | described.get("optional", {})).keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_name": "of-nothing.safetensors"}, "of-nothing.safetensors has no weights under names .* for SD15"),
        ({"guidance": 1.5}, "Value 1.5 bigger than max of 1.0"),
    ],
)
def test_mistakes_are_named(world, changes, message):
    server, _ = world
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, server.folder / "models" / "loras" / "of-nothing.safetensors")
    with pytest.raises(RuntimeError, match=message):
        server.queue(kept(**{"guidance": 1.0} | changes))


def test_a_step_costs_about_what_its_predictions_do(world):
    """Four predictions in place of two, and with "paths" three; alternating, for machines are noisy."""
    server, _ = world
    graphs = {"stock": stock(), "words": kept(1.0), "paths": kept(1.0, compared_with="paths")}
    seconds = {name: [] for name in graphs}
    for turn in range(5):
        for name, graph in graphs.items():
            graph["noise"]["inputs"]["noise_seed"] = turn  # not from the cache
            graph["empty"]["inputs"] |= {"width": 256, "height": 256}
            entry = server.queue(graph)
            times = {message: body["timestamp"] for message, body in entry["status"]["messages"]}
            seconds[name].append((times["execution_success"] - times["execution_start"]) / 1000)
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    ratios = {name: median / medians["stock"] for name, median in medians.items()}
    print(f"\nseconds of {STEPS} steps at 256x256: {medians}; of stock: {ratios}")
    assert ratios["words"] < 2.3 and ratios["paths"] < 1.8


@pytest.mark.parametrize(("kind", "model"), [("sd3", "SD3"), ("flux", "Flux")])
def test_transformers_of_flow_matching_are_drawn_with_too(tmp_path, kind, model):
    command = [PYTHON, "transformers_script.py", COMFYUI, str(ROOT / "comfyui"), str(tmp_path), kind]
    ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    print(f"\n{found}")
    assert found["model"] == model and found["stock"] == 0 and found["calls"] == 4 and found["region"] == [0, 1]
    assert found["lora"] > 1e-2 and found["guidance"] > 1e-2
