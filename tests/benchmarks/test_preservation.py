"""Tests of the benchmark: its statistics on made-up rows, its bookkeeping, and a LoRA judged with the toy model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from benchmarks import preservation
from benchmarks.preservation import (
    ABLATIONS,
    HEADINGS,
    QUIET,
    RUNS,
    WAYS,
    DrawSettings,
    EvaluationJob,
    Originals,
    ablation_differences,
    evaluate_guided,
    evaluate_lora,
    evaluate_original,
    evaluation_jobs,
    load_guided_pipeline,
    load_originals,
    load_pipeline,
    make_rows,
    oracle_differences,
    parse_args,
    places,
    plane_series,
    train,
    training_command,
    trainings,
    true_regions,
    verdicts,
    write_masks,
    write_pictures,
    write_results,
)
from benchmarks.rows import (
    Row,
    curve_change_at,
    curve_of,
    distance_below_curve,
    overall_rows,
    paired_difference,
    resamples_of,
    summarise,
    with_interval,
)
from evaluation.measures import Estimate
from toy_portraits.judge import MARGIN, PortraitJudge, base_prompts
from toy_portraits.recipe import LORA
from toy_portraits.world import LABELS, SIZE, TARGETS, render, sample_factors
from training.arguments import parse_args as parse_training_args


PROMPTS = 40
# rows of the ways to train: each at its strengths, and once more with guidance
DRAWN = sum(len(run.strengths) + 1 for run in WAYS.values())
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
    """Plain LoRA along a line from (0.2, 2) to (0.6, 10); the others respond as much and pollute less."""
    args = parse_args(["--targets", target_name, "--seeds", *map(str, seeds), "--runs", *names])
    results = {}
    for job in evaluation_jobs(args):
        spot = (0.6, 5.0)
        if job.run_name in ("plain", "stage1"):
            spot = (0.2 + 0.4 * job.strength, 2 + 8 * job.strength)
        if job.run_name in ("mask", "composed_mask"):
            spot = (0.7, 4.5)
        measures = made_up(spot[0], spot[1] - 2 * job.guided, seed=job.seed)
        if job.guided:
            del measures["base_change"], measures["leak"]
        results[job] = measures | {"pictures": np.zeros((6, SIZE, SIZE, 3), dtype=np.uint8)}
    return results


@pytest.fixture
def rows() -> list[Row]:
    return make_rows("blonde_hair", made_up(0.2, 2.0, seed=9), made_up_results("blonde_hair"))


def row_of(rows: list[Row], name: str, strength: float = 1.0, guided: bool = False) -> Row:
    return next(row for row in rows if row.key == (name, strength, guided))


def test_rows_hold_seeds_by_prompts_and_the_change_beyond_the_originals(rows):
    # every way to train is there with and without guidance, an ablation once
    assert len(rows) == 1 + DRAWN + len(RUNS) - len(WAYS)
    assert rows[0].run_name == "original" and rows[0].measures["excess"].max() == 0
    plain = row_of(rows, "plain")
    assert plain.measures["response"].shape == (2, PROMPTS)
    expected = plain.measures["change_outside"] - rows[0].measures["change_outside"]
    assert np.array_equal(plain.measures["excess"], expected)
    guided, ablation = row_of(rows, "paper", guided=True), row_of(rows, "no_text")
    assert guided.label == "SPF-Portrait, paper, guided" and "leak" not in guided.measures
    assert plain.seeds == guided.seeds == (0, 1) and ablation.seeds == (0,)


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
    assert len(found) == 2 * len(WAYS) - 1
    composed = found["SPF-Portrait, composed"]
    assert composed["response_ratio"] == pytest.approx(1)
    assert composed["excess_ratio"] == pytest.approx(3 / 8, abs=0.05)
    assert composed["base_change_ratio"] == pytest.approx(0.5)
    assert composed["below_plain_curve"]["distance"] == pytest.approx(5, abs=0.2)
    guided = found["SPF-Portrait, composed, guided"]
    assert "base_change_ratio" not in guided
    assert guided["below_plain_curve"]["distance"] == pytest.approx(composed["below_plain_curve"]["distance"] + 2)
    # plain LoRA is not held against itself, but with guidance it is
    assert "plain LoRA, strength 1" not in found and "plain LoRA, guided" in found
    assert verdicts([row for row in rows if row.run_name != "plain"]) == {}


def test_ablations_are_compared_with_their_parent_at_their_seeds(rows):
    found = ablation_differences(rows)
    assert {parent: set(names) for parent, names in found.items()} == {k: set(v) for k, v in ABLATIONS.items()}
    assert found["paper"]["no_fine"]["response"] == {"mean": 0.0, "standard_error": 0.0}
    # at both seeds the parent's mean is another
    assert found["paper"]["no_fine"]["change_outside"] == {"mean": 0.0, "standard_error": 0.0}
    without_paper = [row for row in rows if row.run_name != "paper"]
    assert set(ablation_differences(without_paper)) == {"composed"}


def test_places_in_the_plane_and_what_knows_the_true_regions(rows):
    found = places(rows)
    assert len(found) == 1 + DRAWN
    mask, composed = found["mask", 1.0, True], found["composed", 1.0, True]
    assert mask.mark == "★" and mask.on_front and mask.on_usable_front is None and mask.usable_share is None
    # dominated by an oracle alone
    assert composed.mark == "☆" and composed.on_usable_front and not composed.on_front
    assert composed.usable_share > 0.9 and composed.share < 0.1
    assert found["plain", 1.0, False].mark == "" and found["original", 0.0, False].mark == "★"
    assert composed.excess.low < composed.excess.value < composed.excess.high

    (unguided,) = [d for d in oracle_differences(rows) if d["label"] == RUNS["paper"].label]
    assert unguided["oracle"] == RUNS["mask"].label
    assert unguided["response"].value == pytest.approx(-0.1) and unguided["excess"].value == pytest.approx(0.5)
    assert len(oracle_differences(rows)) == 6  # composed and paper, and composed again, each guided and not


def test_the_panel_shows_every_way_and_the_strength_curve(rows):
    curve, plain, *others = plane_series(rows)
    assert curve.curve and [round(point.response, 3) for point in curve.points] == [0.2, 0.3, 0.4, 0.5, 0.6]
    assert [point.hollow for point in plain.points] == [False, True]
    assert len(others) == len(WAYS) - 1 and len({(s.color, s.marker) for s in (plain, *others)}) == len(WAYS)
    (mask,) = [series for series in others if series.label == RUNS["mask"].label]
    assert not any(point.on_front for point in mask.points)


def test_the_mean_over_targets_is_over_what_all_of_them_have(rows):
    other = make_rows("red_hat", made_up(0.4, 3.0, seed=9), made_up_results("red_hat"))
    other = [replace(row, measures={k: v for k, v in row.measures.items() if k != "leak"}) for row in other]
    overall = overall_rows({"blonde_hair": rows, "red_hat": other})
    # ablations are those of one target alone
    assert len(overall) == 1 + DRAWN
    assert overall[0].measures["response"].mean() == pytest.approx(0.3) and "leak" not in overall[0].measures
    assert row_of(overall, "plain").measures["response"].shape == (2, PROMPTS)


def test_a_paired_difference_has_no_luck_of_the_prompts():
    luck = np.random.default_rng(0).normal(0, 3, (1, PROMPTS))
    first, second = (Row("", "", 1.0, {"response": luck + shift}) for shift in (0.0, 0.5))
    found = paired_difference(second, first, "response", resamples_of([first]))
    assert found.value == pytest.approx(0.5) and found.low == pytest.approx(0.5) == found.high
    assert with_interval(Estimate(0.5, -0.25, 1), signed=True) == "+0.50 [-0.25, +1.00]"
    assert with_interval(Estimate(0.5, None, None)) == "0.50"


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
    assert [entry["run"] for entry in entries if entry["strength"] == 1 and not entry["guided"]] == list(names)
    assert entries[-1]["training_seconds"] == 3 and entries[-1]["measures"]["response"]["mean"] == 0.6
    assert entries[1]["plane"]["response"]["low"] < entries[1]["plane"]["response"]["high"]
    assert document["settings"]["prompt_seed"] == 90002
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "both branches of the" in text and text.count("| SPF-Portrait, composed |") >= 3
    guided = next(line for line in text.splitlines() if line.startswith("| SPF-Portrait, composed, guided"))
    assert guided.split(" | ")[5:7] == ["-", "-"]
    lines = (tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("target,label,run,strength") and len(lines) > 10
    assert (tmp_path / "comparison_blonde_hair.png").is_file()
    assert (tmp_path / "response_pollution_plane.png").is_file()


def test_every_run_starts_the_training_script_with_the_right_stages(tmp_path):
    args = parse_args(
        ["--output_dir", str(tmp_path), "--stage1_steps", "7", "--stage2_steps", "5", "--train_args=--rank 8"]
    )
    commands = {name: " ".join(training_command(args, "red_hat", name, 4)) for name in RUNS}
    assert "--stage1_steps 7 --stage2_steps 0" in commands["stage1"]
    for name, command in commands.items():
        assert "--seed 4" in command and command.endswith("--rank 8") and "/red_hat" in command
        if RUNS[name].continues:
            assert f"--stage1_steps 0 --stage1_lora_path {tmp_path}" in command and "--stage2_steps 5" in command
            parent = "composed" if "composed" in (name, RUNS[name].parent) or name == "composed_mask" else "paper"
            assert f"--stage2_objective {parent}" in command
        elif name != "stage1":
            assert "--stage1_steps 12 --stage2_steps 0" in command
    assert f"--sfcm_dir {tmp_path}/runs/red_hat/composed_mask-seed4-masks" in commands["composed_mask"]
    assert "--save_alignment" in commands["composed"] and "--train_batch_size 4" in commands["dop"]


def test_every_runs_command_is_one_the_trainer_takes(tmp_path):
    args = parse_args(["--output_dir", str(tmp_path)])
    shutil.copytree(LORA, preservation.run_folder(args, "blonde_hair", "stage1", 4))
    masks = preservation.mask_folder(args, "blonde_hair", 4)
    masks.mkdir()
    Image.new("L", (SIZE, SIZE)).save(masks / "00000.png")
    for name in RUNS:
        command = training_command(args, "blonde_hair", name, 4)
        taken = parse_training_args([*command, "--output_dir", str(tmp_path / name)])
        assert taken.method.stage2_steps == (args.stage2_steps if RUNS[name].continues else 0)
    assert taken.method.stage2_objective == "paper"


def test_what_is_needed_is_trained_first():
    flags = ["--targets", "red_hat", "blonde_hair", "--seeds", "5", "6", "--ablation_targets", "red_hat"]
    args = parse_args([*flags, "--runs", "composed_mask", "no_text", "prior"])
    first, second, third = trainings(args)
    assert {(name, seed) for target, name, seed in first} == {(n, s) for n in ("stage1", "prior") for s in (5, 6)}
    assert ("red_hat", "no_text", 5) in second and ("red_hat", "composed", 6) in second
    assert not {("red_hat", "no_text", 6), ("blonde_hair", "no_text", 5)} & set(second)
    assert len(third) == 4 and all(name == "composed_mask" for _, name, _ in third)
    assert len(first) == len(set(first)) == 8 and len(second) == len(set(second)) == 5


@pytest.mark.parametrize("target_name", TARGETS)
def test_the_true_region_is_where_the_renderer_puts_the_target(target_name):
    target, factors = TARGETS[target_name], sample_factors(24, np.random.default_rng(4))
    portraits, before = render(factors)
    _, after = render(factors | {target.factor: np.full(24, target.value)})
    found = true_regions(PortraitJudge.from_pretrained(), portraits, target)
    wanted = np.isin(np.stack([before, after]), [LABELS.index(label) for label in target.labels]).any(axis=0)
    # With the judge's margin it holds all of the truth and little else.
    assert (found & wanted).sum() / wanted.sum() > 0.995
    padded = np.pad(wanted, ((0, 0), (MARGIN + 1, MARGIN + 1), (MARGIN + 1, MARGIN + 1)))
    side = 2 * MARGIN + 3
    near = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2)).any(axis=(3, 4))
    assert (found & ~near).sum() / found.sum() < 0.02


def test_masks_are_written_for_the_portraits_that_the_composed_run_saved(tmp_path):
    args = parse_args(["--output_dir", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"composed-seed3/alignment has no portraits.*--save_alignment"):
        write_masks(args, "blonde_hair", 3)
    saved = preservation.run_folder(args, "blonde_hair", "composed", 3) / "alignment"
    saved.mkdir(parents=True)
    portraits, labels = render(sample_factors(2, np.random.default_rng(1)))
    for i, portrait in enumerate(portraits):
        Image.fromarray(portrait).save(saved / f"{i:05d}.png")
        Image.new("L", (SIZE, SIZE)).save(saved / f"{i:05d}_sfcm.png")
    folder = write_masks(args, "blonde_hair", 3)
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png"]
    mask = np.asarray(Image.open(folder / "00001.png"))
    assert mask.shape == (SIZE, SIZE) and set(np.unique(mask)) == {0, 255}
    assert mask[labels[1] == LABELS.index("hair")].mean() > 250


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
    assert on["full_images"].shape == on["base_images"].shape == (2, SIZE, SIZE, 3)
    assert np.array_equal(judge.compare(originals.base_images, on["full_images"], TARGETS["striped_shirt"])["change"],
                          on["change"])  # fmt: skip
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


def test_a_guided_lora_is_judged_with_its_map_and_kept(tmp_path, monkeypatch):
    pipeline, judge = load_guided_pipeline(SETTINGS), PortraitJudge.from_pretrained()
    originals = load_originals(pipeline, "red_hat", SETTINGS, tmp_path)
    lora = write_lora(tmp_path / "lora")
    guided = evaluate_guided(pipeline, judge, originals, lora, 1.0, QUIET, SETTINGS, tmp_path)
    unguided = evaluate_guided(pipeline, judge, originals, lora, 0.0, QUIET, SETTINGS, tmp_path)
    assert guided["maps"].shape == (2, SIZE // 4, SIZE // 4) and 0 <= guided["maps"].min() < guided["maps"].max() <= 1
    assert guided["change"].mean() < unguided["change"].mean() and not {"leak", "base_change"} & set(guided)
    assert not getattr(pipeline.unet, "peft_config", None)
    monkeypatch.setattr(preservation, "draw_guided", lambda *given: pytest.fail("drawn again"))
    again = evaluate_guided(pipeline, judge, originals, lora, 1.0, QUIET, SETTINGS, tmp_path)
    assert all(np.array_equal(guided[name], again[name]) for name in guided)
    with pytest.raises(FileNotFoundError, match="pytorch_lora_weights.safetensors does not exist"):
        evaluate_guided(pipeline, judge, originals, tmp_path, 1.0, QUIET, SETTINGS, tmp_path)


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


def test_only_the_ablation_targets_get_the_ablations(capsys):
    args = parse_args(["--ablation_targets", "red_hat", "striped_shirt"])
    assert "no_text" in preservation.chosen_runs(args, "red_hat")
    assert "no_text" in preservation.chosen_runs(args, "striped_shirt")
    assert "no_text" not in preservation.chosen_runs(args, "blonde_hair")
    assert preservation.chosen_runs(parse_args(["--runs", "paper", "plain"]), "red_hat") == ["plain", "paper"]
    assert args.ablation_seeds == [101]
    with pytest.raises(SystemExit):
        parse_args(["--ablation_seeds", "101", "7"])
    assert "--ablation_seeds 7 is none of --seeds" in capsys.readouterr().err


def test_every_ablation_changes_its_parents_flags_once():
    flags = [run.flags for run in RUNS.values() if run.parent is not None]
    assert len(set(flags)) == len(flags)
    for run in RUNS.values():
        if run.parent is not None:
            assert run.flags.startswith(RUNS[run.parent].flags.removesuffix(" --save_alignment"))
