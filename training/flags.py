"""The flags of the training script: a group each, with default, help and the rule that a value must keep. [ours]"""

import math
from dataclasses import MISSING, dataclass
from pathlib import Path

from programs.console import BASE_CONFIG
from training.flag_rules import SFCM_MODES, FlagGroup, check_folder, check_package, flag, names_of, path, refuse


# Names of what other modules and libraries have.
INTERPOLATION_MODES = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest")
ENHANCEMENT_LOSSES = ("difference", "direct")
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = tuple("all aim tensorboard wandb comet_ml mlflow clearml dvclive swanlab trackio".split())
# Ways to keep the portrait that add a row that keeps a prediction to each training portrait's.
WITH_KEPT_ROWS = ("prior", "dop", "cat")


# By the name of a preset, what its flags are where none is given by hand.
PRESETS = {
    "paper": {
        "stage2_objective": "paper", "sfcm_mode": "paper", "base_prompt_share": 0.0, "lambda_base": 0.0,
        "enhancement_weighting": "none",
    },
}  # fmt: skip


@dataclass(frozen=True)
class ModelFlags(FlagGroup):
    """The models, and how they compute."""

    pretrained_model_name_or_path: str = path(
        MISSING,
        "Stable Diffusion 1.x, 2.x, XL, 3 or 3.5 in safetensors: a folder, an id of the Hub, or one file, which of 3 "
        "and 3.5 is the transformer.",
    )
    base_config: str | None = path(None, BASE_CONFIG)
    revision: str | None = flag(None, "Revision of the Hub id, with one file of the configuration's.")
    variant: str | None = flag(None, "Variant of the weight files, such as fp16.")
    prediction_type: str | None = flag(
        None, "What the UNet predicts; else as the model's scheduler says.", choices=("epsilon", "v_prediction")
    )
    pretrained_vae_model_name_or_path: str | None = path(None, "Another VAE than the model's: a folder or Hub id.")
    clip_model_name_or_path: str = path(
        "openai/clip-vit-large-patch14",
        "CLIP model that judges portraits, for the presence of the target and the enhancement loss.",
    )
    cache_dir: str | None = path(None, "Where what comes from the Hub, latents and text embeddings are kept.")
    mixed_precision: str | None = flag(None, "accelerate's setting if not given.", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = flag(False, "Less memory, more time.")
    allow_tf32: bool = flag(False, "TF32 matrix products on Ampere and newer.")
    enable_xformers_memory_efficient_attention: bool = flag(False, "xformers in the layers of self-attention.")

    def check(self) -> None:
        if self.cache_dir is not None:
            check_folder("cache_dir", self.cache_dir)
        if self.enable_xformers_memory_efficient_attention:
            check_package("enable_xformers_memory_efficient_attention", "xformers")


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
        None, "Phrases that may change along with the target, in all base prompts that have them.", action="extend"
    )
    max_train_samples: int | None = flag(None, "Train on this many portraits only, a choice by --seed.", "at least 1")
    caption_extension: str = flag(
        ".txt", "Ending of the captions beside the pictures, a.png and a.txt; the target is taken out of them."
    )
    repeats: int = flag(1, "How often each portrait comes in an epoch.", "at least 1")
    dataloader_num_workers: int = flag(0, "Processes that read pictures; 0: the training's own.", "0 or more")
    cache_latents: bool = flag(True, "Encode each portrait once (with --cache_dir for all runs), not in each step.")
    cache_text_embeddings: bool = flag(
        True, "Encode each prompt once (with --cache_dir for all runs) instead of in each step."
    )

    def check(self) -> None:
        extension = self.caption_extension
        is_ending = extension.startswith(".") and extension.strip(". ")
        refuse(not is_ending, f"--caption_extension must be an ending such as .txt, got {extension!r}")
        lost = extension != type(self).caption_extension and self.train_data_dir is None
        refuse(lost, "--caption_extension is for the captions of --train_data_dir")
        empty = not all(phrase.strip() for phrase in self.free_phrases or ())
        refuse(empty, "--free_phrases has an empty phrase")


@dataclass(frozen=True)
class ColumnFlags(FlagGroup):
    """What the columns of the data are called."""

    image_column: str = flag("image", "Column of the pictures, with --dataset_name.")
    base_prompt_column: str = flag("base_prompt", "Column of the base prompts.")
    caption_column: str | None = flag(None, "Column of captions instead; the target is taken out of them.")
    target_prompt_column: str = flag("target_prompt", "Column of the target prompts.")
    full_prompt_column: str = flag("full_prompt", "Optional column of the full prompts, for replacements.")
    base_phrases_column: str = flag("base_phrases", "Optional column of the base prompts' phrases, as lists.")
    free_phrases_column: str = flag("free_phrases", "Optional column of the phrases that may change, as lists.")
    mask_column: str = flag(
        "mask", "Column of the masks of --preservation mask, with --dataset_name; a folder's is mask_file_name."
    )

    def check(self) -> None:
        both = self.caption_column is not None and self.base_prompt_column != type(self).base_prompt_column
        refuse(both, "--caption_column takes the place of --base_prompt_column: give one of them")


@dataclass(frozen=True)
class PictureFlags(FlagGroup):
    """How a picture becomes pixels of the training."""

    resolution: int | None = flag(
        None,
        "Side of the training pictures, for SD 1.5 a multiple of 64 pixels, for SDXL of 32, for SD3 of 16; the middle "
        "is cut out. "
        "Else as the model draws by itself: 512 for SD 1.5, 1024 for SDXL and SD3.",
        "at least 1",
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
        empty = self.aspect_ratio_buckets is not None and not self.aspect_ratio_buckets.strip()
        refuse(empty, "--aspect_ratio_buckets is empty")


@dataclass(frozen=True)
class LoraFlags(FlagGroup):
    """The LoRA, and those that it is trained on top of."""

    rank: int = flag(16, "Rank of the LoRA.", "at least 1")
    lora_alpha: float | None = flag(None, "The LoRA is scaled by alpha / rank; the rank if not given.", "above 0")
    lora_target: str = flag(
        "cross", "Projections of cross-attention (of Stable Diffusion 3 the image's), or of all attention.",
        choices=("cross", "all"),
    )  # fmt: skip
    lora_layers: list[str] | None = flag(
        None, "Instead of --lora_target: ends of names, as in attn2.to_k,attn2.to_v.", type=names_of, nargs=None
    )
    lora_dropout: float = flag(0.0, "Dropout in front of the LoRA, in [0, 1).", "in [0, 1)")
    use_dora: bool = flag(False, "Weight-decomposed LoRA (DoRA); needs --dual_path two_pass, and no --reference_lora.")
    reference_lora: list[str] | None = path(
        None, "Earlier LoRAs to train on top of: files, folders or Hub ids. They stay as they are.", action="extend"
    )
    reference_lora_scale: list[float] | float | None = flag(1.0, "How strong they are: one value, or one for each.")
    reference_target_prompt: list[str] | None = flag(
        None, "Targets of the earlier LoRAs, each to be asked for in half of the drawn portraits.", action="extend"
    )
    target_presence: float = flag(
        0.0,
        "After both stages, make the LoRA as strong as it takes for portraits to show so much of the target, by CLIP: "
        "0 is what the original model's show, 1 what stage 1's do. At least half and at most twice as strong; 0 "
        "leaves it as it is.",
        "0 or more",
    )
    stage1_lora_path: str | None = path(
        None, "Folder or file of a LoRA, of any rank and layers, that takes stage 1's place; needs --stage1_steps 0."
    )

    def check(self) -> None:
        stage1, scales = self.stage1_lora_path, self.reference_lora_scale
        refuse(stage1 is not None and not Path(stage1).exists(), f"--stage1_lora_path {stage1} does not exist")
        empty = not all(text.strip() for text in self.reference_target_prompt or ())
        refuse(empty, "--reference_target_prompt has an empty text")
        if not isinstance(scales, list):
            return
        refuse(self.reference_lora is None, "--reference_lora_scale needs --reference_lora")
        count = len(self.reference_lora)
        refuse(
            len(scales) not in (1, count),
            f"--reference_lora_scale has {len(scales)} values and --reference_lora {count}: give one for all, or one "
            "for each",
        )
        for scale in scales:
            refuse(not math.isfinite(scale), f"--reference_lora_scale must be finite, got {scale}")


@dataclass(frozen=True)
class MethodFlags(FlagGroup):
    """How the attribute is taught and the portrait kept."""

    preset: str | None = flag(
        None,
        "`paper`: as the paper is written: --stage2_objective paper, --sfcm_mode paper, --base_prompt_share 0, "
        "--lambda_base 0 and --enhancement_weighting none. A flag that is given beside it wins, without an error.",
        choices=("paper",),
    )
    preservation: str = flag(
        "spf",
        "How the portrait is kept. All but `spf` have one stage of --stage1_steps and --stage2_steps together: "
        "`none`, plain LoRA; `prior`, DreamBooth's drawn portraits; `dop`, the original model's prediction of the "
        "training portraits without the target; `cat`, the same with unrelated prompts; `mask`, masked loss.",
        choices=("spf", "none", *WITH_KEPT_ROWS, "mask"),
    )
    preservation_weight: float = flag(1.0, "Weight of that loss, of `prior`, `dop` and `cat`.", "0 or more")
    unrelated_prompts: list[str] | None = flag(
        None, "Prompts that `cat` keeps the predictions of; the empty one if not given.", action="extend"
    )
    stage1_steps: int = flag(500, "Steps of standard fine-tuning.", "0 or more")
    stage2_steps: int = flag(500, "Steps of alignment; 0 is a plain LoRA.", "0 or more")
    stage2_objective: str = flag(
        "composed",
        "`paper`: feature alignment and response enhancement. `composed`: predictions composed by the SFCM.",
        choices=("composed", "paper", "both"),
    )
    dual_path: str = flag(
        "two_pass",
        "Two passes, or one with more memory and the same numbers up to rounding.",
        choices=("two_pass", "single_pass"),
    )
    base_prompt_share: float = flag(
        0.75, "Share of alignment rows, in [0, 1), that ask for no change: 2/3 base, 1/3 empty prompt.", "in [0, 1)"
    )
    snr_gamma: float | None = flag(None, "Min-SNR weighting of the diffusion loss; 5.0 is usual.", "above 0")
    noise_offset: float = flag(
        0.0, "Offset of the diffusion loss's noise that a channel shares; 0.1 is usual.", "0 or more"
    )

    def check(self) -> None:
        lost = self.unrelated_prompts is not None and self.preservation != "cat"
        refuse(lost, "--unrelated_prompts needs --preservation cat")
        lost = self.preservation_weight != type(self).preservation_weight and self.preservation not in WITH_KEPT_ROWS
        refuse(lost, "--preservation_weight is for --preservation prior, dop and cat")
        nothing = self.stage1_steps == self.stage2_steps == 0
        refuse(nothing, "--stage1_steps and --stage2_steps are both 0: there is nothing to train")


@dataclass(frozen=True)
class ComposedFlags(FlagGroup):
    """The composed objective."""

    composed_init: str = flag(
        "zero", "Start from the original model or from stage 1, which teaches anyway.", choices=("zero", "stage1")
    )
    teacher_scale: float = flag(2.0, "Factor on what stage 1 changes inside the map (composed).", "0 or more")
    teacher_base_weight: float = flag(
        0.5, "Of what stage 1 changes with the base prompt alone, the share to take away, in [0, 1].", "in [0, 1]"
    )
    composed_timestep_power: float = flag(
        1.5, "Draw composed alignment's timesteps with density (noise/signal)^power; 0 is uniform.", "0 or more"
    )
    composed_target_reuse: int = flag(
        2, "Steps that learn from each composed target, which is costly to make; 1 makes each anew.", "at least 1"
    )
    sfcm_gamma: float = flag(4.0, "Exponent of the map in the composition; larger narrows it.", "above 0")


@dataclass(frozen=True)
class PaperFlags(FlagGroup):
    """The paper's objective."""

    lambda_text: float = flag(20.0, "Weight of the text-consistent loss (paper).", "0 or more")
    lambda_fine: float = flag(6.0, "Weight of the fine-grained loss (paper).", "0 or more")
    lambda_enh: float = flag(20.0, "Weight of the enhancement loss (paper).", "0 or more")
    lambda_base: float = flag(10.0, "Weight of keeping predictions for unchanged prompts (paper).", "0 or more")
    enhancement_loss: str = flag(
        "difference",
        "Form of the enhancement loss; `direct`: the plain CLIP score; `none`: without it.",
        choices=(*ENHANCEMENT_LOSSES, "none"),
    )
    enhancement_weighting: str = flag(
        "alpha_bar",
        "Weigh the enhancement loss by the signal's share alpha_bar, since at high noise its portrait is a guess; or "
        "compute it with full weight for that share of the rows, `drawn` by chance, which is the same on average and "
        "costs less; or `none`.",
        choices=("alpha_bar", "drawn", "none"),
    )
    enhancement_every: int = flag(
        1, "Compute the enhancement loss every so many steps of stage 2, with so many times its weight.", "at least 1"
    )
    tiny_vae_model_name_or_path: str | None = path(None, "AutoencoderTiny that decodes for the enhancement loss.")
    alignment_layers: str = flag(
        "all", "Cross-attention layers to align: all, or those of the phrases' maps.", choices=("all", "phrase_map")
    )


@dataclass(frozen=True)
class AlignmentFlags(FlagGroup):
    """The portraits that both paths are aligned on, and their maps."""

    alignment_source: str = flag(
        "generated",
        "Portraits both paths are aligned on: drawn by the original model, the training portraits, or both.",
        choices=("generated", "data", "both"),
    )
    alignment_phrase_dropout: float = flag(
        0.5, "Chance in [0, 1) that a drawn portrait's prompt leaves out a phrase, to differ more.", "in [0, 1)"
    )
    alignment_color_variation: float = flag(
        0.75,
        "Chance in [0, 1] that a colour which a drawn portrait's prompt names is another, since a set often has few.",
        "in [0, 1]",
    )
    num_alignment_images: int = flag(64, "How many portraits are drawn for it.", "at least 1")
    alignment_inference_steps: int = flag(25, "Denoising steps of each of them.", "at least 1")
    alignment_guidance_scale: float = flag(5.0, "Guidance scale of each of them.", "0 or more")
    sfcm_mode: str = flag(
        "averaged_both",
        "How the map is made: of what the target's words change (`averaged_target`), of what differs between the "
        "two paths (`averaged`), of both (`averaged_both`), in its literal form (`paper`); `none` aligns everything.",
        choices=SFCM_MODES,
    )
    sfcm_noise_samples: int = flag(4, "Noise samples a portrait's map is averaged over.", "at least 1")
    sfcm_timesteps: tuple[int, int] | None = flag(
        None,
        "Lowest and highest timestep of those samples; else 600 to 950, for Stable Diffusion 3 700 to 920, and higher "
        "above 64x64 latents.",
        metavar=("LOW", "HIGH"),
    )
    sfcm_refresh_steps: int = flag(
        0, "Make the averaged maps anew every so many steps of stage 2; 0 is never.", "0 or more"
    )
    sfcm_dir: str | None = path(
        None, "Folder of maps to use instead, 00000.png and so on: grey, white where the target may change a portrait."
    )
    save_alignment: bool = flag(
        False, "Write alignment portraits to OUTPUT_DIR/alignment and maps to its folder sfcm, to look at or correct."
    )

    def check(self) -> None:
        low, high = self.sfcm_timesteps or (0, 1)
        refuse(not 0 <= low < high, f"--sfcm_timesteps must be two rising timesteps, got {[low, high]}")
        both = self.sfcm_dir is not None and self.sfcm_refresh_steps
        refuse(both, "--sfcm_refresh_steps would replace the maps of --sfcm_dir")


@dataclass(frozen=True)
class OptimizerFlags(FlagGroup):
    """The optimizer."""

    learning_rate: float = flag(1e-4, "Learning rate in both stages; 1.0 is usual for prodigy.", "above 0")
    scale_lr: bool = flag(False, "Multiply it by accumulation, batch size and number of processes.")
    optimizer: str = flag("adamw", "prodigy needs prodigyopt: pip install prodigyopt.", choices=("adamw", "prodigy"))
    use_8bit_adam: bool = flag(False, "AdamW's state in 8 bits, which needs pip install bitsandbytes.")
    adam_beta1: float = flag(0.9, "Decay of the gradient's running mean.", "in [0, 1)")
    adam_beta2: float = flag(0.999, "Decay of the squared gradient's running mean.", "in [0, 1)")
    adam_weight_decay: float = flag(1e-2, "Weight decay; all adam_ flags are prodigy's, too.", "0 or more")
    adam_epsilon: float = flag(1e-8, "Added to the denominator of the update.", "above 0")
    max_grad_norm: float = flag(1.0, "Largest norm of the gradient.", "above 0")

    def check(self) -> None:
        both = self.use_8bit_adam and self.optimizer != "adamw"
        refuse(both, f"--use_8bit_adam is a form of --optimizer adamw, not of {self.optimizer}")
        if self.use_8bit_adam:
            check_package("use_8bit_adam", "bitsandbytes")
        if self.optimizer == "prodigy":
            check_package("optimizer prodigy", "prodigyopt")


@dataclass(frozen=True)
class LoopFlags(FlagGroup):
    """Batches, schedules and checkpoints."""

    train_batch_size: int = flag(4, "Portraits a step and process.", "at least 1")
    gradient_accumulation_steps: int = flag(1, "Batches an update.", "at least 1")
    lr_scheduler: str = flag("constant", "Learning rate over the steps of stage 1.", choices=SCHEDULERS)
    stage2_lr_scheduler: str = flag("cosine", "The same for stage 2.", choices=SCHEDULERS)
    lr_warmup_steps: int = flag(0, "Warm-up steps of each stage's scheduler, of every one but constant.", "0 or more")
    lr_num_cycles: int = flag(1, "How many cycles cosine_with_restarts has.", "at least 1")
    lr_power: float = flag(1.0, "Power of polynomial.", "above 0")
    seed: int = flag(0, "Seed of everything random in the training.", "0 or more", "below 2**32")
    checkpointing_steps: int = flag(
        500, "Write a checkpoint every so many steps; 0 writes one only when the run is asked to stop.", "0 or more"
    )
    checkpoints_total_limit: int | None = flag(None, "Keep the last so many of them; all if not given.", "at least 1")
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
    num_validation_images: int = flag(4, "Seeds, one a row; 0 draws nothing.", "0 or more")
    validation_steps: int = flag(0, "Draw every so many steps; 0: at the start and end.", "0 or more")
    validation_inference_steps: int = flag(25, "Denoising steps of the pictures.", "at least 1")
    validation_guidance_scale: float = flag(5.0, "Guidance scale of the pictures.", "0 or more")
    dry_run: bool = flag(False, "Print prompts, phrases, token positions and CLIP distances; train nothing.")

    def check(self) -> None:
        check_folder("output_dir", self.output_dir)
        check_folder("logging_dir", Path(self.output_dir, self.logging_dir))
        card = Path(self.output_dir) / "README.md"
        # As the metadata of a model card has it.
        other = card.is_file() and "\n- spf-portrait\n" not in card.read_text(encoding="utf-8", errors="replace")
        refuse(other, f"--output_dir {self.output_dir} holds a README.md that is no model card of this script")


@dataclass(frozen=True)
class SharingFlags(FlagGroup):
    """The Hub, and other formats."""

    push_to_hub: bool = flag(False, "Upload LoRA, model card, last picture and pipeline at the end.")
    hub_model_id: str | None = flag(None, "Repository, as user/name or name; the name of --output_dir if not given.")
    hub_token: str | None = flag(
        None,
        "Token to push with, which all users of the machine can see; that of HF_TOKEN or `hf auth login`, which they "
        "cannot, if not given.",
    )
    hub_private_repo: bool = flag(False, "Make the repository private.")
    hub_license: str | None = flag(None, "Licence the model card names; the published base model's if not given.")
    output_kohya_format: bool | None = flag(
        None,
        "Write the LoRA for ComfyUI and A1111, too; if not given, on with --push_to_hub but for DoRA and for Stable "
        "Diffusion 3, whose LoRAs ComfyUI reads as they are.",
    )

    def check(self) -> None:
        for name in ("hub_model_id", "hub_token", "hub_private_repo"):
            refuse(getattr(self, name) and not self.push_to_hub, f"--{name} needs --push_to_hub")
