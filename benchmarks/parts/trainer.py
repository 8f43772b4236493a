"""All that benchmarks use of the inside of the training script: runs at the start of a stage, and single steps.

Source: [ours].
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState

import train_spf_portrait_lora as trainer
from training.alignment import prepare_alignment
from training.arguments import Flags, parse_args, uses_enhancement
from training.engine import Engine
from training.flags import OutputFlags
from training.inputs import check_inputs
from training.objectives import make_objectives
from training.objectives.composed import Composed
from training.objectives.objective import Objective, Parts


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """A run in which steps of both stages can be taken; `objectives` are those of each stage."""

    flags: Flags
    parts: Parts
    engine: Engine
    objectives: dict[int, list[Objective]]

    @classmethod
    def make(cls, flags: Flags, parts: Parts, engine: Engine) -> Run:
        return cls(flags, parts, engine, {stage: make_objectives(stage, flags, parts) for stage in (1, 2)})

    @property
    def composed(self) -> list[Composed]:
        return [objective for objective in self.objectives[2] if isinstance(objective, Composed)]


def prepare(input_args: list[str], steps: int) -> Run:
    """A run at the start of a stage 2 of so many steps."""
    flags = parse_args(input_args)
    accelerator, inputs = trainer.make_accelerator(flags.model.mixed_precision, flags.output), check_inputs(flags)
    parts = trainer.prepare(flags, inputs, accelerator)
    models = parts.models
    models.response_denoiser = accelerator.prepare(models.denoiser)
    engine = Engine(accelerator, models.adapters.parameters("default"), flags.optimizer, flags.loop, None)
    run = Run.make(flags, replace(parts, alignment=prepare_alignment(flags, inputs, parts, accelerator)), engine)
    for objective in run.objectives[2]:
        objective.prepare()
    engine.start_stage(2, steps)
    parts.training.start_reading(range(steps * flags.loop.gradient_accumulation_steps))
    return run


def with_flags(run: Run, changes: dict[str, Any]) -> Run:
    """The same run with other values of flags that nothing but a step asks for, and no targets made."""
    groups = {
        name: replace(group, **{key: value for key, value in changes.items() if hasattr(group, key)})
        for name, group in run.flags._asdict().items()
        if name != "asked"
    }
    flags = run.flags._replace(**groups)
    enhancement = run.parts.enhancement if uses_enhancement(flags.method, flags.paper) else None
    return Run.make(flags, replace(run.parts, enhancement=enhancement), run.engine)


# --------------------------------------------------------------------------------------------------------------- steps


def now() -> float:
    """Seconds: the wall clock's, once a GPU has done all that it was given; without one, of this process's CPU time.

    The latter does not count what other programs on the machine take.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def make_targets(run: Run, step: int) -> None:
    """Make and keep the composed targets of a step without accumulation."""
    for objective in run.composed:
        with torch.no_grad(), objective.losses(step):
            pass


def take_step(run: Run, step: int, stage: int) -> dict[str, float]:
    """The losses."""
    run.engine.global_step = step
    return trainer.train_step(run.engine, run.parts.models, run.objectives[stage])


def host_step(run: Run, step: int, stage: int) -> tuple[float, float, dict[str, float]]:
    """Seconds of a step, those of them in which Python did not wait for the GPU, and the losses."""
    accelerator, waits = run.engine.accelerator, []
    reduce = accelerator.reduce

    def synchronize() -> None:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)

    def waiting(*args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        synchronize()
        waits.append(time.perf_counter() - start)
        return reduce(*args, **kwargs)

    synchronize()
    start = time.perf_counter()
    # The losses are read right after they are reduced, which would wait for the GPU.
    with patch.object(accelerator, "reduce", waiting):
        losses = take_step(run, step, stage)
    host = time.perf_counter() - start - sum(waits)
    synchronize()
    return time.perf_counter() - start, host, losses


# ---------------------------------------------------------------------------------------------------- whole trainings


@contextmanager
def half_on_cpu() -> Iterator[None]:
    """Inside, the trainer's fp16 runs on a CPU: accelerate refuses it, torch's autocast and scaler do not."""
    make = trainer.make_accelerator

    def make_half(mixed_precision: str | None, output: OutputFlags) -> trainer.Accelerator:
        accelerator = make("no", output)
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
