"""How much GPU memory the README's presets ask for, estimated on a machine without one.

`python benchmarks/estimate_memory.py` prints the table of presets and the figures around it, with Stable Diffusion
1.5's own configuration at 512x512. A training's parts are run on tensors that have shapes and dtypes but no content
(torch's `FakeTensorMode`), while the bytes of all storages alive at once are counted. The largest part is printed:

- preparing: all models lie on the device, and a portrait is encoded;
- drawing: alignment portraits with guidance, and two validation pictures decoded at once;
- mapping: both paths of the UNet, captured, for the SFCMs;
- the steps: forward and backward of each term of the loss, with every row of the batch asking for the target.

Counted are the frozen models, the LoRA (and stage 1's, where it is the teacher), its gradients and AdamW's state, all
activations, and temporary tensors as long as Python or autograd holds them. Matrix products are in bfloat16, norms and
softmax in float32, as CUDA's autocast does it, and attention that is not captured has the memory of flash attention.

Not counted are CUDA's context, the workspaces inside of kernels, the allocator's rounding and fragmentation, cached
latents and embeddings, and the copies of DDP.

Source: [ours].
"""

from __future__ import annotations

import argparse
import shlex
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters import Adapters, active_adapters
from attention_processors import CrossAttentionStore, capture_cross_attention
from benchmarks.parts.tables import markdown_table
from benchmarks.random_stable_diffusion import TEXT, VISION, make_unet, make_vae
from families.prompt_embeds import PromptEmbeds
from families.stable_diffusion import StableDiffusion
from training.arguments import Flags, parse_args, uses_enhancement
from training.dual_path import DualPathOutput, dual_path
from training.losses import compose_prediction, diffusion_loss, fine_grained_loss, text_consistent_loss
from training.models import lora_config
from training.prompt_table import embed_pixels


HALF = torch.bfloat16
GIB = 2**30
MIB = 2**20
SIDE = 64  # of the latents of 512x512
TOKENS = 77
MATCHED_TOKENS = 24  # of the base prompt; they hardly count
TEACHER = "stage1"
# What CUDA's autocast computes in float32, and a CPU's does not.
UPCAST = ((F, "group_norm"), (F, "layer_norm"), (F, "softmax"), (Tensor, "softmax"))
# The documentation's rows: GB of the card, and the flags besides --mixed_precision.
PRESETS = {
    8: "--train_batch_size 1 --gradient_accumulation_steps 4 --gradient_checkpointing",
    12: "--train_batch_size 4",
    16: "--stage2_objective both --train_batch_size 4 --gradient_checkpointing",
    24: "--stage2_objective both --train_batch_size 4",
}
ONE_PORTRAIT = "--stage2_objective both --train_batch_size 1 --gradient_checkpointing"


# ----------------------------------------------------------------------------------------------------- what is counted


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations made inside of it, and those it is told of: the bytes now, and the most."""

    def __init__(self, *modules: nn.Module) -> None:
        """Counts the modules' tensors from the beginning."""
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = set()
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.count(tensor)

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed; views of one storage count once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted:
            return
        self._counted.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        # The storage outlives its last Python name if autograd has saved it, and its finalizer waits as long.
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return output


class FlashAttention(torch.autograd.Function):
    """What flash attention allocates and keeps: no scores, but the logarithm of each row's sum. Computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def in_float32(function: Callable) -> Callable:
    """The function, which under autocast takes half precision as float32."""

    def upcast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == HALF else value

    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(upcast, (args, kwargs))
        return function(*args, **kwargs)

    return wrapped


@contextmanager
def like_cuda() -> Iterator[None]:
    """Inside, a CPU's tensors take CUDA's memory: flash attention, and float32 where CUDA's autocast wants it."""
    # A torch function mode would be off while checkpointing recomputes.

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return FlashAttention.apply(query, key, value)

    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        for owner, name in UPCAST:
            stack.enter_context(patch.object(owner, name, in_float32(getattr(owner, name))))
        yield


# -------------------------------------------------------------------------------------------------------------- models


def make_unet_with_lora(flags: Flags, make: Callable[[], UNet2DConditionModel] = make_unet) -> nn.Module:
    """The UNet in bfloat16 with the trainer's LoRA in float32, and the frozen one of stage 1 where that teaches."""
    unet = make().bfloat16().requires_grad_(False)
    config = lora_config(StableDiffusion, flags.lora, unet)
    unet.add_adapter(config)
    if flags.method.stage2_objective != "paper":
        unet.add_adapter(config, adapter_name=TEACHER)
        unet.set_adapter("default")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".lora_" in name and ".default." in name)
    if flags.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


@dataclass
class Models:
    """All models of a run, and its flags."""

    flags: Flags
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    clip: CLIPModel

    @property
    def judges(self) -> list[nn.Module]:
        """What the enhancement loss keeps on the device."""
        return [self.vae, self.clip] if uses_enhancement(self.flags.method, self.flags.paper) else []


def make_models(flags: str) -> Models:
    """The models with shapes alone, on the meta device."""
    given = parse_flags(flags)
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=768)).requires_grad_(False)
        del clip.text_model, clip.text_projection
        return Models(
            given,
            make_unet_with_lora(given),
            make_vae().bfloat16().requires_grad_(False),
            CLIPTextModel(CLIPTextConfig(**TEXT)).bfloat16().requires_grad_(False),
            clip,
        )


@contextmanager
def without_content(*modules: nn.Module) -> Iterator[None]:
    """A fake mode, and modules of the meta device that say inside of it that they are on the CPU.

    Autocast knows no meta device, and `Module.to` cannot exchange fake parameters. The modules are not put back.
    """
    with FakeTensorMode():
        for part in {part for module in modules for part in module.modules()}:
            for name, own in list(part.named_parameters(recurse=False)):
                empty = torch.empty(own.shape, dtype=own.dtype)
                part.register_parameter(name, nn.Parameter(empty, requires_grad=own.requires_grad))
            for name, own in list(part.named_buffers(recurse=False)):
                part.register_buffer(name, torch.empty(own.shape, dtype=own.dtype))
            part.eval()
        yield


def parse_flags(flags: str) -> Flags:
    required = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "portraits"]
    return parse_args([*required, "--mixed_precision", "bf16", *shlex.split(flags)])


def parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------- parts of a training


@contextmanager
def counting(*modules: nn.Module) -> Iterator[LiveBytes]:
    """Count what happens inside, on top of these modules' parameters."""
    with like_cuda(), LiveBytes(*modules) as counter:
        yield counter


@contextmanager
def autocast_forward(unet: UNet2DConditionModel) -> Iterator[None]:
    """Inside, the UNet's forward is as accelerate makes it: under autocast, with an answer in float32."""
    forward = unet.forward

    def wrapped(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        with torch.autocast("cpu", HALF):
            return (forward(*args, **kwargs)[0].float(),)

    with patch.object(unet, "forward", wrapped):
        yield


@dataclass
class UNetInputs:
    """A batch of noisy latents (B, 4, H, W), timesteps (B,) and prompts."""

    latents: Tensor
    timesteps: Tensor
    prompts: PromptEmbeds

    @classmethod
    def make(cls, unet: UNet2DConditionModel, rows: int, side: int = SIDE) -> UNetInputs:
        return cls(
            torch.empty(rows, unet.config.in_channels, side, side),
            torch.zeros(rows, dtype=torch.long),
            PromptEmbeds(torch.empty(rows, TOKENS, unet.config.cross_attention_dim, dtype=HALF)),
        )

    def predict(self, unet: UNet2DConditionModel) -> Tensor:
        return StableDiffusion.predict(unet, self.latents, self.timesteps, self.prompts)

    def both_paths(
        self, unet: UNet2DConditionModel, store: CrossAttentionStore
    ) -> AbstractContextManager[DualPathOutput]:
        predict = partial(StableDiffusion.predict, unet)
        given = (self.latents, self.timesteps, self.prompts, self.prompts)
        return dual_path(Adapters(unet), predict, *given, store=store)


@torch.no_grad()
def preparing_peak(models: Models) -> int:
    """One portrait is encoded beside all models."""
    judges = [models.clip] if models.judges else []
    with counting(models.vae, models.unet, models.text_encoder, *judges) as counter:
        models.vae.encode(torch.empty(1, 3, 8 * SIDE, 8 * SIDE, dtype=HALF)).latent_dist.mode()
    return counter.peak


@torch.no_grad()
def drawing_peak(models: Models) -> int:
    """Two batches' alignment portraits at once, and two validation pictures; guidance doubles the rows."""
    unet = models.unet
    with counting(unet, models.text_encoder, models.vae, *models.judges) as counter, autocast_forward(unet):
        with active_adapters(unet, None):
            UNetInputs.make(unet, 4 * models.flags.loop.train_batch_size).predict(unet)
        with torch.autocast("cpu", HALF):
            models.vae.decode(torch.empty(2, 4, SIDE, SIDE, dtype=HALF), return_dict=False)
    return counter.peak


@torch.no_grad()
def mapping_peak(models: Models) -> int:
    """The captured paths that the SFCMs of two batches come from."""
    unet = models.unet
    with counting(unet, *models.judges) as counter, autocast_forward(unet), capture_cross_attention(unet) as store:
        inputs = UNetInputs.make(unet, 2 * models.flags.loop.train_batch_size)
        with inputs.both_paths(unet, store):
            pass
    return counter.peak


def diffusion_backward(models: Models, inputs: UNetInputs, enhance: bool, small: bool = True) -> None:
    """The diffusion loss, and the enhancement loss of portraits that are decoded `small` or in full."""
    pred = inputs.predict(models.unet)
    loss = diffusion_loss(pred, torch.empty_like(pred)).mean()
    if enhance:
        side = models.clip.config.vision_config.image_size // 8
        latents = F.interpolate(pred, (side, side), mode="bilinear", antialias=True) if small else pred
        pixels = models.vae.decode(latents.to(HALF), return_dict=False)[0]
        embeds = embed_pixels(models.clip, CLIPImageProcessorPil(), pixels)
        loss = loss + F.cosine_similarity(embeds, torch.empty_like(embeds)).mean()
    torch.autograd.backward(loss)


def composed_backward(models: Models, inputs: UNetInputs) -> None:
    """The composed loss: reference, and teacher with both prompts, without gradient; then the response."""
    unet, rows = models.unet, len(inputs.latents)
    with torch.no_grad():
        with active_adapters(unet, None):
            reference = inputs.predict(unet)
        with active_adapters(unet, TEACHER):
            full, base = UNetInputs.make(unet, 2 * rows, inputs.latents.shape[-1]).predict(unet).chunk(2)
    target = compose_prediction(reference, full, base, torch.empty_like(reference[:, :1]), 2.0)
    torch.autograd.backward(diffusion_loss(inputs.predict(unet), target).mean())


def alignment_backward(models: Models, inputs: UNetInputs) -> None:
    """The text-consistent and the fine-grained loss, and the one that keeps predictions."""
    unet, rows = models.unet, len(inputs.latents)
    sfcm = torch.empty_like(inputs.latents[:, :1])
    positions = torch.zeros(rows, MATCHED_TOKENS, dtype=torch.long)
    padding = torch.ones(rows, TOKENS, dtype=torch.bool)
    with (
        capture_cross_attention(unet) as store,
        inputs.both_paths(unet, store) as paths,
    ):
        reference, response = paths.reference, paths.response
        resolutions = list(reference.resolutions.values())
        probs = [list(features.attention_probs.values()) for features in (response, reference)]
        matched = positions, positions, positions == 0
        text = text_consistent_loss(*probs, resolutions, sfcm, *matched, padding, padding)
        fine = fine_grained_loss(list(response.queries.values()), list(reference.queries.values()), resolutions, sfcm)
        base = diffusion_loss(paths.response_pred, paths.reference_pred)
        torch.autograd.backward((text + fine + base).mean())


Term = Callable[[Models, UNetInputs], None]


def stage_terms(flags: Flags, small: bool = True) -> list[Term]:
    """Forward and backward of each term of a step in stage 2, and with the last one of stage 1."""
    terms = [] if flags.method.stage2_objective == "composed" else [alignment_backward]
    terms += [] if flags.method.stage2_objective == "paper" else [composed_backward]
    return [*terms, partial(diffusion_backward, enhance=uses_enhancement(flags.method, flags.paper), small=small)]


def steps_peak(models: Models, side: int = SIDE, terms: Sequence[Term] | None = None) -> int:
    """Terms one after another (default: those of both stages), with the trained LoRA's gradients and AdamW's state."""
    flags, unet = models.flags, models.unet
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    with counting(unet, *models.judges) as counter, autocast_forward(unet):
        state = [torch.zeros_like(parameter) for parameter in trained for _ in range(2)]
        inputs = UNetInputs.make(unet, flags.loop.train_batch_size, side)
        for term in stage_terms(flags) if terms is None else terms:
            term(models, inputs)
        for parameter in trained:
            parameter.grad = None
        del state
    return counter.peak


# -------------------------------------------------------------------------------------------------------------- report


PARTS = {"preparing": preparing_peak, "drawing": drawing_peak, "mapping": mapping_peak, "a step": steps_peak}


def estimate(flags: str) -> dict[str, int]:
    """Most bytes alive at once in each part of a training with these flags."""
    models = make_models(flags)
    with without_content(models.unet, models.vae, models.text_encoder, models.clip):
        return {name: peak(models) for name, peak in PARTS.items()}


def print_presets() -> None:
    lines, details = [], []
    for card, flags in PRESETS.items():
        peaks = estimate(flags)
        lines.append([f"{card} GB", f"`{flags}`", f"{max(peaks.values()) / GIB:.1f} GiB"])
        details.append(f"{card} GB: " + ", ".join(f"{name} {peak / GIB:.2f}" for name, peak in peaks.items()))
    print(markdown_table(["GPU", "flags, besides `--mixed_precision`", "counted"], lines))
    print("GiB of each part:", *details, sep="\n- ")


def print_figures() -> None:
    """The models' own sizes, and what the smaller decoding saves."""
    models = make_models(ONE_PORTRAIT)
    # The frozen UNet is what is not the LoRA's float32.
    unet = sum(parameter.nbytes for parameter in models.unet.parameters() if parameter.dtype == HALF)
    sizes = {"UNet": unet, "VAE": parameter_bytes(models.vae)}
    sizes |= {"text encoder": parameter_bytes(models.text_encoder), "CLIP": parameter_bytes(models.clip)}
    print("\nGiB of the frozen models:", ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items()))
    trained = [parameter for parameter in models.unet.parameters() if parameter.requires_grad]
    count, size = sum(map(torch.numel, trained)), sum(parameter.nbytes for parameter in trained)
    print(f"The default LoRA: {count / 1e6:.1f} million parameters; AdamW's state {2 * size / MIB:.0f} MiB, ", end="")
    print(f"with gradients {3 * size / MIB:.0f} MiB")
    with without_content(models.unet, models.vae, models.clip):
        small, full = (steps_peak(models, terms=stage_terms(models.flags, small)) for small in (True, False))
    print(f"A step of `{ONE_PORTRAIT}`: {small / GIB:.1f} GiB, decoded in full {full / GIB:.1f} GiB")


def main(input_args: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(input_args)
    print_presets()
    print_figures()


if __name__ == "__main__":
    main()
