"""Choosing settings: what is refused, what is trained and shared, that the rule chooses right, and what is written."""

import json
import shlex

import numpy as np
import pytest

from benchmarks import choose
from benchmarks.choose import jobs_of, label_of, main, parse_args, shares_of, train, write_choice
from benchmarks.parts import judging
from benchmarks.parts.judging import make_rows
from benchmarks.parts.tables import Row, with_mean


PROMPTS = 40
pytestmark = pytest.mark.usefixtures("registered")  # a candidate's map is one of those that lost
CANDIDATES = ["default=", "wide=--sfcm_gamma 1", "hard=--sfcm_mode averaged_target_hard --teacher_scale 1"]
# Response and excess of each training seed; plain LoRA has .5 and 10.
SPOTS = {
    "default": ((0.6, 3.0), (0.6, 3.0)),
    "wide": ((0.5, 2.0), (0.5, 2.0)),
    "hard": ((0.7, 1.0), (0.4, 1.0)),  # cleanest, but one seed responds too little
}


def parse(tmp_path, *words, candidates=CANDIDATES):
    return parse_args(["--candidates", *candidates, "--output_dir", str(tmp_path), "--targets", "red_hat", *words])


def measures_of(response: float, excess: float) -> dict[str, np.ndarray]:
    found = {name: np.full(PROMPTS, 0.5) for name in ("kept", "kept_skin", "leak")}
    there = (np.arange(PROMPTS) < round(response * PROMPTS)).astype(float)
    return found | {
        "response": there, "change_outside": np.full(PROMPTS, 2 + excess), "base_change": np.full(PROMPTS, 1 + excess),
    }  # fmt: skip


def rows_of(args, target: str, spots=SPOTS) -> list[Row]:
    results = {}
    for job in jobs_of(args):
        if job.target_name == target:
            spot = (0.5, 10.0) if job.run_name == "plain" else spots[label_of(job)][args.seeds.index(job.seed)]
            results[job] = measures_of(*spot)
    return make_rows(target, measures_of(0.1, 0.0), results, label_of)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "401", "304"], "--seeds 304: reported results are made with it; choose with others"),
        (["--prompt_seed", "91117"], "--prompt_seed 91117: reported results are made with it; choose with another"),
        (["--prompt_seed", "90301"], "--prompt_seed 90301: reported results are made with it"),
        (["--candidates", "wide"], '--candidates "wide": give a name of letters, digits, _ or -, then = and flags'),
        (["--candidates", "../x=--rank 8"], '--candidates "../x=--rank 8": give a name'),
        (["--candidates", "a=", "a=--rank 8"], "--candidates a: the name is given twice"),
        (["--candidates", "a=--sfcm_gama 1"], "--sfcm_gama"),
        (["--candidates", "a=--sfcm_gamma -1"], "--sfcm_gamma"),
        (["--candidates", "a=--seed 101"], "--candidates a: --seed is not to be set there"),
        (["--candidates", "a=--stage1_steps 9"], "--candidates a: --stage1_steps is not to be set there"),
        (["--train_args=--seed 101"], "--train_args: --seed is not to be set there, it is the same"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_chosen_on_is_refused_in_a_line(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, *words)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last and message in last


def test_the_defaults_are_seeds_and_prompts_that_no_result_uses(tmp_path):
    args = parse(tmp_path, candidates=CANDIDATES[:2])
    assert (args.seeds, args.prompt_seed, args.num_prompts, args.num_inference_steps) == ([401, 402], 95551, 48, 8)
    assert args.candidates == {"default": "", "wide": "--sfcm_gamma 1"} and args.least_response == 1


def test_candidates_share_one_stage_1_a_seed_and_are_kept(tmp_path, started):
    args = parse(tmp_path, "--seeds", "7", "8", "--stage2_steps", "5")
    train(args)
    runs = [f"candidate_{name}" for name in SPOTS]
    assert set(started) == {f"red_hat/{run}-seed{seed}" for run in ("plain", "stage1", *runs) for seed in (7, 8)}
    command = shlex.join(started["red_hat/candidate_wide-seed8"])
    assert f"--stage1_lora_path {tmp_path}/runs/red_hat/stage1-seed8 --stage2_steps 5" in command
    assert "--seed 8 " in command and "--stage2_objective composed --save_alignment --sfcm_gamma 1 " in command
    programs = [started[f"red_hat/{run}-seed7"][1] for run in runs]
    assert [program.endswith("sfcm_modes.py") for program in programs] == [False, False, True]
    started.clear()
    train(args)
    assert not started


def test_the_rule_chooses_the_cleanest_of_those_that_respond(tmp_path):
    args = parse(tmp_path)
    shares = shares_of(rows_of(args, "red_hat"))
    assert shares["hard"]["response"].by_seed == {401: pytest.approx(1.4), 402: pytest.approx(0.8)}
    assert shares["hard"]["response"].worst == pytest.approx(0.8) and shares["wide"]["excess"].whole.value == 0.2
    # a mean of 1.1 with a seed at .8 does not count
    assert choose.choose(shares, 1.0) == ("wide", ["default", "wide"])
    assert choose.choose(shares, 1.1) == ("default", ["default"])
    # nothing responds enough: what responds most
    assert choose.choose(shares, 1.3) == ("default", [])


def test_what_is_written_says_what_was_chosen_and_on_what(tmp_path):
    args = parse(tmp_path, "--targets", "red_hat", "blonde_hair")
    # the mean over both targets decides
    other = SPOTS | {"wide": ((0.4, 1.0), (0.4, 1.0))}
    by_target = {"red_hat": rows_of(args, "red_hat"), "blonde_hair": rows_of(args, "blonde_hair", other)}
    write_choice(args, by_target)
    text = (tmp_path / "choice.md").read_text(encoding="utf-8")
    assert "Chosen: **default**, no further flags.\nIt has the least mean excess pollution of those" in text
    assert "training seed(s) 401, 402, 8 DDIM steps" in text and "(seed 95551)" in text and "section Mean over" in text
    assert text.count("| wide | `--sfcm_gamma 1` |") == 3 and "| default (chosen) |  | 1.20 [" in text
    hard = next(line for line in text.splitlines() if line.startswith("| hard"))
    assert "1.10 [" in hard and "worst 0.80 | 0.10 [0.10, 0.10], worst 0.10 | 0.18" in hard
    document = json.loads((tmp_path / "choice.json").read_text(encoding="utf-8"))
    assert document["chosen"] == "default" == document["enough"][0] and document["settings"]["prompt_seed"] == 95551
    assert document["settings"]["candidates"]["wide"] == "--sfcm_gamma 1"
    assert document["of_plain"]["blonde_hair"]["wide"]["response"]["by_seed"] == {"401": 0.8, "402": 0.8}
    assert document["of_plain"]["red_hat"]["hard"]["response"]["worst"] == 0.8
    assert document["measures"]["red_hat"]["plain LoRA"]["excess"]["mean"] == 10

    args.least_response = 1.5
    write_choice(args, by_target)
    text = (tmp_path / "choice.md").read_text(encoding="utf-8")
    assert "**No candidate has at least 1.5 of plain LoRA's response on average, and 0.9 with each seed**" in text


def test_a_plain_lora_that_does_nothing_has_no_shares(tmp_path):
    rows = with_mean({"red_hat": rows_of(parse(tmp_path, candidates=CANDIDATES[:2]), "red_hat")})["red_hat"]
    rows[1].measures["response"] *= 0
    with pytest.raises(ValueError, match=r"plain LoRA's response is 0.00: nothing to have a share of"):
        shares_of(rows)


@pytest.mark.slow
def test_a_short_run_trains_draws_and_chooses(tmp_path, trained, monkeypatch):
    """With random LoRAs; what they respond to is made up, since noise shows no hat."""
    judge = judging.judge_images

    def responding(*args):
        return judge(*args) | {"response": np.ones(3)}

    monkeypatch.setattr(judging, "judge_images", responding)
    few = ["--num_prompts", "3", "--num_inference_steps", "2", "--workers", "1", "--seeds", "7"]
    main(parse(tmp_path, *few, candidates=CANDIDATES[:2]))
    document = json.loads((tmp_path / "choice.json").read_text(encoding="utf-8"))
    assert len(trained) == 4 and set(document["of_plain"]["red_hat"]) == {"default", "wide"}
    assert document["of_plain"]["red_hat"]["wide"]["response"]["by_seed"] == {"7": 1}
