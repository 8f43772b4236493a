"""Tests of AdaLoRA: held to PEFT's own AdaLoraModel, then whole runs, whose file is an ordinary LoRA."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from peft.tuners.adalora import AdaLoraModel
from safetensors import safe_open
from test_resume import assert_same_ending, copy_checkpoint, one_thread, weights  # noqa: F401 (fixtures)
from test_train import (  # noqa: F401 (fixtures)
    ROOT,
    SMOOTH,
    WEIGHTS,
    difference,
    files,
    fresh_accelerator,
    make_flags,
    run_script,
    train,
    watch,
    watch_runs,
    world,
)
from torch import nn

import adalora
import train_spf_portrait_lora as script
import training_inputs as inputs_module
from attention_processors import active_adapters
from checkpoints import read_state
from lora_files import load_lora, read_lora, save_kohya_lora
from pipeline_spf_portrait import SPFPortraitPipeline


STEPS = 8  # the first is a warm-up, ranks are allocated up to the fourth, and the last four keep them
# The singular values start at zero and the vectors near it: it takes large steps to come far in few.
FLAGS = {"use_adalora": True, "stage1_steps": STEPS, "stage2_steps": 0, "learning_rate": 0.1}


# ------------------------------------------------------------------------------------------------------- beside PEFT


class Model(nn.Module):
    """Two linear layers and a convolution, with a loss as a transformer of the library has it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.conv = nn.Linear(6, 8), nn.Linear(8, 5), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        images = self.conv(x.reshape(2, 3, 4, 5))
        hidden = self.second(self.first(x.reshape(2, 10, 6)))
        return SimpleNamespace(loss=hidden.square().mean() + images.square().mean(), outputs=(hidden, images))


def make_pair(steps: int = 24, rank: int = 2, dropout: float = 0.0) -> tuple[AdaLoraModel, Model]:
    """The same model with the same adapter twice, once in PEFT's AdaLoraModel."""
    torch.manual_seed(0)
    model = Model()
    config = adalora.make_config(["first", "second", "conv"], rank=rank, alpha=3.0, dropout=dropout, total_steps=steps)
    tuner = AdaLoraModel(model, config, adalora.ADAPTER)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return tuner, copy.deepcopy(model)


def update(models: list[nn.Module], allocate: list, steps: int, seed: int = 1) -> None:
    """Steps of gradient descent on both, with the allocation as PEFT's documentation places it."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        x = torch.randn(120, generator=generator)
        for model, own in zip(models, allocate, strict=True):
            model(x).loss.backward()
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            with torch.no_grad():
                for parameter in parameters:
                    parameter -= 0.05 * parameter.grad
            own(step)
            model.zero_grad()


def test_the_regularizer_is_pefts():
    tuner, model = make_pair()
    x = torch.randn(120)
    regularizer = tuner(x).loss - tuner.model(x).loss
    torch.testing.assert_close(adalora.ORTHOGONAL_WEIGHT * adalora.orthogonal_loss(model), regularizer)
    regularizer.backward()
    (adalora.ORTHOGONAL_WEIGHT * adalora.orthogonal_loss(model)).backward()
    expected = {name: parameter.grad for name, parameter in tuner.model.named_parameters() if "lora_" in name}
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.testing.assert_close(parameter.grad, expected[name])
            assert parameter.grad.abs().max() > 0
        else:
            assert parameter.grad is None


def test_orthonormal_vectors_cost_nothing():
    _, model = make_pair()
    assert adalora.orthogonal_loss(model) > 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                nn.init.orthogonal_(parameter)
    assert adalora.orthogonal_loss(model) < 1e-5


def test_ranks_are_allocated_as_peft_does_it():
    steps, rank, seen = 24, 2, []
    tuner, model = make_pair(steps, rank)
    allocator = adalora.make_allocator(model)

    def allocate(step):
        adalora.allocate_ranks(allocator, model, step)
        pattern = allocator.peft_config.rank_pattern
        assert pattern == tuner.peft_config[adalora.ADAPTER].rank_pattern
        left = 3 * 3 if pattern is None else sum(map(sum, pattern.values()))
        seen.append(left)
        values = [value for name, value in model.named_parameters() if "lora_E" in name]
        assert sum(int((value != 0).sum()) for value in values) == left

    update([tuner.model, model], [tuner.update_and_allocate, allocate], steps)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), tuner.model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    # A warm-up of three steps, ever fewer ranks, and what was asked for in the last half.
    assert seen[:3] == [9] * 3 and seen[3] < 9
    assert seen == sorted(seen, reverse=True) and seen[11:] == [3 * rank] * 13
    assert allocator.ipt == {}


@pytest.mark.parametrize("rank, initial", [(1, 2), (2, 3), (3, 5), (16, 24)])
def test_a_plain_loras_scale_and_one_and_a_half_times_its_rank(rank, initial):
    config = adalora.make_config(["first"], rank=rank, alpha=3.0, dropout=0.1, total_steps=24)
    assert (config.init_r, config.target_r) == (initial, rank)
    assert (config.tinit, config.tfinal, config.deltaT, config.lora_dropout) == (3, 12, 1, 0.1)
    assert config.lora_alpha / config.init_r == pytest.approx(3.0 / rank)
    shortest = adalora.make_config(["first"], rank=rank, alpha=3.0, dropout=0.1, total_steps=adalora.MIN_STEPS)
    assert 1 <= shortest.tinit < shortest.total_step - shortest.tfinal < shortest.total_step


def test_an_update_that_was_left_out_spoils_nothing():
    _, model = make_pair(8)
    allocator = adalora.make_allocator(model)
    update([model], [lambda step: adalora.allocate_ranks(allocator, model, step)], 3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    before = copy.deepcopy(adalora.training_state(allocator, model))
    assert before["rank_pattern"] is not None and len(before["averages"]["ipt"]) == 9
    adalora.allocate_ranks(allocator, model, 3, updated=False)
    after = adalora.training_state(allocator, model)
    for name, average in before["averages"].items():
        assert all(torch.equal(value, after["averages"][name][key]) for key, value in average.items())
    # The last allocation comes in its step all the same: it needs no gradients.
    adalora.allocate_ranks(allocator, model, 4, updated=False)
    pattern = allocator.peft_config.rank_pattern
    assert sum(map(sum, pattern.values())) == 6 and allocator.ipt == {}


def test_no_update_at_all_before_the_last_allocation_is_an_error():
    _, model = make_pair(8)
    allocator = adalora.make_allocator(model)
    for step in range(1, 4):
        adalora.allocate_ranks(allocator, model, step, updated=False)
    with pytest.raises(FloatingPointError, match="none of 4 steps"):
        adalora.allocate_ranks(allocator, model, 4)


def test_folded_layers_add_what_the_live_ones_do():
    _, model = make_pair(8)
    allocator = adalora.make_allocator(model)
    base = copy.deepcopy(model)
    with active_adapters(base, None):
        x = torch.randn(120)
        original = [output.detach() for output in base(x).outputs]
    update([model], [lambda step: adalora.allocate_ranks(allocator, model, step)], 6)
    pattern = allocator.peft_config.rank_pattern
    gone = "first"
    pattern[f"{gone}.lora_E.{adalora.ADAPTER}"] = [False] * 3
    allocator.mask_using_rank_pattern(model, pattern)
    folded = adalora.fold(model)
    assert set(folded) == {"second", "conv"}
    merged = Model()
    merged.load_state_dict(
        {
            name.replace(".base_layer", ""): value
            for name, value in model.state_dict().items()
            if "lora_" not in name and "ranknum" not in name
        }
    )
    with torch.no_grad():
        for name, (down, up) in folded.items():
            weight = merged.get_submodule(name).weight
            assert len(down) == up.shape[1] == sum(pattern[f"{name}.lora_E.{adalora.ADAPTER}"])
            assert down.shape[1:] == weight.shape[1:] and down.ndim == up.ndim == weight.ndim
            weight += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    for live, ours, without in zip(model(x).outputs, merged(x).outputs, original, strict=True):
        torch.testing.assert_close(ours, live, rtol=1e-5, atol=1e-6)
        assert (live - without).abs().max() > 1e-2


# -------------------------------------------------------------------------------------------------------- whole runs


def predict(pipeline, seed: int = 0) -> torch.Tensor:
    """A prediction of a pipeline's UNet on fixed inputs."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    width = pipeline.unet.config.cross_attention_dim
    states = torch.randn(2, 77, width, generator=generator)
    with torch.no_grad():
        return pipeline.unet(latents, torch.tensor([500, 20]), states).sample


def stock_pipeline(world, kind=StableDiffusionPipeline):  # noqa: F811
    pipeline = kind.from_pretrained(world.model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


OPTIONS = {
    "cross-attention": {},
    "convolutions, dropout, accumulated and recomputed, another way to preserve": {
        "preservation": "dop",
        "lora_layers": "conv1,attn2.to_k,proj_in",
        "lora_dropout": 0.3,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_file_is_an_ordinary_lora_of_what_was_trained(world, tmp_path, monkeypatch, options):  # noqa: F811
    runs = watch_runs(monkeypatch)
    flags = {**FLAGS, **OPTIONS[options], "num_validation_images": 1, "validation_steps": 4}
    output = train(world, tmp_path / "output", **flags)
    live, original = predict(runs[0].pipeline), predict(stock_pipeline(world))
    assert (live - original).abs().max() > 1e-2
    with active_adapters(runs[0].unet, None):
        torch.testing.assert_close(predict(runs[0].pipeline), original)

    pipeline = stock_pipeline(world)
    pipeline.load_lora_weights(output)
    torch.testing.assert_close(predict(pipeline), live, rtol=1e-5, atol=1e-5)
    pipeline = stock_pipeline(world, SPFPortraitPipeline)
    load_lora(pipeline, str(output), "ours")
    torch.testing.assert_close(predict(pipeline), live, rtol=1e-5, atol=1e-5)
    save_kohya_lora(output / WEIGHTS, tmp_path / "kohya.safetensors")
    pipeline = stock_pipeline(world)
    pipeline.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    torch.testing.assert_close(predict(pipeline), live, rtol=1e-5, atol=1e-5)

    layers = read_lora(output / WEIGHTS)["unet"]
    adapted = [name for name in runs[0].unet.state_dict() if name.endswith("lora_E.default")]
    ranks = [layer.rank for layer in layers.values()]
    assert sum(ranks) == 2 * len(adapted) and len(set(ranks)) > 1
    # So a reader that finds no alpha, and takes the rank for it, scales as one that reads the metadata.
    assert all(layer.alpha == layer.rank for layer in layers.values())
    with safe_open(output / WEIGHTS, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert set(metadata["unet.target_modules"]) == set(layers)
    pictures = {f"validation/step_00000{step}.png" for step in (0, 4, 8)}
    assert pictures <= files(output)


def test_the_regularizer_counts_once_a_step(world, tmp_path, monkeypatch):  # noqa: F811
    """Alone, it makes the vectors orthonormal, to the same ones however many batches a step has."""
    monkeypatch.setattr(script, "diffusion_loss", lambda pred, target: 0.0 * (pred - target).flatten(1).mean(1))
    losses, outputs = watch(monkeypatch, "train_step"), []
    for accumulation in (1, 3):
        AcceleratorState._reset_state(reset_partial_state=True)
        flags = {**FLAGS, **SMOOTH, "learning_rate": 0.02, "gradient_accumulation_steps": accumulation}
        train(world, tmp_path / str(accumulation), **flags)
        outputs.append([step["orthogonal"] for step in losses])
        assert all(set(step) == {"diffusion", "orthogonal"} for step in losses) and len(losses) == STEPS
        losses.clear()
    assert outputs[0] == sorted(outputs[0], reverse=True) and outputs[0][-1] < 0.95 * outputs[0][0]
    assert outputs[1] == pytest.approx(outputs[0], rel=1e-5)


def test_bf16(world, tmp_path, monkeypatch):  # noqa: F811
    """The singular vectors and values are in float32, and no weight in half precision moves."""
    runs = watch_runs(monkeypatch)
    output = train(world, tmp_path / "output", mixed_precision="bf16", num_validation_images=1, **FLAGS)
    unet = runs[0].unet
    assert {parameter.dtype for name, parameter in unet.named_parameters() if ".lora_" in name} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.bfloat16
    folded = read_lora(output / WEIGHTS)["unet"]
    for name, layer in folded.items():
        added = unet.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(layer.up @ layer.down, added, rtol=1e-4, atol=1e-6)
        assert added.abs().max() > 1e-3


def test_updates_that_are_left_out_are_told_from_others(world, tmp_path, monkeypatch):  # noqa: F811
    """As a gradient scaler does it, which a CPU has none of: here it leaves out all of them."""
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda optimizer: True))
    with pytest.raises(SystemExit, match="none of 4 steps"):
        train(world, tmp_path / "output", **FLAGS)


def test_on_top_of_an_earlier_lora(world, tmp_path, monkeypatch):  # noqa: F811
    """It is added to the weights as a plain LoRA is: both files side by side are what was trained."""
    earlier = train(world, tmp_path / "earlier", stage1_steps=2, stage2_steps=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    runs = watch_runs(monkeypatch)
    output = train(world, tmp_path / "output", reference_lora=earlier, reference_lora_scale=0.7, **FLAGS)
    pipeline = stock_pipeline(world)
    pipeline.load_lora_weights(earlier, adapter_name="earlier")
    pipeline.load_lora_weights(output, adapter_name="new")
    pipeline.set_adapters(["earlier", "new"], [0.7, 1.0])
    torch.testing.assert_close(predict(pipeline), predict(runs[0].pipeline), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def whole_run(world, tmp_path_factory):  # noqa: F811
    """An undisturbed run with a checkpoint after each step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    output = train(world, tmp_path_factory.mktemp("whole") / "output", checkpointing_steps=1, **FLAGS)
    torch.set_num_threads(before)
    return output


SLOW = pytest.mark.slow
# In the warm-up, before the last allocation, right after it, and the others.
RESUMED = [1, 3, 4, pytest.param(2, marks=SLOW), pytest.param(5, marks=SLOW), pytest.param(STEPS, marks=SLOW)]


@pytest.mark.parametrize("step", RESUMED)
def test_a_run_goes_on_to_the_same_bits(world, whole_run, tmp_path, step):  # noqa: F811
    again = tmp_path / "output"
    copy_checkpoint(whole_run, step, again)
    train(world, again, checkpointing_steps=1, resume_from_checkpoint="latest", **FLAGS)
    assert_same_ending(again, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("without", ["weights", "averages", "rank_pattern"])
def test_each_part_of_the_state_is_needed(world, whole_run, tmp_path, monkeypatch, without):  # noqa: F811
    step = 5 if without == "rank_pattern" else 2
    folder = copy_checkpoint(whole_run, step, tmp_path / "output")
    state = read_state(folder)
    own = state["adalora"][without]
    if without == "rank_pattern":
        state["adalora"][without] = {name: kept[::-1] for name, kept in own.items()}
    elif without == "averages":
        state["adalora"][without] = {
            name: {key: value.flip(0) for key, value in average.items()} for name, average in own.items()
        }
    else:
        state["adalora"][without] = read_state(whole_run / f"checkpoint-{step - 1}")["adalora"][without]
    monkeypatch.setattr(inputs_module, "read_state", lambda _: state)
    train(world, tmp_path / "output", checkpointing_steps=1, resume_from_checkpoint="latest", **FLAGS)
    assert weights(tmp_path / "output") != weights(whole_run)


def test_a_checkpoint_is_not_gone_on_from_as_a_plain_lora(world, whole_run, tmp_path):  # noqa: F811
    copy_checkpoint(whole_run, 4, tmp_path / "output")
    with pytest.raises(SystemExit, match="was trained with use_adalora True, and now it is False"):
        train(world, tmp_path / "output", **{**FLAGS, "use_adalora": None}, resume_from_checkpoint="latest")


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_double_batch(world, tmp_path):  # noqa: F811
    flags = {**FLAGS, **SMOOTH, "learning_rate": 1e-3}
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    given = make_flags(world, tmp_path / "two", train_batch_size=1, **flags)
    result = run_script(*command, ROOT / "train_spf_portrait_lora.py", *given, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stderr
    train(world, tmp_path / "one", train_batch_size=2, **flags)
    assert difference(tmp_path / "two", tmp_path / "one") < 1e-4
