"""Two real processes against one: the same losses, step by step, from the same seed and the same batch over both."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import (  # noqa: F401 (fixtures)
    DUAL_PATHS,
    LOSSES,
    SMOOTH,
    difference,
    fresh_accelerator,
    make_flags,
    train,
    world,
)


def logged_losses(output: Path) -> dict[int, dict[str, float]]:
    """Losses by step and name, as tensorboard has them."""
    steps: dict[int, dict[str, float]] = {}
    for folder in {path.parent for path in output.rglob("events.out.tfevents*")}:
        events = EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith("loss/"):
                for event in events.Scalars(tag):
                    steps.setdefault(event.step, {})[tag.removeprefix("loss/")] = event.value
    return steps


def assert_equal_losses(
    world,  # noqa: F811
    forks,
    tmp_path: Path,
    flags: dict,
    stage1_steps: int,
    names: tuple[set[str], set[str]],
) -> None:
    """Train 20 steps in two processes and in one, and compare every loss; `names` are those of each stage."""
    flags = {"learning_rate": 1e-3, "report_to": "tensorboard", **SMOOTH, **flags}
    run = forks.start(make_flags(world, tmp_path / "two", train_batch_size=1, **flags), processes=2)
    assert run.wait() == 0, run.stderr
    assert "2 processes" in run.stderr, f"the processes did not find each other: {run.stderr}"
    assert run.stderr.count("The LoRA: ") == 1, "every process has said it"
    train(world, tmp_path / "one", train_batch_size=2, **flags)
    two, one = (logged_losses(tmp_path / name) for name in ("two", "one"))
    assert set(two) == set(one) == set(range(1, 21))
    print("\n" + ", ".join(f"{name} {value}" for name, value in flags.items()) + ": step, loss, two, one")
    for step in range(1, 21):
        assert set(two[step]) == set(one[step]) == names[step > stage1_steps]
        for name in sorted(one[step]):
            print(f"{step:3d}  {name:16s} {two[step][name]:.7f}  {one[step][name]:.7f}")
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-3, abs=1e-5), (step, name)
    assert difference(tmp_path / "two", tmp_path / "one") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("checkpointing", [None, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("dual_path", DUAL_PATHS)
def test_two_processes_have_the_losses_of_one(world, forks, tmp_path, dual_path, checkpointing, accumulation):  # noqa: F811
    """Over 20 steps, half of them of stage 2 with every loss there is."""
    flags = {
        "stage2_objective": "both",
        "composed_target_reuse": 2,  # with accumulation the last batches are met again
        "dual_path": dual_path,
        "gradient_checkpointing": checkpointing,
        "gradient_accumulation_steps": accumulation,
        "stage1_steps": 10,
        "stage2_steps": 10,
    }
    assert_equal_losses(world, forks, tmp_path, flags, 10, ({"diffusion"}, LOSSES["both"]))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["prior", "cat"])
def test_two_processes_keep_what_one_keeps(world, forks, tmp_path, way):  # noqa: F811
    prompts = ("a dog", "a street", "a red car") if way == "cat" else None
    flags = {"preservation": way, "unrelated_prompts": prompts, "stage1_steps": 20, "stage2_steps": 0}
    assert_equal_losses(world, forks, tmp_path, flags, 20, ({"diffusion", "preservation"}, set()))


@pytest.mark.slow
def test_two_processes_train_sdxl_as_one(xl_world, forks, tmp_path):  # noqa: F811
    """Pictures of several sizes and crops: each process tells the UNet those of its own rows."""
    flags = {"resolution": None, "aspect_ratio_buckets": "16,16;16,24", "random_flip": True, "no-center_crop": True}
    flags |= {"no-cache_latents": True, "stage2_objective": "both", "stage1_steps": 10, "stage2_steps": 10}
    assert_equal_losses(xl_world, forks, tmp_path, flags, 10, ({"diffusion"}, LOSSES["both"]))
