"""Tests of caches, of the model card, and of what a run finds in its folder."""

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from test_train import ROWS, SMOOTH, WEIGHTS, difference, prepared, train, watch, write_data

from training import prompt_table
from training.models import Models


UNCACHED = {
    "pictures": ({"no-cache_latents": True}, {}),
    "prompts": ({"no-cache_text_embeddings": True}, {}),
    "all, mirrored": (
        {"no-cache_latents": True, "no-cache_text_embeddings": True, "random_flip": True},
        {"random_flip": True},
    ),
}


@pytest.mark.parametrize(
    "objective, flags, cached",
    [
        pytest.param(
            objective,
            *UNCACHED[name],
            id=f"{objective}, {name}",
            marks=() if (objective, name) == ("both", "all, mirrored") else pytest.mark.slow,
        )
        for objective in ("composed", "both")
        for name in UNCACHED
    ],
)
def test_cached_and_uncached_train_the_same(world, tmp_path, trained, objective, flags, cached):
    shared = {"stage2_objective": objective, **SMOOTH}
    output = train(world, tmp_path / "output", **shared, **flags)
    assert difference(output, trained(**shared, **cached)) < 1e-4


def test_a_cache_on_disk_serves_the_next_run(world, tmp_path, monkeypatch):
    flags = {"random_flip": True, "stage2_objective": "paper"}
    encoded, latents, calls = [], [], watch(monkeypatch, Models, "to_latents")
    for name in ("none", "first", "second", "third"):
        if name == "first":
            flags["cache_dir"] = tmp_path / "cache"
        if name == "third":  # a picture changes under its name, and it alone is encoded again
            data = write_data(tmp_path / "data")
            Image.new("RGB", (20, 20), "red").save(data / "4.png")
            flags["train_data_dir"] = data
        latents.append(torch.stack(prepared(world, **flags).parts.training.latents))
        encoded.append(len(calls))
        calls.clear()
    assert encoded == [12, 12, 0, 2]
    assert torch.equal(latents[0], latents[1]) and torch.equal(latents[1], latents[2])
    changed = (latents[2] != latents[3]).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [4, 6 + 4]


def test_prompts_on_disk_are_not_encoded_again(world, tmp_path, monkeypatch):
    first = prepared(world, cache_dir=tmp_path / "cache").parts.table
    calls, look_up = [], prompt_table.TensorCache.get_or_compute

    def note(cache, keys, compute):
        return look_up(cache, keys, lambda missing: calls.append(missing) or compute(missing))

    monkeypatch.setattr(prompt_table.TensorCache, "get_or_compute", note)
    second = prepared(world, cache_dir=tmp_path / "cache").parts.table
    assert calls == []
    assert torch.equal(first.prompt_embeds.states, second.prompt_embeds.states)


def test_the_model_card_tells_targets_and_settings(world, trained):
    card = (trained() / "README.md").read_text(encoding="utf-8")
    assert "`red hair`" in card and "`--rank` | `2`" in card and ROWS[0]["base_prompt"] in card
    assert str(world.folder) not in card


def test_a_readme_of_ones_own_is_not_overwritten(world, tmp_path, capsys):
    output = train(world, tmp_path / "output", stage1_steps=1, stage2_steps=0)
    (output / WEIGHTS).unlink()
    train(world, output, stage1_steps=1, stage2_steps=0)
    (output / "README.md").write_text("# SPF-Portrait, my notes", encoding="utf-8")
    with pytest.raises(SystemExit):
        train(world, output, stage1_steps=1, stage2_steps=0)
    assert f"--output_dir {output} holds a README.md" in capsys.readouterr().err
    assert (output / "README.md").read_text(encoding="utf-8") == "# SPF-Portrait, my notes"


def test_a_resume_without_a_checkpoint_says_that_it_starts_anew(world, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        train(world, tmp_path / "output", stage1_steps=1, stage2_steps=0, resume_from_checkpoint="latest")
    assert f"no whole checkpoint in {tmp_path / 'output'}" in caplog.text


def test_a_run_does_not_go_on_in_another_precision(world, tmp_path):
    """Also where accelerate's own configuration sets it."""
    flags = {"stage1_steps": 1, "stage2_steps": 0, "checkpointing_steps": 1}
    output = train(world, tmp_path / "output", **flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match="mixed_precision no, and now it is bf16"):
        train(world, output, **flags, mixed_precision="bf16", resume_from_checkpoint="latest")
