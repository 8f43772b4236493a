"""The models of a training run: loaded from safetensors alone, the LoRA on the UNet, and what lies on the device.

Legend: B batch, C channels, H/W latent size, T text tokens, E size of a text embedding.
Source: [ours].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import XFormersAttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from adapters import Adapters
from attention_processors import CrossAttentionCapture, find_cross_attention_layers
from loras.files import ReferenceLora, find_lora, load_lora, merge_loras, read_lora
from programs.console import without_warning
from programs.loading import cast_models, load_pipeline, naming_flag
from sfcm import epsilon_scale
from training.flags import LoraFlags, ModelFlags
from training.prompt_table import PromptTable, encode_prompts


STAGE1_ADAPTER = "stage1"


def load_base_model(
    pipeline_class: type[StableDiffusionPipeline],
    args: ModelFlags,
    weight_dtype: torch.dtype,
    references: Sequence[ReferenceLora] = (),
) -> StableDiffusionPipeline:
    """The base model, with the VAE and the prediction type of the flags, and earlier LoRAs merged into its weights."""
    # Merged in half precision, small changes would be rounded away, and the sum be another than side by side.
    dtype = torch.float32 if references else weight_dtype
    parts, vae = {}, args.pretrained_vae_model_name_or_path
    if vae is not None:
        with naming_flag("pretrained_vae_model_name_or_path", vae):
            parts["vae"] = AutoencoderKL.from_pretrained(
                vae, dtype=dtype, cache_dir=args.cache_dir, use_safetensors=True
            )
    pipeline = load_pipeline(
        pipeline_class,
        args.pretrained_model_name_or_path,
        dtype,
        "pretrained_model_name_or_path",
        revision=args.revision,
        cache_dir=args.cache_dir,
        variant=args.variant,
        safety_checker=None,
        requires_safety_checker=False,
        **parts,
    )
    if references:
        with naming_flag("reference_lora", " ".join(reference.name for reference in references)):
            merge_loras(pipeline, [str(lora.path) for lora in references], [lora.scale for lora in references])
        cast_models(pipeline, weight_dtype)
    if args.prediction_type is not None:
        config = pipeline.scheduler.config
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, prediction_type=args.prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def load_adapter(pipeline: StableDiffusionPipeline, path: str | Path) -> None:
    """Load the LoRA in a file or folder as the one in training, with the rank, alpha, layers and numbers it has."""
    unet = pipeline.unet
    load_lora(pipeline, str(path), "default")
    keep_in_float32(unet, "default")
    # PEFT has rounded it to the dtype of the layers it was added to.
    for name, layer in read_lora(find_lora(str(path)))["unet"].items():
        module = unet.get_submodule(name)
        module.lora_A["default"].weight.copy_(layer.down)
        module.lora_B["default"].weight.copy_(layer.up)
        if layer.magnitude is not None:
            magnitude = module.lora_magnitude_vector["default"].weight
            magnitude.copy_(layer.magnitude.view_as(magnitude))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def keep_in_float32(unet: UNet2DConditionModel, adapter_name: str) -> None:
    """Bring an adapter to float32, which PEFT gives the dtype of the layers it is added to."""
    for name, parameter in unet.named_parameters():
        if ".lora_" in name and f".{adapter_name}" in name:
            # A copy: what was loaded may be a view into its file, which a checkpoint has to let go of.
            parameter.data = parameter.data.to(torch.float32, copy=True)


def use_xformers(unet: UNet2DConditionModel) -> None:
    """xformers in self-attention; cross-attention is captured, which its kernels cannot be."""
    processors = {
        name: XFormersAttnProcessor() if ".attn1." in name else processor
        for name, processor in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)


def lora_config(args: LoraFlags, unet: UNet2DConditionModel) -> LoraConfig:
    """LoRA on the projections of the cross-attention layers, of all attention layers, or on the layers named."""
    targets = args.lora_layers
    if targets is None:
        names = list(find_cross_attention_layers(unet))
        if args.lora_target == "all":
            names += [name.removesuffix("attn2") + "attn1" for name in names]
        targets = [f"{name}.{projection}" for name in names for projection in ("to_q", "to_k", "to_v", "to_out.0")]
    return LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_dora=args.use_dora,
        init_lora_weights="gaussian",
        target_modules=targets,
    )


class Models:
    """The base model with the LoRA in training, the teacher once there is one, and what of them lies on the device.

    Attributes:
        pipeline: draws with the models as they are.
        unet: its UNet, with the adapter "default", which is trained.
        response_unet: the distributed wrapper of `unet`, or `unet` itself.
        noise_scheduler: adds noise in training.
        adapters, capture: switch the adapters, and capture the cross-attention, of `unet`.
        device: where steps are computed.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, noise_scheduler: DDPMScheduler, device: torch.device
    ) -> None:
        self.pipeline, self.unet, self.response_unet = pipeline, pipeline.unet, pipeline.unet
        self.noise_scheduler, self.device = noise_scheduler, device
        self.adapters, self.capture = Adapters(pipeline.unet), CrossAttentionCapture(pipeline.unet)
        self._released: tuple[str, ...] = ()

    def release(self, names: Sequence[str]) -> None:
        """Take models that no step uses off the device; for pictures they come back, see `resident`."""
        self._released = tuple(names)
        for name in names:
            getattr(self.pipeline, name).to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Inside, all of the pipeline's models lie on the device."""
        try:
            for name in self._released:
                getattr(self.pipeline, name).to(self.device)
            yield
        finally:
            for name in self._released:
                getattr(self.pipeline, name).to("cpu")

    def embeds(self, table: PromptTable, rows: torch.Tensor) -> torch.Tensor:
        """Text embeddings (B, T, E) of the table's prompts `rows` (B,)."""
        return encode_prompts(table, rows, self.pipeline.text_encoder)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings (U, T, E) of prompts of tokens `ids` (U, T)."""
        return self.pipeline.text_encoder(ids.to(self.device))[0]

    def both_embeds(self, table: PromptTable, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the reference and of the response prompt of table rows (B,)."""
        return self.embeds(table, table.reference_rows[rows]), self.embeds(table, table.response_rows[rows])

    def predict(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """What the UNet predicts, (B, C, H, W), with the adapters that are active."""
        return self.unet(noisy_latents, timesteps, embeds, return_dict=False)[0]

    def respond(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """The same through the distributed wrapper: the one forward of a step that a gradient flows through."""
        return self.response_unet(noisy_latents, timesteps, embeds, return_dict=False)[0]

    def epsilon_scale(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Factors (B,) that make a difference of predictions one of predicted noise, whatever the UNet predicts."""
        scheduler = self.noise_scheduler
        return epsilon_scale(scheduler.alphas_cumprod, timesteps, scheduler.config.prediction_type)

    def lora(self, adapter: str = "default") -> dict[str, torch.Tensor]:
        """The weights of an adapter under PEFT's names."""
        return get_peft_model_state_dict(self.unet, adapter_name=adapter)

    @property
    def has_teacher(self) -> bool:
        """Whether the LoRA of stage 1 is there as a second adapter."""
        return STAGE1_ADAPTER in self.unet.peft_config

    def add_teacher(self, state: dict[str, torch.Tensor]) -> None:
        """Add stage 1's LoRA as a second, frozen adapter beside the one in training."""
        unet = self.unet
        with without_warning("Already found a `peft_config` attribute"):  # a second adapter is what is meant
            unet.add_adapter(unet.peft_config["default"], STAGE1_ADAPTER)
        keep_in_float32(unet, STAGE1_ADAPTER)
        set_peft_model_state_dict(unet, state, adapter_name=STAGE1_ADAPTER)
        unet.set_adapter("default")
        unet.eval()  # the new adapter's dropout is on when it is made
        self.adapters = Adapters(unet)
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(".lora_" in name and f".{STAGE1_ADAPTER}." not in name)

    @torch.no_grad()
    def bring_to_zero(self) -> None:
        """Make the LoRA in training the original model again.

        Started from there it has nothing to unlearn: it is the original model until it is shown more.
        """
        for layer in self.adapters.layers:
            layer.lora_B["default"].weight.zero_()
            if layer.use_dora.get("default", False):
                magnitude = layer.lora_magnitude_vector["default"].weight
                norms = layer.get_base_layer().weight.float().flatten(1).norm(dim=1)
                magnitude.copy_(norms.view_as(magnitude))  # that of a convolution has sides of 1 beside its outputs


def load_models(
    pipeline_class: type[StableDiffusionPipeline],
    model: ModelFlags,
    lora: LoraFlags,
    accelerator: Accelerator,
    references: Sequence[ReferenceLora],
    earlier: str | Path | None,
) -> Models:
    """The base model on the device, frozen, with a new LoRA on its UNet, or an earlier one that goes on.

    Args:
        pipeline_class: of the pipeline.
        model, lora: the flags.
        accelerator: knows device and precision.
        references: earlier LoRAs to merge into the base model.
        earlier: file or folder of the LoRA that goes on.

    Raises:
        InputError: weights are missing, damaged or a pickle.
    """
    pipeline = load_base_model(pipeline_class, model, weight_dtype(accelerator), references).to(accelerator.device)
    unet = pipeline.unet
    for module in (unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False)
    if earlier is None:
        unet.add_adapter(lora_config(lora, unet))
    else:
        load_adapter(pipeline, earlier)
    keep_in_float32(unet, "default")
    if model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if model.enable_xformers_memory_efficient_attention:
        use_xformers(unet)
    unet.eval()  # the LoRA's dropout is on in the training forward alone
    return Models(pipeline, DDPMScheduler.from_config(pipeline.scheduler.config), accelerator.device)


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """Of the frozen weights."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
