"""The flags of the training script: a group each, with default, help and the rule that a value must keep.

Source: [ours].
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import MISSING, dataclass
from pathlib import Path

from training.flag_rules import (
    ABOVE_0,
    AT_LEAST_1,
    BELOW_2_32,
    CARD_TAG,
    DUAL_PATH_MODES,
    ENHANCEMENT_LOSSES,
    INTERPOLATION_MODES,
    NOT_NEGATIVE,
    PRESERVATIONS,
    SCHEDULERS,
    SFCM_MODES,
    SHARE,
    SHARE_BELOW_1,
    TRACKERS,
    WITH_KEPT_ROWS,
    FlagGroup,
    check_folder,
    flag,
    names_of,
    path,
)
from training.optimizers import OPTIMIZERS, check_optimizer


@dataclass(frozen=True)
class ModelFlags(FlagGroup):
    """The models, and how they compute."""

    pretrained_model_name_or_path: str = path(
        MISSING, "Stable Diffusion 1.x or 2.x: a folder or an id of the Hub, with weights in safetensors."
    )
    revision: str | None = flag(None, "Revision of the Hub id.")
    variant: str | None = flag(None, "Variant of the weight files, such as fp16.")
    prediction_type: str | None = flag(
        None, "What the UNet predicts; else as the model's scheduler says.", choices=("epsilon", "v_prediction")
    )
    pretrained_vae_model_name_or_path: str | None = path(None, "Another VAE than the model's: a folder or Hub id.")
    tiny_vae_model_name_or_path: str | None = path(None, "AutoencoderTiny that decodes for the enhancement loss.")
    clip_model_name_or_path: str = path(
        "openai/clip-vit-large-patch14",
        "CLIP model that judges portraits; for the enhancement loss alone.",
    )
    cache_dir: str | None = path(
        None, "Where models and data sets from the Hub are kept, and latents and text embeddings, too."
    )
    mixed_precision: str | None = flag(None, "accelerate's setting if not given.", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = flag(False, "Less memory, more time.")
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere and newer.")
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "xformers in the layers whose attention is not captured: the self-attention."
    )

    def check(self) -> None:
        check_folder("cache_dir", self.cache_dir)
        if self.enable_xformers_memory_efficient_attention and importlib.util.find_spec("xformers") is None:
            raise ValueError(
                "--enable_xformers_memory_efficient_attention needs the package xformers: pip install xformers"
            )


@dataclass(frozen=True)
class DataFlags(FlagGroup):
    """The training portraits and what is kept of them."""

    train_data_dir: str | None = path(
        None, "Folder of pictures with metadata.jsonl or .csv or a caption beside each; or give --dataset_name."
    )
    dataset_name: str | None = path(None, "A `datasets` id or path, instead of --train_data_dir.")
    dataset_config_name: str | None = flag(None, "Configuration of the data set.")
    target_prompt: str | None = flag(None, "One target for the whole set, whose captions are base prompts.")
    free_phrases: list[str] | None = flag(
        None, "Phrases that may change along with the target, for all base prompts that have them.", action="extend"
    )
    max_train_samples: int | None = flag(None, "Train on this many portraits only, a choice by --seed.", AT_LEAST_1)
    caption_extension: str = flag(
        ".txt",
        "Ending of the captions beside the pictures, a.png and a.txt, out of which the target is taken where they "
        "say it.",
    )
    repeats: int = flag(1, "How often each portrait comes in an epoch.", AT_LEAST_1)
    dataloader_num_workers: int = flag(0, "Processes that read pictures; 0: the training's own.", NOT_NEGATIVE)
    cache_latents: bool = flag(
        True, "Encode each portrait once (with --cache_dir once for all runs) instead of in each step."
    )
    cache_text_embeddings: bool = flag(
        True, "Encode each prompt once (with --cache_dir once for all runs) instead of in each step."
    )

    def check(self) -> None:
        extension = self.caption_extension
        if not (extension.startswith(".") and extension.strip(". ")):
            raise ValueError(f"--caption_extension must be an ending such as .txt, got {extension!r}")
        if extension != type(self).caption_extension and self.train_data_dir is None:
            raise ValueError("--caption_extension is for the captions of --train_data_dir")
        if not all(phrase.strip() for phrase in self.free_phrases or ()):
            raise ValueError("--free_phrases has an empty phrase")


@dataclass(frozen=True)
class ColumnFlags(FlagGroup):
    """What the columns of the data are called."""

    image_column: str = flag("image", "Column of the pictures, with --dataset_name.")
    base_prompt_column: str = flag("base_prompt", "Column of the base prompts.")
    caption_column: str | None = flag(
        None, "Column of captions instead, out of which the target is taken where they say it."
    )
    target_prompt_column: str = flag("target_prompt", "Column of the target prompts.")
    full_prompt_column: str = flag("full_prompt", "Optional column of the full prompts, for replacements.")
    base_phrases_column: str = flag("base_phrases", "Optional column of the base prompts' phrases, as lists.")
    free_phrases_column: str = flag(
        "free_phrases", "Optional column of the phrases that may change along with the target, as lists."
    )
    mask_column: str = flag(
        "mask", "Column of the masks of --preservation mask, with --dataset_name; a folder's is mask_file_name."
    )

    def check(self) -> None:
        if self.caption_column is not None and self.base_prompt_column != type(self).base_prompt_column:
            raise ValueError("--caption_column takes the place of --base_prompt_column: give one of them")


@dataclass(frozen=True)
class PictureFlags(FlagGroup):
    """How a picture becomes pixels of the training."""

    resolution: int = flag(
        512, "Side of the training pictures in pixels, a multiple of 64 for SD 1.5; the middle is cut out.", AT_LEAST_1
    )
    aspect_ratio_buckets: str | None = flag(
        None, "Several sizes instead, as height,width;height,width: each portrait has the nearest in shape."
    )
    center_crop: bool = flag(True, "Crop the middle; else anywhere by chance, which needs --no-cache_latents.")
    random_flip: bool = flag(
        False, "Mirror pictures by chance. A caption that says left or right is then wrong every second time."
    )
    image_interpolation_mode: str = flag("lanczos", "How to resize.", choices=INTERPOLATION_MODES)

    def check(self) -> None:
        if self.aspect_ratio_buckets is not None and not self.aspect_ratio_buckets.strip():
            raise ValueError("--aspect_ratio_buckets is empty")


@dataclass(frozen=True)
class LoraFlags(FlagGroup):
    """The LoRA, and those that it is trained on top of."""

    rank: int = flag(16, "Rank of the LoRA.", AT_LEAST_1)
    lora_alpha: float | None = flag(
        None, "Alpha of the LoRA, which is scaled by alpha / rank; the rank if not given.", ABOVE_0
    )
    lora_target: str = flag("cross", "Cross-attention projections, or self-attention's too.", choices=("cross", "all"))
    lora_layers: list[str] | None = flag(
        None,
        "Instead of --lora_target: ends of the layers' names, separated by commas, as in attn2.to_k,attn2.to_v.",
        type=names_of,
        nargs=None,
    )
    lora_dropout: float = flag(0.0, "Dropout in front of the LoRA, in [0, 1).", SHARE_BELOW_1)
    use_dora: bool = flag(False, "Weight-decomposed LoRA (DoRA); needs --dual_path two_pass, and no --reference_lora.")
    reference_lora: list[str] | None = path(
        None,
        "Earlier LoRAs to train on top of: files, folders or Hub ids. They stay as they are, in both paths.",
        action="extend",
    )
    reference_lora_scale: list[float] | float | None = flag(
        1.0, "How strongly they are active: one value for all, or one for each."
    )
    stage1_lora_path: str | None = path(
        None, "Folder or file of a LoRA, of any rank and layers, that takes stage 1's place; needs --stage1_steps 0."
    )

    def check(self) -> None:
        if self.stage1_lora_path is not None and not Path(self.stage1_lora_path).exists():
            raise ValueError(f"--stage1_lora_path {self.stage1_lora_path} does not exist")
        if not isinstance(self.reference_lora_scale, list):
            return
        if self.reference_lora is None:
            raise ValueError("--reference_lora_scale needs --reference_lora")
        if len(self.reference_lora_scale) not in (1, len(self.reference_lora)):
            raise ValueError(
                f"--reference_lora_scale has {len(self.reference_lora_scale)} values and --reference_lora "
                f"{len(self.reference_lora)}: give one for all, or one for each"
            )
        for scale in self.reference_lora_scale:
            if not math.isfinite(scale):
                raise ValueError(f"--reference_lora_scale must be finite, got {scale}")


@dataclass(frozen=True)
class MethodFlags(FlagGroup):
    """How the attribute is taught and the portrait kept."""

    preservation: str = flag(
        "spf",
        "How the portrait is kept. All but `spf` have one stage of --stage1_steps and --stage2_steps together: "
        "`none`, plain LoRA; `prior`, DreamBooth's drawn portraits; `dop`, the original model's prediction of the "
        "training portraits without the target; `cat`, the same with unrelated prompts; `mask`, masked loss.",
        choices=PRESERVATIONS,
    )
    preservation_weight: float = flag(1.0, "Weight of that loss, of `prior`, `dop` and `cat`.", NOT_NEGATIVE)
    unrelated_prompts: list[str] | None = flag(
        None, "Prompts that `cat` keeps the predictions of; the empty one if not given.", action="extend"
    )
    stage1_steps: int = flag(500, "Steps of standard fine-tuning.", NOT_NEGATIVE)
    stage2_steps: int = flag(500, "Steps of alignment; 0 is a plain LoRA.", NOT_NEGATIVE)
    stage2_objective: str = flag(
        "composed",
        "`paper`: feature alignment and response enhancement. `composed`: predictions composed by the SFCM.",
        choices=("composed", "paper", "both"),
    )
    dual_path: str = flag(
        "two_pass",
        "Two passes, or one that takes more memory and gives the same up to rounding.",
        choices=DUAL_PATH_MODES,
    )
    base_prompt_share: float = flag(
        0.6,
        "Share of alignment rows, in [0, 1), that ask for no change: 2/3 base prompt, 1/3 empty prompt.",
        SHARE_BELOW_1,
    )
    snr_gamma: float | None = flag(
        None, "Min-SNR weighting of the diffusion loss; 5.0 is usual. None if not given.", ABOVE_0
    )
    noise_offset: float = flag(
        0.0, "Offset of the diffusion loss's noise that a channel shares; 0.1 is usual.", NOT_NEGATIVE
    )

    def check(self) -> None:
        if self.unrelated_prompts is not None and self.preservation != "cat":
            raise ValueError("--unrelated_prompts needs --preservation cat")
        if self.preservation_weight != type(self).preservation_weight and self.preservation not in WITH_KEPT_ROWS:
            raise ValueError("--preservation_weight is for --preservation prior, dop and cat")
        if self.stage1_steps == self.stage2_steps == 0:
            raise ValueError("--stage1_steps and --stage2_steps are both 0: there is nothing to train")


@dataclass(frozen=True)
class ComposedFlags(FlagGroup):
    """The composed objective."""

    composed_init: str = flag(
        "zero",
        "Start `composed` from the original model or from stage 1, which teaches in either case.",
        choices=("zero", "stage1"),
    )
    teacher_scale: float = flag(1.6, "Factor on what stage 1 changes inside the map (composed).", NOT_NEGATIVE)
    teacher_base_weight: float = flag(
        0.5, "Of what stage 1 changes with the base prompt alone, the share to take away from that, in [0, 1].", SHARE
    )
    composed_timestep_power: float = flag(
        0.5, "Draw composed alignment's timesteps with density (noise/signal)^power; 0 is uniform.", NOT_NEGATIVE
    )
    composed_target_reuse: int = flag(
        2,
        "Steps that learn from each composed target, which costs more to make than to learn; 1 makes each anew.",
        AT_LEAST_1,
    )
    sfcm_gamma: float = flag(2.0, "Exponent of the map in the composition; larger narrows it.", ABOVE_0)


@dataclass(frozen=True)
class PaperFlags(FlagGroup):
    """The paper's objective."""

    lambda_text: float = flag(20.0, "Weight of the text-consistent loss (paper).", NOT_NEGATIVE)
    lambda_fine: float = flag(6.0, "Weight of the fine-grained loss (paper).", NOT_NEGATIVE)
    lambda_enh: float = flag(20.0, "Weight of the enhancement loss (paper).", NOT_NEGATIVE)
    lambda_base: float = flag(10.0, "Weight of keeping predictions for unchanged prompts (paper).", NOT_NEGATIVE)
    enhancement_loss: str = flag(
        "difference",
        "Form of the enhancement loss; `direct`: the plain CLIP score.",
        choices=(*ENHANCEMENT_LOSSES, "none"),
    )
    enhancement_weighting: str = flag(
        "alpha_bar",
        "Weigh the enhancement loss by the signal's share, since at high noise its portrait is a guess; or not.",
        choices=("alpha_bar", "none"),
    )
    enhancement_every: int = flag(
        1, "Compute the enhancement loss in every so manieth step of stage 2, with as much more weight.", AT_LEAST_1
    )
    alignment_layers: str = flag(
        "all",
        "Cross-attention layers the paper's losses align: all, or those of the resolution that the phrases' maps "
        "are taken from.",
        choices=("all", "phrase_map"),
    )


@dataclass(frozen=True)
class AlignmentFlags(FlagGroup):
    """The portraits that both paths are aligned on, and their maps."""

    alignment_source: str = flag(
        "generated",
        "Portraits both paths are aligned on: drawn by the original model from the base prompts, the training "
        "portraits, or both.",
        choices=("generated", "data", "both"),
    )
    alignment_phrase_dropout: float = flag(
        0.5,
        "Chance in [0, 1) that a drawn portrait's prompt leaves out a phrase, so that the portraits differ more.",
        SHARE_BELOW_1,
    )
    num_alignment_images: int = flag(64, "How many portraits are drawn for it.", AT_LEAST_1)
    alignment_inference_steps: int = flag(25, "Denoising steps of each of them.", AT_LEAST_1)
    alignment_guidance_scale: float = flag(5.0, "Guidance scale of each of them.", NOT_NEGATIVE)
    reference_target_prompt: list[str] | None = flag(
        None, "Targets of the earlier LoRAs, each to be asked for in half of the drawn portraits.", action="extend"
    )
    sfcm_mode: str = flag(
        "averaged_target",
        "How the map is made: of what the target's words change (`averaged_target`), of what differs between the "
        "two paths (`averaged`), in its literal form (`paper`); `none` aligns everything.",
        choices=SFCM_MODES,
    )
    sfcm_noise_samples: int = flag(4, "Noise samples a portrait's map is averaged over.", AT_LEAST_1)
    sfcm_timesteps: tuple[int, int] = flag(
        (600, 950), "Lowest and highest timestep of those samples.", metavar=("LOW", "HIGH")
    )
    sfcm_refresh_steps: int = flag(
        0, "Make the averaged maps anew every so many steps of stage 2; 0 is never.", NOT_NEGATIVE
    )
    sfcm_dir: str | None = path(
        None,
        "Folder of maps to use instead, a greyscale picture for each alignment portrait, white where the target "
        "may change it: 00000.png and so on.",
    )
    save_alignment: bool = flag(
        False,
        "Write the alignment portraits to OUTPUT_DIR/alignment and their maps to its folder sfcm, to be looked at "
        "or corrected.",
    )

    def check(self) -> None:
        low, high = self.sfcm_timesteps
        if not 0 <= low < high:
            raise ValueError(f"--sfcm_timesteps must be two rising timesteps, got {[low, high]}")
        if self.sfcm_dir is not None and self.sfcm_refresh_steps:
            raise ValueError("--sfcm_refresh_steps would replace the maps of --sfcm_dir")
        if not all(text.strip() for text in self.reference_target_prompt or ()):
            raise ValueError("--reference_target_prompt has an empty text")


@dataclass(frozen=True)
class OptimizerFlags(FlagGroup):
    """The optimizer."""

    learning_rate: float = flag(1e-4, "Learning rate in both stages; 1.0 is usual for prodigy.", ABOVE_0)
    scale_lr: bool = flag(False, "Multiply it by accumulation, batch size and number of processes.")
    optimizer: str = flag("adamw", "prodigy needs prodigyopt: pip install prodigyopt.", choices=OPTIMIZERS)
    use_8bit_adam: bool = flag(False, "AdamW's state in 8 bits, which needs pip install bitsandbytes.")
    adam_beta1: float = flag(0.9, "Decay of the gradient's running mean.", SHARE_BELOW_1)
    adam_beta2: float = flag(0.999, "Decay of the squared gradient's running mean.", SHARE_BELOW_1)
    adam_weight_decay: float = flag(
        1e-2, "Weight decay, of both optimizers as all that adam_ stands before.", NOT_NEGATIVE
    )
    adam_epsilon: float = flag(1e-8, "Added to the denominator of the update.", ABOVE_0)
    max_grad_norm: float = flag(1.0, "Largest norm of the gradient.", ABOVE_0)

    def check(self) -> None:
        check_optimizer(self.optimizer, self.use_8bit_adam)


@dataclass(frozen=True)
class LoopFlags(FlagGroup):
    """Batches, schedules and checkpoints."""

    train_batch_size: int = flag(4, "Portraits a step and process.", AT_LEAST_1)
    gradient_accumulation_steps: int = flag(1, "Batches an update.", AT_LEAST_1)
    lr_scheduler: str = flag("constant", "Learning rate over the steps of stage 1.", choices=SCHEDULERS)
    stage2_lr_scheduler: str = flag("cosine", "The same for stage 2.", choices=SCHEDULERS)
    lr_warmup_steps: int = flag(0, "Warm-up steps of each stage's scheduler, of every one but constant.", NOT_NEGATIVE)
    lr_num_cycles: int = flag(1, "How many cycles cosine_with_restarts has.", AT_LEAST_1)
    lr_power: float = flag(1.0, "Power of polynomial.", ABOVE_0)
    seed: int = flag(0, "Seed of everything random in the training.", NOT_NEGATIVE, BELOW_2_32)
    checkpointing_steps: int = flag(
        500, "Write a checkpoint every so many steps; 0 writes one only when the run is asked to stop.", NOT_NEGATIVE
    )
    checkpoints_total_limit: int | None = flag(None, "Keep the last so many of them; all if not given.", AT_LEAST_1)
    resume_from_checkpoint: str | None = path(
        None, "Go on from a checkpoint: latest, or a folder, which may be a name inside --output_dir."
    )


@dataclass(frozen=True)
class OutputFlags(FlagGroup):
    """What the run writes and shows."""

    output_dir: str = path("spf-portrait-lora", "Where the LoRA and the pictures are written.")
    logging_dir: str = path("logs", "Folder of the tracker's logs, inside --output_dir.")
    report_to: str = flag(
        "tensorboard", "Tracker of accelerate for losses and pictures; or all, or none.", choices=(*TRACKERS, "none")
    )
    validation_base_prompt: str | None = flag(None, "Base prompt of the pictures; the first portrait's if not given.")
    validation_target_prompt: str | None = flag(None, "Their target; the first portrait's if not given.")
    num_validation_images: int = flag(4, "Seeds, one a row; 0 draws nothing.", NOT_NEGATIVE)
    validation_steps: int = flag(0, "Draw every so many steps; 0: at the start and end.", NOT_NEGATIVE)
    validation_inference_steps: int = flag(25, "Denoising steps of the pictures.", AT_LEAST_1)
    validation_guidance_scale: float = flag(5.0, "Guidance scale of the pictures.", NOT_NEGATIVE)
    dry_run: bool = flag(False, "Print prompts, phrases, token positions and CLIP distances; train nothing.")

    def check(self) -> None:
        check_folder("output_dir", self.output_dir)
        check_folder("logging_dir", Path(self.output_dir, self.logging_dir))
        card = Path(self.output_dir) / "README.md"
        if card.is_file() and CARD_TAG not in card.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"--output_dir {self.output_dir} holds a README.md that is no model card of this script")


@dataclass(frozen=True)
class SharingFlags(FlagGroup):
    """The Hub, and other formats."""

    push_to_hub: bool = flag(False, "Upload LoRA, model card, last picture and pipeline at the end.")
    hub_model_id: str | None = flag(None, "Repository, as user/name or name; the name of --output_dir if not given.")
    hub_token: str | None = flag(
        None,
        "Token to push with, which every user of the machine can see while the run lasts; that of HF_TOKEN or `hf "
        "auth login`, which they cannot see, if not given.",
    )
    hub_private_repo: bool = flag(False, "Make the repository private.")
    hub_license: str = flag("creativeml-openrail-m", "Licence the model card names.")
    output_kohya_format: bool | None = flag(
        None, "Write the LoRA for ComfyUI and A1111, too; if not given, on with --push_to_hub but for DoRA."
    )

    def check(self) -> None:
        if not self.push_to_hub:
            for name in ("hub_model_id", "hub_token", "hub_private_repo"):
                if getattr(self, name):
                    raise ValueError(f"--{name} needs --push_to_hub")
