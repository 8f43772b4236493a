"""The models of a training run: loaded from safetensors alone, the LoRA on the denoiser, and what lies on the device.

Legend: B batch, C channels, H/W latent size, H'/W' size in pixels.
Source: [ours].
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from diffusers.models.attention_processor import XFormersAttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from adapters import Adapters
from families.prompt_embeds import PromptEmbeds
from families.stable_diffusion import StableDiffusion
from loras.finding import find_lora
from loras.loading import load_lora, merge_loras
from loras.reading import read_lora
from programs.console import without_warning
from programs.loading import cast_models, load_pipeline, naming_flag
from training.arguments import Flags
from training.flags import LoraFlags, ModelFlags
from training.inputs import Inputs


STAGE1_ADAPTER = "stage1"


def load_base_model(inputs: Inputs, args: ModelFlags, weight_dtype: torch.dtype) -> DiffusionPipeline:
    """The base model, with the VAE and the prediction type of the flags, and earlier LoRAs merged into its weights."""
    # Merged in half precision, small changes would be rounded away, and the sum be another than side by side.
    references = inputs.references
    dtype = torch.float32 if references else weight_dtype
    parts, vae = {}, args.pretrained_vae_model_name_or_path
    if vae is not None:
        with naming_flag("pretrained_vae_model_name_or_path", vae):
            parts["vae"] = AutoencoderKL.from_pretrained(
                vae, dtype=dtype, cache_dir=args.cache_dir, use_safetensors=True
            )
    pipeline = _load(inputs, args, dtype, **parts)
    if references:
        with naming_flag("reference_lora", " ".join(reference.name for reference in references)):
            merge_loras(pipeline, [str(lora.path) for lora in references], [lora.scale for lora in references])
        cast_models(pipeline, weight_dtype)
    # diffusers' own way warns of layers that stay in float32 where there are none.
    torch.nn.Module.to(pipeline.vae, inputs.family.vae_dtype(pipeline.vae, weight_dtype))
    if args.prediction_type is not None:
        config = pipeline.scheduler.config
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, prediction_type=args.prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_text_part(inputs: Inputs, model: ModelFlags) -> DiffusionPipeline:
    """The base model as far as it reads prompts; whole where earlier LoRAs, which may change that, are merged."""
    if inputs.references:
        return load_base_model(inputs, model, torch.float32)
    return _load(inputs, model, torch.float32, **{"vae": None, inputs.family.denoiser: None})


def _load(inputs: Inputs, model: ModelFlags, dtype: torch.dtype, **parts: Any) -> DiffusionPipeline:
    flag, family = "pretrained_model_name_or_path", inputs.family
    if inputs.base_file is None:
        parts |= {name: getattr(model, name) for name in ("revision", "cache_dir", "variant")}
    parts |= family.training_options
    return load_pipeline(family.pipeline_class, getattr(model, flag), dtype, flag, file=inputs.base_file, **parts)


@torch.no_grad()
def load_adapter(family: type[StableDiffusion], pipeline: DiffusionPipeline, path: str | Path) -> None:
    """Load the LoRA in a file or folder as the one in training, with the rank, alpha, layers and numbers it has."""
    denoiser = getattr(pipeline, family.denoiser)
    load_lora(pipeline, str(path), "default")
    train_in_float32(denoiser, "default")
    # PEFT has rounded it to the dtype of the layers it was added to.
    for name, layer in read_lora(find_lora(str(path))).layers[family.denoiser].items():
        module = denoiser.get_submodule(name)
        module.lora_A["default"].weight.copy_(layer.down)
        module.lora_B["default"].weight.copy_(layer.up)
        if layer.magnitude is not None:
            magnitude = module.lora_magnitude_vector["default"].weight
            magnitude.copy_(layer.magnitude.view_as(magnitude))


def train_in_float32(denoiser: ModelMixin, added: str) -> None:
    """Bring an adapter that was added to float32, where PEFT gives it the dtype of its layers; "default" is trained,
    and nothing else.
    """
    for name, parameter in denoiser.named_parameters():
        if ".lora_" in name and f".{added}." in name:
            # A copy: what was loaded may be a view into its file, which a checkpoint has to let go of.
            parameter.data = parameter.data.to(torch.float32, copy=True)
        parameter.requires_grad_(".lora_" in name and ".default." in name)


def lora_config(family: type[StableDiffusion], args: LoraFlags, denoiser: ModelMixin) -> LoraConfig:
    """LoRA on the attention that the family says, on all attention layers, or on the layers named."""
    return LoraConfig(
        r=args.rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, use_dora=args.use_dora,
        init_lora_weights="gaussian",
        target_modules=args.lora_layers or family.lora_targets(denoiser, args.lora_target),
    )  # fmt: skip


class Models:
    """The base model with the LoRA in training, the teacher once there is one, and what of them lies on the device.

    All lie on the CPU until `keep` says what is used in each step; `at_work` and `drawing` lend the device to others.

    Attributes:
        pipeline: draws with the models as they are.
        denoiser, response_denoiser: its UNet or transformer, with the adapter "default", which is trained, and its
            distributed wrapper, if any.
        noise: of training.
        adapters, capture: switch the adapters, and capture the attention, of `denoiser`.
    """

    def __init__(
        self, family: type[StableDiffusion], pipeline: DiffusionPipeline, device: torch.device
    ) -> None:
        self.family, self.pipeline, self.device = family, pipeline, device
        self.denoiser = self.response_denoiser = getattr(pipeline, family.denoiser)
        self.noise = family.noise_process(type(pipeline.scheduler).__name__, pipeline.scheduler.config)
        self.adapters, self.capture = Adapters(self.denoiser), family.capture(self.denoiser)
        self._kept: frozenset[str] = frozenset()

    def keep(self, names: Sequence[str]) -> None:
        """Bring the models that steps use onto the device, where they stay."""
        self._kept = frozenset(names)
        for name in names:
            getattr(self.pipeline, name).to(self.device)

    @contextmanager
    def at_work(self, *names: str) -> Iterator[None]:
        """Inside, these of the pipeline's models lie on the device."""
        lent = [getattr(self.pipeline, name) for name in names if name not in self._kept]
        try:
            for model in lent:
                model.to(self.device)
            yield
        finally:
            for model in lent:
                model.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Inside, prompts are encoded: all text encoders lie on the device, or, where one of them is no smaller than
        the denoiser, each while it works.
        """
        names = self.family.text_encoders_of(self.pipeline)
        if not set(names) & set(self.family.large_text_encoders):
            with self.at_work(*names):
                yield
            return
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.callback(torch.cuda.empty_cache)
            for model in (getattr(self.pipeline, name) for name in names if name not in self._kept):
                _, hook = cpu_offload_with_hook(model, self.device)
                stack.callback(hook.remove)
                stack.callback(hook.offload)
                stack.callback(model.register_forward_hook(lambda *_, hook=hook: hook.offload()).remove)
            yield

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside, the pipeline draws: each of its models that no step uses comes onto the device when it is called,
        and leaves it before the next one or the denoiser is.
        """
        hooks: list[UserCpuOffloadHook] = []

        def make_room(denoiser: torch.nn.Module, args: tuple) -> None:
            """A model leaves when the next of them is called, and the denoiser, which stays, is none of them."""
            for hook in hooks:
                if next(hook.model.parameters()).device.type != "cpu":
                    hook.offload()

        alone = self.denoiser.register_forward_pre_hook(make_room)
        try:
            for name in (*self.family.text_encoders_of(self.pipeline), "vae"):  # in the order of their calls
                if name not in self._kept:
                    model, last = getattr(self.pipeline, name), hooks[-1] if hooks else None
                    hooks.append(cpu_offload_with_hook(model, self.device, prev_module_hook=last)[1])
            with decoded_without_autocast(self.pipeline.vae), self._giving_way():
                yield
        finally:
            alone.remove()
            for hook in hooks:
                hook.offload()
                hook.remove()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @contextmanager
    def _giving_way(self) -> Iterator[None]:
        """Inside, the denoiser leaves the device while a text encoder that is no smaller works, and is there again
        afterwards, since a pipeline asks it where to draw.
        """
        names = [name for name in self.family.large_text_encoders if name not in self._kept]

        def leave(*_: object) -> None:
            self.denoiser.to("cpu")

        def come_back(encoder: torch.nn.Module, *_: object) -> None:
            encoder.to("cpu")
            self.denoiser.to(self.device)

        with ExitStack() as stack:
            for encoder in filter(None, map(partial(getattr, self.pipeline), names)):
                stack.callback(encoder.register_forward_pre_hook(leave).remove)
                stack.callback(encoder.register_forward_hook(come_back, always_call=True).remove)
            yield

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """What the denoiser predicts, (B, C, H, W), with the adapters that are active."""
        return self.family.predict(self.denoiser, noisy_latents, timesteps, embeds)

    def respond(self, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """The same through the distributed wrapper: the one forward of a step that a gradient flows through."""
        return self.family.predict(self.response_denoiser, noisy_latents, timesteps, embeds)

    def to_latents(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, H, W) float32 of pictures (B, 3, H', W') in [-1, 1]; nothing in them is random."""
        return self.family.to_latents(self.pipeline.vae, pixels)

    def lora(self, adapter: str = "default") -> dict[str, Tensor]:
        """The weights of an adapter under PEFT's names."""
        return get_peft_model_state_dict(self.denoiser, adapter_name=adapter)

    def add_teacher(self, state: dict[str, Tensor]) -> None:
        """Add stage 1's LoRA as a second, frozen adapter beside the one in training."""
        denoiser = self.denoiser
        with without_warning("Already found a `peft_config` attribute"):  # a second adapter is what is meant
            denoiser.add_adapter(denoiser.peft_config["default"], STAGE1_ADAPTER)
        denoiser.set_adapter("default")
        train_in_float32(denoiser, STAGE1_ADAPTER)
        set_peft_model_state_dict(denoiser, state, adapter_name=STAGE1_ADAPTER)
        denoiser.eval()  # the new adapter's dropout is on when it is made
        self.adapters = Adapters(denoiser)

    @torch.no_grad()
    def bring_to_zero(self) -> None:
        """Make the LoRA in training the original model again, so that it has nothing to unlearn."""
        for layer in self.adapters.layers:
            layer.lora_B["default"].weight.zero_()
            if layer.use_dora.get("default", False):
                magnitude = layer.lora_magnitude_vector["default"].weight
                norms = layer.get_base_layer().weight.float().flatten(1).norm(dim=1)
                magnitude.copy_(norms.view_as(magnitude))  # that of a convolution has sides of 1 beside its outputs

    @torch.no_grad()
    def scale_lora(self, factor: float) -> None:
        """Make the LoRA in training so many times as strong, by its weights."""
        for layer in self.adapters.layers:
            layer.lora_B["default"].weight.mul_(factor)


@contextmanager
def decoded_without_autocast(vae: AutoencoderKL) -> Iterator[None]:
    """Inside, a VAE decodes in its own dtype, as it does for users, though autocast is on, which would bring it to
    half where that is too little, and its norms to float32, which takes a gigabyte more for 1024 x 1024 pixels.
    """
    decode = vae.decode

    def own(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = own
    try:
        yield
    finally:
        del vae.decode


def load_models(flags: Flags, inputs: Inputs, accelerator: Accelerator) -> Models:
    """The base model on the CPU, frozen, with a new LoRA on its denoiser, or an earlier one that goes on.

    Raises InputError: weights are missing, damaged or a pickle.
    """
    family, model = inputs.family, flags.model
    earlier = flags.lora.stage1_lora_path if inputs.resume is None else inputs.resume.folder
    pipeline = load_base_model(inputs, model, weight_dtype(accelerator))
    denoiser = getattr(pipeline, family.denoiser)
    for name in (family.denoiser, "vae", *family.text_encoders_of(pipeline)):
        getattr(pipeline, name).requires_grad_(False)
    if earlier is None:
        denoiser.add_adapter(lora_config(family, flags.lora, denoiser))
        train_in_float32(denoiser, "default")
    else:
        load_adapter(family, pipeline, earlier)
    if family.sliced_vae:
        pipeline.vae.enable_slicing()
    if model.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if model.enable_xformers_memory_efficient_attention:
        # In self-attention alone: cross-attention is captured, which its kernels cannot be.
        own = denoiser.attn_processors.items()
        processors = {name: XFormersAttnProcessor() if ".attn1." in name else kept for name, kept in own}
        denoiser.set_attn_processor(processors)
    denoiser.eval()  # the LoRA's dropout is on in the training forward alone
    return Models(family, pipeline, accelerator.device)


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """Of the frozen weights."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
