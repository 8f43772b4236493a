"""Tests of the continual benchmark: its prompts, its measures on renders, and a short run of all of it."""

import json
import shlex

import numpy as np
import pytest

from benchmarks.continual import KEPT, STEPS, judge_steps, lora_folders, main, parse_args, step_prompts, train
from benchmarks.parts import drawing
from benchmarks.parts.tables import summarise
from loras import LORA_WEIGHTS
from toy_portraits.world import TARGETS, render, sample_factors


def drawn(full: list[np.ndarray], base: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [{"full": own, "base": alone} for own, alone in zip(full, base, strict=True)]


def test_prompts_gain_one_target_a_step():
    base, hair, hat, shirt = step_prompts(20, 3)
    assert all(text == f"{start}, blonde hair" for start, text in zip(base, hair))
    assert all(text == f"{start}, a red hat" for start, text in zip(hair, hat))
    for before, after in zip(hat, shirt):
        words = before.split(", ")
        (jacket,) = [i for i, text in enumerate(words) if text.endswith("jacket")]
        words[jacket] = "a striped shirt"
        assert after == ", ".join(words)
    assert not any("hair" in text or "hat" in text or "shirt" in text for text in base)
    assert step_prompts(5, 3)[0] != step_prompts(5, 4)[0]


def steps_of(factors: dict[str, np.ndarray], steps: int = 3) -> list[np.ndarray]:
    """Renders that gain one target after another, and change nothing else."""
    images = []
    for name in STEPS[:steps]:
        target = TARGETS[name]
        factors = {**factors, target.factor: np.full_like(factors[target.factor], target.value)}
        images.append(render(factors)[0])
    return images


def test_renders_that_change_nothing_else_are_judged_as_such(judge):
    factors = sample_factors(24, np.random.default_rng(0))
    original, images = render(factors)[0], steps_of(factors)
    found = judge_steps(judge, original, drawn(images, [original] * 3))
    assert [sum(name.startswith("response_") for name in one) for one in found] == [2, 3, 4]
    for one in found:
        assert one["response_all"].mean() > 0.7 and one["change_outside"].mean() < 0.5
        assert one["step_change"].mean() < 0.5 and one["base_change"].max() == 0 and one["kept"].mean() > 0.95
    assert (found[2]["response_all"] <= found[2]["response_red_hat"]).all()
    # a man's hair is under the hat, a woman's falls from it
    assert np.isnan(found[1]["response_blonde_hair"][factors["sex"] == 1]).any()
    assert not np.isnan(found[1]["response_blonde_hair"][factors["sex"] == 0]).any()
    assert not np.isnan(found[0]["response_blonde_hair"]).any() and not np.isnan(found[1]["response_all"]).any()
    summary = summarise({name: np.stack([values, values]) for name, values in found[1].items()})
    assert summary["response_blonde_hair"]["mean"] == pytest.approx(np.nanmean(found[1]["response_blonde_hair"]))
    assert set(KEPT) == {"sex", "skin", "background", "glasses", "eye_color"}


def test_what_a_step_takes_with_it_is_seen_in_that_step(judge):
    factors = sample_factors(24, np.random.default_rng(0))
    original, images = render(factors)[0], steps_of(factors)
    moved = {**factors, "background": (factors["background"] + 1) % 6}
    images[1] = steps_of(moved, 2)[1]
    images[2] = steps_of(moved)[2]
    found = judge_steps(judge, original, drawn(images, [original, images[1], images[2]]))
    first, second, third = (one["step_change"].mean() for one in found)
    assert second > 10 and first < 0.5 and third < 0.5
    assert found[1]["change_outside"].mean() > 10 and found[2]["change_outside"].mean() > 10
    assert found[1]["base_change"].mean() > 10 and found[1]["kept"].mean() < found[0]["kept"].mean() - 0.15


def test_each_way_trains_what_it_needs_on_what_it_has(tmp_path, started):
    args = parse_args(["--output_dir", str(tmp_path), "--stage1_steps", "7", "--train_args=--rank 8", "--seeds", "5"])
    train(args)
    commands = {name: shlex.join(command) for name, command in started.items()}
    of_each = {name: [f"{name}/{run}-seed5" for run in ("plain", "stage1", "composed")] for name in STEPS}
    later = ["red_hat/continual-seed5", "striped_shirt/continual-seed5"]
    assert set(commands) == {*sum(of_each.values(), []), *later}
    hair, hat, shirt = lora_folders(args, "continual", 5)
    asked = "--reference_target_prompt 'blonde hair'"
    assert f"--reference_lora {hair} {asked} --rank 8" in commands[later[0]]
    both = f"{asked} --reference_target_prompt 'a red hat'"
    assert f"--reference_lora {hair} {hat} {both} --rank 8" in commands[later[1]]
    assert "--stage1_steps 7" in commands[later[1]] and "/striped_shirt " in commands[later[1]]
    assert "--reference_lora" not in commands["red_hat/composed-seed5"]
    assert hair == lora_folders(args, "spf", 5)[0]

    started.clear()
    train(args)
    assert not started
    (hat / LORA_WEIGHTS).write_bytes(b"another hat")
    with pytest.raises(ValueError, match="striped_shirt/continual-seed5 was trained with other flags or from another"):
        train(args)


@pytest.mark.slow
def test_a_short_run_draws_judges_and_goes_on(tmp_path, trained, monkeypatch):
    """With LoRAs that a training of another test's kind would have left."""
    few = ["--output_dir", str(tmp_path), "--num_prompts", "3", "--num_inference_steps", "2", "--workers", "1"]
    main(parse_args(few))
    assert len(trained) == 11
    folder = tmp_path / "continual"
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = {(row["way"], row["step"]): row["measures"] for row in document["rows"]}
    assert set(rows) == {(way, step) for way in ("original", "plain", "spf", "continual") for step in (1, 2, 3)}
    assert rows["original", 3]["base_change"]["mean"] == 0 < rows["plain", 3]["base_change"]["mean"]
    assert rows["plain", 1] != rows["spf", 1] == rows["continual", 1]
    assert "response_striped_shirt" in rows["spf", 3] and "response_striped_shirt" not in rows["spf", 2]
    assert "| + a red hat | SPF LoRAs, stacked |" in (folder / "table.md").read_text(encoding="utf-8")
    assert (folder / "continual.png").is_file()

    monkeypatch.setattr(drawing, "draw", lambda *a: pytest.fail("drawn again"))
    trained.clear()
    main(parse_args(few))
    assert not trained
