"""Tests of what only a process of its own shows: the script as users launch it, alone and as several processes."""

import pytest
from test_train import (
    CARD,
    ROOT,
    ROWS,
    RUN_FILE,
    SMOOTH,
    WEIGHTS,
    difference,
    files,
    make_flags,
    run_script,
    train,
    write_data,
)


@pytest.mark.slow
def test_the_script_by_itself_ends_with_one_line_and_no_traceback(world, tmp_path):
    data = write_data(tmp_path / "data", [ROWS[0], {**ROWS[1], "target_prompt": "a red hat"}])
    flags = make_flags(world, tmp_path / "output", train_data_dir=data)
    result = run_script(ROOT / "train_spf_portrait_lora.py", *flags)
    assert result.returncode == 1 and result.stdout == ""
    unused, error = result.stderr.splitlines()
    assert unused.startswith("4 images of ") and unused.endswith("metadata.jsonl: 2.png, 3.png, 4.png, 5.png")
    assert error.startswith("train_spf_portrait_lora.py: error: ") and "metadata.jsonl, line 2" in error
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_accelerate_launches_the_script(world, trained, tmp_path):
    command = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--mixed_precision", "no"]
    flags = make_flags(world, tmp_path / "output", num_validation_images=1, report_to="tensorboard")
    result = run_script(*command, ROOT / "train_spf_portrait_lora.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    found = {path for path in files(tmp_path / "output") if not path.startswith("logs/")}
    pictures = {f"validation/{name}.png" for name in ("step_000000", "step_000004", "alignment")}
    assert found == {WEIGHTS, CARD, RUN_FILE, f"stage1/{WEIGHTS}", *pictures}
    assert difference(tmp_path / "output", trained()) < 1e-6


def test_processes_that_do_not_find_each_other_end_before_they_train(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="error: launched as 2 processes, of which accelerate makes 1"):
        train(world, tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"stage2_objective": "composed"},
        {"stage2_objective": "paper", "sfcm_mode": "paper"},
        {"stage2_objective": "both", "dual_path": "single_pass", "gradient_checkpointing": True},
        {"stage2_objective": "both", "gradient_accumulation_steps": 2, "num_alignment_images": 4},
    ],
    ids=["composed", "paper", "both, one pass, checkpointing", "both, accumulation"],
)
def test_two_processes_train_as_one_with_the_double_batch(world, tmp_path, flags):
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    given = make_flags(world, tmp_path / "two", train_batch_size=1, **SMOOTH, **flags)
    result = run_script(*command, ROOT / "train_spf_portrait_lora.py", *given, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stderr, f"the processes did not find each other: {result.stderr}"
    assert result.stderr.count("The LoRA: ") == 1, "each process said what is there"
    one = train(world, tmp_path / "one", train_batch_size=2, **SMOOTH, **flags)
    assert files(tmp_path / "two") == {WEIGHTS, CARD, RUN_FILE, f"stage1/{WEIGHTS}"}
    assert difference(tmp_path / "two", one) < 1e-4 < difference(one / "stage1", one) / 10
