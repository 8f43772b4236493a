"""The flags of the training script, in groups, and the checks that need nothing but their values.

No library is imported here: a wrong flag is answered at once.
Source: [ours].
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from programs.console import FlagFormatter, in_home
from training.optimizers import OPTIMIZERS, check_optimizer


# Names of what other modules and libraries have; a test compares them.
DUAL_PATH_MODES = ("two_pass", "single_pass")
INTERPOLATION_MODES = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest")
ENHANCEMENT_LOSSES = ("difference", "direct")
# A list, since a program that brings further modes extends it.
SFCM_MODES = ["averaged_target", "averaged", "paper", "none"]
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
)  # fmt: skip
TRACKERS = (
    "all", "aim", "tensorboard", "wandb", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab", "trackio",
)  # fmt: skip
# Ways to keep the portrait, and those that add a row that keeps a prediction to each training portrait's.
PRESERVATIONS = ("spf", "none", "prior", "dop", "cat", "mask")
WITH_KEPT_ROWS = ("prior", "dop", "cat")
CARD_TAG = "\n- spf-portrait\n"  # as the metadata of a model card has it
POLYNOMIAL_END = 1e-7  # of the learning rate, in diffusers
# Where losses can go that keeps no command line, and with it what was given as a flag.
PRIVATE_TRACKERS = ("tensorboard", "none")


# A shell leaves the ~ of --output_dir=~/lora as it is.
PATHS = (
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "tiny_vae_model_name_or_path",
    "clip_model_name_or_path", "train_data_dir", "dataset_name", "cache_dir", "reference_lora", "stage1_lora_path",
    "sfcm_dir", "resume_from_checkpoint", "output_dir", "logging_dir",
)  # fmt: skip


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the flags; a value that cannot work ends the program with a line that names it."""
    parser = argparse.ArgumentParser(
        prog="train_spf_portrait_lora.py",
        description="Teach Stable Diffusion a portrait attribute as a LoRA, without moving anything else.",
        usage="%(prog)s [flags; --help lists them]",
        formatter_class=FlagFormatter,
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Stable Diffusion 1.x/2.x: a folder or a Hub id."
    )
    group.add_argument("--revision", help="Revision of the Hub id.")
    group.add_argument("--variant", help="Variant of the weight files, such as fp16.")
    group.add_argument(
        "--prediction_type",
        choices=("epsilon", "v_prediction"),
        help="What the UNet predicts; as the model's scheduler says if not given.",
    )
    group.add_argument("--pretrained_vae_model_name_or_path", help="Another VAE than the model's: a folder or Hub id.")
    group.add_argument("--tiny_vae_model_name_or_path", help="AutoencoderTiny that decodes for the enhancement loss.")
    group.add_argument(
        "--clip_model_name_or_path",
        default="openai/clip-vit-large-patch14",
        help="CLIP model that measures phrases against the target and judges portraits in the enhancement loss.",
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--train_data_dir", help="Folder with pictures and metadata.jsonl or metadata.csv, or a caption beside each."
    )
    group.add_argument("--dataset_name", help="A `datasets` id or path, instead of --train_data_dir.")
    group.add_argument("--dataset_config_name", help="Configuration of the data set.")
    group.add_argument(
        "--cache_dir", help="Where models and data sets from the Hub are kept, and latents and text embeddings, too."
    )
    group.add_argument("--image_column", default="image", help="Column of the pictures, with --dataset_name.")
    group.add_argument("--base_prompt_column", default="base_prompt", help="Column of the base prompts.")
    group.add_argument(
        "--caption_column", help="Column of captions instead, out of which the target is taken where they say it."
    )
    group.add_argument(
        "--caption_extension",
        default=".txt",
        help="Ending of the captions beside the pictures, a.png and a.txt, out of which the target is taken likewise.",
    )
    group.add_argument("--target_prompt_column", default="target_prompt", help="Column of the target prompts.")
    group.add_argument(
        "--full_prompt_column", default="full_prompt", help="Optional column of the full prompts, for replacements."
    )
    group.add_argument(
        "--base_phrases_column", default="base_phrases", help="Optional column of the base prompts' phrases, as lists."
    )
    group.add_argument(
        "--free_phrases_column",
        default="free_phrases",
        help="Optional column of the phrases that may change along with the target, as lists.",
    )
    group.add_argument(
        "--free_phrases", action="extend", nargs="+", help="Such phrases for all base prompts that have them."
    )
    group.add_argument(
        "--mask_column",
        default="mask",
        help="Column of the masks of --preservation mask, with --dataset_name; a folder's is mask_file_name.",
    )
    group.add_argument("--target_prompt", help="One target for the whole set, whose captions are base prompts.")
    group.add_argument("--max_train_samples", type=int, help="Train on this many portraits only.")
    group.add_argument("--resolution", type=int, default=512, help="Side of the training pictures, in pixels.")
    group.add_argument(
        "--aspect_ratio_buckets",
        help="Several sizes instead, as height,width;height,width: each portrait has the nearest in shape.",
    )
    group.add_argument(
        "--center_crop",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Crop the middle; else anywhere by chance, which needs --no-cache_latents.",
    )
    group.add_argument(
        "--random_flip",
        action="store_true",
        help="Mirror pictures by chance. A caption that says left or right is then wrong every second time.",
    )
    group.add_argument(
        "--image_interpolation_mode", choices=INTERPOLATION_MODES, default="lanczos", help="How to resize."
    )
    group.add_argument("--repeats", type=int, default=1, help="How often each portrait comes in an epoch.")
    group.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Processes that read pictures; 0: the training's own."
    )
    group.add_argument(
        "--cache_latents",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Encode each portrait once (with --cache_dir once for all runs) instead of in each step.",
    )
    group.add_argument(
        "--cache_text_embeddings",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Encode each prompt once (with --cache_dir once for all runs) instead of in each step.",
    )

    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, default=16, help="Rank of the LoRA.")
    group.add_argument("--lora_alpha", type=float, help="Alpha of the LoRA; the rank if not given.")
    group.add_argument(
        "--lora_target",
        choices=("cross", "all"),
        default="cross",
        help="Cross-attention projections, or self-attention's too.",
    )
    group.add_argument(
        "--lora_layers",
        type=_split_names,
        help="Instead of --lora_target: ends of the layers' names, separated by commas, as in attn2.to_k,attn2.to_v.",
    )
    group.add_argument("--lora_dropout", type=float, default=0.0, help="Dropout in front of the LoRA, in [0, 1).")
    group.add_argument("--use_dora", action="store_true", help="Weight-decomposed LoRA (DoRA).")
    group.add_argument(
        "--reference_lora",
        action="extend",
        nargs="+",
        help="Earlier LoRAs to train on top of: files, folders or Hub ids. They stay as they are, in both paths.",
    )
    group.add_argument(
        "--reference_lora_scale",
        type=float,
        nargs="+",
        default=1.0,
        help="How strongly they are active: one value for all, or one for each.",
    )

    group = parser.add_argument_group("method")
    group.add_argument(
        "--preservation",
        choices=PRESERVATIONS,
        default="spf",
        help="How the portrait is kept. All but `spf` have one stage of --stage1_steps and --stage2_steps together: "
        "`none`, plain LoRA; `prior`, DreamBooth's drawn portraits; `dop`, the original model's prediction of the "
        "training portraits without the target; `cat`, the same with unrelated prompts; `mask`, masked loss.",
    )
    group.add_argument(
        "--preservation_weight", type=float, default=1.0, help="Weight of that loss, of `prior`, `dop` and `cat`."
    )
    group.add_argument(
        "--unrelated_prompts",
        action="extend",
        nargs="+",
        help="Prompts that `cat` keeps the predictions of; the empty one if not given.",
    )
    group.add_argument("--stage1_steps", type=int, default=500, help="Steps of standard fine-tuning.")
    group.add_argument("--stage2_steps", type=int, default=500, help="Steps of alignment; 0 is a plain LoRA.")
    group.add_argument(
        "--stage1_lora_path", help="Folder or file of a LoRA that takes stage 1's place (needs --stage1_steps 0)."
    )
    group.add_argument(
        "--stage2_objective",
        choices=("composed", "paper", "both"),
        default="composed",
        help="`paper`: feature alignment and response enhancement. `composed`: predictions composed by the SFCM.",
    )
    group.add_argument(
        "--composed_init",
        choices=("zero", "stage1"),
        default="zero",
        help="Whether `composed` starts from the original model or from stage 1, which teaches it in either case.",
    )
    group.add_argument(
        "--teacher_scale", type=float, default=1.6, help="Factor on what stage 1 changes inside the map (composed)."
    )
    group.add_argument(
        "--teacher_base_weight",
        type=float,
        default=0.5,
        help="Of what stage 1 changes with the base prompt alone, the share to take away from that, in [0, 1].",
    )
    group.add_argument(
        "--composed_timestep_power",
        type=float,
        default=0.5,
        help="Draw composed alignment's timesteps with density (noise/signal)^power; 0 is uniform.",
    )
    group.add_argument(
        "--composed_target_reuse",
        type=int,
        default=2,
        help="Steps that learn from each composed target, which costs more to make than to learn; 1 makes each anew.",
    )
    group.add_argument("--lambda_text", type=float, default=20.0, help="Weight of the text-consistent loss (paper).")
    group.add_argument("--lambda_fine", type=float, default=6.0, help="Weight of the fine-grained loss (paper).")
    group.add_argument("--lambda_enh", type=float, default=20.0, help="Weight of the enhancement loss (paper).")
    group.add_argument(
        "--lambda_base", type=float, default=10.0, help="Weight of keeping predictions for unchanged prompts (paper)."
    )
    group.add_argument(
        "--enhancement_loss",
        choices=(*ENHANCEMENT_LOSSES, "none"),
        default="difference",
        help="Form of the enhancement loss.",
    )
    group.add_argument(
        "--enhancement_weighting",
        choices=("alpha_bar", "none"),
        default="alpha_bar",
        help="Weigh the enhancement loss by the signal's share, since at high noise its portrait is a guess; or not.",
    )
    group.add_argument(
        "--alignment_layers",
        choices=("all", "phrase_map"),
        default="all",
        help="Cross-attention layers the paper's losses align: all, or those whose attention the phrases' maps show.",
    )
    group.add_argument(
        "--enhancement_every", type=int, default=1, help="Compute the enhancement loss in every so manieth step alone."
    )
    group.add_argument(
        "--base_prompt_share",
        type=float,
        default=0.6,
        help="Share of the alignment rows, in [0, 1), that ask for no change: 2/3 base prompt, 1/3 empty prompt.",
    )
    group.add_argument("--sfcm_mode", choices=SFCM_MODES, default="averaged_target", help="How the map is made.")
    group.add_argument("--sfcm_gamma", type=float, default=2.0, help="Exponent of the map in the composition.")
    group.add_argument(
        "--sfcm_noise_samples", type=int, default=4, help="Noise samples a portrait's map is averaged over."
    )
    group.add_argument(
        "--sfcm_timesteps",
        type=int,
        nargs=2,
        default=(600, 950),
        metavar=("LOW", "HIGH"),
        help="Timesteps of those samples.",
    )
    group.add_argument(
        "--sfcm_refresh_steps",
        type=int,
        default=0,
        help="Make the averaged maps anew every so many steps; 0 is never.",
    )
    group.add_argument(
        "--sfcm_dir",
        help="Folder of maps to use instead, a greyscale picture for each alignment portrait: 00000.png and so on.",
    )
    group.add_argument(
        "--save_alignment",
        action="store_true",
        help="Write the alignment portraits and their maps to OUTPUT_DIR/alignment, to be looked at or corrected.",
    )
    group.add_argument(
        "--alignment_source",
        choices=("generated", "data", "both"),
        default="generated",
        help="Portraits both paths are aligned on: drawn by the original model, the training portraits, or both.",
    )
    group.add_argument(
        "--alignment_phrase_dropout",
        type=float,
        default=0.5,
        help="Chance in [0, 1) that a drawn portrait's prompt leaves out a phrase, so that the portraits differ more.",
    )
    group.add_argument("--num_alignment_images", type=int, default=64, help="How many portraits are drawn for it.")
    group.add_argument("--alignment_inference_steps", type=int, default=25, help="Denoising steps of each of them.")
    group.add_argument("--alignment_guidance_scale", type=float, default=5.0, help="Guidance scale of each of them.")
    group.add_argument(
        "--reference_target_prompt",
        action="extend",
        nargs="+",
        help="Targets of the earlier LoRAs, each to be asked for in half of the drawn portraits.",
    )
    group.add_argument(
        "--dual_path",
        choices=DUAL_PATH_MODES,
        default="two_pass",
        help="Two passes, or one batched pass, for the two paths.",
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--train_batch_size", type=int, default=4, help="Portraits a step and process.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Batches an update.")
    group.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, more time.")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="Learning rate; 1.0 is usual for prodigy.")
    group.add_argument(
        "--scale_lr", action="store_true", help="Multiply it by accumulation, batch size and number of processes."
    )
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="prodigy needs prodigyopt.")
    group.add_argument("--use_8bit_adam", action="store_true", help="AdamW's state in 8 bits, from bitsandbytes.")
    group.add_argument(
        "--lr_scheduler", choices=SCHEDULERS, default="constant", help="Learning rate over the steps of stage 1."
    )
    group.add_argument("--stage2_lr_scheduler", choices=SCHEDULERS, default="cosine", help="The same for stage 2.")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="Warm-up steps of each stage's scheduler.")
    group.add_argument("--lr_num_cycles", type=int, default=1, help="Hard restarts of cosine_with_restarts.")
    group.add_argument("--lr_power", type=float, default=1.0, help="Power of polynomial.")
    group.add_argument(
        "--snr_gamma", type=float, help="Min-SNR weighting of the diffusion loss; 5.0 is usual. None if not given."
    )
    group.add_argument(
        "--noise_offset", type=float, default=0.0, help="Offset of the diffusion loss's noise a channel; 0.1 is usual."
    )
    group.add_argument("--adam_beta1", type=float, default=0.9, help="Decay of the gradient's running mean.")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="Decay of the squared gradient's running mean.")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="Weight decay.")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="Added to the denominator of the update.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Largest norm of the gradient.")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="accelerate's setting if not given.")
    group.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and newer.")
    group.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="xformers in the layers whose attention is not captured: the self-attention.",
    )
    group.add_argument("--seed", type=int, default=0, help="Seed of everything random in the training.")

    group = parser.add_argument_group("checkpoints")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="Write one every so many steps; 0: never.")
    group.add_argument("--checkpoints_total_limit", type=int, help="Keep this many of them; all if not given.")
    group.add_argument(
        "--resume_from_checkpoint", help="Go on from a checkpoint: latest, or a folder (of --output_dir)."
    )

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir", default="spf-portrait-lora", help="Where the LoRA and the pictures are written."
    )
    group.add_argument("--logging_dir", default="logs", help="Folder of the tracker's logs, inside --output_dir.")
    group.add_argument(
        "--report_to",
        choices=(*TRACKERS, "none"),
        default="tensorboard",
        help="Where losses and pictures are shown while training.",
    )
    group.add_argument(
        "--validation_base_prompt", help="Base prompt of the pictures; the first portrait's if not given."
    )
    group.add_argument("--validation_target_prompt", help="Their target; the first portrait's if not given.")
    group.add_argument("--num_validation_images", type=int, default=4, help="Seeds, one a row; 0 draws nothing.")
    group.add_argument(
        "--validation_steps", type=int, default=0, help="Draw every so many steps; 0: at the start and end."
    )
    group.add_argument("--validation_inference_steps", type=int, default=25, help="Denoising steps of the pictures.")
    group.add_argument("--validation_guidance_scale", type=float, default=5.0, help="Guidance scale of the pictures.")
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="Print prompts, phrases, token positions and CLIP distances; train nothing.",
    )

    group = parser.add_argument_group("sharing")
    group.add_argument("--push_to_hub", action="store_true", help="Push LoRA, card and pipeline at the end.")
    group.add_argument("--hub_model_id", help="Repository; the name of --output_dir if not given.")
    group.add_argument(
        "--hub_token",
        help="Token to push with, which every user of the machine can see while the run lasts; that of HF_TOKEN or "
        "`hf auth login`, which they cannot see, if not given.",
    )
    group.add_argument("--hub_private_repo", action="store_true", help="Make the repository private.")
    group.add_argument("--hub_license", default="creativeml-openrail-m", help="Licence the model card names.")
    group.add_argument(
        "--output_kohya_format",
        action=argparse.BooleanOptionalAction,
        help="Write the LoRA for ComfyUI and A1111, too; if not given, on with --push_to_hub but for DoRA.",
    )

    args = parser.parse_args(input_args)
    for name in PATHS:
        setattr(args, name, _in_home(getattr(args, name)))
    _fold_stages(parser, args)
    _check_flags(parser, args)
    if args.lora_alpha is None:
        args.lora_alpha = float(args.rank)
    if args.output_kohya_format is None:
        args.output_kohya_format = args.push_to_hub and not args.use_dora
    args.reference_lora_scale = _scale_of_each(args)
    return args


def _fold_stages(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Where there is nothing to align, all steps are one stage; what only the other ways need is refused."""
    if args.unrelated_prompts is not None and args.preservation != "cat":
        parser.error("--unrelated_prompts needs --preservation cat")
    default = parser.get_default("preservation_weight")
    if args.preservation_weight != default and args.preservation not in WITH_KEPT_ROWS:
        parser.error("--preservation_weight is for --preservation prior, dop and cat")
    if args.preservation == "spf":
        return
    if args.stage1_lora_path is not None:
        parser.error(f"--preservation {args.preservation} has no second stage, which --stage1_lora_path is for")
    for name in ("stage1_steps", "stage2_steps"):  # a sum would hide that one of them is below 0
        if getattr(args, name) < 0:
            parser.error(f"--{name} must be 0 or more, got {getattr(args, name)}")
    args.stage1_steps, args.stage2_steps = args.stage1_steps + args.stage2_steps, 0


def _scale_of_each(args: argparse.Namespace) -> list[float] | None:
    """A scale for each of --reference_lora; None without one."""
    if args.reference_lora is None:
        return None
    scales = args.reference_lora_scale
    scales = scales if isinstance(scales, list) else [scales]
    return scales * len(args.reference_lora) if len(scales) == 1 else scales


def _in_home(path: str | list[str] | None) -> str | list[str] | None:
    """A path, or several, with the home folder in the place of ~."""
    if isinstance(path, list):
        return [in_home(one) for one in path]
    return None if path is None else in_home(path)


def _split_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"an empty name in {text!r}")
    return names


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program at the first flag whose value cannot work."""
    at_least_one = (
        "rank", "train_batch_size", "gradient_accumulation_steps", "num_alignment_images", "alignment_inference_steps",
        "sfcm_noise_samples", "validation_inference_steps", "resolution", "repeats", "enhancement_every",
        "composed_target_reuse", "checkpoints_total_limit", "lr_num_cycles",
    )  # fmt: skip
    not_negative = (
        "stage1_steps", "stage2_steps", "lambda_text", "lambda_fine", "lambda_enh", "lambda_base", "lr_warmup_steps",
        "num_validation_images", "validation_steps", "sfcm_refresh_steps", "adam_weight_decay", "seed",
        "teacher_scale", "composed_timestep_power", "alignment_guidance_scale", "validation_guidance_scale",
        "dataloader_num_workers", "noise_offset", "checkpointing_steps", "preservation_weight",
    )  # fmt: skip
    positive = (
        "learning_rate", "sfcm_gamma", "max_grad_norm", "lora_alpha", "adam_epsilon", "lr_power", "snr_gamma",
    )  # fmt: skip
    for names, wrong, rule in (
        (at_least_one, lambda value: value < 1, "at least 1"),
        (not_negative, lambda value: not 0 <= value < math.inf, "0 or more"),
        (positive, lambda value: not 0 < value < math.inf, "above 0"),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and wrong(value):
                parser.error(f"--{name} must be {rule}, got {value}")
    for name in ("base_prompt_share", "alignment_phrase_dropout", "adam_beta1", "adam_beta2", "lora_dropout"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} must be in [0, 1), got {getattr(args, name)}")
    if not 0 <= args.teacher_base_weight <= 1:
        parser.error(f"--teacher_base_weight must be in [0, 1], got {args.teacher_base_weight}")
    if args.seed >= 2**32:
        parser.error(f"--seed must be below 2**32, got {args.seed}")
    folders = {
        "output_dir": args.output_dir,
        "logging_dir": Path(args.output_dir, args.logging_dir),
        "cache_dir": args.cache_dir,
    }
    for name, folder in folders.items():
        if folder is not None:
            folder = Path(folder)
            if not next(path for path in (folder, *folder.parents) if path.exists()).is_dir():
                parser.error(f"--{name} {folder} is, or lies below, a file")
    card = Path(args.output_dir) / "README.md"
    if card.is_file() and CARD_TAG not in card.read_text(encoding="utf-8", errors="replace"):
        parser.error(f"--output_dir {args.output_dir} holds a README.md that is no model card of this script")
    if args.stage1_lora_path is not None and not Path(args.stage1_lora_path).exists():
        parser.error(f"--stage1_lora_path {args.stage1_lora_path} does not exist")
    if not 0 <= args.sfcm_timesteps[0] < args.sfcm_timesteps[1]:
        parser.error(f"--sfcm_timesteps must be two rising timesteps, got {args.sfcm_timesteps}")
    if args.stage1_lora_path is not None and args.stage1_steps > 0:
        parser.error("--stage1_lora_path takes stage 1's place, so it needs --stage1_steps 0")
    if args.stage1_steps == args.stage2_steps == 0:
        parser.error("--stage1_steps and --stage2_steps are both 0: there is nothing to train")
    if args.stage1_steps == 0 and args.stage1_lora_path is None and args.stage2_objective != "paper":
        parser.error(
            f"--stage2_objective {args.stage2_objective} needs a stage 1: give --stage1_steps or --stage1_lora_path"
        )
    for name in ("lr_scheduler", "stage2_lr_scheduler"):
        if getattr(args, name) == "polynomial" and args.learning_rate <= POLYNOMIAL_END:
            parser.error(
                f"--{name} polynomial ends at {POLYNOMIAL_END:g}, so --learning_rate must be above it, got "
                f"{args.learning_rate:g}"
            )
    if not args.center_crop and args.cache_latents:
        parser.error("--no-center_crop takes another crop in each step, so it needs --no-cache_latents")
    if args.sfcm_dir is not None and args.sfcm_refresh_steps:
        parser.error("--sfcm_refresh_steps would replace the maps of --sfcm_dir")
    for name in ("sfcm_dir", "save_alignment"):
        if getattr(args, name) and args.stage2_steps == 0:
            parser.error(f"--{name} is for the alignment of stage 2, and these flags have none")
    if args.use_dora and args.dual_path == "single_pass":
        parser.error("--use_dora needs --dual_path two_pass: DoRA cannot be off in some rows of a batch")
    _check_references(parser, args)
    if args.tiny_vae_model_name_or_path is not None and not uses_enhancement(args):
        parser.error("--tiny_vae_model_name_or_path is for the enhancement loss, which these flags do not compute")
    try:
        check_optimizer(args.optimizer, args.use_8bit_adam)
    except ValueError as error:
        parser.error(str(error))
    if args.enable_xformers_memory_efficient_attention and importlib.util.find_spec("xformers") is None:
        parser.error("--enable_xformers_memory_efficient_attention needs the package xformers: pip install xformers")
    if args.hub_token is not None and args.report_to not in PRIVATE_TRACKERS:
        parser.error(
            f"--hub_token would be kept by --report_to {args.report_to} with the command line: "
            "log in with `hf auth login` instead"
        )
    if not args.push_to_hub:
        for name in ("hub_model_id", "hub_token", "hub_private_repo"):
            if getattr(args, name):
                parser.error(f"--{name} needs --push_to_hub")
    if args.caption_column is not None and args.base_prompt_column != parser.get_default("base_prompt_column"):
        parser.error("--caption_column takes the place of --base_prompt_column: give one of them")
    if not (args.caption_extension.startswith(".") and args.caption_extension.strip(". ")):
        parser.error(f"--caption_extension must be an ending such as .txt, got {args.caption_extension!r}")
    if args.caption_extension != parser.get_default("caption_extension") and args.train_data_dir is None:
        parser.error("--caption_extension is for the captions of --train_data_dir")
    if not all(phrase.strip() for phrase in args.free_phrases or ()):
        parser.error("--free_phrases has an empty phrase")
    if args.aspect_ratio_buckets is not None and not args.aspect_ratio_buckets.strip():
        parser.error("--aspect_ratio_buckets is empty")
    _check_tracker(parser, args.report_to)


def _check_tracker(parser: argparse.ArgumentParser, name: str) -> None:
    """End the program where a tracker's package is not installed."""
    # Asked last, for accelerate knows the packages, and takes seconds to be imported.
    from accelerate.tracking import get_available_trackers

    if name not in ("all", "none", *(tracker.value for tracker in get_available_trackers())):
        parser.error(f"--report_to {name} needs the tracker's own package, which is not installed")


def _check_references(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program where the flags about earlier LoRAs cannot go together."""
    scales = args.reference_lora_scale if isinstance(args.reference_lora_scale, list) else None
    if args.reference_lora is None:
        for name, value in (
            ("reference_lora_scale", scales),
            ("reference_target_prompt", args.reference_target_prompt),
        ):
            if value is not None:
                parser.error(f"--{name} needs --reference_lora")
        return
    if scales is not None and len(scales) not in (1, len(args.reference_lora)):
        parser.error(
            f"--reference_lora_scale has {len(scales)} values and --reference_lora {len(args.reference_lora)}: "
            "give one for all, or one for each"
        )
    for scale in scales or ():
        if not math.isfinite(scale):
            parser.error(f"--reference_lora_scale must be finite, got {scale}")
    if args.reference_target_prompt is None:
        return
    if not all(text.strip() for text in args.reference_target_prompt):
        parser.error("--reference_target_prompt has an empty text")
    if args.preservation != "prior" and (args.stage2_steps == 0 or args.alignment_source == "data"):
        parser.error("--reference_target_prompt is for drawn portraits, and these flags draw none for the alignment")


def uses_enhancement(args: argparse.Namespace) -> bool:
    """Whether any step computes the enhancement loss."""
    return args.stage2_steps > 0 and args.stage2_objective != "composed" and args.enhancement_loss != "none"


def has_sfcm_bank(args: argparse.Namespace) -> bool:
    """Whether each alignment portrait has one map, instead of one anew in each step."""
    # Asked of flags that were read, when all is imported anyway.
    from sfcm import SFCM_MODES

    return SFCM_MODES[args.sfcm_mode].averaged or args.sfcm_dir is not None
