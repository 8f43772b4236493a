"""The nodes, as ComfyUI reads them. Ranges and tooltips are what its interface shows."""

import logging

import comfy.hooks
import comfy.lora
import comfy.lora_convert
import comfy.utils
import folder_paths
import torch.nn.functional as F
from torch import Tensor

from .guider import COMPARED, RegionGuider


CATEGORY = "sampling/custom_sampling/guiders"


class LoraKeptToRegion:
    """A guider for `SamplerCustomAdvanced`."""

    DESCRIPTION = (
        "Draws with a LoRA that acts only where the target's words change the picture, without a mask: elsewhere each "
        "step is kept to what the model without the LoRA predicts for the base prompt. For any LoRA."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("GUIDER",)
    FUNCTION = "get_guider"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        conditioning = {
            "full_prompt": "The prompt with the target, such as 'a photo of a man, blonde hair'. Drawn with the LoRA.",
            "base_prompt": "The same without the target: 'a photo of a man'. The model's own picture of it is kept.",
            "negative": "The negative prompt.",
        }
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model without this LoRA. Others may be loaded into it before."}),
                "lora_name": (folder_paths.get_filename_list("loras"), {"tooltip": "The LoRA."}),
                "lora_strength": ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}),
                **{name: ("CONDITIONING", {"tooltip": text}) for name, text in conditioning.items()},
                "cfg": ("FLOAT", {"default": 7.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}),
                "guidance": (
                    "FLOAT",
                    {
                        "default": 1.0, "min": 0.0, "max": 1.0, "step": 0.05,
                        "tooltip": "How far the LoRA is kept to its region. 0: not at all, as with any LoRA.",
                    },
                ),
                "exponent": (
                    "FLOAT",
                    {
                        "default": 2.0, "min": 0.1, "max": 10.0, "step": 0.1,
                        "tooltip": "Larger draws the region tighter.",
                    },
                ),
                "compared_with": (
                    [*COMPARED],
                    {
                        "tooltip": "What finds the region. words: what the target's words change with the LoRA. "
                        "paths: what LoRA and words change together, one prediction less a step. both: where both do.",
                    },
                ),
                "lora_in_negative": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Whether the LoRA is active in the negative branch, as everywhere in ComfyUI. "
                        "Without it the LoRA acts more strongly: turn its strength down.",
                    },
                ),
            },
            "optional": {
                "base_prompt_with_lora": (
                    "CONDITIONING",
                    {
                        "tooltip": "Only for a LoRA of the text encoder: the base prompt by the CLIP with the LoRA. "
                        "Without it the base prompt above is taken.",
                    },
                ),
            },
        }  # fmt: skip

    def get_guider(
        self, model, lora_name: str, lora_strength: float, full_prompt: list, base_prompt: list, negative: list,
        cfg: float, guidance: float, exponent: float, compared_with: str, lora_in_negative: bool,
        base_prompt_with_lora: list | None = None,
    ) -> tuple[RegionGuider]:  # fmt: skip
        hooks, groups = comfy.hooks.create_hook_lora(read_lora(model, lora_name), lora_strength, 0.0), {}

        def adapted(conditioning: list) -> list:
            # The groups are shared: rows are predicted together where their group is the same object.
            return comfy.hooks.set_hooks_for_conditioning(conditioning, hooks, cache=groups)

        guider = RegionGuider(model, guidance, exponent, compared_with)
        guider.set_rows(
            full=adapted(full_prompt), base=base_prompt,
            base_adapted=adapted(base_prompt if base_prompt_with_lora is None else base_prompt_with_lora),
            negative=adapted(negative) if lora_in_negative else negative,
        )  # fmt: skip
        guider.set_cfg(cfg)
        return (guider,)


class LoraRegionMask:
    """The map of a guider's last run."""

    DESCRIPTION = "Where the LoRA acted in a run of its guider, as a mask: white is the region of the target."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MASK",)
    FUNCTION = "get_mask"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "guider": ("GUIDER", {"tooltip": "LoRA kept to its region. A sampler needs one of its own."}),
                "image": ("IMAGE", {"tooltip": "The decoded picture that was drawn with this guider."}),
            }
        }

    def get_mask(self, guider, image: Tensor) -> tuple[Tensor]:
        """The map (B, H, W) in [0, 1] at the size of the images (B, H, W, 3)."""
        if not isinstance(guider, RegionGuider):
            raise ValueError("This guider finds no region: connect the one that draws with a LoRA kept to its region.")
        if guider.region is None or guider.region.calls == 0:
            raise ValueError("The guider has found no region: draw with it first, with a guidance above 0.")
        found = guider.region.map()
        if len(found) != len(image):
            raise ValueError(
                f"The guider drew {len(found)} pictures last, but {len(image)} are connected: connect the pictures "
                "that were drawn with it, and give each sampler a guider of its own."
            )
        return (F.interpolate(found, image.shape[1:3], mode="bilinear").squeeze(1).cpu(),)


def read_lora(model, lora_name: str) -> dict[str, Tensor]:
    """The weights of a LoRA file of the folder `loras`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no weight that this model knows.
    """
    path = folder_paths.get_full_path_or_raise("loras", lora_name)
    lora = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(path, safe_load=True))
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    if not comfy.lora.load_lora(lora, names, log_missing=False):
        kind = type(model.model.model_config).__name__
        raise ValueError(f"{lora_name} has no weights under names that ComfyUI knows for {kind}.")
    if any(key.startswith(("lora_te", "text_encoder", "text_model")) for key in lora):
        logging.info(
            "%s also changes the text encoder, which this node leaves alone: encode the full prompt, and "
            "base_prompt_with_lora, by the CLIP of a LoraLoader with strength_model 0.",
            lora_name,
        )
    return lora


NODE_CLASS_MAPPINGS = {"SPFPortraitLoraKeptToRegion": LoraKeptToRegion, "SPFPortraitLoraRegionMask": LoraRegionMask}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SPFPortraitLoraKeptToRegion": "LoRA kept to its region",
    "SPFPortraitLoraRegionMask": "Region of the LoRA (mask)",
}
