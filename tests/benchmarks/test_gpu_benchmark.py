"""Tests of `benchmarks/gpu.py`: rows on the CPU, the tables, and what becomes of rows that fail."""

import json
import os
import re
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from benchmarks import gpu, gpu_rows
from benchmarks.estimate_memory import PRESETS
from benchmarks.gpu import FAILED, NOT_HERE, OK, Bench, Result, Row
from families.stable_diffusion_xl import StableDiffusionXL
from loras import LORA_WEIGHTS


@pytest.fixture
def bench(tmp_path):
    yield Bench("cpu", tmp_path, 2)
    AcceleratorState._reset_state(reset_partial_state=True)


# Rows without torch, so that a process that runs them starts at once.
LIGHT = """
import atexit, os, time
from benchmarks.gpu import Result

def good(bench, value): return Result({"value": value})
def wrong(bench): return Result({"value": "7"}, ["7 is too much", "and odd"])
def missing(bench): return Result(missing="a part is not installed")
def crash(bench): raise KeyError("a|b")
def slow(bench):
    print("where it hangs", flush=True)
    time.sleep(60)
def bad_end(bench):
    atexit.register(os._exit, 3)
    return Result({"value": "9"})
def environment(bench):
    import huggingface_hub.constants
    return Result({"offline": str(huggingface_hub.constants.HF_HUB_OFFLINE)})
"""


@pytest.fixture
def light(tmp_path, monkeypatch):
    """A function that runs rows by name, each by the function that its name begins with."""
    (tmp_path / "light.py").write_text(LIGHT, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def run(*names, seconds=60):
        rows = []
        for name in names:
            function = name.split("/")[1].split(" ")[0]
            arguments = ("3",) if function == "good" else ()
            rows.append(Row(name, f"light:{function}", arguments, limit=0.1 if function == "slow" else 30))
        results = gpu.run_rows(rows, Bench("cpu", tmp_path, 2), time.time() + seconds, tmp_path / "log.txt")
        assert list(results) == list(names)
        return list(results.values())

    return run


# -------------------------------------------------------------------------------------------------- rows that fail


def test_rows_that_fail_do_not_lose_the_others(light, capsys):
    outcomes = light("a/good 1", "a/crash", "a/good 2", "a/wrong", "a/slow", "a/missing")
    shown = capsys.readouterr().err
    assert "where it hangs" in shown and 'light.py", line' in shown
    assert [outcome.verdict for outcome in outcomes] == [
        OK,
        f"{FAILED}: status 1: KeyError: 'a/b'",  # a bar would end a cell of the table
        OK,
        f"{FAILED}: 7 is too much; and odd",
        f"{FAILED}: it took longer than it may",
        f"{NOT_HERE}: a part is not installed",
    ]
    assert [outcome.cells for outcome in outcomes if outcome.verdict == OK] == [{"value": "3"}] * 2


def test_a_process_that_comes_to_no_row_is_started_once(light):
    outcomes = light("a/good", "a/unknown", "a/good 2")
    assert [outcome.verdict for outcome in outcomes] == [outcomes[0].verdict] * 3
    assert re.fullmatch(f"{FAILED}: status 1: AttributeError: module 'light' .*unknown.*", outcomes[0].verdict)


def test_a_bad_end_after_the_last_row_is_its_fault(light):
    first, last = light("a/good", "a/bad_end")
    assert first.verdict == OK and last.cells == {"value": "9"}
    assert last.verdict.startswith(f"{FAILED}: all was done, then status 3: ")


def test_no_row_begins_when_the_time_is_over(light):
    assert [outcome.verdict for outcome in light("a/good", seconds=0)] == [f"{FAILED}: no time was left for it"]


def test_the_exit_status_tells_of_a_failure_and_the_file_has_the_table(tmp_path, monkeypatch, capsys, light):
    rows = [Row("training/good", "light:good", ("1",)), Row("steps/good", "light:good", ("2",))]
    flags = ["--device", "cpu", "--output", str(tmp_path / "out.md")]
    monkeypatch.setattr(gpu, "ROWS", rows)
    for name in (*gpu.ENVIRONMENT, "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # as before, after the test
    assert gpu.main(flags) == 0
    assert (tmp_path / "out.md").read_text(encoding="utf-8") + "\n" == capsys.readouterr().out
    monkeypatch.setattr(gpu, "ROWS", [*rows, Row("training/environment", "light:environment")])
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert gpu.main(flags) == 0 and "| environment | - | True |" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "ROWS", [*rows, Row("training/crash", "light:crash")])
    assert gpu.main(flags) == 1
    written = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert "3 rows in" in written and "1 failed\n- training/crash" in written
    assert f"torch {torch.__version__}" in written and "`python benchmarks/gpu.py --device cpu --output" in written


# ------------------------------------------------------------------------------------------------------- the table


def test_a_table_has_all_columns_of_its_rows():
    results = {
        "steps/a/b": Result({"ms": "1"}, seconds=2.04),
        "steps/c": Result(faults=["x"]),
        "steps/d": Result({"ms": "2", "GiB": "3"}),
    }
    assert gpu.section_table(results).splitlines() == [
        "| row | ms | GiB | s | verdict |",
        "| --- | --- | --- | --- | --- |",
        "| a, b | 1 | - | 2.0 | ok |",
        "| c | - | - | 0.0 | FAILED: x |",
        "| d | 2 | 3 | 0.0 | ok |",
    ]


def test_every_row_has_a_section_a_process_and_a_function():
    names = [row.name for row in gpu.ROWS]
    assert len(set(names)) == len(names)
    assert {row.section for row in gpu.ROWS} == set(gpu.SECTIONS)
    assert sorted(gpu.SECTIONS) == sorted(s for processes in gpu.PHASES for own in processes for s in own)
    for row in gpu.ROWS:
        assert callable(getattr(gpu_rows, row.function.removeprefix("benchmarks.gpu_rows:"))), row.name
    assert gpu.MODELS.keys() == gpu_rows.WRITERS.keys()
    assert all(set(model.presets) <= PRESETS.keys() for model in gpu.MODELS.values())
    assert set(gpu.MODELS["Stable Diffusion 1.5"].presets) == PRESETS.keys()
    assert [gpu_rows.counted(card) for card in (8, 24)] == ["2.5 GiB", "6.9 GiB"]


def test_rows_are_chosen_by_the_parts_of_their_names():
    assert [row.name for row in gpu.chosen_rows(["pipeline/fp16", "resume/bf16", "resume/SDXL"])] == [
        "resume/bf16", "resume/SDXL/bf16", "resume/SDXL/fp16", "pipeline/fp16", "pipeline/fp16/model offload",
        "pipeline/fp16/sequential offload", "pipeline/fp16/torch.compile",
    ]  # fmt: skip
    assert gpu.chosen_rows(None) == gpu.ROWS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cpu", "--rows", "pipe"], "--rows pipe: no row's name begins so; training, resume,"),
        (["--device", "cpu", "--steps", "1"], "--steps must be at least 2, got 1"),
        ([], "--device cuda: nvidia-smi is not there"),
    ],
)
def test_flags_that_cannot_be(flags, message, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit):
        gpu.main(flags)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ the rows


def write_run(folder, start, end, losses=({"composed": 0.5},)):
    """A run's LoRA at the end of stage 1 and of stage 2, and its losses."""
    for path, tensors in ((folder / "stage1", start), (folder, end)):
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / LORA_WEIGHTS)
    (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    return folder


def lora(a, b):
    return {"unet.x.lora_A.weight": torch.tensor(a), "unet.x.lora_B.weight": torch.tensor(b)}


def test_the_update_of_stage_2_starts_where_its_objective_does(tmp_path):
    run = write_run(tmp_path / "run", lora([1.0, 2.0], [5.0, 6.0]), lora([1.5, 2.0], [5.0, 7.0]))
    assert gpu_rows.stage2_update(run, "paper").tolist() == [0.5, 0.0, 0.0, 1.0]
    assert gpu_rows.stage2_update(run, "composed").tolist() == [0.5, 0.0, 5.0, 7.0]


@pytest.mark.parametrize(
    ("end", "losses", "faults"),
    [
        (lora([2.0, 2.0], [1.0, 3.0]), [{"x": 1.0}], []),
        (lora([2.04, 2.0], [1.0, 3.0]), [{"x": 1.0}], []),
        (lora([1.2, 2.0], [1.0, 2.2]), [{"x": 1.0}], ["the norm is not within 5% of the other's"]),
        (lora([2.0, 2.0], [1.0, 1.0]), [{"x": 1.0}], ["the cosine is below 0.9"]),
        (
            lora([1.0, 2.0], [1.0, 2.0]),
            [{"x": 1.0}],
            ["the norm is not within 5% of the other's", "the cosine is below 0.9"],
        ),
        (lora([2.0, 2.0], [1.0, 3.0]), [{"x": 1.0, "y": float("nan")}], ["a loss is not finite"]),
        (
            {name: value.half() for name, value in lora([2.0, 2.0], [1.0, 3.0]).items()},
            [{"x": 1.0}],
            ["the LoRA's file holds torch.float16"],
        ),
    ],
)
def test_what_is_wrong_with_a_run_is_said(tmp_path, end, losses, faults):
    start = lora([1.0, 2.0], [1.0, 2.0])
    other = write_run(tmp_path / "other", start, lora([2.0, 2.0], [1.0, 3.0]))
    own = write_run(tmp_path / "own", start, end, losses)
    result = gpu_rows.compare_updates(own, other, "paper", 0.05, 0.9)
    assert result.faults == faults
    assert result.verdict == (f"{FAILED}: {'; '.join(faults)}" if faults else OK)


@pytest.mark.slow
def test_bfloat16_learns_what_float32_does(bench):
    result = gpu_rows.training(bench, "composed", "bf16")
    assert result.verdict == OK and 0.9 < float(result.cells["norm"]) < 1.1
    assert float(result.cells["norm"]) != 1 != float(result.cells["cosine"])


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same(bench):
    result = gpu_rows.resume(bench, "float32")
    assert result.verdict == OK
    assert result.cells == dict.fromkeys(("two undisturbed", "from stage 1", "from stage 2"), "0, to the bit")
    # With another LoRA at the end of the resumed run it is not.
    run = bench.folder / "runs" / "sd" / "resume-float32-3" / LORA_WEIGHTS
    save_file({name: value + 1e-3 for name, value in load_file(run).items()}, run)
    result = gpu_rows.resume(bench, "float32")
    assert (
        result.faults == ["from stage 2 it is another than undisturbed"] and result.cells["from stage 2"] == "1.0e-03"
    )


@pytest.mark.slow
def test_rows_of_sdxl_train_resume_and_draw_it(bench, toy_xl, monkeypatch):
    """A random one."""
    monkeypatch.setattr(gpu_rows, "PICTURE_STEPS", 2)
    for objective in ("composed", "paper"):
        result = gpu_rows.training(bench, objective, "float32", "sdxl")
        assert result.verdict == OK and result.cells["norm"] == "1.0000"
    lora = load_file(bench.folder / "runs" / "sdxl" / "composed-float32" / LORA_WEIGHTS)
    assert {value.shape[1] for name, value in lora.items() if "attn2.to_k.lora_A" in name} == {160}
    assert gpu_rows.resume(bench, "float32", "sdxl").verdict == OK
    result = gpu_rows.pipeline(bench, "float32", "", "sdxl")
    assert result.verdict == OK and set(result.cells) == {"map", "portrait", "original", "guided", "halves"}


@pytest.mark.slow
def test_rows_of_stable_diffusion_3_train_resume_and_draw_it(bench, toy_3, monkeypatch):
    """A random one."""
    monkeypatch.setattr(gpu_rows, "PICTURE_STEPS", 2)
    result = gpu_rows.training(bench, "composed", "float32", "sd3")
    assert result.verdict == OK and result.cells["norm"] == "1.0000"
    assert gpu_rows.resume(bench, "float32", "sd3").verdict == OK
    assert gpu_rows.validation(bench, "float32", "", "sd3").cells.keys() == {"spread"}
    result = gpu_rows.pipeline(bench, "float32", "", "sd3")
    assert result.verdict == OK and set(result.cells) == {"map", "portrait", "original", "guided", "halves"}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float32")])
def test_the_vae_of_sdxl_is_not_in_float16(bench, toy_xl, precision, dtype, monkeypatch):
    result = gpu_rows.vae(bench, precision)
    assert result.verdict == OK and result.cells["VAE"] == dtype
    if precision == "fp16":
        assert result.cells["decoded"] == "0.0e+00"
        monkeypatch.setattr(StableDiffusionXL, "vae_dtype", lambda vae, dtype: dtype)
        assert "the VAE is in torch.float16" in gpu_rows.vae(bench, precision).faults


@pytest.mark.slow
def test_the_scaler_of_float16_is_a_real_one(bench, monkeypatch):
    """On a CPU, too."""
    scales = []
    scaler = torch.amp.GradScaler.step

    def watched(self, *args, **kwargs):
        scales.append(self.get_scale())
        return scaler(self, *args, **kwargs)

    monkeypatch.setattr(torch.amp.GradScaler, "step", watched)
    gpu_rows.run_toy(bench, "half", "fp16", "--stage2_objective composed")
    assert len(scales) == 4 and min(scales) > 1


@pytest.mark.slow
def test_the_pipeline_and_a_step_are_measured(bench, monkeypatch):
    monkeypatch.setattr(gpu_rows, "PICTURE_STEPS", 2)
    assert gpu_rows.pipeline(bench, "float32").verdict == OK
    monkeypatch.setitem(gpu_rows.PIXELS, "bf16", 1e-9)
    assert "portrait is further than 1e-09 from float32's on average" in gpu_rows.pipeline(bench, "bf16").faults
    result = gpu_rows.step(bench, "toy", "full", "float32", "paper")
    assert result.verdict == OK and float(result.cells["ms"]) > 0 and result.cells.keys() == {"ms"}
