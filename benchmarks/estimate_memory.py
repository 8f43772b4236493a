"""How much GPU memory trainings ask for, estimated on a machine without one: `python benchmarks/estimate_memory.py`.

It prints the presets of docs/training.md, or a training of the flags that it is given (of SDXL with `--model sdxl`),
with the configuration of Stable Diffusion 1.5 at 512x512, or of SDXL or SD3.5-medium at 1024x1024, and all caches. The
phases of a
training are run on tensors that have shapes and dtypes but no content (torch's `FakeTensorMode`), while the bytes of
all storages alive at once are counted. The most of all phases is what it prints:

- prompts: the text encoders alone, all or one after another, and a chunk of prompts;
- portraits: the VAE alone encodes a portrait;
- drawing: the denoiser predicts alignment portraits with guidance; each text encoder comes and goes before it;
- decoding: two validation pictures by the VAE without autocast, beside the denoiser; at once of SD 1.5 alone;
- mapping: both paths of the denoiser, captured, for the SFCMs;
- a step: forward and backward of each term of the loss, with every row of the batch asking for the target.

`PHASES` has a function for each, which says first which models lie on the device.

Counted are the frozen models, the LoRA (and stage 1's, where it is the teacher), its gradients and AdamW's state, all
activations, and temporary tensors as long as Python or autograd holds them. Matrix products are in bfloat16, norms and
softmax in float32, as CUDA's autocast does it; attention that is not captured is a CPU's flash attention, which keeps
what a GPU's does. Not counted are CUDA's context, the workspaces inside of kernels, the allocator's rounding and
fragmentation, cached latents and embeddings, and the copies of DDP.

Source: [ours].
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPImageProcessorPil, CLIPModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters import Adapters
from benchmarks.parts.counting import HALF, LiveBytes, like_cuda
from benchmarks.parts.tables import markdown_table
from benchmarks.random_stable_diffusion import (
    make_3_pipeline,
    make_3_transformer,
    make_clip,
    make_pipeline,
    make_unet,
    make_xl_pipeline,
    make_xl_unet,
)
from families.prompt_embeds import PromptEmbeds
from families.stable_diffusion import StableDiffusion
from families.stable_diffusion_3 import StableDiffusion3
from families.stable_diffusion_xl import StableDiffusionXL
from training.arguments import parse_args, uses_enhancement
from training.dual_path import DualPathOutput, dual_path
from training.enhancement import row_by_row
from training.losses import compose_prediction, diffusion_loss, fine_grained_loss, text_consistent_loss
from training.models import STAGE1_ADAPTER, Models, lora_config, train_in_float32
from training.prompt_table import embed_pixels


GIB, MIB = 2**30, 2**20
TOKENS, T5_TOKENS = 77, 256
PROMPTS = 32  # that the trainer encodes at once, or half as many by a large text encoder
MATCHED_TOKENS = 24  # of the base prompt; they hardly count
# The documentation's rows: GB of the card, and the flags besides --mixed_precision.
PRESETS = {
    8: "--train_batch_size 1 --gradient_accumulation_steps 4 --gradient_checkpointing",
    12: "--train_batch_size 4",
    16: "--stage2_objective both --train_batch_size 4 --gradient_checkpointing",
    24: "--stage2_objective both --train_batch_size 4",
}
PRESETS_XL = {
    12: "--train_batch_size 1 --gradient_accumulation_steps 4 --gradient_checkpointing",
    16: "--train_batch_size 4 --gradient_checkpointing",
    24: "--train_batch_size 1 --gradient_accumulation_steps 4",
}


PRESETS_3 = {
    16: "--train_batch_size 4 --gradient_checkpointing",
    24: "--train_batch_size 1 --gradient_accumulation_steps 4",
}


class Model(NamedTuple):
    """A base model that is counted, at a size of its latents."""

    title: str
    family: type[StableDiffusion]
    make_denoiser: Callable[[], ModelMixin]
    make_pipeline: Callable[[ModelMixin], DiffusionPipeline]
    side: int
    presets: dict[int, str]
    tokens: tuple[int, ...] = (TOKENS,)  # of each text encoder that the denoiser is told one after another


MODELS = {
    "sd": Model("Stable Diffusion 1.5, 512x512", StableDiffusion, make_unet, make_pipeline, 64, PRESETS),
    "sdxl": Model("SDXL, 1024x1024", StableDiffusionXL, make_xl_unet, make_xl_pipeline, 128, PRESETS_XL),
    "sd3": Model(
        "SD3.5-medium, 1024x1024", StableDiffusion3, make_3_transformer, make_3_pipeline, 128, PRESETS_3,
        (TOKENS, T5_TOKENS),
    ),
}
REQUIRED = ("--pretrained_model_name_or_path", "model", "--train_data_dir", "portraits")
# The flags whose memory is counted; accumulation needs none.
COUNTED = {
    *("train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("stage2_objective", "enhancement_loss", "lambda_enh"),
    *("rank", "lora_alpha", "lora_target", "lora_layers", "lora_dropout", "use_dora"),
}


# -------------------------------------------------------------------------------------------------------------- models


@dataclass
class Training:
    """All models of a run; `judges` are those that the enhancement loss keeps on the device, `side` is of latents."""

    objective: str
    models: Models
    clip: CLIPModel
    judges: list[nn.Module]
    rows: int
    side: int
    tokens: tuple[int, ...]

    @property
    def kept(self) -> list[nn.Module]:
        """What stays on the device from the first step on."""
        return [self.models.denoiser, *self.judges]

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [getattr(self.models.pipeline, name) for name in self.models.family.text_encoders]

    def encode(self, encoder: nn.Module, rows: int) -> None:
        """Prompts, by a text encoder; the last one of several counts tokens of its own."""
        length = self.tokens[-1] if encoder is self.text_encoders[-1] else self.tokens[0]
        encoder(torch.zeros(rows, length, dtype=torch.long), output_hidden_states=True)

    def inputs(self, rows: int) -> tuple[Tensor, Tensor, PromptEmbeds]:
        """Noisy latents (B, C, H, W), timesteps (B,) and prompts."""
        config, pooled = self.models.denoiser.config, self.models.family.pooled_dim(self.models.pipeline)
        width = config.get("cross_attention_dim") or config["joint_attention_dim"]
        states = torch.empty(rows, sum(self.tokens), width, dtype=HALF)
        prompts = PromptEmbeds(states, torch.empty(rows, pooled, dtype=HALF) if pooled else None)
        prompts = prompts.of(torch.empty(rows, 6))
        latents = torch.empty(rows, config.in_channels, self.side, self.side)
        return latents, torch.zeros(rows, dtype=torch.long), prompts

    def predict(self, rows: int) -> Tensor:
        return self.models.predict(*self.inputs(rows))

    @contextmanager
    def both_paths(self, rows: int) -> Iterator[DualPathOutput]:
        given, models = self.inputs(rows), self.models
        with (
            models.capture.store() as store,
            dual_path(models.adapters, models.predict, *given, given[-1], store=store) as paths,
        ):
            yield paths

    @contextmanager
    def counting(self, *modules: nn.Module) -> Iterator[LiveBytes]:
        """Count what happens inside, on top of these modules; accelerate puts the denoiser under autocast."""
        denoiser = self.models.denoiser
        forward = convert_outputs_to_fp32(torch.autocast("cpu", HALF)(denoiser.forward))
        with like_cuda(), patch.object(denoiser, "forward", forward), LiveBytes(*modules) as counter:
            yield counter


@contextmanager
def training(flags: str, model: Model = MODELS["sd"]) -> Iterator[Training]:
    """A run's models as the trainer makes them, with tensors that have no content.

    Modules of fake tensors can be neither cast nor given a LoRA. So they are made on the meta device, which autocast
    does not know, and get fake tensors of the CPU then.
    """
    given = parse_args([*REQUIRED, "--mixed_precision", "bf16", *shlex.split(flags)])
    with torch.device("meta"):
        pipeline, clip = model.make_pipeline(model.make_denoiser()), make_clip()
        del clip.text_model, clip.text_projection
        denoiser = getattr(pipeline, model.family.denoiser)
        encoders = [getattr(pipeline, name) for name in model.family.text_encoders]
        halves = [module.bfloat16() for module in (denoiser, pipeline.vae, *encoders, clip)]
        for module in halves:
            module.requires_grad_(False).eval()
        denoiser.add_adapter(lora_config(model.family, given.lora, denoiser))
        train_in_float32(denoiser, "default")
        if model.family.sliced_vae:
            pipeline.vae.enable_slicing()
        if given.model.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        models = Models(model.family, pipeline, torch.device("cpu"))
        if given.method.stage2_objective != "paper":
            models.add_teacher(models.lora())
    with FakeTensorMode():
        made: dict[Tensor, Tensor] = {}  # what two layers share they share again
        for part in (part for module in halves for part in module.modules()):
            for name, own in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                if own not in made:
                    made[own] = torch.empty(own.shape, dtype=own.dtype)
                    if isinstance(own, nn.Parameter):
                        made[own] = nn.Parameter(made[own], own.requires_grad)
                setattr(part, name, made[own])
        models.adapters = Adapters(denoiser)
        judges = [pipeline.vae, clip] if uses_enhancement(given.method, given.paper) else []
        objective, rows = given.method.stage2_objective, given.loop.train_batch_size
        yield Training(objective, models, clip, judges, rows, model.side, model.tokens)


# ------------------------------------------------------------------------------------------------ phases of a training


@torch.no_grad()
def prompts_peak(run: Training) -> int:
    """A chunk of prompts, encoded by all text encoders, or by each alone where one is no smaller than the denoiser."""
    alone, peaks = bool(run.models.family.large_text_encoders), []
    for encoder in run.text_encoders:
        with run.counting(*([encoder] if alone else run.text_encoders)) as counter:
            run.encode(encoder, PROMPTS // 2 if alone else PROMPTS)
        peaks.append(counter.peak)
    return max(peaks)


@torch.no_grad()
def portraits_peak(run: Training) -> int:
    """One portrait, encoded by the VAE."""
    vae, side = run.models.pipeline.vae, 8 * run.side
    with run.counting(vae) as counter:
        vae.encode(torch.empty(1, 3, side, side, dtype=HALF)).latent_dist.mode()
    return counter.peak


@torch.no_grad()
def drawing_peak(run: Training) -> int:
    """Two batches' alignment portraits, for which guidance doubles the rows; one text encoder at a time beside the
    denoiser, which gives way to one that is no smaller."""
    peaks, family = [], run.models.family
    for name, encoder in zip(family.text_encoders, run.text_encoders, strict=True):
        kept = run.judges if name in family.large_text_encoders else run.kept
        with run.counting(*kept, encoder) as counter:
            run.encode(encoder, 2 * run.rows)
        peaks.append(counter.peak)
    with run.counting(*run.kept) as counter, run.models.adapters.only(None):
        run.predict(4 * run.rows)
    return max(*peaks, counter.peak)


@torch.no_grad()
def decoding_peak(run: Training) -> int:
    """Two validation pictures, decoded at once unless the family's VAE takes one at a time; without autocast."""
    vae = run.models.pipeline.vae
    with run.counting(*run.kept, vae) as counter:
        vae.decode(torch.empty(2, vae.config.latent_channels, run.side, run.side, dtype=HALF), return_dict=False)
    return counter.peak


@torch.no_grad()
def mapping_peak(run: Training) -> int:
    """The paths that the SFCMs of two batches come from."""
    with run.counting(*run.kept) as counter, run.both_paths(2 * run.rows):
        pass
    return counter.peak


def diffusion_backward(run: Training, enhance: bool = False) -> None:
    """The diffusion loss, and the enhancement loss of portraits that are decoded small, one by one."""
    pred = run.predict(run.rows)
    loss = diffusion_loss(pred, torch.empty_like(pred)).mean()
    if enhance:
        side = run.clip.config.vision_config.image_size // 8

        def enhancement(_: int, row: Tensor) -> Tensor:
            latents = F.interpolate(row, (side, side), mode="bilinear", antialias=True)
            pixels = run.models.pipeline.vae.decode(latents.to(HALF), return_dict=False)[0]
            embeds = embed_pixels(run.clip, CLIPImageProcessorPil(), pixels)
            return F.cosine_similarity(embeds, torch.empty_like(embeds))

        loss = loss + row_by_row(enhancement, pred).mean()
    torch.autograd.backward(loss)


def composed_backward(run: Training) -> None:
    """The composed loss: reference, and teacher with both prompts, without gradient; then the response."""
    adapters = run.models.adapters
    with torch.no_grad():
        with adapters.only(None):
            reference = run.predict(run.rows)
        with adapters.only(STAGE1_ADAPTER):
            full, base = run.predict(2 * run.rows).chunk(2)
    target = compose_prediction(reference, full, base, torch.empty_like(reference[:, :1]), 2.0)
    torch.autograd.backward(diffusion_loss(run.predict(run.rows), target).mean())


def alignment_backward(run: Training) -> None:
    """The text-consistent and the fine-grained loss, and the one that keeps predictions."""
    sfcm = torch.empty(run.rows, 1, run.side, run.side)
    positions = torch.zeros(run.rows, MATCHED_TOKENS, dtype=torch.long)
    padding = torch.ones(run.rows, TOKENS, dtype=torch.bool)
    with run.both_paths(run.rows) as paths:
        resolutions = list(paths.reference.resolutions.values())
        probs, queries = (
            [list(getattr(features, name).values()) for features in (paths.response, paths.reference)]
            for name in ("attention_probs", "queries")
        )
        matched = positions, positions, positions == 0
        text = text_consistent_loss(*probs, resolutions, sfcm, *matched, padding, padding)
        fine = fine_grained_loss(*queries, resolutions, sfcm)
        base = diffusion_loss(paths.response_pred, paths.reference_pred)
        torch.autograd.backward((text + fine + base).mean())


def step_peak(run: Training, terms: Sequence[Callable[[Training], None]] | None = None) -> int:
    """Terms one after another (default: those of both stages), with the trained LoRA's gradients and AdamW's state."""
    if terms is None:
        terms = [] if run.objective == "composed" else [alignment_backward]
        terms += [] if run.objective == "paper" else [composed_backward]
        terms += [partial(diffusion_backward, enhance=bool(run.judges))]
    trained = run.models.adapters.parameters("default")
    with run.counting(*run.kept) as counter:
        state = [torch.zeros_like(parameter) for parameter in trained for _ in range(2)]
        for term in terms:
            term(run)
        for parameter in trained:
            parameter.grad = None
        del state
    return counter.peak


PHASES: dict[str, Callable[[Training], int]] = {
    "prompts": prompts_peak,
    "portraits": portraits_peak,
    "drawing": drawing_peak,
    "decoding": decoding_peak,
    "mapping": mapping_peak,
    "a step": step_peak,
}


# -------------------------------------------------------------------------------------------------------------- report


def parameter_bytes(module: nn.Module) -> int:
    """Without a LoRA's."""
    return sum(parameter.nbytes for name, parameter in module.named_parameters() if ".lora_" not in name)


def count(model: Model, flags: str) -> tuple[int, str]:
    """The most bytes of a training with these flags, and GiB of each of its phases and models."""
    with training(flags, model) as run:
        sizes = {name: peak(run) for name, peak in PHASES.items()}
        most = max(sizes.values())
        sizes["a step of a plain LoRA"] = step_peak(run, [diffusion_backward])
        frozen = (model.family.denoiser, "vae", *model.family.text_encoders)
        sizes |= {name: parameter_bytes(getattr(run.models.pipeline, name)) for name in frozen}
        sizes["clip"] = parameter_bytes(run.clip)
        trained = sum(map(torch.numel, run.models.adapters.parameters("default")))
    described = ", ".join(f"{label} {size / GIB:.2f}" for label, size in sizes.items())
    return most, f"{described}; LoRA with gradient and AdamW's state {16 * trained / MIB:.0f} MiB"


def main(input_args: Sequence[str] | None = None) -> None:
    epilog = "Its other flags are a training's."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog, allow_abbrev=False)
    titles = ", ".join(f"{name}: {model.title}" for name, model in MODELS.items())
    parser.add_argument("--model", choices=MODELS, help=f"{titles}; all without training flags, else sd.")
    options, others = parser.parse_known_args(input_args)
    asked = shlex.join(others)
    own, default = (parse_args([*REQUIRED, *shlex.split(flags)]).asked for flags in (asked, ""))
    uncounted = [f"--{name}" for name in default.keys() - COUNTED if own[name] != default[name]]
    if uncounted:
        parser.error(f"{' '.join(sorted(uncounted))} is not counted; these are: {' '.join(sorted(COUNTED))}")
    for name in [options.model] if options.model else ["sd"] if asked else MODELS:
        model, lines, details = MODELS[name], [], []
        for card, flags in {"given": asked}.items() if asked else model.presets.items():
            most, described = count(model, flags)
            lines.append([str(card), f"`{flags}`", f"{most / GIB:.1f} GiB"])
            details.append(described)
        print(f"{model.title}:\n")
        print(markdown_table(["GPU", "flags, besides `--mixed_precision`", "counted"], lines))
        print("GiB of each part:", *details, sep="\n- ", end="\n\n")


if __name__ == "__main__":
    main()
