"""Stable Diffusion 3 and 3.5 with a target prompt: the portrait, the original model's own portrait beside it, and the
SFCM.

Works as `custom_pipeline` of `DiffusionPipeline.from_pretrained` and as an import. Inference alone.

Paper: arXiv 2504.00396; what names no source is [ours].
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_3 import StableDiffusion3PipelineOutput
from diffusers.utils import replace_example_docstring
from torch import Tensor


# As `custom_pipeline` this file and its siblings lie in a package; `import pipeline_spf_portrait` knows no package.
# The loader copies only the siblings named here in this form, those of the siblings too, and would ask users to
# pip-install an "import x" without "as".
try:
    from . import joint_attention, prompts, spf_arguments, spf_call, spf_observer
    from .adapters import original_rows  # noqa: F401
    from .attention_processors import capture_cross_attention  # noqa: F401
    from .joint_attention import capture_joint_attention  # noqa: F401
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
    import joint_attention as joint_attention
    import prompts as prompts
    import spf_arguments as spf_arguments
    import spf_call as spf_call
    import spf_observer as spf_observer

Embeds, Target, Request = spf_call.Embeds, spf_arguments.Target, spf_arguments.Request
Phrases, RowLayout = spf_observer.Phrases, spf_observer.RowLayout
SPFPortraitPipelineOutput = spf_call.SPFPortraitPipelineOutput
# Of pure noise, where every run begins, `1 - sigma` is 0; the least signal is as in `sfcm.epsilon_scale`.
LEAST_SIGNAL = 2**-12
EXAMPLE_DOC_STRING = f"""{spf_arguments.CALL_DOC}
        Examples:
            ```py
            >>> import torch
            >>> from diffusers import DiffusionPipeline

            >>> pipe = DiffusionPipeline.from_pretrained(
            ...     "stabilityai/stable-diffusion-3.5-medium", dtype=torch.bfloat16,
            ...     custom_pipeline="./pipeline_spf_portrait_3.py", trust_remote_code=True,
            ... ).to("cuda")
            >>> pipe.load_lora_weights("spf-portrait-lora-3")
            >>> output = pipe(
            ...     "a woman, a brown jacket, a curtain background", target_prompt="blonde hair",
            ...     compare=True, return_sfcm=True, generator=torch.Generator().manual_seed(0),
            ... )
            >>> output.images[0].save("portrait.png"), output.reference_images[0].save("original_model.png")
            >>> pipe.visualize(output).save("where.png")
            ```
"""


class SPFPortrait3Pipeline(spf_call.SPFCall, StableDiffusion3Pipeline):
    """Text-to-portrait generation with an SPF-Portrait LoRA for Stable Diffusion 3 or 3.5 (any LoRA, or none).

    Components, loading, saving and all that is not named below are [`StableDiffusion3Pipeline`]'s. A call that uses
    none of the arguments below is the stock call, to the bit. T5, `text_encoder_3` and `tokenizer_3`, may be None.
    """

    _denoiser_name = "transformer"
    _tokenizers = ("tokenizer", "tokenizer_2")  # T5's text stands behind that of both
    _clip = ("text_encoder_2", "tokenizer_2")
    _capture = staticmethod(joint_attention.capture_joint_attention)

    @wraps(StableDiffusion3Pipeline.__init__)  # from which diffusers reads the components
    def __init__(self, *args, **kwargs) -> None:
        # Before the stock one, which asks the transformer for what only this family's has.
        spf_call.check_family(args[0] if args else kwargs.get("transformer"), spf_call.THIRD)
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (the stock default)
        max_sequence_length: int | None = None,
        skip_guidance_layers: list[int] = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_start: float = 0.01,
        mu: float | None = None,
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
    ) -> SPFPortraitPipelineOutput | StableDiffusion3PipelineOutput | tuple:
        r"""
        Draw portraits.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts; the *base* prompt where there is a target.
            prompt_2, prompt_3 (`str` or `list[str]`, *optional*):
                As in [`StableDiffusion3Pipeline`]; with `target_prompt` or `return_sfcm` no other than `prompt`.
            max_sequence_length (`int`, *optional*):
                Of T5's text, in tokens. 256 as in [`StableDiffusion3Pipeline`] if not given, or fewer where
                `tokenizer_3` knows fewer.
            ip_adapter_image, ip_adapter_image_embeds, skip_guidance_layers:
                As in [`StableDiffusion3Pipeline`], but neither with `compare`, `return_sfcm`, `sfcm_guidance` or
                `sfcm_guidance_start`, nor without `adapter_in_unconditional`.
            height to mu, and others:
                As in [`StableDiffusion3Pipeline`].
        Examples:
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        # As the stock call does, so that all that is computed beside it knows the size.
        side = self.default_sample_size * self.vae_scale_factor
        arguments |= {"height": height or side, "width": width or side}
        if max_sequence_length is None:
            longest = 256 if self.tokenizer_3 is None else self.tokenizer_3.model_max_length
            arguments["max_sequence_length"] = min(256, longest)
        for name in ("prompt_2", "prompt_3"):
            other = arguments[name]
            if prompt is not None and (other in (prompt, [prompt]) or [other] == prompt):
                arguments[name] = None
        return self._draw(**arguments)

    def _compose(
        self, prompt: str | list[str] | None, request: Request, stock: dict[str, Any]
    ) -> tuple[list[str] | None, list[Target], Phrases | None, int]:
        for name in ("prompt_2", "prompt_3"):
            if stock[name] and (request.target_prompt is not None or request.return_sfcm):
                raise ValueError(
                    "`target_prompt` and `return_sfcm` are about one text for all text encoders: leave out "
                    f"`{name}`, which is {stock[name]!r}."
                )
        if request.splits_rows:
            beside = "`compare`, `return_sfcm`, `sfcm_guidance`, `sfcm_guidance_start` or `adapter_in_unconditional`"
            if stock["skip_guidance_layers"] is not None:
                raise ValueError(
                    f"`skip_guidance_layers` does not go with {beside}: its second call in a step knows one row for "
                    "each picture."
                )
            if any(stock[f"ip_adapter_{name}"] is not None for name in ("image", "image_embeds")):
                raise ValueError(
                    f"An IP-Adapter's picture does not go with {beside}: the transformer is told it in a form of its "
                    "own, which has no further rows."
                )
        if request.compare and _draws_noise(self.scheduler):
            raise ValueError(
                f"`compare` is about one noise, and this {type(self.scheduler).__name__} draws more of it at each "
                "step, without a generator: use one that draws none, such as FlowMatchEulerDiscreteScheduler."
            )
        return super()._compose(prompt, request, stock)

    def _locate(self, pair: prompts.PromptPair, stock: dict[str, Any]) -> prompts.PromptTokens:
        behind = None if self.text_encoder_3 is None else self.tokenizer_3
        return prompts.locate_in_two_parts(pair, self._text_tokenizers(), behind, stock["max_sequence_length"])

    def _encode(
        self, prompts: str | list[str] | None, guided: bool, stock: dict[str, Any]
    ) -> tuple[Embeds, Embeds | None]:
        given = (
            "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3", "prompt_embeds",
            "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "clip_skip",
            "max_sequence_length", "num_images_per_prompt",
        )  # fmt: skip
        states, negative_states, pooled, negative_pooled = self.encode_prompt(
            prompts, device=self._execution_device, do_classifier_free_guidance=guided,
            lora_scale=(stock["joint_attention_kwargs"] or {}).get("scale"), **{name: stock[name] for name in given},
        )  # fmt: skip
        return (states, pooled), (negative_states, negative_pooled) if guided else None

    def _stock_prompts(self, embeds: Embeds, negatives: Embeds | None) -> dict[str, Any]:
        (states, pooled), (negative_states, negative_pooled) = embeds, negatives or (None, None)
        texts = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
        return dict.fromkeys(texts) | {
            "prompt_embeds": states, "pooled_prompt_embeds": pooled, "negative_prompt_embeds": negative_states,
            "negative_pooled_prompt_embeds": negative_pooled,
        }  # fmt: skip

    def _extra_rows(
        self, args: tuple, kwargs: dict[str, Any], rows: RowLayout, own: Embeds, appended: Sequence[Embeds],
        closed: bool, stock: dict[str, Any],
    ) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
        latents, states, pooled = (
            kwargs[name] for name in ("hidden_states", "encoder_hidden_states", "pooled_projections")
        )
        # diffusers' SD3CFGCutoffCallback leaves one row of each.
        if closed or len(states) < len(latents):
            states, pooled = (embeds[-len(latents) :] for embeds in own)
        return args, kwargs | {
            "hidden_states": rows.append(latents),
            "timestep": rows.append(kwargs["timestep"]),
            "encoder_hidden_states": torch.cat([states, *(embeds[0] for embeds in appended)]),
            "pooled_projections": torch.cat([pooled, *(embeds[1] for embeds in appended)]),
        }

    def _sigma(self, timestep: Tensor) -> Tensor:
        """The noise at a timestep of flow matching, as a share of it and the signal."""
        return timestep.float() / self.scheduler.config.num_train_timesteps

    def _to_epsilon(self, timestep: Tensor) -> Tensor:
        if not _is_flow_matching(self.scheduler):
            return super()._to_epsilon(timestep)
        # Noise is the noisy latents and `1 - sigma` times the velocity.
        return (1 - self._sigma(timestep)).clamp(min=LEAST_SIGNAL)

    def _gate(self, start: float | None) -> Callable[[Tensor], bool]:
        if start is None or not _is_flow_matching(self.scheduler):
            return super()._gate(start)

        def closed(timestep: Tensor) -> bool:
            sigma = self._sigma(timestep)
            return bool(sigma / (1 - sigma).clamp(min=LEAST_SIGNAL) > start)

        return closed


def _is_flow_matching(scheduler: Any) -> bool:
    config = scheduler.config
    has_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(has_flow) or hasattr(scheduler, "scale_noise")


def _draws_noise(scheduler: Any) -> bool:
    """Whether each step draws noise, for which the stock call hands on no generator."""
    config = scheduler.config
    drawn = config.get("stochastic_sampling") or "sde" in (config.get("algorithm_type") or "")
    return bool(drawn) or type(scheduler).__name__ == "FlowMatchLCMScheduler"
