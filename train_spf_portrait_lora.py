#!/usr/bin/env python
"""Teach a Stable Diffusion model a portrait attribute as a LoRA, without moving anything else (SPF-Portrait).

A recipe from top to bottom: what a run is made of, the step, the two stages, what is left behind. What a step learns
is in training/objectives/, the flags are in training/flags.py, what is read before a model is loaded in
training/inputs.py.

Paper: arXiv 2504.00396; `[ours]` marks what it leaves open.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from programs.console import import_libraries
from training.arguments import Flags, parse_args, uses_enhancement, uses_presence


if __name__ == "__main__":
    # Flags are read before the libraries are imported, which takes seconds: --help and a wrong flag answer at once.
    FLAGS = parse_args()
    import_libraries()

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from loras import LORA_WEIGHTS
from programs.interruption import Interrupted, StopRequest, catch_stop_signals
from programs.loading import InputError
from programs.writing import find_checkpoints
from training.alignment import prepare_alignment
from training.batches import BatchDrawer
from training.caches import TensorCache
from training.checkpoints import CheckpointError, lock_folder, remove_leftovers, what_is_safe
from training.engine import Engine, make_accelerator, stop_if_asked, tracker_config
from training.enhancement import Enhancement
from training.inputs import Inputs, check_inputs, print_dry_run
from training.maps import MapMaker
from training.models import Models, load_models, load_text_part
from training.objectives import make_objectives
from training.objectives.objective import Objective, Parts
from training.portraits import TrainingPortraits, draw_portraits, portraits_of
from training.presence import Presence, bring_to_presence
from training.prompt_table import make_prompt_table
from training.resuming import check_nothing_came, check_record, resume_record
from training.run_file import write_run_file
from training.saving import Checkpoints, save_result, say_what_is_there
from training.sharing import make_repository, share
from training.validation import draw_validation, validation_path


logger = get_logger(__name__)


# ----------------------------------------------------------------------------------------------- what a run is made of


def prepare(flags: Flags, inputs: Inputs, accelerator: Accelerator) -> Parts:
    """Load the models, add the LoRA, and turn prompts and portraits into tensors on the device.

    Raises InputError: weights are missing, damaged or a pickle.
    """
    family, data, shown = inputs.family, flags.data, accelerator.is_local_main_process
    models = load_models(flags, inputs, accelerator)
    cache = TensorCache(None if flags.model.cache_dir is None else Path(flags.model.cache_dir) / "spf-portrait")
    with models.encoding():
        table = make_prompt_table(
            family, models.pipeline, inputs.pairs, inputs.tokens, device=models.device,
            encoded=data.cache_text_embeddings, cache=cache, shown=shown,
        )  # fmt: skip
    training, enhancement, used = TrainingPortraits(flags, inputs, models, accelerator), None, [family.denoiser]
    presence = Presence(flags, inputs, models, accelerator) if uses_presence(flags) else None
    if data.cache_latents:
        with models.at_work("vae"):
            training.encode(cache, shown)
    if uses_enhancement(flags.method, flags.paper):
        enhancement = Enhancement(flags, models, inputs.pairs, accelerator)
        if data.cache_latents:
            enhancement.embed(training, shown)
    if not data.cache_latents or (enhancement is not None and enhancement.decoder is models.pipeline.vae):
        used.append("vae")
    if not data.cache_text_embeddings:
        used += family.text_encoders_of(models.pipeline)
    # The denoiser comes last, so that it need not share the device with what made these.
    models.keep(used)
    batches = BatchDrawer(
        flags.loop.seed, flags.loop.train_batch_size, accelerator.process_index, accelerator.num_processes,
        len(inputs.pairs), models.noise, accelerator.device,
    )  # fmt: skip
    return Parts(
        models=models, table=table, batches=batches, training=training, enhancement=enhancement, presence=presence,
        alignment=None, maps=MapMaker(models, table, flags.alignment, flags.loop.seed),
        unrelated_ids=inputs.unrelated_ids,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the step


def train_step(engine: Engine, models: Models, objectives: Sequence[Objective]) -> dict[str, float]:
    """One update of the LoRA; returns its losses by name, averaged over the batches of the step.

    Each objective is a forward and a backward of its own, so that no two of them are in memory together.
    """
    means: dict[str, torch.Tensor] = {}
    engine.seed_dropout()
    with models.adapters.dropout("default"):
        for micro_step in engine.micro_steps:
            for objective in objectives:
                last = micro_step == engine.micro_steps[-1] and objective is objectives[-1]
                with engine.reducing(models.response_denoiser, last), objective.losses(micro_step) as losses:
                    engine.backward(sum(objective.weights[name] * loss for name, loss in losses.items()))
                for name, loss in losses.items():
                    means[name] = means.get(name, 0.0) + loss.detach() / len(engine.micro_steps)
    return engine.update(means)


# ---------------------------------------------------------------------------------------------------------- the stages


def train_stages(
    flags: Flags, inputs: Inputs, parts: Parts, engine: Engine, checkpoints: Checkpoints, stop: StopRequest
) -> None:
    """Stage 1 and stage 2, or what is left of them."""
    method, output, models, accelerator = flags.method, flags.output, parts.models, engine.accelerator
    resume, total = inputs.resume, method.stage1_steps + method.stage2_steps

    def after_step(losses: dict[str, float]) -> None:
        """Show the losses, write a checkpoint, stop if asked, draw."""
        step = engine.global_step
        progress.set_description(f"stage {engine.stage}", refresh=False)
        progress.set_postfix({name: f"{value:.3g}" for name, value in losses.items()}, refresh=False)
        progress.update()
        accelerator.log({f"loss/{name}": value for name, value in losses.items()}, step=step)
        if flags.loop.checkpointing_steps and step % flags.loop.checkpointing_steps == 0:
            checkpoints.write()
        stop_if_asked(stop, accelerator)
        if output.validation_steps and step % output.validation_steps == 0 and step != total:
            with stop.at_once():
                draw_validation(flags, inputs, models, engine)
            progress.unpause()  # its clock counts steps alone

    if resume is None:
        with stop.at_once():
            if method.preservation == "prior":
                parts = replace(parts, alignment=draw_portraits(flags, inputs, models, parts.table, accelerator))
            draw_validation(flags, inputs, models, engine)
    else:
        logger.info("Going on from %s", resume.folder)
        parts = replace(parts, alignment=portraits_of(resume.state, accelerator.device))
        if parts.presence is not None and engine.stage == 2:
            parts.presence.restore(resume.state["presence"])
    with tqdm(total=total, initial=engine.global_step, disable=not accelerator.is_local_main_process) as progress:
        if engine.global_step < method.stage1_steps:
            train_stage(1, range(method.stage1_steps), flags, parts, engine, checkpoints, after_step)
        if method.stage2_steps == 0:
            return
        if engine.stage == 1:
            if method.stage1_steps > 0:
                save_result(models, Path(output.output_dir) / "stage1", Path(output.output_dir), accelerator)
            logger.info("Stage 2: preparing %s alignment portraits and their maps", flags.alignment.alignment_source)
            with stop.at_once():
                if parts.presence is not None:
                    parts.presence.measure_stage1()
                parts = replace(parts, alignment=prepare_alignment(flags, inputs, parts, accelerator))
            progress.unpause()
        train_stage(2, range(method.stage1_steps, total), flags, parts, engine, checkpoints, after_step)


def train_stage(
    stage: int, steps: range, flags: Flags, parts: Parts, engine: Engine, checkpoints: Checkpoints,
    after_step: Callable[[dict[str, float]], None],
) -> None:  # fmt: skip
    """The steps of one stage, or those that are left, with its own objectives, optimizer state and learning rate."""
    objectives, refresh = make_objectives(stage, flags, parts), flags.alignment.sfcm_refresh_steps
    for objective in objectives:
        objective.prepare(checkpoints.state_for(objective, stage))
    engine.start_stage(stage, len(steps))
    checkpoints.hold(objectives, parts.alignment, parts.presence if stage == 2 else None)
    accumulation, portraits = flags.loop.gradient_accumulation_steps, parts.alignment
    parts.training.start_reading(range(engine.global_step * accumulation, steps.stop * accumulation))
    for global_step in range(engine.global_step, steps.stop):
        done = global_step - steps.start
        if stage == 2 and refresh and done and done % refresh == 0:
            shown = engine.accelerator.is_local_main_process
            portraits.sfcm = parts.maps.fill_bank(portraits, 2 * flags.loop.train_batch_size, shown)
            for objective in objectives:
                objective.maps_changed()
        after_step(train_step(engine, parts.models, objectives))


# ------------------------------------------------------------------------------------------------- what is left behind


def end_processes(models: Models, accelerator: Accelerator) -> None:
    """The distributed wrapper goes before the group of processes it talks to, which could else wait for itself."""
    models.response_denoiser = models.denoiser
    accelerator.free_memory()
    accelerator.end_training()


def leave(
    flags: Flags, inputs: Inputs, models: Models, engine: Engine, checkpoints: Checkpoints, interruption: Interrupted
) -> None:
    """Write a checkpoint, say how to go on, and end the program as its signal would have."""
    output_dir, total = flags.output.output_dir, flags.method.stage1_steps + flags.method.stage2_steps
    if engine.global_step > 0:
        checkpoints.write()
        # Nothing lies in the output folder yet if the run came from another one and has done no step since.
        checkpoint = "latest" if find_checkpoints(Path(output_dir)) else inputs.resume.folder
        advice = f"go on with the same flags and --resume_from_checkpoint {checkpoint} ({output_dir})"
    else:
        advice = "before the first one there is nothing to keep: start again"
    if engine.accelerator.is_main_process:
        logger.warning("%s after step %d of %d: %s", interruption, engine.global_step, total, advice)
    end_processes(models, engine.accelerator)
    sys.exit(128 + interruption.signal_number)


def finish(flags: Flags, inputs: Inputs, parts: Parts, engine: Engine, repo_id: str | None) -> None:
    """The LoRA, the last picture, the model card, and what else was asked for."""
    accelerator, output_dir, models, presence = engine.accelerator, Path(flags.output.output_dir), parts.models, ""
    save_result(models, output_dir, output_dir, accelerator)
    if parts.presence is not None:
        presence = bring_to_presence(models, parts.presence, flags.lora.target_presence)
        save_result(models, output_dir, output_dir, accelerator)
    try:
        draw_validation(flags, inputs, models, engine)
    except OSError as error:
        raise CheckpointError(
            f"the last picture could not be written: {error}; {output_dir / LORA_WEIGHTS} is whole"
        ) from error
    accelerator.wait_for_everyone()
    end_processes(models, accelerator)
    if engine.skipped_updates:
        logger.warning("The gradient scaler left out %d updates that were not finite", engine.skipped_updates)
    if accelerator.is_main_process:
        pictures = [validation_path(engine.global_step)] if flags.output.num_validation_images else []
        is_dora = models.denoiser.peft_config["default"].use_dora
        share(flags, inputs, pictures, repo_id, is_dora, presence)
        say_what_is_there(flags, inputs, engine.global_step, Path(__file__).with_name(inputs.family.hub.pipeline_file))


# -------------------------------------------------------------------------------------------------------- the program


def train(flags: Flags, inputs: Inputs) -> None:
    """Both stages, from checked inputs to the LoRA in --output_dir."""
    accelerator, resume = make_accelerator(flags.model.mixed_precision, flags.output), inputs.resume
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    set_seed(flags.loop.seed)
    if flags.model.allow_tf32:
        torch.set_float32_matmul_precision("high")
    if flags.output.dry_run:
        text_part = load_text_part(inputs, flags.model)
        print_dry_run(inputs, inputs.family.distances(text_part, inputs.pairs, inputs.tokens))
        return
    batch_size = flags.loop.train_batch_size * accelerator.num_processes
    record = resume_record(flags, inputs.references, batch_size, accelerator.mixed_precision)
    if resume is not None:
        check_record(resume.folder, resume.state["record"], record)
    # Inside, no other run writes into --output_dir.
    lock = lock_folder(Path(flags.output.output_dir)) if accelerator.is_main_process else nullcontext()
    with lock, logging_redirect_tqdm():
        train_in_folder(flags, inputs, accelerator, record)


def train_in_folder(flags: Flags, inputs: Inputs, accelerator: Accelerator, record: dict[str, Any]) -> None:
    """Both stages, in a folder that is this run's alone."""
    output_dir, repo_id = Path(flags.output.output_dir), None
    if accelerator.is_main_process:
        check_nothing_came(flags.loop, flags.output, inputs.resume)
        if flags.sharing.push_to_hub:
            repo_id = make_repository(flags.sharing, output_dir)
    logger.info("Loading %s", flags.model.pretrained_model_name_or_path)
    parts = prepare(flags, inputs, accelerator)
    models, resume = parts.models, None if inputs.resume is None else inputs.resume.state
    models.response_denoiser = accelerator.prepare(models.denoiser)
    engine = Engine(accelerator, models.adapters.parameters("default"), flags.optimizer, flags.loop, resume)
    checkpoints = Checkpoints(flags, record, inputs, models, engine)
    if accelerator.is_main_process:
        for folder in (output_dir, output_dir / "stage1"):
            remove_leftovers(folder)
        write_run_file(flags.asked, output_dir)
        accelerator.init_trackers("spf-portrait", config=tracker_config(flags))
    logger.info(
        "%d portraits, %d processes, %d steps of stage 1, %d of stage 2",
        len(inputs.rows), accelerator.num_processes, flags.method.stage1_steps, flags.method.stage2_steps,
    )  # fmt: skip
    with catch_stop_signals() as stop:
        try:
            train_stages(flags, inputs, parts, engine, checkpoints, stop)
        except Interrupted as interruption:
            leave(flags, inputs, models, engine, checkpoints, interruption)
    finish(flags, inputs, parts, engine, repo_id)


def main(input_args: Sequence[str] | None = None) -> None:
    """The program, from its command line."""
    run_program(parse_args(input_args))


def run_program(flags: Flags) -> None:
    """Check everything first, so that a mistake in the input ends at once with one line."""
    start = "train_spf_portrait_lora.py: error: "
    try:
        inputs = check_inputs(flags)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{start}{error}") from error
    try:
        train(flags, inputs)
    except (InputError, CheckpointError) as error:
        raise SystemExit(f"{start}{error}") from error
    except (FloatingPointError, OSError) as error:  # OSError: of a picture, a cache or a log, on a disk that is full
        safe = what_is_safe(Path(flags.output.output_dir))
        raise SystemExit(f"{start}{' '.join(str(error).split())}; {safe}") from error


if __name__ == "__main__":
    run_program(FLAGS)
