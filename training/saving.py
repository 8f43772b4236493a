"""What a run leaves behind: the LoRA, checkpoints, and the last lines that say what lies where. Source: [ours]."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from loras import CARD, LORA_WEIGHTS
from loras.card import loading_code
from loras.writing import write_diffusers_lora
from training.arguments import Flags
from training.checkpoints import save_checkpoint, saying_what_is_safe
from training.engine import Engine
from training.inputs import Inputs
from training.models import Models
from training.objectives.objective import Objective
from training.portraits import Portraits
from training.presence import Presence
from training.validation import validation_path


logger = get_logger(__name__)


def save_lora(models: Models, folder: Path) -> None:
    """Write the LoRA in diffusers' format with its metadata, whole or not at all."""
    # peft's names, for all layers: a loader tells the naming by the first one.
    config = models.denoiser.peft_config["default"]
    write_diffusers_lora(folder, {models.family.denoiser: (models.lora(), config)})


def save_result(models: Models, folder: Path, output_dir: Path, accelerator: Accelerator) -> None:
    """Write the LoRA of a stage that is over, on the main process, or raise a CheckpointError."""
    if accelerator.is_main_process:
        with saying_what_is_safe(folder / LORA_WEIGHTS, output_dir):
            save_lora(models, folder)


class Checkpoints:
    """Writes all that a run needs to go on exactly: batches, noise and timesteps are functions of seed and step."""

    def __init__(
        self, flags: Flags, record: Mapping[str, Any], inputs: Inputs, models: Models, engine: Engine
    ) -> None:
        self._output_dir, self._limit = Path(flags.output.output_dir), flags.loop.checkpoints_total_limit
        self._constant = {"record": record, "data": inputs.data_fingerprint}
        self._models, self._engine, self._resume = models, engine, inputs.resume
        self._saved_step = None if inputs.resume is None else engine.global_step
        self._objectives: Sequence[Objective] = ()
        self._alignment: Portraits | None = None
        self._presence: Presence | None = None

    def hold(
        self, objectives: Sequence[Objective], alignment: Portraits | None, presence: Presence | None
    ) -> None:
        """From now on a checkpoint has the state of these."""
        self._objectives, self._alignment, self._presence = objectives, alignment, presence

    def state_for(self, objective: Objective, stage: int) -> dict[str, torch.Tensor] | None:
        """What the checkpoint that the run goes on from has for an objective, if it is of this stage."""
        if self._resume is None or self._resume.state["stage"] != stage:
            return None
        return self._resume.state["objectives"][type(objective).__name__]

    def _measured(self) -> dict[str, float] | None:
        """What was seen of the target before stage 2, in this run or in the one that it goes on from."""
        if self._presence is not None:
            return self._presence.state()
        return None if self._resume is None else self._resume.state.get("presence")

    def write(self) -> None:
        """Write one for the last step, unless there is one."""
        engine = self._engine
        if not engine.accelerator.is_main_process or self._saved_step == engine.global_step:
            return
        state = self._constant | engine.state()
        state["alignment"] = None if self._alignment is None else vars(self._alignment)
        state["presence"] = self._measured()
        state["objectives"] = {type(objective).__name__: objective.state() for objective in self._objectives}
        write = partial(save_lora, self._models)
        save_checkpoint(self._output_dir, engine.global_step, state, write, self._limit)
        self._saved_step = engine.global_step


def say_what_is_there(flags: Flags, inputs: Inputs, global_step: int, pipeline_file: Path) -> None:
    """The last lines: what lies where, and how to draw with it."""
    output, pair = flags.output, inputs.validation_pair
    folder, targets = Path(output.output_dir), list(pair.target_argument)
    logger.info("The LoRA: %s", folder / LORA_WEIGHTS)
    if output.num_validation_images:
        logger.info("Pictures: %s, the last one of them", folder / validation_path(global_step))
    if output.report_to != "none":
        logger.info("Losses: %s", folder / output.logging_dir)
    logger.info("Model card: %s", folder / CARD)
    if inputs.references:
        logger.info("How to draw with it and the earlier LoRAs is in the model card")
        return
    target, base = targets[0] if len(targets) == 1 else targets, flags.model.pretrained_model_name_or_path
    file, code = inputs.base_file, f"custom_pipeline={str(pipeline_file)!r}, trust_remote_code=True"
    if file is None:
        pipeline = f"DiffusionPipeline.from_pretrained({base!r}, {code})"
    else:  # diffusers loads no custom pipeline from one file
        pipeline = f"DiffusionPipeline.from_pipe({loading_code(inputs.family.hub, base, file, file.config)}, {code})"
    logger.info(
        "Draw: pipe = %s; pipe.load_lora_weights(%r); pipe(%r, target_prompt=%r, compare=True)", pipeline,
        output.output_dir, pair.base_prompt, target,
    )  # fmt: skip
