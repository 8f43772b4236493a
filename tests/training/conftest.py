"""Fixtures of all tests of the training: a tiny world, runs that several tests share, and how a wrong run ends."""

from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from test_train import fresh_accelerator, refusal, train, trained, watch, world, xl_world  # noqa: F401 (fixtures)

import train_spf_portrait_lora as script


@pytest.fixture(scope="session")
def run(world, tmp_path_factory) -> SimpleNamespace:  # noqa: F811
    """A run whose LoRA changes everything, after its end: flags, inputs, parts, alignment. No test may change it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        parts, inputs = watch(patch, script, "prepare"), watch(patch, script, "check_inputs")
        flags, alignment = watch(patch, script, "parse_args"), watch(patch, script, "prepare_alignment")
        output = tmp_path_factory.mktemp("run") / "output"
        train(world, output, learning_rate=1.0, train_batch_size=1, stage2_steps=1, base_prompt_share=0)
    return SimpleNamespace(parts=parts[0], inputs=inputs[0], flags=flags[0], alignment=alignment[0])


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Runs the trainer as a program, see `forks.py`; one for each process of tests."""
    from forks import Forks

    own = Forks(tmp_path_factory.mktemp("forks"))
    yield own
    own.close()
