"""Stable Diffusion with a target prompt: the portrait, the original model's own portrait beside it, and the SFCM.

Works as `custom_pipeline` of `DiffusionPipeline.from_pretrained` and as an import. Inference alone.

Paper: arXiv 2504.00396.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
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
    from . import spf_arguments, spf_call, spf_observer
    from .adapters import original_rows  # noqa: F401
    from .attention_processors import capture_cross_attention  # noqa: F401
    from .lora_layers import check_loadable  # noqa: F401
    from .pictures import captioned_pictures  # noqa: F401
    from .prompts import make_prompt_pair  # noqa: F401
    from .region_guidance import keep_to_region  # noqa: F401
    from .sfcm import SFCM_MODES  # noqa: F401
    from .spf_arguments import Request  # noqa: F401
    from .spf_call import SPFCall  # noqa: F401
    from .spf_lora import LoraPipeline  # noqa: F401
    from .spf_observer import Observer  # noqa: F401
    from .wording import find_weights  # noqa: F401
except ImportError:
    import spf_arguments as spf_arguments
    import spf_call as spf_call
    import spf_observer as spf_observer

Embeds, Target, RowLayout = spf_call.Embeds, spf_arguments.Target, spf_observer.RowLayout
SPFPortraitPipelineOutput = spf_call.SPFPortraitPipelineOutput
EXAMPLE_DOC_STRING = f"""{spf_arguments.CALL_DOC}
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


class SPFPortraitPipeline(spf_call.SPFCall, StableDiffusionPipeline):
    """Text-to-portrait generation with an SPF-Portrait LoRA (any LoRA, or none).

    Components, loading, saving and all that is not named below are [`StableDiffusionPipeline`]'s. A call that uses
    none of the arguments below is the stock call, to the bit.
    """

    @wraps(StableDiffusionPipeline.__init__)  # from which diffusers reads the components
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        spf_call.check_family(self.unet, spf_call.FIRST)

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
        sfcm_guidance_start: float | None = None,
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
        with ExitStack() as stack:
            # The stock `clip_skip` takes the last norm from a `text_model`, and transformers 5 puts it on the encoder.
            if self.text_encoder is not None and not hasattr(self.text_encoder, "text_model"):
                # Past Module's own bookkeeping, in which a module may not hold itself.
                object.__setattr__(self.text_encoder, "text_model", self.text_encoder)
                stack.callback(object.__delattr__, self.text_encoder, "text_model")
            return super().encode_prompt(*args, **kwargs)

    def _encode(
        self, prompts: str | list[str] | None, guided: bool, stock: dict[str, Any]
    ) -> tuple[Embeds, Embeds | None]:
        embeds, negative_embeds = self.encode_prompt(
            prompts, self._execution_device, stock["num_images_per_prompt"], guided, stock["negative_prompt"],
            prompt_embeds=stock["prompt_embeds"], negative_prompt_embeds=stock["negative_prompt_embeds"],
            lora_scale=(stock["cross_attention_kwargs"] or {}).get("scale"), clip_skip=stock["clip_skip"],
        )  # fmt: skip
        return (embeds,), (negative_embeds,) if guided else None

    def _stock_prompts(self, embeds: Embeds, negatives: Embeds | None) -> dict[str, Any]:
        return {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": None if negatives is None else negatives[0],
            "negative_prompt": None,
        }

    def _extra_rows(
        self, args: tuple, kwargs: dict[str, Any], rows: RowLayout, own: Embeds, appended: Sequence[Embeds],
        closed: bool, stock: dict[str, Any],
    ) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
        (sample, *others), states = args, kwargs["encoder_hidden_states"]
        # diffusers' SDCFGCutoffCallback leaves one row of the prompts, taking it for that of the only image.
        states = own[0][-len(sample) :] if closed or len(states) < len(sample) else states
        kwargs["encoder_hidden_states"] = torch.cat([states, *(embeds[0] for embeds in appended)])
        if kwargs.get("timestep_cond") is not None:
            kwargs["timestep_cond"] = rows.append(kwargs["timestep_cond"])
        if kwargs.get("added_cond_kwargs") is not None:
            images = kwargs["added_cond_kwargs"]["image_embeds"]
            kwargs["added_cond_kwargs"] = {"image_embeds": [rows.append(embeds) for embeds in images]}
        return (rows.append(sample), *others), kwargs
