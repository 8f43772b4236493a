"""Tests of the benchmark: its statistics on made-up rows, its bookkeeping, and a LoRA judged with the toy model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from benchmarks import preservation
from benchmarks.preservation import (
    HEADINGS,
    RUNS,
    STRENGTHS,
    DrawSettings,
    EvaluationJob,
    Originals,
    Row,
    ablation_differences,
    curve_change_at,
    curve_of,
    distance_below_curve,
    evaluate_lora,
    evaluate_original,
    load_originals,
    load_pipeline,
    make_rows,
    parse_args,
    summarise,
    train,
    training_command,
    verdicts,
    write_pictures,
    write_results,
)
from toy_portraits.judge import PortraitJudge, base_prompts
from toy_portraits.world import SIZE, TARGETS


PROMPTS = 40
SETTINGS = DrawSettings(num_prompts=2, prompt_seed=3, num_inference_steps=2)


def made_up(response: float, change: float, seed: int, prompts: int = PROMPTS) -> dict[str, np.ndarray]:
    """Measures of one evaluation; the same seed gives the same prompts' luck."""
    rng = np.random.default_rng(seed)
    measures = {name: np.full(prompts, 0.5) for name in (*HEADINGS, "kept_sex", "change") if name != "excess"}
    measures["response"] = (np.arange(prompts) < round(response * prompts)).astype(float)
    measures["change_outside"] = change + rng.normal(0, 0.3, prompts)
    measures["base_change"] = np.full(prompts, change)
    return measures


def made_up_results(target_name: str, seeds=(0, 1), names=tuple(RUNS)) -> dict[EvaluationJob, dict[str, np.ndarray]]:
    """Plain LoRA along a line from (0.2, 2) to (0.6, 10); SPF-Portrait responds as much and pollutes less."""
    results = {}
    for name in names:
        for seed in seeds:
            for strength in RUNS[name].strengths:
                spot = (0.2 + 0.4 * strength, 2 + 8 * strength) if name in ("plain", "stage1") else (0.6, 5.0)
                measures = made_up(*spot, seed=seed) | {"pictures": np.zeros((6, SIZE, SIZE, 3), dtype=np.uint8)}
                results[EvaluationJob(target_name, name, seed, strength, Path("x"))] = measures
    return results


@pytest.fixture
def rows() -> list[Row]:
    return make_rows("blonde_hair", made_up(0.2, 2.0, seed=9), made_up_results("blonde_hair"))


def row_of(rows: list[Row], name: str, strength: float = 1.0) -> Row:
    return next(row for row in rows if row.run_name == name and row.strength == strength)


def test_rows_hold_seeds_by_prompts_and_the_change_beyond_the_originals(rows):
    assert len(rows) == 1 + 2 * len(STRENGTHS) + 6
    assert rows[0].run_name == "original" and rows[0].measures["excess"].max() == 0
    plain = row_of(rows, "plain")
    assert plain.measures["response"].shape == (2, PROMPTS)
    expected = plain.measures["change_outside"] - rows[0].measures["change_outside"]
    assert np.array_equal(plain.measures["excess"], expected)


def test_standard_errors_count_prompts_and_not_seeds_times_prompts():
    once = np.random.default_rng(0).normal(size=(1, 50))
    row = Row("", "", 1.0, {"response": np.repeat(once, 3, axis=0)})
    summary = summarise(row)["response"]
    assert summary["standard_error"] == pytest.approx(once[0].std(ddof=1) / np.sqrt(50))
    assert summary["seed_spread"] == 0
    summary = summarise(Row("", "", 1.0, {"response": np.array([[0.0, 0.0], [1.0, 1.0]])}))["response"]
    assert summary["mean"] == 0.5 and summary["standard_error"] == 0
    assert summary["seed_spread"] == pytest.approx(np.sqrt(0.5))
    assert np.isnan(summarise(Row("", "", 1.0, {"response": once}))["response"]["seed_spread"])


def test_the_curve_gives_the_least_change_that_still_responds_as_asked():
    strengths = np.array([0, 0.5, 1.0])
    rising, changes = np.array([0.2, 0.4, 0.8]), np.array([2.0, 4.0, 12.0])
    assert curve_change_at(0.6, strengths, rising, changes) == pytest.approx(8)
    assert curve_change_at(0.1, strengths, rising, changes) == pytest.approx(2)
    # nothing responds as much: the change of what responds most
    assert curve_change_at(0.9, strengths, rising, changes) == pytest.approx(12)
    # a response that falls again at full strength is reached at the lower strength
    bent = np.array([0.2, 0.8, 0.6])
    assert curve_change_at(0.6, strengths, bent, changes) == pytest.approx(2 + 2 * 2 / 3, abs=0.05)


def test_distance_below_the_curve_and_its_error(rows):
    curve = curve_of(rows, "plain")
    assert [point.strength for point in curve] == [0, 0.25, 0.5, 0.75, 1]
    found = distance_below_curve(row_of(rows, "composed"), curve, np.random.default_rng(0))
    assert found["distance"] == pytest.approx(5, abs=0.2) and not found["beyond_the_curve"]
    assert found["standard_errors_below"] == pytest.approx(found["distance"] / found["standard_error"])
    assert found["standard_errors_below"] > 3 and len(found["per_seed"]) == 2
    # a point of the curve lies on it
    on_curve = distance_below_curve(row_of(rows, "plain", 0.5), curve, np.random.default_rng(0))
    assert abs(on_curve["distance"]) < 0.2
    again = distance_below_curve(row_of(rows, "composed"), curve, np.random.default_rng(0))
    assert again == found


def test_run_and_curve_are_resampled_together():
    """Prompts that change a lot do so in every row, which must not count as uncertainty of the difference."""
    luck = np.random.default_rng(0).normal(0, 3, PROMPTS)
    response = np.tile([0.0, 1.0], PROMPTS // 2)[None]
    levels = ((0.0, 5.0), (1.0, 9.0))
    curve = [Row("", "", s, {"response": response, "change_outside": (luck + c)[None]}) for s, c in levels]
    row = Row("", "", 1.0, {"response": response, "change_outside": (luck + 4.0)[None]})
    found = distance_below_curve(row, curve, np.random.default_rng(0))
    assert found["distance"] == pytest.approx(1) and found["standard_error"] < 1e-9


def test_verdicts_are_ratios_to_plain_lora(rows):
    found = verdicts(rows)
    assert set(found) == {"composed", "paper"}
    assert found["composed"]["response_ratio"] == pytest.approx(1)
    assert found["composed"]["excess_ratio"] == pytest.approx(3 / 8, abs=0.05)
    assert found["composed"]["base_change_ratio"] == pytest.approx(0.5)
    assert {"below_plain_curve", "below_stage1_curve"} <= set(found["composed"])


def test_ablations_are_compared_with_the_papers_objective(rows):
    found = ablation_differences(rows)
    assert set(found) == {"no_sfcm", "no_fine", "no_text", "no_enhancement"}
    assert found["no_fine"]["response"] == {"mean": 0.0, "standard_error": 0.0}
    without_paper = [row for row in rows if row.run_name != "paper"]
    assert ablation_differences(without_paper) == {}


@pytest.mark.parametrize("names", (tuple(RUNS), ("composed",)))
def test_tables_and_pictures_are_written(tmp_path, names):
    args = parse_args(["--output_dir", str(tmp_path), "--targets", "blonde_hair", "--seeds", "0", "1"])
    for name in names:
        for seed in args.seeds:
            folder = preservation.run_folder(args, "blonde_hair", name, seed)
            folder.mkdir(parents=True)
            (folder / "benchmark.json").write_text('{"seconds": 3.0}', encoding="utf-8")
    results = made_up_results("blonde_hair", names=names)
    tables = {"blonde_hair": make_rows("blonde_hair", made_up(0.2, 2.0, seed=9), results)}
    prompts = base_prompts(TARGETS["blonde_hair"], PROMPTS, 0)
    blank = np.zeros((PROMPTS, SIZE, SIZE, 3), dtype=np.uint8)
    write_results(args, tables)
    write_pictures(args, tables, results, {"blonde_hair": Originals("blonde_hair", prompts, blank, blank)})

    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    entries = document["targets"]["blonde_hair"]["rows"]
    assert [entry["run"] for entry in entries if entry["strength"] == 1] == list(names)
    assert entries[-1]["training_seconds"] == 3 and entries[-1]["measures"]["response"]["mean"] == 0.6
    assert document["settings"]["prompt_seed"] == 90002
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "both branches of the" in text and text.count("| SPF-Portrait, composed |") >= 3
    lines = (tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("target,label,run,strength") and len(lines) > 10
    assert (tmp_path / "comparison_blonde_hair.png").is_file() and (tmp_path / "strength_curves.png").is_file()


def test_every_run_starts_the_training_script_with_the_right_stages(tmp_path):
    args = parse_args(
        ["--output_dir", str(tmp_path), "--stage1_steps", "7", "--stage2_steps", "5", "--train_args=--rank 8"]
    )
    commands = {name: " ".join(training_command(args, "red_hat", name, 4)) for name in RUNS}
    assert "--stage1_steps 12 --stage2_steps 0" in commands["plain"]
    assert "--stage1_steps 7 --stage2_steps 0" in commands["stage1"]
    for name, command in commands.items():
        assert "--seed 4" in command and command.endswith("--rank 8") and "/red_hat" in command
        if name not in ("plain", "stage1"):
            assert f"--stage1_steps 0 --stage1_lora_path {tmp_path}" in command and "--stage2_steps 5" in command
            objective = "composed" if name == "composed" else "paper"
            assert f"--stage2_objective {objective}" in command


def write_lora(folder: Path, seed: int = 0) -> Path:
    """A random LoRA on the embedded model, strong enough to be seen."""
    pipeline = StableDiffusionPipeline.from_pretrained(preservation.BASE_MODEL)
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["attn2.to_v", "attn2.to_out.0"])
    pipeline.unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
    )
    return folder


def test_a_lora_is_judged_and_leaves_the_pipeline_as_it_was(tmp_path):
    pipeline, judge = load_pipeline(SETTINGS), PortraitJudge.from_pretrained()
    originals = load_originals(pipeline, "striped_shirt", SETTINGS, tmp_path)
    assert originals.base_images.shape == originals.full_images.shape == (2, SIZE, SIZE, 3)
    original = evaluate_original(judge, originals)
    assert original["base_change"].max() == 0 and original["change"].max() > 0

    lora = write_lora(tmp_path / "lora")
    off = evaluate_lora(pipeline, judge, originals, lora, 0.0, SETTINGS, tmp_path)
    on = evaluate_lora(pipeline, judge, originals, lora, 1.0, SETTINGS, tmp_path)
    assert off["base_change"].max() < 0.05 and on["base_change"].min() > 0.5
    assert np.abs(off["change_outside"] - original["change_outside"]).max() < 0.05
    assert np.array_equal(off["pictures"].shape, (2, SIZE, SIZE, 3))
    assert not getattr(pipeline.unet, "peft_config", None)

    # drawn anew, in another folder, the original model's portraits are the same as before the LoRA came and went
    again = load_originals(pipeline, "striped_shirt", SETTINGS, tmp_path / "other")
    assert np.array_equal(again.full_images, originals.full_images)


def test_portraits_are_cached_by_everything_they_depend_on(tmp_path, monkeypatch):
    pipeline, judge = load_pipeline(SETTINGS), PortraitJudge.from_pretrained()
    originals = load_originals(pipeline, "red_hat", SETTINGS, tmp_path)
    lora = write_lora(tmp_path / "lora")
    first = evaluate_lora(pipeline, judge, originals, lora, 1.0, SETTINGS, tmp_path)

    drawn = []
    draw = preservation.draw
    monkeypatch.setattr(preservation, "draw", lambda *given: drawn.append(1) or draw(*given))
    second = evaluate_lora(pipeline, judge, originals, lora, 1.0, SETTINGS, tmp_path)
    load_originals(pipeline, "red_hat", SETTINGS, tmp_path)
    assert not drawn and all(np.array_equal(first[name], second[name]) for name in first)
    evaluate_lora(pipeline, judge, originals, lora, 0.5, SETTINGS, tmp_path)
    assert len(drawn) == 2
    evaluate_lora(pipeline, judge, originals, lora, 1.0, replace(SETTINGS, guidance_scale=2.0), tmp_path)
    assert len(drawn) == 4
    evaluate_lora(pipeline, judge, originals, write_lora(tmp_path / "lora", seed=1), 1.0, SETTINGS, tmp_path)
    assert len(drawn) == 6


def test_a_prompts_noise_does_not_depend_on_how_many_are_drawn():
    few, many = (preservation.noise_of_prompts(replace(SETTINGS, num_prompts=count)) for count in (2, 5))
    assert torch.equal(few, many[:2]) and not torch.equal(many[0], many[1])


def test_a_missing_lora_is_named(tmp_path):
    originals = Originals("red_hat", [], np.empty(0), np.empty(0))
    with pytest.raises(FileNotFoundError, match="pytorch_lora_weights.safetensors does not exist"):
        evaluate_lora(None, None, originals, tmp_path, 1.0, SETTINGS, tmp_path)


def test_a_finished_training_is_kept_and_one_of_other_flags_refused(tmp_path, monkeypatch):
    args = parse_args(["--output_dir", str(tmp_path)])
    started = []

    def fake_process(command, **kwargs):
        started.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        (folder / preservation.WEIGHTS_NAME).write_bytes(b"weights")
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr(preservation.subprocess, "run", fake_process)
    train(args, "red_hat", "stage1", 0)
    train(args, "red_hat", "stage1", 0)
    train(args, "red_hat", "composed", 0)
    assert len(started) == 2 and started[0][1].endswith("train_spf_portrait_lora.py")

    stage1 = preservation.run_folder(args, "red_hat", "stage1", 0)
    (stage1 / preservation.WEIGHTS_NAME).write_bytes(b"other weights")
    with pytest.raises(ValueError, match="composed-seed0 was trained with other flags or from another model"):
        train(args, "red_hat", "composed", 0)
    args.stage1_steps = 9
    with pytest.raises(ValueError, match="stage1-seed0 was trained"):
        train(args, "red_hat", "stage1", 0)


def test_a_failed_training_names_its_log(tmp_path, monkeypatch):
    args = parse_args(["--output_dir", str(tmp_path)])
    monkeypatch.setattr(preservation.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 3})())
    with pytest.raises(RuntimeError, match=r"exit code 3; see .*training\.log"):
        train(args, "red_hat", "plain", 0)


def test_only_the_ablation_target_gets_the_ablations():
    args = parse_args(["--ablation_target", "red_hat"])
    assert "no_text" in preservation.chosen_runs(args, "red_hat")
    assert "no_text" not in preservation.chosen_runs(args, "blonde_hair")
    assert preservation.chosen_runs(parse_args(["--runs", "paper", "plain"]), "red_hat") == ["plain", "paper"]
