"""Tests of phrases of the base prompt that may change along with the target: the maps, the prompts, whole runs."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from test_train import ROWS, difference, files, train, watch, watch_runs, write_data

import train_spf_portrait_lora as script
from pipeline_spf_portrait import SPFPortraitPipeline
from prompts import make_prompt_pair, tokenize_prompt_pair
from sfcm import SFCM_MODES, phrase_attention_maps
from training.alignment_prompts import thin_out
from training.arguments import parse_args
from training.flags import AlignmentFlags
from training.inputs import validation_pair
from training.maps import MapMaker
from training.prompt_table import FULL


HATS = [{**row, "free_phrases": [row["base_prompt"].split(", ")[1]]} for row in ROWS]


@pytest.fixture(scope="module")
def prepared(world, tmp_path_factory):
    """The parts of a run in which every woman's hat is free, and its alignment portraits."""
    folder = tmp_path_factory.mktemp("free")
    rows = [free if "woman" in row["base_prompt"] else row for row, free in zip(ROWS, HATS, strict=True)]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs, alignments = watch_runs(monkeypatch), watch(monkeypatch, script, "prepare_alignment")
        flags = {"train_data_dir": write_data(folder / "data", rows), "alignment_phrase_dropout": 0}
        train(world, folder / "output", **flags, stage1_steps=1, stage2_steps=1)
    return runs[0], alignments[0]


# ------------------------------------------------------------------------------------------------------------ the maps


@pytest.mark.parametrize("mode", SFCM_MODES)
def test_a_map_is_open_where_a_free_phrase_is_and_elsewhere_without_its_protection(prepared, mode):
    parts, _ = prepared
    table, rows = parts.table, torch.tensor([0, 1, 2, 5])
    assert table.free_mask[:6].tolist() == [[False, True], [False, False]] * 3
    generator = torch.Generator().manual_seed(1)
    difference_map = torch.rand(4, 1, 8, 8, generator=generator)
    probs, resolutions = [torch.rand(4, 16, 77, generator=generator).softmax(-1)], [(4, 4)]
    maps = phrase_attention_maps(probs, resolutions, table.phrase_weights[rows], (8, 8))
    maker = MapMaker(parts.models, table, AlignmentFlags(sfcm_mode=mode), seed=0)
    found = maker._make(rows, difference_map, probs, resolutions)
    assert found.shape == (4, 1, 8, 8) and 0 <= found.min() and found.max() <= 1

    protected = table.phrase_mask[rows].clone()
    protected[[0, 2], 1] = False
    unraised = SFCM_MODES[mode].compute(difference_map, maps, table.distances[rows], protected)
    assert torch.equal(found[[1, 3]], unraised[[1, 3]])  # the men's, in which nothing is free
    free_map = maps[[0, 2], 1:]
    assert (found[[0, 2]] >= free_map).all() and free_map.max() > 0.9
    raised = free_map > unraised[[0, 2]]
    assert raised.any() and torch.equal(found[[0, 2]][raised], free_map[raised])
    assert torch.equal(found[[0, 2]][~raised], unraised[[0, 2]][~raised])


def test_the_attention_of_a_real_run_opens_its_maps(prepared):
    """The bank of the portraits, made anew with and without the free phrases."""
    parts, alignment = prepared
    closed = replace(parts.table, free_mask=torch.zeros_like(parts.table.free_mask))
    flags = AlignmentFlags(sfcm_noise_samples=2)
    free, protected = (
        MapMaker(parts.models, table, flags, seed=0).fill_bank(alignment, 4, shown=False)
        for table in (parts.table, closed)
    )
    own = [bool(parts.table.free_mask[pair].any()) for pair in alignment.pair_index.tolist()]
    assert any(own) and not all(own)
    for is_free, opened, closed in zip(own, free, protected, strict=True):
        assert torch.equal(opened, closed) != is_free
        assert not is_free or opened.mean() > closed.mean() + 0.05


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(
    "flags",
    [
        {"stage2_objective": "composed"},
        pytest.param({"stage2_objective": "paper", "sfcm_mode": "none"}, marks=pytest.mark.slow),
        pytest.param({"stage2_objective": "both", "sfcm_mode": "paper"}, marks=pytest.mark.slow),
    ],
    ids=lambda flags: " ".join(flags.values()),
)
def test_a_run_with_free_phrases(world, trained, tmp_path, monkeypatch, flags):
    flags = {**flags, "alignment_phrase_dropout": 0}
    without, opened, of_batch = trained(**flags), [], MapMaker.of_batch
    AcceleratorState._reset_state(reset_partial_state=True)

    def watched(maker, batch, *args):
        sfcm = of_batch(maker, batch, *args)
        opened.append((sfcm.flatten(1).amax(1) > 0.9).tolist())
        assert opened[-1] == (batch.kinds == FULL).tolist()
        return sfcm

    monkeypatch.setattr(MapMaker, "of_batch", watched)
    data = write_data(tmp_path / "data", HATS)
    output = train(world, tmp_path / "output", train_data_dir=data, **flags)
    assert any(sum(opened, []))
    assert difference(output / "stage1", without / "stage1") == 0
    assert difference(output, without) > 1e-4


def test_the_flag_is_for_the_prompts_that_have_the_phrase(world, tmp_path, monkeypatch):
    inputs = watch(monkeypatch, script, "check_inputs")
    rows = [{**ROWS[0], "free_phrases": ["a woman"]}, *ROWS[1:]]
    data = write_data(tmp_path / "data", rows)
    flags = {"train_data_dir": data, "free_phrases": ("A Red Hat", "a white hat"), "dry_run": True}
    train(world, tmp_path / "output", **flags)
    assert [pair.free_phrases for pair in inputs[0].pairs[:6]] == [
        ("a woman",), ("a red hat",), (), (), ("a white hat",), (),
    ]  # fmt: skip


def test_a_dry_run_says_which_phrases_are_free(world, tmp_path, capsys):
    data = write_data(tmp_path / "data", HATS[:1])
    train(world, tmp_path / "output", train_data_dir=data, dry_run=True)
    printed = capsys.readouterr().out
    assert "  free phrase  a green hat  (tokens " in printed and "  phrase       a woman  (tokens " in printed


@pytest.mark.slow
def test_the_pictures_open_the_map_for_them(world, tmp_path, monkeypatch):
    outputs, call = [], SPFPortraitPipeline.__call__

    def draw_twice(self, *args, **kwargs):
        state = kwargs["generator"].get_state()
        outputs.append(drawn := call(self, *args, **kwargs))
        if kwargs.pop("free_phrases", None):
            outputs.append(call(self, *args, **{**kwargs, "generator": torch.Generator().set_state(state)}))
        return drawn

    monkeypatch.setattr(SPFPortraitPipeline, "__call__", draw_twice)
    data = write_data(tmp_path / "data", HATS)
    flags = {"num_validation_images": 1, "stage1_steps": 1, "stage2_steps": 0}
    train(world, tmp_path / "output", train_data_dir=data, **flags)
    _, opened, closed = outputs[:3]
    assert opened.phrases == closed.phrases == [("a woman", "a green hat")]
    assert (opened.sfcm >= opened.phrase_maps[:, 1:]).all() and not (closed.sfcm >= closed.phrase_maps[:, 1:]).all()


def test_other_prompts_of_the_pictures_have_the_free_phrases_they_name(world):
    first = make_prompt_pair(ROWS[0]["base_prompt"], "red hair", free_phrases=["a green hat"])
    locate = partial(tokenize_prompt_pair, tokenizer=world.tokenizer)
    flags = ["--pretrained_model_name_or_path=x", "--train_data_dir=x", "--free_phrases", "a red hat"]
    given = {"a man, a red hat": ("a red hat",), "a man, a green hat": ("a green hat",), "a man": ()}
    for base_prompt, free in given.items():
        args = parse_args([*flags, f"--validation_base_prompt={base_prompt}"])
        assert validation_pair(args, first, locate).free_phrases == free


@pytest.mark.parametrize("free", [[], pytest.param(["a woman"], marks=pytest.mark.slow)])
def test_a_run_does_not_go_on_with_other_free_phrases(world, tmp_path, free):
    data = write_data(tmp_path / "data", HATS)
    flags = {"checkpointing_steps": 1, "stage1_steps": 1, "stage2_steps": 0}
    train(world, tmp_path / "output", train_data_dir=data, **flags)
    before = files(tmp_path / "output")
    AcceleratorState._reset_state(reset_partial_state=True)
    data = write_data(tmp_path / "other", [{**HATS[0], "free_phrases": free}, *HATS[1:]])
    with pytest.raises(SystemExit, match="checkpoint-1: was trained on other prompts or pictures"):
        train(world, tmp_path / "output", train_data_dir=data, **flags, resume_from_checkpoint="latest")
    assert files(tmp_path / "output") == before


# -------------------------------------------------------------------------------------------- drawn portraits' prompts


def test_a_thinned_out_prompt_keeps_those_that_are_left_and_one_that_is_protected():
    pair = make_prompt_pair("a woman, a hat, a red scarf, a tie", "red hair", free_phrases=["a hat", "a tie"])
    random = np.random.default_rng(0)
    pairs = [thin_out(pair, 0.7, random) for _ in range(200)]
    for thin in pairs:
        assert thin.base_phrases == tuple(thin.base_prompt.split(", "))
        assert thin.free_phrases == tuple(phrase for phrase in thin.base_phrases if phrase in ("a hat", "a tie"))
        assert set(thin.base_phrases) & {"a woman", "a red scarf"}
    assert len({thin.free_phrases for thin in pairs}) == 4


def test_a_free_part_of_another_phrase_is_not_written_twice():
    pair = make_prompt_pair("a woman, a hat, a red scarf", "red hair", free_phrases=["scarf"])
    random = np.random.default_rng(0)
    prompts = {thin_out(pair, 0.5, random).base_prompt for _ in range(200)}
    assert "a woman, a red scarf" in prompts and "a woman, scarf" in prompts
    assert all(prompt.count("scarf") <= 1 for prompt in prompts)


def test_without_free_phrases_the_choice_is_what_it_was():
    pair = make_prompt_pair("a woman, a hat, a red scarf", "red hair")
    free = make_prompt_pair("a woman, a hat, a red scarf", "red hair", free_phrases=["a hat"])
    kept = [thin_out(own, 0.4, np.random.default_rng(5)).base_prompt for own in (pair, free)]
    assert kept[0] == kept[1]
