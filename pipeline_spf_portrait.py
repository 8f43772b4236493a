"""Stable Diffusion with a target prompt: the portrait, the original model's own portrait beside it, and the SFCM.

Works as `custom_pipeline` of `DiffusionPipeline.from_pretrained` and as an import. Inference alone.

Paper: arXiv 2504.00396.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils import replace_example_docstring
from torch import Tensor


# As `custom_pipeline` this file and its siblings lie in a package; `import pipeline_spf_portrait` knows no package.
# The loader copies only the siblings named here in this form, those of the siblings too, and would ask users to
# pip-install an "import x" without "as".
try:
    from .attention_processors import original_rows  # noqa: F401
    from .pictures import captioned_pictures  # noqa: F401
    from .prompts import make_prompt_pair  # noqa: F401
    from .sfcm import SFCM_MODES  # noqa: F401
    from .spf_arguments import CALL_DOC, Target
    from .spf_arguments import is_number as _is_number
    from .spf_call import Embeds, SPFCall, SPFPortraitPipelineOutput
    from .spf_call import uncompiled as _uncompiled
    from .spf_observer import RowLayout
    from .wording import find_weights  # noqa: F401
except ImportError:
    import spf_arguments as _arguments
    import spf_call as _call
    import spf_observer as _observer

    CALL_DOC, Target, RowLayout = _arguments.CALL_DOC, _arguments.Target, _observer.RowLayout
    Embeds, SPFCall, SPFPortraitPipelineOutput = _call.Embeds, _call.SPFCall, _call.SPFPortraitPipelineOutput
    _is_number, _uncompiled = _arguments.is_number, _call.uncompiled

EXAMPLE_DOC_STRING = f"""{CALL_DOC}
        Examples:
            ```py
            >>> import torch
            >>> from diffusers import DiffusionPipeline

            >>> pipe = DiffusionPipeline.from_pretrained(
            ...     "stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.float16,
            ...     custom_pipeline="./pipeline_spf_portrait.py", trust_remote_code=True,
            ... ).to("cuda")
            >>> pipe.load_lora_weights("spf-portrait-lora")
            >>> output = pipe(
            ...     "a woman, a brown jacket, a curtain background", target_prompt="blonde hair",
            ...     compare=True, return_sfcm=True, generator=torch.Generator().manual_seed(0),
            ... )
            >>> output.images[0].save("portrait.png"), output.reference_images[0].save("original_model.png")
            >>> pipe.visualize(output).save("where.png")

            >>> # a phrase of the prompt replaced by the target
            >>> image = pipe("a woman in a T-shirt", target_prompt=("a T-shirt", "a red dress")).images[0]

            >>> # a LoRA of any trainer, kept to the region of its target
            >>> pipe.load_lora_weights("someone/a-plain-lora")
            >>> image = pipe(
            ...     "a woman, a brown jacket", target_prompt="blonde hair",
            ...     sfcm_guidance=1.0, adapter_in_unconditional=False, target_scale=0.75,
            ... ).images[0]
            ```
"""


def _lora_layer(key: str) -> tuple[str, str] | None:
    """The layer that a LoRA's matrix belongs to and its side, "A" or "B"; None for other tensors.

    diffusers knows three names for one matrix: PEFT's, its own, and an older one, into which it turns kohya's format.
    """
    match = re.fullmatch(r"(.+?)(?:\.lora_(A|B)|(\.lora|\.lora_linear_layer|_lora)\.(down|up))\.weight", key)
    if match is None:
        return None
    path = match[1].replace(".processor.", ".").replace("text_encoder.text_model.", "text_encoder.")
    if match[3] == "_lora":
        path = path.replace(".self_attn.to_out", ".self_attn.out_proj").replace(".to_out", ".to_out.0")
        path = re.sub(r"\.self_attn\.to_(q|k|v)$", r".self_attn.\1_proj", path)
    return path, match[2] or {"down": "A", "up": "B"}[match[4]]


def _features(layer: torch.nn.Module | None) -> tuple[int, int] | None:
    """Inputs and outputs of a layer with weights, of which quantized ones do not tell them; None for other modules."""
    if getattr(layer, "weight", None) is None:
        return None
    for inputs, outputs in (("in_features", "out_features"), ("in_channels", "out_channels")):
        if hasattr(layer, inputs):
            return getattr(layer, inputs), getattr(layer, outputs)
    return None


def _check_lora_values(
    name: str, layers: dict[str, Tensor], alphas: dict[str, float] | None, metadata: dict[str, Any] | None
) -> None:
    """Raise a ValueError if a LoRA holds numbers that are none, or what the stock loader takes for something else."""
    embedding = next((key for key in layers if key.startswith("bundle_emb.")), None)
    if embedding is not None:
        raise ValueError(
            f"{name} holds a textual inversion beside its layers ({embedding!r}), and diffusers reads none of both: "
            "export_spf_portrait_lora.py writes the LoRA without it."
        )
    for key, tensor in layers.items():
        values = tensor.float()
        if not values.isfinite().all():
            kind = "NaN" if values.isnan().any() else "infinite"
            raise ValueError(f"{name}: its weights are not numbers ({kind}) in layer {key}")
    given = dict(alphas or {})
    for model in {key.partition(".")[0] for key in layers} if metadata else ():
        # PEFT would have numbers of its own.
        missing = [key for key in ("r", "lora_alpha", "target_modules") if metadata.get(f"{model}.{key}") is None]
        if missing:
            raise ValueError(f"{name}: its metadata tells no {' and no '.join(missing)} of the {model}'s layers.")
        given |= {f"{model} (all)": metadata[f"{model}.lora_alpha"], **(metadata.get(f"{model}.alpha_pattern") or {})}
    for key, alpha in given.items():
        if not _is_number(alpha):
            raise ValueError(f"{name}: its alpha is not a number ({alpha!r}) in layer {key}")


@contextmanager
def _without_false_alarms() -> Iterator[None]:
    """Inside, nothing is said of what is no fault in a LoRA that was checked: no part of it is for the text encoder,
    or there is an earlier one beside it."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")

    speaker = logging.getLogger("diffusers.loaders.lora_base")
    speaker.addFilter(other)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            yield
    finally:
        speaker.removeFilter(other)


def _check_lora_fits(name: str, layers: dict[str, Tensor], models: dict[str, torch.nn.Module | None]) -> None:
    """Raise a ValueError if a LoRA's layers, by their names in diffusers' format, are not those of the models."""
    advice = "load it with a pipeline of the model it was trained on."
    modules = {
        f"{prefix}.{path}".replace(".base_layer", ""): module
        for prefix, model in models.items()
        if model is not None
        for path, module in _uncompiled(model).named_modules()
    }
    matrices = {place: value for key, value in layers.items() if (place := _lora_layer(key)) is not None}
    if not matrices:
        raise ValueError(f"{name} has no LoRA layer that is known here: {advice}")
    for path in dict.fromkeys(path for path, _ in matrices):
        features = _features(modules.get(path))
        if features is None:
            raise ValueError(f"{name} is for another architecture: there is no layer {path}; {advice}")
        down, up = (matrices.get((path, side)) for side in "AB")
        for matrix, side, other in zip((down, up), (1, 0), features):
            own = other if matrix is None else matrix.shape[side]
            if own != other:
                raise ValueError(
                    f"{name} is for another architecture: {path} has {own} features, not {other}; {advice}"
                )
        if down is None or up is None or down.shape[0] != up.shape[1]:
            raise ValueError(f"{name} is damaged: the two matrices of {path} do not belong together.")


@contextmanager
def _text_model_of_its_own(text_encoder: torch.nn.Module | None) -> Iterator[None]:
    """Inside, a text encoder has a `text_model`: the stock `clip_skip` takes the last norm from there.

    transformers 5 puts the norm on the text encoder itself.
    """
    if text_encoder is None or hasattr(text_encoder, "text_model"):
        yield
        return
    # Past Module's own bookkeeping, in which a module may not hold itself.
    object.__setattr__(text_encoder, "text_model", text_encoder)
    try:
        yield
    finally:
        object.__delattr__(text_encoder, "text_model")


class SPFPortraitPipeline(SPFCall, StableDiffusionPipeline):
    """Text-to-portrait generation with an SPF-Portrait LoRA (any LoRA, or none).

    Components, loading, saving and all that is not named below are [`StableDiffusionPipeline`]'s. A call that uses
    none of the arguments below is the stock call, to the bit.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (the stock default)
        target_prompt: Target | list[Target] | dict[str, Target] | None = None,
        base_phrases: list[str] | list[list[str]] | None = None,
        free_phrases: list[str] | list[list[str]] | None = None,
        target_scale: float | list[float] | dict[str, float] | None = None,
        compare: bool = False,
        return_sfcm: bool | str = False,
        sfcm_mode: str = "averaged_target",
        sfcm_guidance: float = 0.0,
        sfcm_guidance_exponent: float = 2.0,
        adapter_in_unconditional: bool = True,
        **kwargs,
    ) -> SPFPortraitPipelineOutput | StableDiffusionPipelineOutput | tuple:
        r"""
        Draw portraits.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts; the *base* prompt where there is a target.
            height to callback_on_step_end_tensor_inputs, and others:
                As in [`StableDiffusionPipeline`].
        Examples:
        """
        arguments = locals() | kwargs
        return self._draw(**{name: value for name, value in arguments.items() if name not in ("self", "kwargs")})

    def encode_prompt(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Encode prompts as [`StableDiffusionPipeline`] does, `clip_skip` included."""
        with _text_model_of_its_own(self.text_encoder):
            return super().encode_prompt(*args, **kwargs)

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | dict[str, Tensor], adapter_name: str | None = None, **kwargs
    ) -> None:
        """Load a LoRA as [`StableDiffusionPipeline`] does, in diffusers' or kohya's format, but none that fits not.

        Args:
            pretrained_model_name_or_path_or_dict (`str` or `dict`):
                A file, a folder, an id of the Hub, or a state dict.
            adapter_name (`str`, *optional*):
                Under which it is switched on and off.
            kwargs:
                As in [`StableDiffusionPipeline`].

        Raises:
            `ValueError`: it is for another architecture, damaged, or has numbers that are none; nothing was loaded.
        """
        given = pretrained_model_name_or_path_or_dict
        weights = dict(given) if isinstance(given, dict) else given
        layers, alphas, metadata = self.lora_state_dict(weights, return_lora_metadata=True, **kwargs)
        name = "The LoRA" if isinstance(given, dict) else f"The LoRA {given}"
        if kwargs.get("weight_name") is not None:
            name += f"/{kwargs['weight_name']}"
        _check_lora_values(name, layers, alphas, metadata)
        _check_lora_fits(name, layers, {"unet": self.unet, "text_encoder": self.text_encoder})
        with _without_false_alarms():
            super().load_lora_weights(given, adapter_name=adapter_name, **kwargs)

    def _encode(
        self, prompts: str | list[str] | None, guided: bool, stock: dict[str, Any]
    ) -> tuple[Embeds, Embeds | None]:
        embeds, negative_embeds = self.encode_prompt(
            prompts,
            self._execution_device,
            stock["num_images_per_prompt"],
            guided,
            stock["negative_prompt"],
            prompt_embeds=stock["prompt_embeds"],
            negative_prompt_embeds=stock["negative_prompt_embeds"],
            lora_scale=(stock["cross_attention_kwargs"] or {}).get("scale"),
            clip_skip=stock["clip_skip"],
        )
        return (embeds,), (negative_embeds,) if guided else None

    def _stock_prompts(self, embeds: Embeds, negatives: Embeds | None) -> dict[str, Any]:
        return {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": None if negatives is None else negatives[0],
            "negative_prompt": None,
        }

    def _extra_rows(
        self, args: tuple, kwargs: dict[str, Any], rows: RowLayout, own: Embeds, appended: Sequence[Embeds]
    ) -> tuple[tuple, dict[str, Any]]:
        (sample, *others), states = args, kwargs["encoder_hidden_states"]
        # diffusers' SDCFGCutoffCallback leaves one row of the prompts, taking it for that of the only image.
        states = own[0] if len(states) < len(sample) else states
        kwargs["encoder_hidden_states"] = torch.cat([states, *(embeds[0] for embeds in appended)])
        if kwargs.get("timestep_cond") is not None:
            kwargs["timestep_cond"] = rows.append(kwargs["timestep_cond"])
        if kwargs.get("added_cond_kwargs") is not None:
            images = kwargs["added_cond_kwargs"]["image_embeds"]
            kwargs["added_cond_kwargs"] = {"image_embeds": [rows.append(embeds) for embeds in images]}
        return (rows.append(sample), *others), kwargs
