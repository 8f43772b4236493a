"""The guider on transformers with random weights, run by ComfyUI's own interpreter in a checkout of it.

`python transformers_script.py COMFYUI NODES FOLDER KIND` prints, as JSON, how far runs differ. Text encoders of these
models have billions of weights: prompts are random embeddings.
"""

import importlib.util
import json
import sys
from pathlib import Path


comfyui, package, folder, kind = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, comfyui)

import comfy.options  # noqa: E402


comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


torch.manual_seed(0)
OPERATIONS = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32}


def sd3():
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    return OpenAISignatureMMDITWrapper(
        input_size=None, pos_embed_scaling_factor=None, pos_embed_offset=None, pos_embed_max_size=64, patch_size=2,
        in_channels=16, depth=2, num_patches=4096, adm_in_channels=2048, context_embedder_config=context, **OPERATIONS,
    )  # fmt: skip


def flux():
    from comfy.ldm.flux.model import Flux

    # The published width, which ComfyUI takes for granted, and one block of each kind.
    return Flux(
        image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096,
        hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56],
        theta=10000, qkv_bias=True, guidance_embed=True, **OPERATIONS,
    )  # fmt: skip


BUILD, POOLED, CFG = {"sd3": (sd3, 2048, 4.0), "flux": (flux, 768, 1.0)}[kind]
weights = {name: torch.randn(one.shape) * 0.5 / one.shape[-1] ** 0.5 for name, one in BUILD().state_dict().items()}
lora = {}
for name, weight in weights.items():
    if name.endswith("attn.qkv.weight"):
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        lora[f"{layer}.lora_down.weight"] = torch.randn(4, weight.shape[1]) * 0.3
        lora[f"{layer}.lora_up.weight"] = torch.randn(weight.shape[0], 4) * 0.3
save_file(lora, Path(folder) / "lora.safetensors")
folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
model = comfy.sd.load_diffusion_model_state_dict(weights)

places = {"submodule_search_locations": [package]}
spec = importlib.util.spec_from_file_location("nodes_of_ours", f"{package}/__init__.py", **places)
nodes = sys.modules["nodes_of_ours"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nodes)
make = nodes.NODE_CLASS_MAPPINGS["SPFPortraitLoraKeptToRegion"]().get_guider

full, base, negative = (
    [[torch.randn(1, 77, 4096), {"pooled_output": torch.randn(1, POOLED), "guidance": 3.5}]] for _ in range(3)
)
noise, euler = torch.randn(1, 16, 16, 16), comfy.samplers.sampler_object("euler")
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)


def sample(guider):
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)


def kept(guidance, strength=1.0):
    return make(model, "lora.safetensors", strength, full, base, negative, CFG, guidance, 2.0, "words", True)[0]


with torch.inference_mode():
    ordinary, without = sample(kept(0.0)), sample(kept(0.0, strength=0.0))
    guided = sample(guider := kept(1.0))
    loaded, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    stock = comfy.samplers.CFGGuider(loaded)
    stock.set_conds(full, negative)
    stock.set_cfg(CFG)
    region = guider.region.map()
    print(json.dumps({
        "model": type(model.model.model_config).__name__,
        "stock": (sample(stock) - ordinary).abs().max().item(),
        "lora": (ordinary - without).abs().max().item(),
        "guidance": (guided - ordinary).abs().max().item(),
        "region": [region.min().item(), region.max().item()],
        "calls": guider.region.calls,
    }))  # fmt: skip
