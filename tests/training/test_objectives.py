"""Tests of the objectives: each made of a run's parts alone, what it asks for, and one of its own that the step trains.

"""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from test_train import WEIGHTS, adapter_state, copy_model, difference, prepared, train, watch
from test_train import files as files_of

import train_spf_portrait_lora as script
from training import objectives
from training.alignment import prepare_alignment
from training.engine import Engine
from training.maps import MapMaker
from training.models import STAGE1_ADAPTER
from training.objectives import OBJECTIVES, Objective, composed, diffusion, make_objectives
from training.objectives.composed import Composed
from training.prompt_table import BASE, EMPTY, FULL


STAGE2 = 2  # the first batch of stage 2
KINDS = {
    "diffusion": ("diffusion", {}),
    "diffusion and enhancement": ("diffusion", {"stage2_objective": "paper"}),
    "inside masks": ("diffusion", {"snr_gamma": 5}),
    **{f"kept rows, {kind}": ("kept_rows", {"preservation": kind}) for kind in ("prior", "dop", "cat")},
    "paper": ("paper", {"stage2_objective": "paper"}),
    "paper, one pass": ("paper", {"stage2_objective": "paper", "dual_path": "single_pass"}),
    "composed": ("composed", {}),
    "composed, one pass": ("composed", {"dual_path": "single_pass", "sfcm_mode": "paper"}),
}


def ready(world, **changes) -> SimpleNamespace:
    """A run with alignment portraits and with a LoRA that changes something, before any step."""
    run = prepared(world, **changes)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in run.parts.models.adapters.parameters("default"):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    alignment = prepare_alignment(run.flags, run.inputs, run.parts, run.accelerator)
    run.parts = replace(run.parts, alignment=alignment)
    return run
