"""Stable Diffusion XL with a target prompt: the portrait, the original model's own portrait beside it, and the SFCM.

Works as `custom_pipeline` of `DiffusionPipeline.from_pretrained` and as an import. Inference alone.

Paper: arXiv 2504.00396.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
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
    from .spf_arguments import CALL_DOC  # noqa: F401
    from .spf_call import SPFCall  # noqa: F401
    from .spf_lora import LoraPipeline  # noqa: F401
    from .spf_observer import Observer  # noqa: F401
    from .wording import find_weights  # noqa: F401
except ImportError:
    import spf_arguments as spf_arguments
    import spf_call as spf_call
    import spf_observer as spf_observer

Embeds, Target, Request = spf_call.Embeds, spf_arguments.Target, spf_arguments.Request
Phrases, RowLayout = spf_observer.Phrases, spf_observer.RowLayout
SPFPortraitPipelineOutput = spf_call.SPFPortraitPipelineOutput
EXAMPLE_DOC_STRING = f"""{spf_arguments.CALL_DOC}
        Examples:
            ```py
            >>> import torch
            >>> from diffusers import DiffusionPipeline

            >>> pipe = DiffusionPipeline.from_pretrained(
            ...     "stabilityai/stable-diffusion-xl-base-1.0", dtype=torch.float16, add_watermarker=False,
            ...     custom_pipeline="./pipeline_spf_portrait_xl.py", trust_remote_code=True,
            ... ).to("cuda")
            >>> pipe.load_lora_weights("spf-portrait-lora-xl")
            >>> output = pipe(
            ...     "a woman, a brown jacket, a curtain background", target_prompt="blonde hair",
            ...     compare=True, return_sfcm=True, generator=torch.Generator().manual_seed(0),
            ... )
            >>> output.images[0].save("portrait.png"), output.reference_images[0].save("original_model.png")
            >>> pipe.visualize(output).save("where.png")
            ```
"""


class SPFPortraitXLPipeline(spf_call.SPFCall, StableDiffusionXLPipeline):
    """Text-to-portrait generation with an SPF-Portrait LoRA for Stable Diffusion XL (any LoRA, or none).

    Components, loading, saving and all that is not named below are [`StableDiffusionXLPipeline`]'s. A call that uses
    none of the arguments below is the stock call, to the bit.
    """

    _tokenizers = ("tokenizer", "tokenizer_2")
    _clip = ("text_encoder_2", "tokenizer_2")  # the one with a projection, whose pooled embeddings the UNet is told

    @wraps(StableDiffusionXLPipeline.__init__)  # from which diffusers reads the components
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.unet is None:
            return
        spf_call.check_family(self.unet, spf_call.XL)
        if self.text_encoder_2 is not None:
            unet, pooled = self.unet.config, self.text_encoder_2.config.projection_dim
            count = (unet.projection_class_embeddings_input_dim - pooled) / unet.addition_time_embed_dim
            if count != 6:
                raise ValueError(
                    f"The UNet takes {count:g} numbers about a picture's size instead of 6, as Stable Diffusion XL's "
                    "refiner does, which only goes over pictures: use the base model."
                )

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
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
    ) -> SPFPortraitPipelineOutput | StableDiffusionXLPipelineOutput | tuple:
        r"""
        Draw portraits.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts; the *base* prompt where there is a target.
            prompt_2 (`str` or `list[str]`, *optional*):
                As in [`StableDiffusionXLPipeline`]; with `target_prompt` or `return_sfcm` no other than `prompt`.
            negative_original_size, negative_target_size (`tuple[int, int]`, *optional*):
                As in [`StableDiffusionXLPipeline`], which mixes up the rows of several images. With `compare`,
                `return_sfcm`, `sfcm_guidance` or without `adapter_in_unconditional` each row has its own.
            height to callback_on_step_end_tensor_inputs, and others:
                As in [`StableDiffusionXLPipeline`].
        Examples:
        """
        arguments = locals() | kwargs
        # As the stock call does, so that all that is computed beside it knows the size.
        side = self.default_sample_size * self.vae_scale_factor
        arguments |= {"height": height or side, "width": width or side}
        if prompt is not None and (prompt_2 in (prompt, [prompt]) or [prompt_2] == prompt):
            arguments["prompt_2"] = None
        return self._draw(**{name: value for name, value in arguments.items() if name not in ("self", "kwargs")})

    def _compose(
        self, prompt: str | list[str] | None, request: Request, stock: dict[str, Any]
    ) -> tuple[list[str] | None, list[Target], Phrases | None, int]:
        if stock["prompt_2"] and (request.target_prompt is not None or request.return_sfcm):
            raise ValueError(
                "`target_prompt` and `return_sfcm` are about one text for both text encoders: leave out `prompt_2`, "
                f"which is {stock['prompt_2']!r}."
            )
        return super()._compose(prompt, request, stock)

    def _lora_options(self) -> dict[str, Any]:
        return {"unet_config": self.unet.config}  # without it "input_blocks" and the like stay as they are

    def _encode(
        self, prompts: str | list[str] | None, guided: bool, stock: dict[str, Any]
    ) -> tuple[Embeds, Embeds | None]:
        given = (
            "negative_prompt", "negative_prompt_2", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds", "clip_skip",
        )  # fmt: skip
        states, negative_states, pooled, negative_pooled = self.encode_prompt(
            prompts, stock["prompt_2"], self._execution_device, stock["num_images_per_prompt"], guided,
            lora_scale=(stock["cross_attention_kwargs"] or {}).get("scale"), **{name: stock[name] for name in given},
        )  # fmt: skip
        return (states, pooled), (negative_states, negative_pooled) if guided else None

    def _stock_prompts(self, embeds: Embeds, negatives: Embeds | None) -> dict[str, Any]:
        (states, pooled), (negative_states, negative_pooled) = embeds, negatives or (None, None)
        texts = dict.fromkeys(("prompt_2", "negative_prompt", "negative_prompt_2"))
        return texts | {
            "prompt_embeds": states, "pooled_prompt_embeds": pooled, "negative_prompt_embeds": negative_states,
            "negative_pooled_prompt_embeds": negative_pooled,
        }  # fmt: skip

    def _extra_rows(
        self, args: tuple, kwargs: dict[str, Any], rows: RowLayout, own: Embeds, appended: Sequence[Embeds],
        closed: bool, stock: dict[str, Any],
    ) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
        (sample, *others), added = args, dict(kwargs["added_cond_kwargs"])
        states, pooled, sizes = kwargs["encoder_hidden_states"], added["text_embeds"], added["time_ids"]
        ended = len(states) < len(sample)  # diffusers' SDXLCFGCutoffCallback leaves one row of each
        if closed or ended:
            states, pooled = (embeds[-len(sample) :] for embeds in own)
        # The stock call repeats the pair of negative and positive sizes, where its rows are all of the one and then
        # all of the other.
        if ended or (stock["negative_original_size"] is not None and stock["negative_target_size"] is not None):
            negatives = sizes[:1].expand(len(sample) - rows.branch, -1)
            sizes = torch.cat([negatives, sizes[-1:].expand(rows.branch, -1)])
        kwargs["encoder_hidden_states"] = torch.cat([states, *(embeds[0] for embeds in appended)])
        added["text_embeds"] = torch.cat([pooled, *(embeds[1] for embeds in appended)])
        added["time_ids"] = rows.append(sizes)
        if "image_embeds" in added:
            added["image_embeds"] = [rows.append(embeds) for embeds in added["image_embeds"]]
        if kwargs.get("timestep_cond") is not None:
            kwargs["timestep_cond"] = rows.append(kwargs["timestep_cond"])
        return (rows.append(sample), *others), kwargs | {"added_cond_kwargs": added}
