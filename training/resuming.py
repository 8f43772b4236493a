"""Going on with a run: from which checkpoint, and what must be as it was. Source: [ours]."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loras import LORA_WEIGHTS
from loras.loading import ReferenceLora
from programs.loading import InputError, naming_flag
from programs.writing import find_checkpoints
from training.arguments import Flags, flat, uses_presence
from training.checkpoints import check_checkpoint, latest_checkpoint, read_state
from training.flag_rules import refuse
from training.flags import LoopFlags, OutputFlags


logger = logging.getLogger(__name__)

# What may be another when a run goes on, for it does not change what is computed; prompts, pictures and earlier LoRAs
# are compared by their content, batch and precision as accelerate has them.
FREE_ON_RESUME = frozenset(
    """
    train_data_dir dataset_name dataset_config_name cache_dir image_column base_prompt_column caption_column
    target_prompt_column full_prompt_column base_phrases_column free_phrases_column mask_column caption_extension
    free_phrases target_prompt max_train_samples dataloader_num_workers cache_latents cache_text_embeddings
    train_batch_size gradient_checkpointing allow_tf32 enable_xformers_memory_efficient_attention mixed_precision
    stage2_steps output_dir logging_dir report_to checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    validation_base_prompt validation_target_prompt num_validation_images validation_steps validation_inference_steps
    validation_guidance_scale push_to_hub hub_model_id hub_token hub_private_repo hub_license output_kohya_format
    dry_run reference_lora reference_lora_scale save_alignment target_presence
    """.split()
)


class Resume(NamedTuple):
    """A checkpoint to go on from: its folder and what `checkpoints.read_state` read there."""

    folder: Path
    state: dict[str, Any]


def resume_record(
    flags: Flags, references: Sequence[ReferenceLora], global_batch_size: int, mixed_precision: str
) -> dict[str, Any]:
    """What must be the same when the run goes on: the flags that change what is computed, and what accelerate decides.

    Args:
        global_batch_size: portraits a batch over all processes.
        mixed_precision: the flag's, or that of accelerate's configuration.
    """
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in flat(flags).items()}
    record = {name: value for name, value in values.items() if name not in FREE_ON_RESUME}
    if references:
        record["reference_lora (SHA-256, scale)"] = [[lora.sha256, lora.scale] for lora in references]
    return record | {"global_batch_size": global_batch_size, "mixed_precision": mixed_precision}


def find_resume(flags: Flags, references: Sequence[ReferenceLora]) -> Resume | None:
    """The checkpoint that --resume_from_checkpoint names, checked and read; None to start anew.

    Raises ValueError: there is none, it is damaged, or another run's; or one would be lost among those of this run.
    """
    asked, output_dir = flags.loop.resume_from_checkpoint, Path(flags.output.output_dir)
    if asked in (None, "latest"):
        earlier = find_checkpoints(output_dir)
        if earlier and asked is None and not flags.output.dry_run:
            raise ValueError(
                f"--output_dir {output_dir} holds {earlier[-1].name} of an earlier run: give "
                "--resume_from_checkpoint latest to go on, or another folder to start anew"
            )
        folder = None if asked is None else latest_checkpoint(output_dir)
        if folder is None:
            check_unused(flags.output)
            if asked == "latest":
                logger.warning("There is no whole checkpoint in %s: the run starts anew", output_dir)
            return None
    else:
        folder = Path(asked) if Path(asked).is_dir() else output_dir / asked
        with naming_flag("resume_from_checkpoint", asked):
            refuse(not folder.is_dir(), "there is no such folder")
            check_checkpoint(folder)
    state = read_state(folder)
    record = state["record"]
    # Batch and precision are compared once accelerate has said what they are.
    now = resume_record(flags, references, record["global_batch_size"], record["mixed_precision"])
    check_record(folder, record, now)
    refuse(
        uses_presence(flags) and state["stage"] == 2 and state.get("presence") is None,
        f"--resume_from_checkpoint {folder}: what --target_presence needs was not measured before stage 2; go on "
        "without it, or from a checkpoint of stage 1",
    )
    return Resume(folder, state)


def check_unused(output: OutputFlags) -> None:
    """An InputError where a run that starts anew would write over the LoRA of another."""
    if not output.dry_run and Path(output.output_dir, LORA_WEIGHTS).is_file():
        raise InputError(
            f"--output_dir {output.output_dir} holds the {LORA_WEIGHTS} of an earlier run, which this one would write "
            "over: give another folder"
        )


def check_nothing_came(loop: LoopFlags, output: OutputFlags, resume: Resume | None) -> None:
    """An InputError where another run has written into the output folder since the flags were checked.

    To be asked once no other run can write into it.
    """
    output_dir = Path(output.output_dir)
    if resume is None:
        check_unused(output)
    expected = None if resume is None or resume.folder.parent != output_dir else resume.folder
    if loop.resume_from_checkpoint in (None, "latest") and latest_checkpoint(output_dir) != expected:
        raise InputError(f"--output_dir {output_dir}: another run has written checkpoints meanwhile; start again")


def check_record(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """An InputError that names the first that differs of what a run was trained with and what it is given now."""
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise InputError(
                f"--resume_from_checkpoint {folder}: was trained with {name} {before.get(name)}, and now it is "
                f"{now.get(name)}"
            )
