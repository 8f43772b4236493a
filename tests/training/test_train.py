"""Tests of `train_spf_portrait_lora.py`: the script itself, on a tiny random base model and six pictures.

Most runs are `main([...])` in this process; what only a process of its own shows is launched as users launch it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pipeline import make_components
from test_prompts import write_vocabulary
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

import train_spf_portrait_lora as script
from prompts import make_prompt_pair
from training import arguments as script_arguments
from training import inputs as inputs_module
from training.data import derive_seed
from training.prompt_table import BASE, EMPTY, FULL


ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "pytorch_lora_weights.safetensors"
CARD = "README.md"
LAYERS = 7  # of cross-attention, and as many of self-attention
OBJECTIVES = ("composed", "paper", "both")
# Adam divides a gradient of rounding errors by its own size; a larger epsilon keeps such errors small.
SMOOTH = {"adam_epsilon": 1e-4}
DUAL_PATHS = ("two_pass", "single_pass")
PAPER_LOSSES = {"diffusion", "text_consistent", "fine_grained", "base_prompt", "enhancement"}
LOSSES = {"composed": {"diffusion", "composed"}, "paper": PAPER_LOSSES, "both": PAPER_LOSSES | {"composed"}}
COLORS = ("green", "red", "gray", "black", "white", "brown")
ROWS = [
    {"file_name": f"{i}.png", "base_prompt": f"a {person}, a {color} hat", "target_prompt": "red hair"}
    for i, (person, color) in enumerate(zip(("woman", "man") * 3, COLORS, strict=True))
]


# ---------------------------------------------------------------------------------------------- a tiny world and runs


def write_data(folder: Path, rows: list[dict] = ROWS) -> Path:
    """Six pictures of noise in different sizes, and the metadata."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(6):
        pixels = random.integers(0, 256, (16 + 2 * i, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """Folders of a base model, a CLIP model and data, all tiny. No test may change them."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), model_max_length=77)
    components = make_components(tokenizer)
    StableDiffusionPipeline(**components).save_pretrained(folder / "model")
    text = CLIPTextConfig(**components["text_encoder"].config.to_diff_dict())
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**size).save_pretrained(folder / "clip")
    write_data(folder / "data")
    return SimpleNamespace(
        folder=folder, model=folder / "model", clip=folder / "clip", data=folder / "data", tokenizer=tokenizer
    )


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state in the process; each run of the script starts without it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_flags(world: SimpleNamespace, output_dir: Path, **changes) -> list[str]:
    """Flags of a run of 2 + 2 steps in which every step moves the weights visibly; None removes a flag."""
    values = {
        "pretrained_model_name_or_path": world.model,
        "clip_model_name_or_path": world.clip,
        "train_data_dir": world.data,
        "output_dir": output_dir,
        "resolution": 16,
        "rank": 2,
        "lora_alpha": 4,
        "stage1_steps": 2,
        "stage2_steps": 2,
        "train_batch_size": 2,
        "learning_rate": 0.01,
        "num_alignment_images": 3,
        "alignment_inference_steps": 2,
        "sfcm_noise_samples": 2,
        "num_validation_images": 0,
        "validation_inference_steps": 2,
        "report_to": "none",
        **changes,
    }
    flags = []
    for name, value in values.items():
        if value is True:
            flags.append(f"--{name}")
        elif isinstance(value, tuple):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")  # with "=" a negative number is a value and not a flag
    return flags


def train(world: SimpleNamespace, output_dir: Path, **changes) -> Path:
    script.main(make_flags(world, output_dir, **changes))
    return output_dir


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """Trains once per set of flags, and hands out the folder."""
    folders = {}

    def run(**changes) -> Path:
        key = tuple(sorted(changes.items()))
        if key not in folders:
            AcceleratorState._reset_state(reset_partial_state=True)
            folders[key] = train(world, tmp_path_factory.mktemp("run") / "output", **changes)
        return folders[key]

    return run


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def difference(first: Path | dict, second: Path | dict) -> float:
    """Largest difference of two LoRAs, each a folder, a file or a state."""
    states = []
    for lora in (first, second):
        if isinstance(lora, Path):
            lora = load_file(lora / WEIGHTS if lora.is_dir() else lora)
        states.append(lora)
    assert states[0].keys() == states[1].keys() and states[0]
    return max((states[0][name] - states[1][name]).abs().max().item() for name in states[0])


def adapter_state(unet: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """A copy of an adapter's weights, named as in the file."""
    state = get_peft_model_state_dict(unet, adapter_name=name)
    return {f"unet.{name}": value.clone() for name, value in state.items()}


def watch(monkeypatch, name: str) -> list:
    """Results of every call of a function of the script, still on their way to the caller."""
    results, function = [], getattr(script, name)

    def watched(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(script, name, watched)
    return results


def watch_runs(monkeypatch) -> list:
    return watch(monkeypatch, "prepare_run")


# ----------------------------------------------------------------------------------------------------- both stages


@pytest.mark.parametrize("dual_path", DUAL_PATHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_stages_train_and_write_their_files(world, trained, objective, dual_path):
    output = trained(stage2_objective=objective, dual_path=dual_path, num_validation_images=2, report_to="tensorboard")
    pictures = {f"validation/{name}.png" for name in ("step_000000", "step_000004", "alignment")}
    logs = {path for path in files(output) if path.startswith("logs/")}
    assert files(output) - logs == {WEIGHTS, CARD, f"stage1/{WEIGHTS}", *pictures}
    assert not [path for path in output.rglob("*") if path.is_dir() and path.name.startswith(".")]
    for picture in pictures:
        with Image.open(output / picture) as image:
            assert image.size == ((2 if "alignment" in picture else 4) * (192 + 6) + 6, 2 * (192 + 6) + 6 + 22)

    events = [path.parent for path in output.rglob("events.out.tfevents*")]
    scalars = {}
    for folder in set(events):
        accumulator = EventAccumulator(str(folder)).Reload()
        scalars |= {
            tag: {event.step: event.value for event in accumulator.Scalars(tag)}
            for tag in accumulator.Tags()["scalars"]
        }
    scalars = {tag: values for tag, values in scalars.items() if tag.startswith("loss/")}
    assert set(scalars) == {f"loss/{name}" for name in LOSSES[objective]}
    assert set(scalars["loss/diffusion"]) == ({1, 2} if objective == "composed" else {1, 2, 3, 4})
    for tag in set(scalars) - {"loss/diffusion"}:
        assert set(scalars[tag]) == {3, 4}
    assert all(np.isfinite(value) for values in scalars.values() for value in values.values())

    assert difference(output / "stage1", output) > 0.005


@pytest.mark.parametrize("part", ["", "stage1"])
def test_the_stock_pipeline_loads_the_lora_with_its_alpha(world, trained, part):
    pipeline = StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a man, red hair", num_inference_steps=2, generator=generator, output_type="np").images

    before = draw()
    pipeline.load_lora_weights(trained() / part)
    layers = [module for module in pipeline.unet.modules() if isinstance(module, BaseTunerLayer)]
    config = pipeline.unet.peft_config[pipeline.get_active_adapters()[0]]
    assert (config.r, config.lora_alpha) == (2, 4)
    assert len(layers) == LAYERS * 4 and {scale for layer in layers for scale in layer.scaling.values()} == {2.0}
    assert np.abs(draw() - before).max() > 1e-4


def test_the_lora_file_holds_the_trained_weights_in_float32(world, tmp_path, monkeypatch):
    runs = watch_runs(monkeypatch)
    saved = load_file(train(world, tmp_path / "output") / WEIGHTS)
    assert len(saved) == LAYERS * 4 * 2
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert difference(saved, adapter_state(runs[0].unet, "default")) == 0
    assert all(".attn2." in name and name.startswith("unet.") for name in saved)


def test_only_the_adapter_in_training_moves(world, tmp_path, monkeypatch):
    runs, before = [], {}
    prepare = script.prepare_run

    def prepare_and_copy(*args):
        runs.append(prepare(*args))
        before.update({name: value.clone() for name, value in runs[0].unet.state_dict().items()})
        return runs[0]

    monkeypatch.setattr(script, "prepare_run", prepare_and_copy)
    output = train(world, tmp_path / "output", stage2_objective="both", num_validation_images=1, validation_steps=1)
    unet = runs[0].unet
    after = unet.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == {name for name in before if ".default." in name}
    assert difference(adapter_state(unet, script.STAGE1_ADAPTER), load_file(output / "stage1" / WEIGHTS)) == 0
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == (".lora_" in name and ".default." in name), name
    for model in (runs[0].pipeline.vae, runs[0].pipeline.text_encoder, runs[0].clip):
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_the_end_says_what_lies_where_and_how_to_draw(world, tmp_path, caplog):
    with caplog.at_level("INFO"):
        output = train(world, tmp_path / "output", stage1_steps=1, stage2_steps=0, num_validation_images=1)
    lines = [message.removeprefix("[RANK 0] ") for message in caplog.messages[-4:]]
    assert lines[0] == f"The LoRA: {output / WEIGHTS}" and (output / WEIGHTS).is_file()
    assert lines[1] == f"Pictures: {output}/validation/step_000001.png, the last one of them"
    assert lines[2] == f"Model card: {output / CARD}"
    code = lines[3].removeprefix("Draw: ").replace("compare=True", "compare=True, num_inference_steps=1")
    names = {"DiffusionPipeline": DiffusionPipeline}
    exec(code.replace("; pipe(", "; result = pipe("), names)
    assert len(names["result"].images) == len(names["result"].reference_images) == 1


def test_without_stage_2_it_is_a_plain_lora(trained):
    plain = trained(stage2_steps=0)
    assert files(plain) == {WEIGHTS, CARD}
    assert difference(plain, trained() / "stage1") == 0


def test_without_stage_1_the_papers_objective_starts_from_nothing(world, tmp_path):
    output = train(world, tmp_path / "output", stage1_steps=0, stage2_objective="paper")
    assert files(output) == {WEIGHTS, CARD}


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    "flags, start",
    [
        ({"stage2_objective": "paper"}, "stage 1"),
        ({"stage2_objective": "both"}, "stage 1"),
        ({"stage2_objective": "composed", "composed_init": "stage1"}, "stage 1"),
        ({"stage2_objective": "composed", "composed_init": "zero"}, "zero"),
    ],
    ids=["paper", "both", "composed from stage 1", "composed from zero"],
)
@pytest.mark.slow
def test_an_earlier_lora_takes_stage_1s_place(world, trained, tmp_path, monkeypatch, flags, start, as_file):
    stage1 = trained() / "stage1" / WEIGHTS
    states, step = [], script.train_step
    names = ["default"] if flags["stage2_objective"] == "paper" else ["default", script.STAGE1_ADAPTER]

    def copy_and_step(run, *args):
        states.append({name: adapter_state(run.unet, name) for name in names})
        return step(run, *args)

    monkeypatch.setattr(script, "train_step", copy_and_step)
    runs = watch_runs(monkeypatch)
    path = stage1 if as_file else stage1.parent
    output = train(world, tmp_path / "output", stage1_steps=0, stage1_lora_path=path, rank=16, **flags)
    assert files(output) == {WEIGHTS, CARD}
    earlier = load_file(stage1)
    student, later = states[0]["default"], states[1]["default"]
    if start == "zero":
        assert all(value.abs().max() == 0 for name, value in student.items() if ".lora_B." in name)
        student = {name: earlier[name] if ".lora_B." in name else value for name, value in student.items()}
    assert difference(student, earlier) == 0
    assert difference(later, states[0]["default"]) > 0.001
    for state in states:
        if script.STAGE1_ADAPTER in state:
            assert difference(state[script.STAGE1_ADAPTER], earlier) == 0
    scales = [layer.scaling for layer in runs[0].unet.modules() if isinstance(layer, BaseTunerLayer)]
    assert {scale for scaling in scales for scale in scaling.values()} == {2.0}
    assert difference(output, stage1) > 0.005


@pytest.mark.parametrize(
    "objective", [name if name == "composed" else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
)
def test_equal_seeds_give_equal_weights(world, trained, tmp_path, objective):
    again = train(world, tmp_path / "again", stage2_objective=objective)
    assert difference(again, trained(stage2_objective=objective)) == 0


def test_another_seed_gives_other_weights(trained):
    assert difference(trained(seed=1), trained()) > 0.005


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_pass_and_two_give_the_same_weights(trained, objective):
    flags = {"stage2_objective": objective, "sfcm_mode": "paper", **SMOOTH}
    runs = [trained(dual_path=mode, **flags) for mode in DUAL_PATHS]
    assert difference(*runs) < 1e-4 < difference(runs[0], runs[0] / "stage1") / 10


@pytest.mark.parametrize("dual_path", DUAL_PATHS)
def test_gradient_checkpointing_gives_the_same_weights(world, trained, tmp_path, dual_path):
    flags = {"stage2_objective": "both", "dual_path": dual_path, "sfcm_mode": "paper", **SMOOTH}
    output = train(world, tmp_path / "output", gradient_checkpointing=True, **flags)
    assert difference(output, trained(**flags)) < 1e-4


def test_validation_does_not_change_the_training(world, trained, tmp_path):
    flags = {"stage2_objective": "both"}
    output = train(world, tmp_path / "output", num_validation_images=1, validation_steps=1, **flags)
    pictures = {f"validation/step_{step:06d}.png" for step in range(5)} | {"validation/alignment.png"}
    assert files(output) == {WEIGHTS, CARD, f"stage1/{WEIGHTS}", *pictures}
    assert difference(output, trained(**flags)) == 0


def test_no_picture_of_the_maps_where_each_step_makes_its_own(world, tmp_path):
    output = train(world, tmp_path / "output", num_validation_images=1, sfcm_mode="paper", stage1_steps=1)
    assert "validation/alignment.png" not in files(output)


def test_validation_shows_the_original_model_and_the_adapted_one(world, tmp_path):
    output = train(world, tmp_path / "output", num_validation_images=1, learning_rate=1.0, stage2_steps=0)
    columns = {}
    for step in (0, 2):
        with Image.open(output / f"validation/step_{step:06d}.png") as image:
            columns[step] = [np.asarray(image.crop((6 + 198 * i, 22, 198 + 198 * i, 214))) for i in range(4)]
    assert np.array_equal(columns[0][0], columns[2][0]), "the original model changed"
    assert np.array_equal(columns[0][0], columns[0][1]), "a fresh LoRA is not the original model"
    assert not np.array_equal(columns[2][0], columns[2][1])
    assert not np.array_equal(columns[2][1], columns[2][2]), "the target is not in the full prompt's picture"


def test_validation_takes_prompts_of_its_own(world, tmp_path, monkeypatch):
    inputs = watch(monkeypatch, "check_inputs")
    flags = {"validation_base_prompt": "a man, a scarf", "validation_target_prompt": "a red hat"}
    train(world, tmp_path / "output", num_validation_images=1, stage2_steps=0, **flags)
    assert inputs[0].validation_pair.full_prompt == "a man, a scarf, a red hat"


# ---------------------------------------------------------------------------------------------------- method options


@pytest.mark.parametrize("source, counts", [("generated", (3, 0)), ("data", (0, 6)), ("both", (3, 6))])
def test_alignment_sources(world, tmp_path, monkeypatch, source, counts):
    runs, alignments = watch_runs(monkeypatch), watch(monkeypatch, "prepare_alignment")
    train(world, tmp_path / "output", alignment_source=source, stage2_objective="both")
    training, (alignment,) = runs[0].training, alignments
    drawn, taken = counts
    assert len(alignment.latents) == len(alignment.pair_index) == len(alignment.sfcm) == drawn + taken
    latents, sfcm = torch.stack(alignment.latents), torch.stack(alignment.sfcm)
    assert all(torch.equal(own, same) for own, same in zip(latents[drawn:], training.latents[:taken], strict=True))
    assert alignment.pair_index[drawn:].tolist() == list(range(taken))
    assert len(set(alignment.pair_index[:drawn].tolist())) == drawn
    assert latents.std(dim=(1, 2, 3)).min() > 0.01
    assert sfcm.min() >= 0 and sfcm.max() <= 1 and sfcm.std() > 0.1


def test_alignment_portraits_are_the_original_models_own(world, trained, tmp_path, monkeypatch):
    """Drawn after stage 1, and yet without its LoRA; the batch size is no matter."""
    alignments = watch(monkeypatch, "prepare_alignment")
    runs = watch_runs(monkeypatch)
    train(world, tmp_path / "output", learning_rate=1.0, train_batch_size=1)
    pipeline = StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for i, pair_index in enumerate(alignments[0].pair_index.tolist()):
        expected = pipeline(
            runs[0].inputs.pairs[pair_index].base_prompt,
            height=16,
            width=16,
            num_inference_steps=2,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(derive_seed(0, f"alignment portrait {i}")),
            output_type="latent",
        ).images[0]
        torch.testing.assert_close(alignments[0].latents[i], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_the_alignment_portraits(world, tmp_path, monkeypatch, processes):
    """Any number of them: three portraits are two shares of two, or three of one and two idle ones."""
    runs = watch_runs(monkeypatch)
    alignments = watch(monkeypatch, "prepare_alignment")
    train(world, tmp_path / "output", stage1_steps=1, stage2_steps=1)
    shares = []
    for index in range(processes):
        accelerator = SimpleNamespace(
            num_processes=processes,
            process_index=index,
            is_local_main_process=False,
            device=torch.device("cpu"),
            gather=lambda latents: shares.append(latents) or latents,
        )
        script.draw_alignment_portraits(replace(runs[0], accelerator=accelerator))
    assert len({share.shape for share in shares}) == 1
    torch.testing.assert_close(torch.cat(shares)[:3], torch.stack(alignments[0].latents), rtol=1e-4, atol=1e-4)


def test_more_alignment_portraits_than_prompts(world, tmp_path, monkeypatch):
    alignments = watch(monkeypatch, "prepare_alignment")
    inputs = watch(monkeypatch, "check_inputs")
    train(world, tmp_path / "output", num_alignment_images=8, max_train_samples=3, alignment_phrase_dropout=0)
    pairs = inputs[0].pairs
    assert alignments[0].pair_index.tolist() == list(range(3, 11))
    counts = Counter(pair.base_prompt for pair in pairs[3:])
    assert sorted(counts.values()) == [2, 3, 3] and set(pairs[3:]) == set(pairs[:3])
    distances = torch.pdist(torch.stack(alignments[0].latents).flatten(1))
    assert distances.min() > 0.1, "two portraits are the same"


PAIR = make_prompt_pair("a woman, a green hat, a red scarf, a tie", [("a green hat", "a crown"), "red hair"])


def test_drawn_portraits_leave_out_phrases_by_chance():
    random = np.random.default_rng(0)
    assert inputs_module.thin_out(PAIR, 0.0, random) == PAIR
    pairs = [inputs_module.thin_out(PAIR, 0.5, random) for _ in range(400)]
    for pair in pairs:
        phrases = pair.base_prompt.split(", ")
        assert phrases == [phrase for phrase in PAIR.base_prompt.split(", ") if phrase in phrases]
        assert "a green hat" in phrases and pair.target_prompts == PAIR.target_prompts
        assert pair.base_phrases == tuple(phrase for phrase in phrases if phrase != "a green hat")
        assert "a crown" in pair.full_prompt and "red hair" in pair.full_prompt
    counts = Counter(phrase for pair in pairs for phrase in pair.base_phrases)
    # One of three phrases always stays, so a phrase does a little more often than every second time.
    assert all(count / 400 == pytest.approx(0.5 + 1 / 24, abs=0.08) for count in counts.values()) and len(counts) == 3
    assert {len(inputs_module.thin_out(PAIR, 0.999, random).base_phrases) for _ in range(20)} == {1}


def test_thinned_out_prompts_are_those_the_losses_ask_about(world, tmp_path, monkeypatch):
    runs, batches = watch_runs(monkeypatch), watch(monkeypatch, "draw_batch")
    flags = {"alignment_phrase_dropout": 0.9, "train_batch_size": 3, "base_prompt_share": 0}
    train(world, tmp_path / "output", **flags)
    pairs, table = runs[0].inputs.pairs, runs[0].table
    assert len(pairs) == 6 + 3 and any(len(pair.base_phrases) == 1 for pair in pairs[6:])
    text_encoder, batch = runs[0].pipeline.text_encoder, batches[2]
    reference, response = script.prompt_embeds(runs[0], batch.rows)
    for i, pair_index in enumerate(batch.pairs.tolist()):
        for embeds, prompt in ((reference, pairs[pair_index].base_prompt), (response, pairs[pair_index].full_prompt)):
            with torch.no_grad():
                ids = world.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
                torch.testing.assert_close(embeds[i], text_encoder(ids)[0][0], rtol=1e-4, atol=1e-5)
        assert table.phrase_mask[pair_index].sum() == len(pairs[pair_index].base_phrases)


@pytest.mark.parametrize("mode", script.SFCM_MODES)
def test_every_sfcm_mode_trains(trained, mode):
    output = trained(sfcm_mode=mode, stage2_objective="both")
    assert files(output) == {WEIGHTS, CARD, f"stage1/{WEIGHTS}"}
    if mode != "none":
        # A gain of Adam's first steps: even a small change of the loss moves some weight.
        assert difference(output, trained(sfcm_mode="none", stage2_objective="both")) > 1e-4


def test_the_bank_of_maps_does_not_depend_on_the_batch_size(world, tmp_path, monkeypatch):
    """Else a run on two processes would be another one than a run on one with the double batch."""
    alignments = watch(monkeypatch, "prepare_alignment")
    lora = train(world, tmp_path / "first", stage2_steps=0)
    for size in (1, 4):
        flags = {"stage1_steps": 0, "stage1_lora_path": lora, "train_batch_size": size, "alignment_source": "data"}
        train(world, tmp_path / f"{size}", stage2_steps=1, **flags)
    first, second = (torch.stack(alignment.sfcm) for alignment in alignments)
    assert (first - second).abs().max() < 1e-3 and first.std() > 0.1


def test_the_bank_is_refreshed_with_the_student(world, tmp_path, monkeypatch):
    banks = watch(monkeypatch, "fill_sfcm_bank")
    train(world, tmp_path / "output", stage2_steps=5, sfcm_refresh_steps=2)
    banks = [torch.stack(bank) for bank in banks]
    assert len(banks) == 1 + 2
    assert (banks[0] - banks[1]).abs().max() > 1e-3


def test_no_change_is_asked_of_rows_with_the_base_or_the_empty_prompt(world, tmp_path, monkeypatch):
    batches, targets = watch(monkeypatch, "draw_batch"), watch(monkeypatch, "compose_prediction")
    predictions, maps = watch(monkeypatch, "composed_predictions"), watch(monkeypatch, "alignment_sfcm")
    train(world, tmp_path / "output", train_batch_size=6, base_prompt_share=0.5, learning_rate=0.1)
    composed = batches[2:]
    assert len(composed) == len(targets) == len(predictions) == len(maps) == 2
    for batch, target, (reference_pred, *teacher_preds, _), sfcm in zip(composed, targets, predictions, maps):
        full = batch.kinds == FULL
        assert full.sum() == 3 and set(batch.kinds.tolist()) == {FULL, BASE, EMPTY}
        assert torch.equal(target[~full], reference_pred[~full]) and sfcm[~full].abs().max() == 0
        assert all(torch.equal(pred[~full], reference_pred[~full]) for pred in teacher_preds)
        for row in full.nonzero().flatten():
            assert not torch.equal(target[row], reference_pred[row])


@pytest.mark.parametrize(("scale", "base_weight"), [(0, 0.5), (3, 0), (3, 0.5)])
@pytest.mark.parametrize("dual_path", ["two_pass", "single_pass"])
def test_the_teachers_change_is_scaled_and_rid_of_the_base_prompts(
    world, tmp_path, monkeypatch, scale, base_weight, dual_path
):
    """Only inside the map, and from the original model on."""
    predictions, targets = watch(monkeypatch, "composed_predictions"), watch(monkeypatch, "compose_prediction")
    maps = watch(monkeypatch, "alignment_sfcm")
    train(
        world,
        tmp_path / "output",
        teacher_scale=scale,
        teacher_base_weight=base_weight,
        dual_path=dual_path,
        sfcm_gamma=3,
        stage2_steps=1,
    )
    (reference_pred, full_pred, base_pred, _), sfcm = predictions[0], maps[0]
    assert not torch.equal(full_pred, base_pred)
    # Where it has no weight, the teacher is not asked for the base prompt.
    assert torch.equal(base_pred, reference_pred) == (base_weight == 0)
    change = full_pred - reference_pred - base_weight * (base_pred - reference_pred)
    torch.testing.assert_close(targets[0], reference_pred + scale * sfcm**3 * change)
    assert (targets[0] - reference_pred).abs().max() > 1e-3 or scale == 0


def test_a_map_of_the_target_alone_leaves_out_what_the_lora_does_to_any_prompt(world, tmp_path, monkeypatch):
    """Without a target in the full prompts its difference is zero, and that of the two paths is not."""
    runs, alignments = watch_runs(monkeypatch), watch(monkeypatch, "prepare_alignment")
    train(world, tmp_path / "output", stage1_steps=1, stage2_steps=1)
    run, differences = runs[0], []
    make_sfcm = script.make_sfcm
    monkeypatch.setattr(
        script,
        "make_sfcm",
        lambda run, rows, difference, *args: differences.append(difference) or make_sfcm(run, rows, difference, *args),
    )
    same = replace(run.table, response_rows=run.table.reference_rows)
    for mode in ("averaged_target", "averaged"):
        args = SimpleNamespace(**{**vars(run.args), "sfcm_mode": mode})
        script.fill_sfcm_bank(replace(run, args=args, table=same), alignments[0])
    count = len(differences) // 2
    assert all(difference.max() < 1e-5 for difference in differences[:count])
    assert all(difference.max() > 1e-3 for difference in differences[count:])


def test_the_second_stage_has_a_schedule_of_its_own(world, tmp_path, monkeypatch):
    rates, step = [], script.train_step

    def note_and_step(run, stage, global_step, optimizer, parameters):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(run, stage, global_step, optimizer, parameters)

    monkeypatch.setattr(script, "train_step", note_and_step)
    train(world, tmp_path / "output", lr_scheduler="linear", stage2_lr_scheduler="cosine")
    assert rates == pytest.approx([0.01, 0.005, 0.01, 0.005])


@pytest.mark.parametrize("scheduler", script_arguments.SCHEDULERS)
def test_every_schedule_works_without_a_stage_1(world, tmp_path, scheduler):
    flags = {"stage1_steps": 0, "stage2_steps": 1, "stage2_objective": "paper", "enhancement_loss": "none"}
    output = train(world, tmp_path / "output", lr_scheduler=scheduler, stage2_lr_scheduler=scheduler, **flags)
    assert files(output) == {WEIGHTS, CARD}


@pytest.mark.parametrize("kind", ["direct", "none"])
def test_the_other_enhancement_losses(world, tmp_path, trained, monkeypatch, kind):
    steps = watch(monkeypatch, "train_step")
    output = train(world, tmp_path / "output", stage2_objective="paper", enhancement_loss=kind)
    assert ("enhancement" in steps[-1]) == (kind == "direct")
    assert difference(output, trained(stage2_objective="paper")) > 1e-4


def test_the_lambdas_weigh_their_losses(world, tmp_path, trained, monkeypatch):
    """With all of them zero, what is left of the paper's objective is plain fine-tuning."""
    zero = {f"lambda_{name}": 0 for name in ("text", "fine", "enh", "base")}
    flags = {"stage1_steps": 0, "stage2_objective": "paper", "stage2_lr_scheduler": "constant"}
    output = train(world, tmp_path / "output", **flags, **zero)
    assert difference(output, trained(stage2_steps=0)) < 1e-6
    for name in zero:
        one = train(world, tmp_path / name, **flags, **{**zero, name: 10})
        assert difference(one, output) > 1e-5, name


def test_lora_on_self_attention_too(world, trained):
    state = load_file(trained(lora_target="all") / WEIGHTS)
    layers = {name.split(".transformer_blocks.")[1].split(".")[1] for name in state}
    assert layers == {"attn1", "attn2"} and len(state) == 2 * LAYERS * 4 * 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_of_the_diffusion_loss(world, tmp_path, monkeypatch, prediction_type):
    model = copy_model(world, tmp_path, {"scheduler/scheduler_config.json": {"prediction_type": prediction_type}})
    runs, batches, targets = watch_runs(monkeypatch), watch(monkeypatch, "draw_batch"), []
    loss = script.diffusion_loss
    monkeypatch.setattr(script, "diffusion_loss", lambda pred, target: targets.append(target) or loss(pred, target))
    flags = {"stage2_objective": "both", "stage1_steps": 1, "stage2_steps": 1}
    output = train(world, tmp_path / "output", pretrained_model_name_or_path=model, **flags)
    assert files(output) == {WEIGHTS, CARD, f"stage1/{WEIGHTS}"}
    batch, latents = batches[0], torch.stack([runs[0].training.latents[i] for i in batches[0].index])
    alpha_bar = runs[0].noise_scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.noisy_latents, alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * batch.noise)
    expected = alpha_bar.sqrt() * batch.noise - (1 - alpha_bar).sqrt() * latents
    torch.testing.assert_close(targets[0], batch.noise if prediction_type == "epsilon" else expected)


def test_bfloat16(world, tmp_path, trained):
    output = train(
        world, tmp_path / "output", mixed_precision="bf16", stage2_objective="both", num_validation_images=1
    )
    state = load_file(output / WEIGHTS)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in state.values())
    # The same draws, rounded: Adam's sign may flip where the gradient is tiny, but most weights agree.
    exact = load_file(trained(stage2_objective="both") / WEIGHTS)
    moved = torch.cat([(state[name] - exact[name]).abs().flatten() for name in state])
    assert 0 < moved.median() < 0.004


# ------------------------------------------------------------------------------------------------------------- data


def changed_rows(**changes) -> list[dict]:
    return [{key: value for key, value in {**row, **changes}.items() if value is not None} for row in ROWS]


REPLACED = [
    {**row, "target_prompt": "a scarf", "full_prompt": row["base_prompt"].rsplit("a ", 1)[0] + "a scarf"}
    for row in ROWS
]


@pytest.mark.parametrize(
    "rows, flags, full_prompt, phrases",
    [
        (ROWS, {}, "a woman, a green hat, red hair", ("a woman", "a green hat")),
        (REPLACED, {}, "a woman, a scarf", ("a woman",)),
        (
            changed_rows(target_prompt=None),
            {"target_prompt": "a red scarf"},
            "a woman, a green hat, a red scarf",
            None,
        ),
        (changed_rows(target_prompt=["red hair", ["a woman", "a man"]])[:1], {}, "a man, a green hat, red hair", None),
        (changed_rows(base_phrases=["hat"]), {}, "a woman, a green hat, red hair", ("hat",)),
        (
            [{**row, "caption": row["base_prompt"], "base_prompt": "x"} for row in ROWS],
            {"base_prompt_column": "caption"},
            "a woman, a green hat, red hair",
            None,
        ),
    ],
    ids=["addition", "replacement", "one target", "several targets", "phrases", "column"],
)
def test_data_of_every_kind(world, tmp_path, monkeypatch, rows, flags, full_prompt, phrases):
    data = write_data(tmp_path / "data", rows)
    inputs = watch(monkeypatch, "check_inputs")
    flags = {"stage1_steps": 1, "stage2_steps": 1, "stage2_objective": "both", "num_validation_images": 1, **flags}
    output = train(world, tmp_path / "output", train_data_dir=data, **flags)
    assert (output / WEIGHTS).is_file()
    pair = inputs[0].pairs[0]
    assert pair.full_prompt == full_prompt and inputs[0].validation_pair == pair
    assert phrases is None or pair.base_phrases == phrases


def test_a_saved_dataset(world, trained, tmp_path):
    import datasets

    columns = {name: [row[name] for row in ROWS] for name in ("base_prompt", "target_prompt")}
    images = [str(world.data / row["file_name"]) for row in ROWS]
    dataset = datasets.Dataset.from_dict({"picture": images, **columns})
    dataset.cast_column("picture", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    output = train(
        world, tmp_path / "output", train_data_dir=None, dataset_name=tmp_path / "saved", image_column="picture"
    )
    assert difference(output, trained()) == 0


def test_the_pictures_protect_the_phrases_of_the_data(world, tmp_path, monkeypatch):
    outputs, call = [], script.SPFPortraitPipeline.__call__
    monkeypatch.setattr(
        script.SPFPortraitPipeline,
        "__call__",
        lambda self, *args, **kwargs: outputs.append(call(self, *args, **kwargs)) or outputs[-1],
    )
    data = write_data(tmp_path / "data", changed_rows(base_phrases=["hat"]))
    flags = {"num_validation_images": 1, "stage1_steps": 1, "stage2_steps": 0}
    train(world, tmp_path / "output", train_data_dir=data, **flags)
    assert outputs[1].phrases == [("hat",)]


def test_max_train_samples(world, tmp_path, monkeypatch):
    runs = watch_runs(monkeypatch)
    train(world, tmp_path / "output", max_train_samples=4, stage2_steps=0)
    assert len(runs[0].training.latents) == len(runs[0].inputs.rows) == 4


# ---------------------------------------------------------------------------------------------------------- batches


def fake_run(process_index: int = 0, num_processes: int = 1, batch_size: int = 8, seed: int = 0) -> SimpleNamespace:
    """What `draw_batch` asks of a run."""
    return SimpleNamespace(
        args=SimpleNamespace(train_batch_size=batch_size, seed=seed),
        accelerator=SimpleNamespace(process_index=process_index, num_processes=num_processes),
        inputs=SimpleNamespace(pairs=[None] * 5),
        noise_scheduler=DDPMScheduler(),
        training=None,
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def portraits():
    generator = torch.Generator().manual_seed(0)
    pair_index = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    return script.Portraits(torch.randn(7, 4, 4, 4, generator=generator), pair_index, (0,) * 7)


def tensors(batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if value is not None}


def test_a_batch_is_a_pure_function(portraits):
    torch.manual_seed(0)
    first = tensors(script.draw_batch(fake_run(), portraits, 3, stream=1, unchanged_share=0.375))
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    script.draw_batch(fake_run(), portraits, 4, stream=1)
    second = tensors(script.draw_batch(fake_run(), portraits, 3, stream=1, unchanged_share=0.375))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state), "it drew from the global generator"


@pytest.mark.parametrize("other", [{"micro_step": 4}, {"stream": 2}, {"seed": 1}])
def test_steps_streams_and_seeds_draw_different_batches(portraits, other):
    def draw(micro_step=3, stream=1, seed=0):
        return script.draw_batch(fake_run(seed=seed), portraits, micro_step, stream)

    first, second = draw(), draw(**other)
    assert not torch.equal(first.noise, second.noise) and not torch.equal(first.timesteps, second.timesteps)
    assert not torch.equal(first.index, second.index)


def test_processes_share_the_batch_of_one(portraits):
    for micro_step in range(5):
        whole = tensors(script.draw_batch(fake_run(batch_size=8), portraits, micro_step, 2, 0.375))
        parts = [
            tensors(script.draw_batch(fake_run(i, 4, batch_size=2), portraits, micro_step, 2, 0.375)) for i in range(4)
        ]
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value), name


def test_the_rows_of_a_batch_belong_together(portraits):
    batch = script.draw_batch(fake_run(), portraits, 3, stream=1, unchanged_share=0.5)
    assert torch.equal(batch.pairs, portraits.pair_index[batch.index])
    assert torch.equal(batch.rows, batch.kinds * 5 + batch.pairs)
    noisy_latents = DDPMScheduler().add_noise(portraits.latents[batch.index], batch.noise, batch.timesteps)
    assert torch.equal(batch.noisy_latents, noisy_latents)


def test_every_portrait_comes_once_an_epoch(portraits):
    index = torch.cat([script.draw_batch(fake_run(batch_size=4), portraits, i, 0).index for i in range(7)])
    assert torch.bincount(index).tolist() == [4] * 7


@pytest.mark.parametrize(
    "share, full, base, empty", [(0.375, {5}, {2}, {1}), (0.6, {3, 4}, {2, 3, 4}, {1, 2}), (0.25, {6}, {1, 2}, {0, 1})]
)
def test_every_batch_has_its_share_of_each_kind(portraits, share, full, base, empty):
    """Two thirds of the rows that ask for no change have the base prompt, one third the empty one."""
    counts, places = [], torch.zeros(8)
    for micro_step in range(400):
        kinds = script.draw_batch(fake_run(), portraits, micro_step, 2, share).kinds
        counts.append([(kinds == kind).sum().item() for kind in (FULL, BASE, EMPTY)])
        places += kinds != FULL
    counts = torch.tensor(counts)
    for column, allowed, mean in zip(
        counts.T, (full, base, empty), (8 * (1 - share), 8 * share * 2 / 3, 8 * share / 3), strict=True
    ):
        assert set(column.tolist()) == allowed and column.float().mean() == pytest.approx(mean, abs=0.1)
    # Each process has its share in the long run, too.
    assert (places / 400).sub(share).abs().max() < 0.1


def test_a_share_smaller_than_a_row_comes_in_some_batches(portraits):
    kinds = [script.draw_batch(fake_run(batch_size=2), portraits, i, 2, 0.25).kinds for i in range(400)]
    assert (torch.cat(kinds) != FULL).float().mean() == pytest.approx(0.25, abs=0.04)


def test_without_a_share_every_row_asks_for_the_target(portraits):
    kinds = torch.cat([script.draw_batch(fake_run(), portraits, i, 0).kinds for i in range(20)])
    assert (kinds == FULL).all()


def drawn_timesteps(portraits, power: float) -> torch.Tensor:
    batches = [script.draw_batch(fake_run(), portraits, i, 2, timestep_power=power) for i in range(200)]
    return torch.cat([batch.timesteps for batch in batches])


def test_neighbouring_seeds_share_no_noise(world, tmp_path, monkeypatch):
    """Of the portraits that are drawn for the alignment, and of their maps."""
    generators, seeds = [], torch.Generator.manual_seed

    class Watched(torch.Generator):
        def manual_seed(self, seed):
            generators.append(seed)
            return seeds(self, seed)

    used = []
    for seed in (101, 102, 103):
        AcceleratorState._reset_state(reset_partial_state=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "Generator", Watched)
            train(world, tmp_path / str(seed), seed=seed, stage1_steps=1, stage2_steps=2, num_alignment_images=4)
        used.append(set(generators))
        generators.clear()
    assert all(len(own) >= 4 + 4 + 3 for own in used)
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]


def test_timesteps_cover_the_whole_range_evenly(portraits):
    timesteps = drawn_timesteps(portraits, 0.0)
    assert timesteps.min() < 10 and timesteps.max() in range(990, 1000)
    assert torch.histc(timesteps.float(), 4, 0, 1000).sub(400).abs().max() < 80


def test_timesteps_are_drawn_with_the_given_density(portraits):
    alphas_cumprod = DDPMScheduler().alphas_cumprod
    density = ((1 - alphas_cumprod) / alphas_cumprod).clamp(max=script.MAX_NOISE_TO_SIGNAL) ** 0.5
    torch.testing.assert_close(script.timestep_density(alphas_cumprod, 0.5), density)
    expected = 1600 * density.unflatten(0, (4, 250)).sum(1) / density.sum()
    counts = torch.histc(drawn_timesteps(portraits, 0.5).float(), 4, 0, 1000)
    assert (counts - expected).abs().max() < 80 and counts[3] > 3 * counts[1]


def test_a_schedule_that_ends_in_pure_noise_has_a_finite_density():
    alphas_cumprod = torch.tensor([0.9, 0.5, 0.1, 0.0])
    density = torch.tensor([1 / 9, 1.0, 9.0, script.MAX_NOISE_TO_SIGNAL])
    torch.testing.assert_close(script.timestep_density(alphas_cumprod, 1.0), density)
    assert torch.equal(script.timestep_density(alphas_cumprod, 0.0), torch.ones(4))


# ---------------------------------------------------------------------------------------------- gradient accumulation


def concatenated(draw, size: int):
    """`draw_batch` for a batch of `size`, as the union of the `size` batches of one that accumulation would draw."""

    def draw_batch(run, portraits, micro_step, *args, **kwargs):
        assert run.args.train_batch_size == size
        small = replace(
            run,
            args=SimpleNamespace(**{**vars(run.args), "train_batch_size": 1}),
            training_set=replace(run.training_set, batch_size=1, share=slice(0, 1)),
        )
        parts = [tensors(draw(small, portraits, size * micro_step + k, *args, **kwargs)) for k in range(size)]
        return script.Batch(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    return draw_batch


@pytest.mark.parametrize("objective", ["composed", "both"])
def test_accumulated_batches_are_one_batch(world, tmp_path, monkeypatch, objective):
    flags = {"stage2_objective": objective, **SMOOTH}
    accumulated = train(world, tmp_path / "two", train_batch_size=1, gradient_accumulation_steps=2, **flags)
    monkeypatch.setattr(script, "draw_batch", concatenated(script.draw_batch, 2))
    one = train(world, tmp_path / "one", train_batch_size=2, **flags)
    assert difference(accumulated, one) < 1e-4 < difference(one, one / "stage1") / 10


def test_accumulation_draws_anew_reduces_once_and_logs_the_mean(world, tmp_path, monkeypatch):
    events, micro_steps, losses = [], [], []
    no_sync, backward, draw, step_terms = (
        script.Accelerator.no_sync,
        script.Accelerator.backward,
        script.draw_batch,
        script.step_terms,
    )

    @contextmanager
    def watched(run, micro_step, term):
        with term(run, micro_step) as parts:
            losses.append({name: value.item() for name, value in parts.items()})
            yield parts

    monkeypatch.setattr(
        script.Accelerator, "no_sync", lambda self, model: events.append("no_sync") or no_sync(self, model)
    )
    monkeypatch.setattr(
        script.Accelerator, "backward", lambda self, loss: events.append("backward") or backward(self, loss)
    )
    monkeypatch.setattr(
        script,
        "draw_batch",
        lambda run, portraits, micro_step, *args, **kwargs: (
            micro_steps.append(micro_step) or draw(run, portraits, micro_step, *args, **kwargs)
        ),
    )
    monkeypatch.setattr(
        script,
        "step_terms",
        lambda *args: [partial(watched, term=term) for term in step_terms(*args)],
    )
    means = watch(monkeypatch, "train_step")
    flags = {"stage1_steps": 1, "stage2_steps": 1, "stage2_objective": "both", "gradient_accumulation_steps": 2}
    train(world, tmp_path / "output", **flags)
    assert micro_steps == [0, 1] + [2] * 3 + [3] * 3
    assert events == ["no_sync", "backward", "backward"] + ["no_sync", "backward"] * 5 + ["backward"]
    assert means[0] == {"diffusion": pytest.approx((losses[0]["diffusion"] + losses[1]["diffusion"]) / 2)}
    assert means[1].keys() == LOSSES["both"]
    for name in LOSSES["both"]:
        values = [parts[name] for parts in losses[2:] if name in parts]
        assert len(values) == 2 and means[1][name] == pytest.approx(sum(values) / 2, rel=1e-5, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------ dry run


def test_a_dry_run_prints_prompts_and_writes_nothing(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.SPFPortraitPipeline, "from_pretrained", forbidden)
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path / "data", [*ROWS[:2], {**ROWS[0], "file_name": "2.png"}, *REPLACED[3:4]])
    train(world, tmp_path / "output", train_data_dir=data, dry_run=True, report_to="tensorboard")
    printed = capsys.readouterr().out
    tokens = world.tokenizer.convert_ids_to_tokens(world.tokenizer("a woman, a green hat, red hair").input_ids)
    target = ", ".join(str(i) for i in range(tokens.index("red</w>"), len(tokens) - 1))
    assert f"{data / 'metadata.jsonl'}, line 1\n" in printed
    assert "base prompt  a woman, a green hat\n  full prompt  a woman, a green hat, red hair\n" in printed
    assert f"target       red hair  (tokens {target} of the full prompt)" in printed
    assert "phrase       a woman  (tokens 1, 2, CLIP distance " in printed
    assert "full prompt  a man, a scarf" in printed
    assert printed.count("base prompt") == 3 and "4 portraits, 3 different pairs of prompts." in printed
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# ------------------------------------------------------------------------------------------------------- bad input


def forbidden(*args, **kwargs):
    raise AssertionError("weights were loaded")


@pytest.fixture
def refusal(world, tmp_path, monkeypatch, capsys):
    """The one line with which the script ends before any weights load; nothing may be left behind."""

    def refuse(**changes) -> str:
        # Not before: a test may have something trained first.
        monkeypatch.setattr(script.SPFPortraitPipeline, "from_pretrained", forbidden)
        monkeypatch.setattr(script.CLIPModel, "from_pretrained", forbidden)
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            train(world, **{"output_dir": tmp_path / "output", **changes})
        assert sorted(tmp_path.rglob("*")) == before
        message = end.value.code
        if message == 2:  # argparse prints its usage, in one line, and then the error
            usage, message = capsys.readouterr().err.strip().split("\n")
            assert usage.startswith("usage: ")
        assert message.count("error: ") == 1 and "\n" not in message
        return message.split("error: ")[1]

    return refuse


def copy_model(world, tmp_path: Path, changes: dict[str, dict]) -> Path:
    """The base model in a folder of its own, with changes to its JSON files."""
    model = shutil.copytree(world.model, tmp_path / "changed_model")
    for name, values in changes.items():
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**config, **values}))
    return model


# tests/test_command_line.py runs each of them through a command line, too.
WRONG_FLAGS = [
    ({"stage1_steps": 0, "stage2_steps": 0}, ["--stage1_steps and --stage2_steps", "0"]),
    ({"stage1_steps": -1}, ["--stage1_steps", "-1"]),
    ({"lambda_text": -0.5}, ["--lambda_text", "-0.5"]),
    ({"lambda_fine": -1}, ["--lambda_fine", "-1"]),
    ({"lambda_enh": -1}, ["--lambda_enh", "-1"]),
    ({"lambda_base": "nan"}, ["--lambda_base", "nan"]),
    ({"rank": 0}, ["--rank", "0"]),
    ({"lora_alpha": -4}, ["--lora_alpha", "-4"]),
    ({"learning_rate": 0}, ["--learning_rate", "0"]),
    ({"learning_rate": "inf"}, ["--learning_rate", "inf"]),
    ({"train_batch_size": 0}, ["--train_batch_size", "0"]),
    ({"base_prompt_share": 1}, ["--base_prompt_share", "1"]),
    ({"base_prompt_share": "nan"}, ["--base_prompt_share", "nan"]),
    ({"sfcm_timesteps": (900, 100)}, ["--sfcm_timesteps", "900", "100"]),
    ({"sfcm_timesteps": (900, 1001)}, ["--sfcm_timesteps", "1001", "1000"]),
    ({"sfcm_mode": "nonsense"}, ["--sfcm_mode", "nonsense", "averaged"]),
    ({"lr_scheduler": "piecewise_constant"}, ["--lr_scheduler", "piecewise_constant", "cosine"]),
    ({"adam_beta1": 1.0}, ["--adam_beta1", "1.0"]),
    ({"adam_beta2": -0.1}, ["--adam_beta2", "-0.1"]),
    ({"seed": -1}, ["--seed", "-1"]),
    ({"seed": 2**32}, ["--seed", str(2**32)]),
    ({"max_train_samples": 0}, ["--max_train_samples", "0"]),
    ({"report_to": "nonsense"}, ["--report_to", "nonsense"]),
    ({"stage1_lora_path": "somewhere"}, ["--stage1_lora_path", "somewhere"]),
    ({"stage1_lora_path": "."}, ["--stage1_lora_path", "--stage1_steps 0"]),
    ({"alignment_phrase_dropout": 1}, ["--alignment_phrase_dropout", "1"]),
    ({"teacher_scale": -1}, ["--teacher_scale", "-1"]),
    ({"teacher_base_weight": 1.5}, ["--teacher_base_weight", "1.5"]),
    ({"composed_timestep_power": -1}, ["--composed_timestep_power", "-1"]),
    ({"stage1_steps": 0}, ["--stage2_objective composed", "--stage1_steps", "--stage1_lora_path"]),
    ({"resolution": 18}, ["--resolution", "18", "4"]),
    ({"train_data_dir": "missing"}, ["--train_data_dir", "missing"]),
    ({"train_data_dir": None}, ["--train_data_dir", "--dataset_name"]),
    ({"dataset_name": "x"}, ["--train_data_dir", "--dataset_name"]),
    ({"base_prompt_column": "text"}, ["metadata.jsonl, line 1", "'text'", "--base_prompt_column"]),
    ({"target_prompt": " "}, ["--target_prompt"]),
    ({"free_phrases": ("a woman", " ")}, ["--free_phrases", "empty"]),
    ({"free_phrases": ("a woman", "a cat")}, ["--free_phrases", "'a cat'", "no base prompt"]),
    ({"free_phrases": "red hair"}, ["--free_phrases", "'red hair'"]),
    ({"free_phrases_column": "loose"}, ["--free_phrases_column", "'loose'"]),
    ({"pretrained_model_name_or_path": "missing"}, ["--pretrained_model_name_or_path", "missing"]),
    ({"clip_model_name_or_path": "missing"}, ["--clip_model_name_or_path", "missing"]),
    ({"validation_target_prompt": "a woman"}, ["--validation_target_prompt", "'a woman'"]),
    ({"validation_base_prompt": "", "validation_target_prompt": "a hat"}, ["--validation_base_prompt"]),
    *(
        ({name: 0}, [f"--{name}", "at least 1", "got 0"])
        for name in (
            "gradient_accumulation_steps", "num_alignment_images", "alignment_inference_steps", "sfcm_noise_samples",
            "validation_inference_steps", "resolution", "repeats", "enhancement_every", "checkpoints_total_limit",
            "lr_num_cycles",
        )
    ),
    *(
        ({name: -1}, [f"--{name}", "0 or more", "got -1"])
        for name in (
            "stage2_steps", "lr_warmup_steps", "num_validation_images", "validation_steps", "sfcm_refresh_steps",
            "adam_weight_decay", "alignment_guidance_scale", "validation_guidance_scale", "dataloader_num_workers",
            "noise_offset", "checkpointing_steps",
        )
    ),
    *(
        ({name: 0}, [f"--{name}", "above 0", "got 0"])
        for name in ("sfcm_gamma", "max_grad_norm", "adam_epsilon", "lr_power", "snr_gamma")
    ),
    ({"lora_dropout": 1}, ["--lora_dropout", "[0, 1)", "1.0"]),
    *(
        ({name: "polynomial", "learning_rate": 1e-7}, [f"--{name} polynomial", "--learning_rate", "1e-07"])
        for name in ("lr_scheduler", "stage2_lr_scheduler")
    ),
    ({"rank": "many"}, ["--rank", "'many'"]),
    ({"nonsense": 1}, ["--nonsense=1"]),
    ({"aspect_ratio_buckets": " "}, ["--aspect_ratio_buckets", "empty"]),
    ({"aspect_ratio_buckets": "16x16"}, ["--aspect_ratio_buckets", "'16x16'"]),
    ({"aspect_ratio_buckets": "16,16;"}, ["--aspect_ratio_buckets", "''"]),
    ({"aspect_ratio_buckets": "16,16;18,16"}, ["--aspect_ratio_buckets", "'18,16'", "multiples of 4"]),
    ({"aspect_ratio_buckets": "16,16;16, 16"}, ["--aspect_ratio_buckets", "'16, 16'", "twice"]),
    ({"lora_layers": "attn2.to_k,,attn2.to_v"}, ["--lora_layers", "'attn2.to_k,,attn2.to_v'"]),
    ({"lora_layers": "attn2.to_k,attn7.to_v"}, ["--lora_layers", "'attn7.to_v'"]),
    ({"no-center_crop": True}, ["--no-center_crop", "--no-cache_latents"]),
    ({"preservation": "love"}, ["--preservation", "'love'", "mask"]),
    ({"preservation": "dop", "stage2_steps": -1}, ["--stage2_steps", "-1"]),
    ({"preservation": "dop", "stage1_lora_path": "."}, ["--preservation dop", "--stage1_lora_path"]),
    ({"preservation_weight": 2}, ["--preservation_weight", "--preservation prior, dop and cat"]),
    ({"preservation": "cat", "preservation_weight": -1}, ["--preservation_weight", "-1"]),
    ({"unrelated_prompts": "a dog"}, ["--unrelated_prompts", "--preservation cat"]),
    ({"preservation": "cat", "unrelated_prompts": "a dog " * 60}, ["--unrelated_prompts", "77"]),
    ({"preservation": "mask"}, ["line 1", "mask_file_name"]),
    ({"sfcm_dir": "missing"}, ["--sfcm_dir missing", "00000.png does not exist", "3 portraits"]),
    ({"sfcm_dir": ".", "sfcm_refresh_steps": 5}, ["--sfcm_refresh_steps", "--sfcm_dir"]),
    ({"sfcm_dir": ".", "stage2_steps": 0}, ["--sfcm_dir", "stage 2"]),
    ({"save_alignment": True, "preservation": "prior"}, ["--save_alignment", "stage 2"]),
    ({"use_dora": True, "dual_path": "single_pass"}, ["--use_dora", "--dual_path"]),
    ({"reference_lora": "missing"}, ["--reference_lora missing", "no such file or folder"]),
    ({"reference_lora": ".", "use_dora": True}, ["--use_dora", "--reference_lora"]),
    ({"reference_lora": ".", "reference_lora_scale": (1, 2)}, ["--reference_lora_scale", "2", "--reference_lora 1"]),
    ({"reference_target_prompt": "a hat"}, ["--reference_target_prompt", "--reference_lora"]),
    ({"tiny_vae_model_name_or_path": "missing"}, ["--tiny_vae_model_name_or_path", "enhancement loss"]),
    (
        {"tiny_vae_model_name_or_path": "missing", "stage2_objective": "paper"},
        ["--tiny_vae_model_name_or_path", "missing"],
    ),
    ({"pretrained_vae_model_name_or_path": "missing"}, ["--pretrained_vae_model_name_or_path", "missing"]),
    ({"use_8bit_adam": True, "optimizer": "prodigy"}, ["--use_8bit_adam", "--optimizer", "prodigy"]),
    (
        {"push_to_hub": True, "hub_token": "hf_SECRET", "report_to": "wandb"},
        ["--hub_token", "--report_to wandb", "hf auth login"],
    ),
    ({"hub_model_id": "spf"}, ["--hub_model_id", "--push_to_hub"]),
    ({"hub_token": "hf_SECRET"}, ["--hub_token", "--push_to_hub"]),
    ({"hub_private_repo": True}, ["--hub_private_repo", "--push_to_hub"]),
    ({"dataset_config_name": "en"}, ["--dataset_config_name", "'en'", "--dataset_name"]),
    ({"resume_from_checkpoint": "checkpoint-7"}, ["--resume_from_checkpoint", "checkpoint-7", "no such folder"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "flags, parts",
    WRONG_FLAGS,
    ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_flag_ends_the_program(refusal, flags, parts):
    message = refusal(**flags)
    for part in parts:
        assert part in message, message


# tests/test_command_line.py runs each of them through a command line, too.
WRONG_ROWS = [
    ([], ["metadata.jsonl", "no rows"]),
    (changed_rows(target_prompt=None), ["line 1", "'target_prompt'", "--target_prompt"]),
    (changed_rows(base_prompt=None), ["line 1", "'base_prompt'"]),
    ([ROWS[0], {**ROWS[1], "target_prompt": ""}], ["line 2", "'target_prompt'", "''"]),
    ([ROWS[0], {**ROWS[1], "target_prompt": "a man, a red hat"}], ["line 2", "a man, a red hat"]),
    ([ROWS[0], {**ROWS[1], "target_prompt": "a red hat"}], ["line 2", "a red hat"]),
    ([*ROWS[:3], {**ROWS[3], "base_phrases": ["a cat"]}], ["line 4", "'a cat'"]),
    ([{**ROWS[0], "target_prompt": [["a cat", "a dog"]]}], ["line 1", "'a cat'"]),
    ([{**ROWS[0], "target_prompt": "x " * 80}], ["line 1", "77"]),
    ([{**ROWS[0], "base_prompt": "a hat", "target_prompt": [["a hat", "a scarf"]]}], ["line 1", "preserve"]),
    ([{**ROWS[0], "full_prompt": "a woman"}], ["line 1", "'red hair'"]),
    ([ROWS[0], {**ROWS[1], "free_phrases": ["a cat"]}], ["line 2", "'a cat'"]),
    ([{**ROWS[0], "free_phrases": "a green hat"}], ["line 1", "'free_phrases'", "a list"]),
    ([{**ROWS[0], "free_phrases": ["Red hair"]}], ["line 1", "'Red hair' is the target prompt itself"]),
    ([{**ROWS[0], "free_phrases": ["a green hat", "a woman"]}], ["line 1", "left to preserve"]),
    ([{**ROWS[0], "file_name": "7.png"}], ["line 1", "7.png"]),
    ([ROWS[0], "not JSON"], ["line 2", "JSON"]),
]


@pytest.mark.parametrize(
    "rows, parts",
    WRONG_ROWS,
    ids=[
        "no rows", "no target column", "no base column", "empty target", "target is base", "target is a phrase",
        "phrase not in prompt", "replaced not in prompt", "target too long", "nothing left", "target not in full",
        "free phrase not in prompt", "free phrases no list", "free phrase is target", "all free", "no image",
        "a text as row",
    ],
)  # fmt: skip
def test_a_wrong_row_ends_the_program(refusal, tmp_path, rows, parts):
    message = refusal(train_data_dir=write_data(tmp_path / "data", rows))
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("below", ["", "more/output"])
def test_an_output_folder_that_is_a_file_ends_the_program(refusal, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    message = refusal(output_dir=tmp_path / "file" / below)
    assert "--output_dir" in message and str(tmp_path / "file") in message


def test_an_empty_folder_ends_the_program(refusal, tmp_path):
    (tmp_path / "data").mkdir()
    message = refusal(train_data_dir=tmp_path / "data")
    assert str(tmp_path / "data") in message and "empty" in message


def test_a_broken_image_ends_the_program(refusal, tmp_path):
    data = write_data(tmp_path / "data")
    whole = (data / "3.png").read_bytes()
    (data / "3.png").write_bytes(whole[: len(whole) // 2])
    message = refusal(train_data_dir=data)
    assert "line 4" in message and "3.png" in message


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer", "scheduler"])
def test_a_model_with_a_part_missing_ends_the_program(refusal, world, tmp_path, part):
    model = copy_model(world, tmp_path, {})
    shutil.rmtree(model / part)
    message = refusal(pretrained_model_name_or_path=model)
    assert "--pretrained_model_name_or_path" in message and str(model) in message and part in message


def test_a_prediction_type_without_a_target_ends_the_program(refusal, world, tmp_path):
    model = copy_model(world, tmp_path, {"scheduler/scheduler_config.json": {"prediction_type": "sample"}})
    message = refusal(pretrained_model_name_or_path=model)
    assert "--pretrained_model_name_or_path" in message and "'sample'" in message


@pytest.mark.parametrize(
    "kind", ["missing", "empty folder", "not safetensors", "another width", "another model", "text"]
)
def test_a_wrong_earlier_lora_ends_the_program(refusal, trained, tmp_path, kind):
    path = tmp_path / "earlier" / WEIGHTS
    path.parent.mkdir()
    state = load_file(trained() / WEIGHTS)
    if kind == "not safetensors":
        path.write_bytes(b"nonsense" * 10)
    elif kind == "another width":
        save_file({name: torch.cat([value, value], 1).contiguous() for name, value in state.items()}, path)
    elif kind == "another model":
        save_file({name.replace("down_blocks.0", "down_blocks.7"): value for name, value in state.items()}, path)
    elif kind == "text":
        save_file({name.replace("unet.", "text_encoder."): value for name, value in state.items()}, path)
    message = refusal(stage1_steps=0, stage1_lora_path=path if kind == "missing" else path.parent)
    assert "--stage1_lora_path" in message and str(path.parent) in message


def run_script(*command: str | Path, timeout: int = 300, **variables: str) -> subprocess.CompletedProcess:
    """A command in a process of its own, with one thread, its output as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("ACCELERATE_")}
    environment |= variables
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=timeout,
        check=False,
    )


def test_the_script_by_itself_ends_with_one_line_and_no_traceback(world, tmp_path):
    data = write_data(tmp_path / "data", [ROWS[0], {**ROWS[1], "target_prompt": "a red hat"}])
    flags = make_flags(world, tmp_path / "output", train_data_dir=data)
    result = run_script(ROOT / "train_spf_portrait_lora.py", *flags)
    assert result.returncode == 1 and result.stdout == ""
    unused, error = result.stderr.splitlines()
    assert unused.startswith("4 images of ") and unused.endswith("metadata.jsonl: 2.png, 3.png, 4.png, 5.png")
    assert error.startswith("train_spf_portrait_lora.py: error: ") and "metadata.jsonl, line 2" in error
    assert not (tmp_path / "output").exists()


# ---------------------------------------------------------------------------------------------- losses that explode


def test_a_loss_that_explodes_stops_the_training(world, tmp_path):
    with pytest.raises(SystemExit, match="'diffusion' is .* at step [1-4].*there is no earlier checkpoint"):
        train(world, tmp_path / "output", learning_rate=1e20, stage1_steps=5)
    assert not (tmp_path / "output" / WEIGHTS).exists()


def test_a_gradient_that_explodes_is_not_taken(world, tmp_path, monkeypatch):
    """Also in the last step, whose loss was still finite."""
    loss, runs = script.diffusion_loss, watch_runs(monkeypatch)

    def explode(model_pred, target):
        model_pred.register_hook(lambda gradient: gradient * float("inf"))
        return loss(model_pred, target)

    monkeypatch.setattr(script, "diffusion_loss", explode)
    with pytest.raises(SystemExit, match="'gradient' is (nan|inf) at step 0"):
        train(world, tmp_path / "output", stage1_steps=1, stage2_steps=0)
    assert not (tmp_path / "output").exists()
    assert all(torch.isfinite(parameter).all() for parameter in runs[0].unet.parameters())


@pytest.mark.parametrize("objective, name", [("composed", "composed"), ("paper", "text_consistent")])
def test_what_stage_1_saved_is_whole_when_stage_2_explodes(world, trained, tmp_path, monkeypatch, objective, name):
    whole, step = trained() / "stage1", script.train_step

    def train_step(run, stage, global_step, *args):
        if global_step == 3:
            with torch.no_grad():
                for parameter in run.unet.parameters():
                    if parameter.requires_grad:
                        parameter.fill_(float("nan"))
        return step(run, stage, global_step, *args)

    monkeypatch.setattr(script, "train_step", train_step)
    with pytest.raises(SystemExit, match=f"'{name}' is nan at step 3"):
        train(world, tmp_path / "output", stage2_objective=objective)
    assert files(tmp_path / "output") == {f"stage1/{WEIGHTS}"}
    assert difference(tmp_path / "output" / "stage1", whole) == 0


def test_an_earlier_lora_of_nan_is_refused(world, trained, tmp_path):
    state = {name: torch.full_like(value, float("nan")) for name, value in load_file(trained() / WEIGHTS).items()}
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(SystemExit, match=rf"{WEIGHTS}: its weights are not numbers \(NaN\) in layer unet\."):
        train(world, tmp_path / "output", stage1_steps=0, stage1_lora_path=tmp_path / WEIGHTS)
    assert not (tmp_path / "output").exists()


# ------------------------------------------------------------------------------------------------------- launching


def test_accelerate_launches_the_script(world, trained, tmp_path):
    command = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--mixed_precision", "no"]
    flags = make_flags(world, tmp_path / "output", num_validation_images=1, report_to="tensorboard")
    result = run_script(*command, ROOT / "train_spf_portrait_lora.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    found = {path for path in files(tmp_path / "output") if not path.startswith("logs/")}
    pictures = {f"validation/{name}.png" for name in ("step_000000", "step_000004", "alignment")}
    assert found == {WEIGHTS, CARD, f"stage1/{WEIGHTS}", *pictures}
    assert difference(tmp_path / "output", trained()) < 1e-6


def test_processes_that_do_not_find_each_other_end_before_they_train(world, tmp_path):
    result = run_script(ROOT / "train_spf_portrait_lora.py", *make_flags(world, tmp_path / "output"), WORLD_SIZE="2")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: launched as 2 processes, of which accelerate makes 1" in result.stderr.splitlines()[-1]
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
    one = train(world, tmp_path / "one", train_batch_size=2, **SMOOTH, **flags)
    assert files(tmp_path / "two") == {WEIGHTS, CARD, f"stage1/{WEIGHTS}"}
    assert difference(tmp_path / "two", one) < 1e-4 < difference(one / "stage1", one) / 10
