"""All that benchmarks use of the inside of the training script: runs at the start of a stage, and single steps.

Source: [ours].
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState

import train_spf_portrait_lora as trainer
from toy_portraits.recipe import training_flags
from training.arguments import parse_args, uses_enhancement
from training.inputs import check_inputs


Run = trainer.Run


# ---------------------------------------------------------------------------------------------------------------- runs


def prepare(flags: list[str], steps: int) -> Run:
    """A run at the start of a stage 2 of so many steps."""
    args = parse_args(flags)
    accelerator = trainer.make_accelerator(args)
    run = trainer.prepare_run(args, check_inputs(args), accelerator)
    run.response_unet = accelerator.prepare(run.unet)
    trainer.start_stage2(run)
    trainer.prepare_optimizer(run, trained_parameters(run), steps, "constant")
    trainer.start_reading(run, steps)
    return run


def with_flags(run: Run, changes: dict[str, Any]) -> Run:
    """The same run with other values of flags that nothing but a step asks for, and no targets made."""
    return replace(run, args=argparse.Namespace(**{**vars(run.args), **changes}), targets={})


def make_stage1(target: str, output_dir: Path) -> Path:
    """A LoRA of four steps, since composed alignment needs a teacher."""
    flags = training_flags(target) + ["--output_dir", str(output_dir), "--report_to", "none"]
    trainer.main(flags + ["--stage1_steps", "4", "--stage2_steps", "0", "--num_validation_images", "0"])
    return output_dir


def trained_parameters(run: Run) -> list[torch.nn.Parameter]:
    return [parameter for parameter in run.unet.parameters() if parameter.requires_grad]


# --------------------------------------------------------------------------------------------------------------- steps


def now() -> float:
    """Seconds: the wall clock's, once a GPU has done all that it was given; without one, of this process's CPU time.

    The latter does not count what other programs on the machine take.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def first_step(run: Run) -> int:
    """Of stage 2."""
    return run.args.stage1_steps


def make_targets(run: Run, step: int) -> None:
    """Make and keep the composed targets of a step without accumulation."""
    with torch.no_grad(), trainer.composed_terms(run, step):
        pass


def take_step(run: Run, step: int, stage: int) -> dict[str, float]:
    """The losses."""
    return trainer.train_step(run, stage, step, run.optimizer, trained_parameters(run))


def timed_step(run: Run, step: int, stage: int = 2) -> tuple[float, dict[str, float]]:
    """Seconds and losses of a step, by `now`."""
    start = now()
    losses = take_step(run, step, stage)
    return now() - start, losses


def host_step(run: Run, step: int, stage: int) -> tuple[float, float, dict[str, float]]:
    """Seconds of a step, those of them in which Python did not wait for the GPU, and the losses."""
    reduce, waits = run.accelerator.reduce, []

    def synchronize() -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)

    def waiting(*args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        synchronize()
        waits.append(time.perf_counter() - start)
        return reduce(*args, **kwargs)

    synchronize()
    start = time.perf_counter()
    # The losses are read right after they are reduced, which would wait for the GPU.
    with patch.object(run.accelerator, "reduce", waiting):
        losses = take_step(run, step, stage)
    host = time.perf_counter() - start - sum(waits)
    synchronize()
    return time.perf_counter() - start, host, losses


@contextmanager
def timing_parts(run: Run, clock: dict[str, float]) -> Iterator[None]:
    """Inside, each part of a step adds its seconds to the clock."""
    owners = [
        (trainer, "draw_batch", "drawing the batch"),
        (trainer, "composed_predictions", "reference and teacher"),
        (run.unet, "forward", "UNet, all forwards"),
        (trainer, "text_consistent_loss", "text-consistent loss, forward"),
        (trainer, "fine_grained_loss", "fine-grained loss, forward"),
        (trainer, "enhancement_loss", "enhancement loss, forward"),
        (run.accelerator, "backward", "backward"),
        (run.accelerator, "clip_grad_norm_", "norm of the gradient"),
        (run.optimizer, "step", "optimizer"),
    ]

    def timed(function: Callable, label: str) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                clock[label] = clock.get(label, 0.0) + now() - start

        return wrapped

    with ExitStack() as stack:
        for owner, name, label in owners:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), label)))
        yield


def held_tensors(run: Run, stage: int) -> list[torch.Tensor]:
    """What is in memory when a step begins: the models that it needs, the optimizer's state, the kept targets."""
    modules = [run.unet, run.decoder, run.clip] if stage == 2 and uses_enhancement(run.args) else [run.unet]
    state = [value for values in run.optimizer.state.values() for value in values.values()]
    return [*state, *run.targets.values(), *(parameter for module in modules for parameter in module.parameters())]


# ---------------------------------------------------------------------------------------------------- whole trainings


@contextmanager
def half_on_cpu() -> Iterator[None]:
    """Inside, the trainer's fp16 runs on a CPU: accelerate refuses it, torch's autocast and scaler do not."""
    make = trainer.make_accelerator

    def make_half(args: argparse.Namespace) -> trainer.Accelerator:
        accelerator = make(argparse.Namespace(**{**vars(args), "mixed_precision": "no"}))
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    with patch.object(trainer, "make_accelerator", make_half):
        yield


@contextmanager
def precision_of(device: str, precision: str) -> Iterator[None]:
    """Inside, the trainer runs afresh in this precision: accelerate and torch keep theirs in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_float32_matmul_precision("highest")
    # torch's default lets convolutions of float32 be of TF32, which the reference is not to be.
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, precision != "float32"
    with ExitStack() as stack:
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", before)
        if precision == "fp16" and device == "cpu":
            stack.enter_context(half_on_cpu())
        yield


def train_watched(flags: Sequence[str]) -> list[dict[str, float]]:
    """Train in this process; the losses of each step."""
    losses, step = [], trainer.train_step

    def watched(*args: Any, **kwargs: Any) -> dict[str, float]:
        losses.append(step(*args, **kwargs))
        return losses[-1]

    with patch.object(trainer, "train_step", watched):
        trainer.main(flags)
    return losses
