"""The engine of a run: where it is, its optimizer, schedule, accumulation and precision, updates left out. [ours]"""

import copy
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler

from programs.interruption import Interrupted, StopRequest
from programs.loading import InputError
from training.arguments import Flags, flat
from training.flags import LoopFlags, OptimizerFlags, OutputFlags


logger = get_logger(__name__)

# A scaler that starts at 2^16 and is halved each time has come down to 1 by then.
MAX_SKIPPED_IN_A_ROW = 16
ADVICE = "A lower --learning_rate or --mixed_precision bf16 instead of fp16 usually helps"


def make_accelerator(mixed_precision: str | None, output: OutputFlags) -> Accelerator:
    """The processes, the precision and the trackers.

    Raises InputError: accelerate's settings ask for what this script does not do.
    """
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
            raise InputError(
                f"accelerate is set to {engine}, which this script does not train with: a LoRA has little to be "
                "sharded; choose MULTI_GPU (DDP)"
            )
    output_dir = Path(output.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=1, mixed_precision=mixed_precision,
        log_with=None if output.report_to == "none" else output.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / output.logging_dir),
    )  # fmt: skip
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise InputError(
            f"launched as {launched} processes, of which accelerate makes {accelerator.num_processes}; on a machine "
            "without a GPU set ACCELERATE_USE_CPU=true"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU; bf16 works on the CPU, too")
    return accelerator


def tracker_config(flags: Flags) -> dict[str, bool | int | float | str]:
    """The flags as values a tracker can show, without the token."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in flat(flags).items()
        if value is not None and name != "hub_token"
    }


def stop_if_asked(stop: StopRequest, accelerator: Accelerator) -> None:
    """Stop all processes after the same step, whichever of them was sent a signal."""
    asked = stop.signal_number
    if accelerator.num_processes > 1:
        asked = int(accelerator.gather(torch.tensor([asked], device=accelerator.device)).max())
    if asked:
        raise Interrupted(asked)


class Engine:
    """Makes the updates of both stages with one optimizer, which each stage starts anew.

    The run is in stage `stage`, 1 or 2, after `global_step` updates, of which a gradient scaler left out
    `skipped_updates`; it begins where the state `resume` has it.
    """

    def __init__(
        self, accelerator: Accelerator, parameters: list[torch.nn.Parameter], flags: OptimizerFlags, loop: LoopFlags,
        resume: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        self.accelerator, self.parameters = accelerator, parameters
        self._flags, self._loop, self._resume = flags, loop, resume
        self.stage, self.global_step = (1, 0) if resume is None else (resume["stage"], resume["global_step"])
        self.skipped_updates = self._skipped_in_a_row = 0
        self.optimizer = self.lr_scheduler = self._fresh = None
        self.learning_rate = flags.learning_rate
        if flags.scale_lr:
            batch_size = loop.train_batch_size * accelerator.num_processes
            self.learning_rate *= loop.gradient_accumulation_steps * batch_size
        if flags.optimizer == "prodigy" and self.learning_rate <= 0.1:
            advice = "--learning_rate %g is a factor on the rate that prodigy finds; 1.0 is usual"
            logger.warning(advice, self.learning_rate)

    def start_stage(self, stage: int, num_steps: int) -> None:
        """Start a stage of so many steps with its own schedule, or go on in it as the checkpoint has it."""
        self.stage, loop, resume = stage, self._loop, self._resume
        first = self.optimizer is None
        optimizer = self._make_optimizer() if first else self.optimizer.optimizer
        if first:
            self._fresh = copy.deepcopy(optimizer.state_dict())
        else:
            optimizer.load_state_dict(self._fresh)
        self.lr_scheduler = get_scheduler(
            loop.lr_scheduler if stage == 1 else loop.stage2_lr_scheduler, optimizer,
            num_warmup_steps=loop.lr_warmup_steps, num_training_steps=num_steps, num_cycles=loop.lr_num_cycles,
            power=loop.lr_power,
        )  # fmt: skip
        if first:
            self.optimizer = self.accelerator.prepare(optimizer)
        if resume is None or resume["global_step"] != self.global_step:
            return
        if resume["stage"] == stage:
            self.optimizer.load_state_dict(resume["optimizer"])
            self.lr_scheduler.load_state_dict(resume["lr_scheduler"])
        # The scaler is one for both stages.
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(resume["scaler"])

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW, or one from a package of its own, which the flags have looked for."""
        flags = self._flags
        options = {
            "lr": self.learning_rate, "betas": (flags.adam_beta1, flags.adam_beta2),
            "weight_decay": flags.adam_weight_decay, "eps": flags.adam_epsilon,
        }  # fmt: skip
        if flags.use_8bit_adam:
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(self.parameters, **options)
        if flags.optimizer == "prodigy":
            from prodigyopt import Prodigy

            # As its authors advise for diffusion models: bias correction, and no estimate of the rate in the warm-up.
            return Prodigy(self.parameters, **options, use_bias_correction=True, safeguard_warmup=True)
        return torch.optim.AdamW(self.parameters, **options)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs for the engine to go on."""
        scaler = self.accelerator.scaler
        return {
            "stage": self.stage, "global_step": self.global_step, "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(), "scaler": None if scaler is None else scaler.state_dict(),
        }  # fmt: skip

    @property
    def micro_steps(self) -> range:
        """The batches of the step that comes."""
        accumulation = self._loop.gradient_accumulation_steps
        return range(self.global_step * accumulation, (self.global_step + 1) * accumulation)

    def backward(self, loss: torch.Tensor) -> None:
        """Add a loss's gradient, of which an update has the mean over its batches."""
        self.accelerator.backward(loss / self._loop.gradient_accumulation_steps)

    def reducing(self, module: torch.nn.Module, last: bool) -> AbstractContextManager[None]:
        """Inside, gradients are summed over the processes if this is the step's last backward."""
        return nullcontext() if last else self.accelerator.no_sync(module)

    def seed_dropout(self) -> None:
        """What is dropped is a function of the step, as all that is random is."""
        own = (self._loop.seed * 1_000_003 + self.global_step) * self.accelerator.num_processes
        torch.manual_seed(own + self.accelerator.process_index)

    def update(self, losses: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """One update from the gradients that are there; returns the losses, averaged over the processes.

        Raises FloatingPointError: a loss or the gradient is not finite, and no scaler is there that would try again;
        or it was not for too many steps.
        """
        accelerator, optimizer, step = self.accelerator, self.optimizer, self.global_step
        # Of this optimizer alone: accelerate's own clipping divides the gradients by a scaler's scale once for each
        # optimizer that was ever prepared.
        accelerator.unscale_gradients(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._flags.max_grad_norm)
        # Read together: each reading waits until a GPU has done all that it was given.
        values = torch.stack([value.float() for value in (*losses.values(), norm)])
        values = dict(zip((*losses, "gradient"), accelerator.reduce(values, "mean").tolist(), strict=True))
        # A scaler leaves out an update whose gradient is not finite by itself, and tries again with a lower scale.
        if accelerator.scaler is None or math.isfinite(values["gradient"]):
            for name, value in values.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name!r} is {value} at step {step}, before its update. {ADVICE}")
        del values["gradient"]
        optimizer.step()
        if optimizer.step_was_skipped:
            self._count_skipped(values)
        else:
            self._skipped_in_a_row = 0
            self.lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        self.global_step += 1
        return values

    def _count_skipped(self, losses: Mapping[str, float]) -> None:
        """Count an update that the gradient scaler left out; too many in a row are no matter of its scale."""
        self.skipped_updates += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            shown = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
            raise FloatingPointError(
                f"the gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step "
                f"{self.global_step}, and the losses are {shown}. {ADVICE}"
            )
