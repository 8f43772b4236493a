"""The preservation benchmark: what is trained, drawn and compared, on made-up measures."""

import json
import re
import shutil
from dataclasses import astuple, replace

import numpy as np
import pytest
from PIL import Image

from benchmarks.parts import runs
from benchmarks.parts.drawing import ROOT, base_model_digest
from benchmarks.parts.judging import Job, make_rows
from benchmarks.parts.runs import (
    ABLATIONS,
    BEFORE,
    CHANGES,
    CLAIMED,
    RUNS,
    WAYS,
    mask_folder,
    run_folder,
    train,
    training_command,
    trainings,
    true_regions,
    write_masks,
)
from benchmarks.parts.tables import Row, curve_of, distance_below_curve, overall_rows
from benchmarks.preservation import (
    HEADINGS,
    ablation_differences,
    below_plain_curve,
    chosen,
    explanation,
    jobs_of,
    label_of,
    main,
    oracle_differences,
    parse_args,
    places,
    plane_series,
    shares_of_plain,
    write_plane,
    write_tables,
)
from loras import LORA_WEIGHTS
from toy_portraits.judge import MARGIN
from toy_portraits.recipe import BASE_MODEL, BASES, LORA
from toy_portraits.world import LABELS, SIZE, TARGETS, render, sample_factors
from training.arguments import flat
from training.arguments import parse_args as parse_training_args


PROMPTS = 40
# rows of the ways to train: each at its strengths, once more with guidance, and once more late
DRAWN = sum(len(run.strengths) + 2 for run in WAYS.values())


def made_up(response: float, change: float, seed: int, prompts: int = PROMPTS) -> dict[str, np.ndarray]:
    """Measures of one evaluation; the same seed gives the same prompts' luck."""
    rng = np.random.default_rng(seed)
    measures = {name: np.full(prompts, 0.5) for name in (*HEADINGS, "kept_sex", "change") if name != "excess"}
    measures["response"] = (np.arange(prompts) < round(response * prompts)).astype(float)
    measures["change_outside"] = change + rng.normal(0, 0.3, prompts)
    measures["base_change"] = np.full(prompts, change)
    return measures


def made_up_results(target_name: str, seeds=(0, 1), names=tuple(RUNS)) -> dict[Job, dict[str, np.ndarray]]:
    """Plain LoRA along a line from (0.2, 2) to (0.6, 10); the others respond as much and pollute less."""
    args = parse_args(["--targets", target_name, "--seeds", *map(str, seeds), "--runs", *names])
    results = {}
    for job in jobs_of(args):
        spot = (0.6, 5.0)
        if job.run_name in ("plain", "stage1"):
            spot = (0.2 + 0.4 * job.strength, 2 + 8 * job.strength)
        if job.run_name in ("mask", "composed_mask"):
            spot = (0.7, 4.5)
        measures = made_up(spot[0], spot[1] - {"": 0, "guided": 2, "late": 1}[job.way], seed=job.seed)
        if job.way:
            del measures["base_change"], measures["leak"]
        results[job] = measures
    return results


def rows_of(target_name: str, original: dict[str, np.ndarray], results: dict) -> list[Row]:
    return make_rows(target_name, original, results, label_of)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return rows_of("blonde_hair", made_up(0.2, 2.0, seed=9), made_up_results("blonde_hair"))


def row_of(rows: list[Row], name: str, strength: float = 1.0, way: str = "") -> Row:
    return next(row for row in rows if row.key == (name, strength, way))


def test_rows_hold_seeds_by_prompts_and_the_change_beyond_the_originals(rows):
    # every way to train is there as it is, with guidance and late, an ablation once
    assert len(rows) == 1 + DRAWN + len(RUNS) - len(WAYS)
    assert rows[0].run_name == "original" and rows[0].measures["excess"].max() == 0
    plain = row_of(rows, "plain")
    assert plain.measures["response"].shape == (2, PROMPTS)
    expected = plain.measures["change_outside"] - rows[0].measures["change_outside"]
    assert np.array_equal(plain.measures["excess"], expected)
    ablation = row_of(rows, "no_text")
    for way in ("guided", "late"):
        row = row_of(rows, "paper", way=way)
        assert row.label == f"SPF-Portrait, paper, {way}" and not {"leak", "base_change"} & set(row.measures)
        assert plain.seeds == row.seeds == (0, 1) and ablation.seeds == (0,)


def test_a_way_to_train_is_drawn_late_as_it_is():
    jobs = [job for job in jobs_of(parse_args(["--targets", "red_hat", "--seeds", "1"])) if job.way == "late"]
    assert [job.run_name for job in jobs] == list(WAYS) and not any(job.quiet for job in jobs)
    assert {(job.seed, job.strength) for job in jobs} == {(1, 1.0)}


def test_distance_below_the_curve_and_its_error(rows):
    curve = curve_of(rows, "plain")
    assert [point.strength for point in curve] == [0, 0.25, 0.5, 0.75, 1]
    found = distance_below_curve(row_of(rows, "composed"), curve)
    assert found["distance"] == pytest.approx(5, abs=0.2) and not found["beyond_the_curve"]
    assert found["distance"] > 3 * found["standard_error"] and len(found["per_seed"]) == 2
    # a point of the curve lies on it
    assert abs(distance_below_curve(row_of(rows, "plain", 0.5), curve)["distance"]) < 0.2
    assert distance_below_curve(row_of(rows, "composed"), curve) == found


def test_every_way_is_held_against_plain_loras_curve(rows):
    found = below_plain_curve(rows)
    assert len(found) == 3 * len(WAYS) - 1
    guided, composed = found["SPF-Portrait, composed, guided"], found["SPF-Portrait, composed"]
    assert guided["distance"] == pytest.approx(composed["distance"] + 2)
    assert found["SPF-Portrait, composed, late"]["distance"] == pytest.approx(composed["distance"] + 1)
    # plain LoRA is not held against itself, but drawn in another way it is
    assert "plain LoRA, strength 1" not in found and {"plain LoRA, guided", "plain LoRA, late"} <= set(found)
    assert below_plain_curve([row for row in rows if row.run_name != "plain"]) == {}


def test_every_way_is_a_share_of_plain_lora(rows):
    found = shares_of_plain(rows)
    assert len(found) == 3 * len(WAYS) - 1 + len(CLAIMED)
    own = found["SPF-Portrait, composed"]
    assert own["response"].whole.value == pytest.approx(1) and list(own["response"].by_seed) == [0, 1]
    assert own["excess"].whole.value == pytest.approx(3 / 8, abs=0.02)
    assert own["base_change"].whole.value == pytest.approx(0.5)
    guided = found["SPF-Portrait, composed, guided"]
    assert guided["excess"].whole.value == pytest.approx(1 / 8, abs=0.02) and "base_change" not in guided
    late = found["SPF-Portrait, composed, late"]
    assert late["excess"].whole.value == pytest.approx(2 / 8, abs=0.02) and "base_change" not in late
    assert shares_of_plain([row for row in rows if row.run_name != "plain"]) == {}


def test_ablations_are_compared_with_their_parent_at_their_seeds(rows):
    found = ablation_differences(rows)
    expected = {
        (parent, seeds): {name for name in names if (name in CLAIMED) == (len(seeds) == 2)}
        for parent, names in ABLATIONS.items()
        for seeds in ((0,), (0, 1))
    }
    assert {key: set(names) for key, names in found.items()} == expected
    # Made up alike at each seed; over both seeds the parent's mean is another than at the first.
    for key, name in {("paper", (0,)): "no_fine", ("composed", (0, 1)): "c_before"}.items():
        for measure in ("response", "change_outside"):
            assert astuple(found[key][name][measure]) == (0, 0, 0)
    polluted = replace(row_of(rows, "c_before"), measures=dict(row_of(rows, "c_before").measures))
    polluted.measures["excess"] = polluted.measures["excess"] + np.array([[1.0], [2.0]])
    own = ablation_differences([row_of(rows, "composed"), polluted])["composed", (0, 1)]["c_before"]["excess"]
    assert (own.value, own.low, own.high) == pytest.approx((1.5, 1, 2))
    without_paper = [row for row in rows if row.run_name != "paper"]
    assert {parent for parent, _ in ablation_differences(without_paper)} == {"composed"}


def test_places_in_the_plane_and_what_knows_the_true_regions(rows):
    found = places(rows)
    assert len(found) == 1 + DRAWN
    mask, composed = found["mask", 1.0, "guided"], found["composed", 1.0, "guided"]
    assert mask.mark == "★" and mask.on_front and mask.on_usable_front is None and mask.usable_share is None
    # dominated by an oracle alone
    assert composed.mark == "☆" and composed.on_usable_front and not composed.on_front
    assert composed.usable_share > 0.9 and composed.share < 0.1
    assert found["plain", 1.0, ""].mark == "" and found["original", 0.0, ""].mark == "★"
    assert composed.excess.low < composed.excess.value < composed.excess.high
    # what is drawn late is a candidate as any other
    worse = [row for row in rows if row.way != "guided"]
    assert found["composed", 1.0, "late"].mark == "" and places(worse)["composed", 1.0, "late"].mark == "☆"

    unguided = oracle_differences(rows)[f"{RUNS['paper'].label}, minus {RUNS['mask'].label}"]
    assert unguided["response"].value == pytest.approx(-0.1) and unguided["excess"].value == pytest.approx(0.5)
    assert len(oracle_differences(rows)) == 9  # composed and paper, and composed again, each in three ways
    late = oracle_differences(rows)[f"{RUNS['paper'].label}, late, minus {RUNS['mask'].label}, late"]
    assert late["excess"].value == pytest.approx(0.5)


def test_the_panel_shows_every_way_and_the_strength_curve(rows):
    curve, plain, *others = plane_series(rows)
    assert curve.curve and [round(point.response.value, 3) for point in curve.points] == [0.2, 0.3, 0.4, 0.5, 0.6]
    # what is joined is the LoRA as it is, and the same drawn in another way
    assert [point.way for point in plain.points] == ["guided", "", "late"]
    assert len(others) == len(WAYS) - 1 and len({(s.color, s.marker) for s in (plain, *others)}) == len(WAYS)
    (mask,) = [series for series in others if series.label == RUNS["mask"].label]
    assert not any(point.on_front for point in mask.points)


def test_the_mean_over_targets_is_over_what_all_of_them_have(rows):
    other = rows_of("red_hat", made_up(0.4, 3.0, seed=9), made_up_results("red_hat"))
    other = [replace(row, measures={k: v for k, v in row.measures.items() if k != "leak"}) for row in other]
    overall = overall_rows({"blonde_hair": rows, "red_hat": other})
    # ablations are those of one target alone
    assert len(overall) == 1 + DRAWN
    assert overall[0].measures["response"].mean() == pytest.approx(0.3) and "leak" not in overall[0].measures
    assert row_of(overall, "plain").measures["response"].shape == (2, PROMPTS)


@pytest.mark.parametrize("names", [tuple(RUNS), ("composed",)], ids=len)
def test_tables_and_pictures_are_written(tmp_path, names):
    seeds = [0, 1, 2, 3, 4]
    args = parse_args(["--output_dir", str(tmp_path), "--targets", "blonde_hair", "--seeds", *map(str, seeds)])
    results = made_up_results("blonde_hair", seeds, names)
    # a seed that all the means hide
    (worst,) = [own for job, own in results.items() if (job.run_name, job.seed, job.way) == ("composed", 3, "")]
    worst |= made_up(0.3, 9.0, seed=3)
    tables = {"blonde_hair": rows_of("blonde_hair", made_up(0.2, 2.0, seed=9), results)}
    write_tables(args, tables)
    write_plane(args, tables)

    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    entries = document["targets"]["blonde_hair"]["rows"]
    assert [entry["run"] for entry in entries if entry["strength"] == 1 and not entry["way"]] == list(names)
    places = {(entry["run"], entry["way"]): entry["plane"] for entry in entries if entry["strength"] in (0, 1)}
    composed = places["composed", ""]
    assert composed["worst"] == {"response": pytest.approx(0.3), "excess": pytest.approx(7, abs=0.1)}
    assert composed["response"]["low"] < 0.5 < composed["response"]["value"] == pytest.approx(0.54)
    assert places["original", ""]["worst"] == {"response": None, "excess": None}
    # three training seeds and one
    assert len(names) == 1 or (places["mask", ""]["worst"]["response"], places["no_text", ""]) == (0.7, None)
    assert document["settings"]["prompt_seed"] == 91117
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "both branches of the" in text and "| SPF-Portrait, composed |" in text
    for way in ("guided", "late"):
        line = next(line for line in text.splitlines() if line.startswith(f"| SPF-Portrait, composed, {way}"))
        assert line.split(" | ")[5:7] == ["-", "-"]
    assert "`sfcm_guidance_start=5.1, target_scale=1.4`" in text
    first = next(line for line in text.splitlines() if line.startswith("| SPF-Portrait, composed"))
    assert re.search(r"\| 0\.54 \[[\d., ]+\], worst 0\.30 \| 3\.\d\d \[[\d., ]+\], worst 6\.99 \|", first)
    assert (tmp_path / "response_pollution_plane.png").is_file()
    shares = [entry["of_plain"] for entry in entries if entry["run"] == "composed"]
    assert ("As a share of plain LoRA's" in text) == (len(names) > 1) == all(shares)
    if len(names) > 1:
        assert shares[0]["excess"]["by_seed"].keys() == {"0", "1", "2", "3", "4"} and "base_change" not in shares[1]
        assert shares[0]["response"]["worst"] == pytest.approx(0.5) and shares[0]["base_change"]["worst"] > 0.85
        shared = next(line for line in text.splitlines() if line.startswith("| masked loss, true masks | 1.17"))
        assert shared.count(", ") == 1 + 3 * 3  # an interval and three seeds each


def test_every_runs_command_is_one_the_trainer_takes(tmp_path, registered):
    args = parse_args(["--output_dir", str(tmp_path)])
    shutil.copytree(LORA, run_folder(args.output_dir, "blonde_hair", "stage1", 4))
    masks = mask_folder(args, "blonde_hair", 4)
    masks.mkdir()
    Image.new("L", (SIZE, SIZE)).save(masks / "00000.png")
    for name in RUNS:
        command = training_command(args, "blonde_hair", name, 4)
        taken = parse_training_args([*command, "--output_dir", str(tmp_path / name)])
        assert taken.method.stage2_steps == (args.stage2_steps if RUNS[name].continues else 0)
    assert taken.method.stage2_objective == "paper"


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


def test_a_base_has_a_folder_of_its_own_and_its_name_in_the_tables(toy_xl):
    args, other = parse_args([]), parse_args(["--base", "sdxl"])
    assert (args.output_dir, other.output_dir) == (ROOT / "runs/preservation", ROOT / "runs/preservation_sdxl")
    command = training_command(other, "red_hat", "plain", 1)
    assert command[:2] == ["--pretrained_model_name_or_path", str(toy_xl)]
    assert command[2:4] == ["--clip_model_name_or_path", str(BASE_MODEL / "clip")]
    assert command[4:] == training_command(args, "red_hat", "plain", 1)[4:]
    assert "toy Stable Diffusion, 64 prompts" in explanation(args) and "15 DDIM steps" in explanation(args)
    assert "toy Stable Diffusion XL, 64 prompts" in explanation(other) and "15 Euler steps" in explanation(other)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_short_run_trains_judges_and_keeps_to_its_base(tmp_path, trained, toy_bases, base):
    flags = ["--output_dir", str(tmp_path), "--targets", "blonde_hair", "--seeds", "5", "--workers", "1"]
    runs = ["plain", "stage1", "composed", *(["paper"] if base != "sd3" else [])]
    flags += ["--num_prompts", "3", "--num_inference_steps", "2", "--runs", *runs]
    main(parse_args([*flags, "--base", base]))
    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    rows = [(row["run"], row["strength"], row["way"]) for row in document["targets"]["blonde_hair"]["rows"]]
    assert len(rows) == len(set(rows)) == 1 + 9 + 3 * (len(runs) - 2)
    assert {("composed", 1.0, way) for way in ("", "guided", "late")} < set(rows)
    assert document["settings"]["base"] == base and document["base_model"] == base_model_digest(base)
    assert BASES[base].title in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert len(trained) == len(runs) and all(str(BASES[base].folder) in command for command in trained.values())
    with pytest.raises(ValueError, match="was trained with other flags or from another model"):
        main(parse_args([*flags, "--base", "sd" if base != "sd" else "sdxl"]))


def test_a_base_without_the_papers_objective_has_no_such_runs(toy_3, capsys):
    own = parse_args(["--base", "sd3"]).runs
    assert {"plain", "composed", "c_gamma1", "composed_mask"} < set(own)
    assert set(RUNS) - set(own) == {"both", *(n for n, run in RUNS.items() if "paper" in (n, run.parent))}
    with pytest.raises(SystemExit):
        parse_args(["--base", "sd3", "--runs", "composed", "paper", "both"])
    assert "--runs paper both: --base sd3 is not trained with the paper's objective" in capsys.readouterr().err


def test_what_is_needed_is_trained_first():
    flags = ["--targets", "red_hat", "blonde_hair", "--seeds", "5", "6", "--ablation_targets", "red_hat"]
    args = parse_args([*flags, "--runs", "composed_mask", "no_text", "prior"])
    first, second, third = trainings(chosen(args))
    assert {(name, seed) for target, name, seed in first} == {(n, s) for n in ("stage1", "prior") for s in (5, 6)}
    assert ("red_hat", "no_text", 5) in second and ("red_hat", "composed", 6) in second
    assert not {("red_hat", "no_text", 6), ("blonde_hair", "no_text", 5)} & set(second)
    assert len(third) == 4 and all(name == "composed_mask" for _, name, _ in third)
    assert len(first) == len(set(first)) == 8 and len(second) == len(set(second)) == 5


@pytest.mark.parametrize("target_name", TARGETS)
def test_the_true_region_is_where_the_renderer_puts_the_target(target_name, judge):
    target, factors = TARGETS[target_name], sample_factors(24, np.random.default_rng(4))
    portraits, before = render(factors)
    _, after = render(factors | {target.factor: np.full(24, target.value)})
    found = true_regions(judge, portraits, target)
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
    saved = run_folder(args.output_dir, "blonde_hair", "composed", 3) / "alignment"
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


def test_what_is_claimed_has_five_seeds_the_other_ways_three_and_ablations_one():
    args = parse_args(["--targets", "red_hat", "--ablation_targets", "red_hat"])
    assert args.num_prompts >= 64
    seeds = {name: [seed for _, own, seed in chosen(args) if own == name] for name in RUNS}
    every = [301, 302, 303, 304, 305]
    ways = {name for name in WAYS if seeds[name] == every}
    assert ways == {"plain", "stage1", "composed", "paper"}
    assert {name for name in RUNS.keys() - WAYS.keys() if seeds[name] == every} == CLAIMED
    assert all(seeds[name] == every[: 1 if RUNS[name].parent else 3] for name in RUNS.keys() - ways - CLAIMED)


def test_only_the_ablation_targets_get_the_ablations():
    args = parse_args(["--ablation_targets", "red_hat", "striped_shirt"])
    ablations = {(target, seed) for target, name, seed in chosen(args) if name == "no_text"}
    assert ablations == {("red_hat", 301), ("striped_shirt", 301)}
    few = parse_args(["--runs", "paper", "plain", "--targets", "red_hat", "--seeds", "1"])
    assert [name for _, name, _ in chosen(few)] == ["plain", "paper"]


def test_every_ablation_changes_its_parents_flags_once():
    flags = [run.flags for run in RUNS.values() if run.parent is not None]
    assert len(set(flags)) == len(flags)
    for run in RUNS.values():
        if run.parent is not None:
            assert run.flags.startswith(RUNS[run.parent].flags.removesuffix(" --save_alignment"))


def test_all_changes_of_the_earlier_defaults_are_todays():
    made = {name: value for _, own in CHANGES.values() for name, value in own.items()}
    command = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "portraits"]
    today = flat(parse_training_args(command))
    assert made.keys() == BEFORE.keys() and {name: today[name] for name in made} == made


def test_a_finished_training_is_kept_and_one_of_other_flags_refused(tmp_path, started):
    args = parse_args(["--output_dir", str(tmp_path)])
    for name in ("stage1", "composed", "c_hard"):
        train(args, "red_hat", name, 0)
    programs = {name: command[1] for name, command in started.items()}
    assert programs["red_hat/composed-seed0"].endswith("train_spf_portrait_lora.py")
    assert programs["red_hat/c_hard-seed0"].endswith("benchmarks/sfcm_modes.py")
    started.clear()
    train(args, "red_hat", "stage1", 0)
    assert not started

    stage1 = run_folder(args.output_dir, "red_hat", "stage1", 0)
    (stage1 / LORA_WEIGHTS).write_bytes(b"other weights")
    with pytest.raises(ValueError, match="composed-seed0 was trained with other flags or from another model"):
        train(args, "red_hat", "composed", 0)
    args.stage1_steps = 9
    with pytest.raises(ValueError, match="stage1-seed0 was trained"):
        train(args, "red_hat", "stage1", 0)


def test_a_failed_training_names_its_log(tmp_path, monkeypatch):
    args = parse_args(["--output_dir", str(tmp_path)])
    monkeypatch.setattr(runs.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 3})())
    with pytest.raises(RuntimeError, match=r"exit code 3; see .*training\.log"):
        train(args, "red_hat", "plain", 0)


@pytest.mark.parametrize("name", ["batch_size", "num_prompts", "workers", "num_inference_steps", "stage1_steps"])
def test_nothing_is_done_less_than_once(name, capsys):
    with pytest.raises(SystemExit):
        parse_args([f"--{name}", "0"])
    assert f"error: --{name} must be at least 1, not 0" in capsys.readouterr().err
