"""Tests of `train_spf_portrait_lora.py`: the script itself, on a tiny random base model and six pictures.

Most runs are `main([...])` in this process; what only a process of its own shows is in
test_launching.py. What the other tests of the training take from here comes first.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from PIL import Image
from pipeline_world import make_components, make_xl_components
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_prompts import write_vocabulary
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

import train_spf_portrait_lora as script
from pipeline_spf_portrait import SPFPortraitPipeline
from training.arguments import parse_args
from training.inputs import check_inputs
from training.models import STAGE1_ADAPTER
from training.objectives.objective import Parts


ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "pytorch_lora_weights.safetensors"
CARD = "README.md"
RUN_FILE = "run.yaml"
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


@cache
def make_world(folder: Path, family: str = "sd") -> SimpleNamespace:
    """Folders of a base model, of Stable Diffusion or "sdxl", a CLIP model and data, all tiny."""
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), model_max_length=77)
    if family == "sdxl":
        components = make_xl_components(tokenizer)
        StableDiffusionXLPipeline(**components).save_pretrained(folder / "model")
    else:
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


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """The tiny world of a session. No test may change it."""
    return make_world(tmp_path_factory.getbasetemp() / "world")


@pytest.fixture(scope="session")
def xl_world(tmp_path_factory) -> SimpleNamespace:
    """The same of Stable Diffusion XL."""
    return make_world(tmp_path_factory.getbasetemp() / "xl_world", "sdxl")


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
        "base_prompt_share": 0.6,  # with more, both rows of a batch may ask for no change
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


def prepared(world: SimpleNamespace, **changes) -> SimpleNamespace:
    """A run before its first step, which does none: its flags, inputs, accelerator and parts."""
    flags = parse_args(make_flags(world, Path("nowhere"), **changes))
    inputs, accelerator = check_inputs(flags), Accelerator(mixed_precision=flags.model.mixed_precision)
    torch.manual_seed(flags.loop.seed)
    parts = script.prepare(flags, inputs, accelerator)
    return SimpleNamespace(flags=flags, inputs=inputs, accelerator=accelerator, parts=parts)


RUNS: dict[tuple, Path] = {}  # of `trained`: a fixture that is imported is made anew for each module


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """Trains once per set of flags, whichever module asks, and hands out the folder."""

    def run(**changes) -> Path:
        key = tuple(sorted(changes.items()))
        if key not in RUNS:
            AcceleratorState._reset_state(reset_partial_state=True)
            RUNS[key] = train(world, tmp_path_factory.mktemp("run") / "output", **changes)
            AcceleratorState._reset_state(reset_partial_state=True)
        return RUNS[key]

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


def watch(monkeypatch, owner: Any, name: str) -> list:
    """Results of every call of a function of a module or class, still on their way to the caller."""
    results, function = [], getattr(owner, name)

    def watched(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(owner, name, watched)
    return results


def watch_runs(monkeypatch) -> list[Parts]:
    """What every run is made of."""
    return watch(monkeypatch, script, "prepare")


def forbidden(*args, **kwargs):
    raise AssertionError("weights were loaded")


@pytest.fixture
def refusal(world, tmp_path, monkeypatch, capsys):
    """The one line with which the script ends before any weights load; nothing may be left behind."""

    def refuse(**changes) -> str:
        # Not before: a test may have something trained first.
        monkeypatch.setattr(SPFPortraitPipeline, "from_pretrained", forbidden)
        monkeypatch.setattr(CLIPModel, "from_pretrained", forbidden)
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


# ----------------------------------------------------------------------------------------------------- both stages


FIRST_WAYS = {("composed", "two_pass"), ("paper", "two_pass"), ("both", "single_pass")}


@pytest.mark.parametrize(
    "objective, dual_path",
    [
        pytest.param(objective, way, marks=() if (objective, way) in FIRST_WAYS else pytest.mark.slow)
        for objective in OBJECTIVES
        for way in DUAL_PATHS
    ],
)
def test_both_stages_train_and_write_their_files(world, trained, objective, dual_path):
    output = trained(stage2_objective=objective, dual_path=dual_path, num_validation_images=1, report_to="tensorboard")
    pictures = {f"validation/{name}.png" for name in ("step_000000", "step_000004", "alignment")}
    logs = {path for path in files(output) if path.startswith("logs/")}
    assert files(output) - logs == {WEIGHTS, CARD, RUN_FILE, f"stage1/{WEIGHTS}", *pictures}
    assert not [path for path in output.rglob("*") if path.is_dir() and path.name.startswith(".")]
    for picture in pictures:
        with Image.open(output / picture) as image:
            assert image.size == ((2 if "alignment" in picture else 4) * (192 + 6) + 6, 192 + 6 + 6 + 18)

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
    assert difference(saved, adapter_state(runs[0].models.denoiser, "default")) == 0
    assert all(".attn2." in name and name.startswith("unet.") for name in saved)


def test_only_the_adapter_in_training_moves(world, tmp_path, monkeypatch):
    runs, before = [], {}
    prepare = script.prepare

    def prepare_and_copy(*args):
        runs.append(prepare(*args))
        before.update({name: value.clone() for name, value in runs[0].models.denoiser.state_dict().items()})
        return runs[0]

    monkeypatch.setattr(script, "prepare", prepare_and_copy)
    output = train(world, tmp_path / "output", stage2_objective="both", num_validation_images=1, validation_steps=1)
    models = runs[0].models
    unet = models.denoiser
    after = unet.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == {name for name in before if ".default." in name}
    assert difference(adapter_state(unet, STAGE1_ADAPTER), load_file(output / "stage1" / WEIGHTS)) == 0
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == (".lora_" in name and ".default." in name), name
    for model in (models.pipeline.vae, models.pipeline.text_encoder, runs[0].enhancement.clip):
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_composed_alignment_needs_no_clip_of_its_own(world, tmp_path, monkeypatch):
    """A wrong name of one is nothing to it."""
    monkeypatch.setattr(CLIPModel, "from_pretrained", forbidden)
    flags = {"stage1_steps": 1, "stage2_steps": 1, "clip_model_name_or_path": tmp_path / "nowhere"}
    output = train(world, tmp_path / "output", stage2_objective="composed", **flags)
    assert (output / WEIGHTS).is_file()


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
    assert files(plain) == {WEIGHTS, CARD, RUN_FILE}
    assert difference(plain, trained() / "stage1") == 0


def test_without_stage_1_the_papers_objective_starts_from_nothing(world, tmp_path):
    output = train(world, tmp_path / "output", stage1_steps=0, stage2_objective="paper")
    assert files(output) == {WEIGHTS, CARD, RUN_FILE}


@pytest.mark.parametrize(
    "flags, start, as_file",
    [
        ({"stage2_objective": "paper"}, "stage 1", False),
        ({"stage2_objective": "both"}, "stage 1", False),
        ({"stage2_objective": "both"}, "stage 1", True),
        ({"stage2_objective": "composed", "composed_init": "stage1"}, "stage 1", False),
        ({"stage2_objective": "composed", "composed_init": "zero"}, "zero", False),
    ],
    ids=["paper", "both", "both, from a file", "composed from stage 1", "composed from zero"],
)
@pytest.mark.slow
def test_an_earlier_lora_takes_stage_1s_place(world, trained, tmp_path, monkeypatch, flags, start, as_file):
    stage1 = trained() / "stage1" / WEIGHTS
    states, step = [], script.train_step
    names = ["default"] if flags["stage2_objective"] == "paper" else ["default", STAGE1_ADAPTER]

    def copy_and_step(engine, models, objectives):
        states.append({name: adapter_state(models.denoiser, name) for name in names})
        return step(engine, models, objectives)

    monkeypatch.setattr(script, "train_step", copy_and_step)
    runs = watch_runs(monkeypatch)
    path = stage1 if as_file else stage1.parent
    output = train(world, tmp_path / "output", stage1_steps=0, stage1_lora_path=path, rank=16, **flags)
    assert files(output) == {WEIGHTS, CARD, RUN_FILE}
    earlier = load_file(stage1)
    student, later = states[0]["default"], states[1]["default"]
    if start == "zero":
        assert all(value.abs().max() == 0 for name, value in student.items() if ".lora_B." in name)
        student = {name: earlier[name] if ".lora_B." in name else value for name, value in student.items()}
    assert difference(student, earlier) == 0
    assert difference(later, states[0]["default"]) > 0.001
    for state in states:
        if STAGE1_ADAPTER in state:
            assert difference(state[STAGE1_ADAPTER], earlier) == 0
    scales = [layer.scaling for layer in runs[0].models.denoiser.modules() if isinstance(layer, BaseTunerLayer)]
    assert {scale for scaling in scales for scale in scaling.values()} == {2.0}
    assert difference(output, stage1) > 0.005
