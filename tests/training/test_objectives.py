"""Tests of the objectives: each made of a run's parts alone, what it asks for, and one more that the step trains."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from test_train import WEIGHTS, adapter_state, copy_model, difference, files, prepared, train, watch

import train_spf_portrait_lora as script
from training import objectives
from training.alignment import prepare_alignment
from training.engine import Engine
from training.maps import MapMaker
from training.models import STAGE1_ADAPTER
from training.objectives import OBJECTIVES, Objective, diffusion, make_objectives
from training.objectives.composed import Composed
from training.prompt_table import BASE, EMPTY, FULL


STAGE2 = 2  # the first batch of stage 2
KINDS = {
    "diffusion": ("diffusion", {}),
    "diffusion and enhancement": ("diffusion", {"stage2_objective": "paper"}),
    "min-SNR": ("diffusion", {"snr_gamma": 5}),
    **{f"kept rows, {kind}": ("kept_rows", {"preservation": kind}) for kind in ("prior", "dop", "cat")},
    "paper": ("paper", {"stage2_objective": "paper"}),
    "paper, one pass": ("paper", {"stage2_objective": "paper", "dual_path": "single_pass"}),
    "composed": ("composed", {}),
    "composed, one pass": ("composed", {"dual_path": "single_pass", "sfcm_mode": "paper"}),
}


def ready(world, **changes) -> SimpleNamespace:
    """A run with the portraits it draws, and with a LoRA that changes something, before any step."""
    run = prepared(world, **changes)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in run.parts.models.adapters.parameters("default"):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    if len(run.inputs.pairs) > len(run.inputs.rows):
        alignment = prepare_alignment(run.flags, run.inputs, run.parts, run.accelerator)
        run.parts = replace(run.parts, alignment=alignment)
    return run


def one_of(name: str, run: SimpleNamespace) -> Objective:
    objective = OBJECTIVES[name](run.flags, run.parts)
    objective.prepare()
    return objective


def test_every_objective_is_tried():
    assert {name for name, _ in KINDS.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_has_the_losses_it_weighs_and_teaches_the_lora_alone(world, kind):
    name, changes = KINDS[kind]
    run = ready(world, **changes)
    objective, models = one_of(name, run), run.parts.models
    with objective.losses(STAGE2) as losses:
        assert losses.keys() == objective.weights.keys()
        assert all(loss.shape == () and torch.isfinite(loss) and loss > 0 for loss in losses.values()), losses
        sum(objective.weights[name] * loss for name, loss in losses.items()).backward()
    pipeline, enhancement = models.pipeline, run.parts.enhancement
    frozen = [pipeline.vae, pipeline.text_encoder, *([] if enhancement is None else [enhancement.clip])]
    assert not any(parameter.grad is not None for model in frozen for parameter in model.parameters())
    taught = {name for name, parameter in models.denoiser.named_parameters() if parameter.grad is not None}
    lora = {name for name, _ in models.denoiser.named_parameters() if ".default." in name}
    # Fine-grained and text-consistent losses end at the last attention's queries and keys.
    assert taught <= lora and (taught == lora or name == "paper")
    gradients = [parameter.grad for parameter in models.adapters.parameters("default") if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) > 0


# ---------------------------------------------------------------------------------------------------------- diffusion


@pytest.mark.parametrize(
    "in_model, flags",
    [("epsilon", {}), ("v_prediction", {}), ("epsilon", {"prediction_type": "v_prediction"})],
    ids=["epsilon", "v_prediction", "v_prediction by a flag"],
)
def test_the_target_of_the_diffusion_loss(world, tmp_path, monkeypatch, in_model, flags):
    """That of the model or of the flag, as the pictures' own."""
    model = copy_model(world, tmp_path, {"scheduler/scheduler_config.json": {"prediction_type": in_model}})
    run = prepared(world, pretrained_model_name_or_path=model, **flags)
    kind = flags.get("prediction_type", in_model)
    assert run.parts.models.pipeline.scheduler.config.prediction_type == kind
    targets, loss = [], diffusion.diffusion_loss
    monkeypatch.setattr(diffusion, "diffusion_loss", lambda pred, target: targets.append(target) or loss(pred, target))
    with one_of("diffusion", run).losses(0):
        pass
    batch = run.parts.batches.training(run.parts.training, 0)
    latents = torch.stack([run.parts.training.latents[i] for i in batch.index])
    alphas_cumprod = DDPMScheduler.from_config(run.parts.models.pipeline.scheduler.config).alphas_cumprod
    alpha_bar = alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.noisy_latents, alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * batch.noise)
    velocity = alpha_bar.sqrt() * batch.noise - (1 - alpha_bar).sqrt() * latents
    torch.testing.assert_close(targets[0], batch.noise if kind == "epsilon" else velocity)


def test_v_prediction_trains_in_both_stages(world, tmp_path):
    flags = {"stage2_objective": "both", "stage1_steps": 1, "stage2_steps": 1, "prediction_type": "v_prediction"}
    output = train(world, tmp_path / "output", num_validation_images=1, **flags)
    assert {WEIGHTS, f"stage1/{WEIGHTS}"} <= files(output)


def test_min_snr_weighs_the_diffusion_loss(world, monkeypatch):
    run, raw = prepared(world, snr_gamma=0.5), watch(monkeypatch, diffusion, "diffusion_loss")
    with one_of("diffusion", run).losses(0) as losses:
        batch = run.parts.batches.training(run.parts.training, 0)
        scheduler = DDPMScheduler.from_config(run.parts.models.pipeline.scheduler.config)
        alpha_bar = scheduler.alphas_cumprod[batch.timesteps]
        snr = alpha_bar / (1 - alpha_bar)
        expected = (raw[0].detach() * snr.clamp(max=0.5) / snr).mean().item()
        assert losses["diffusion"].item() == pytest.approx(expected, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- paper


def test_the_lambdas_weigh_their_losses(world, tmp_path, trained):
    """With all of them zero, what is left of the paper's objective is plain fine-tuning."""
    names = ("text", "fine", "base", "enh")
    run = prepared(world, stage2_objective="paper", **{f"lambda_{name}": i for i, name in enumerate(names, 1)})
    weights = [dict(objective.weights) for objective in make_objectives(2, run.flags, run.parts)]
    assert weights == [
        {"text_consistent": 1, "fine_grained": 2, "base_prompt": 3}, {"diffusion": 1, "enhancement": 4},
    ]  # fmt: skip
    zero = {f"lambda_{name}": 0 for name in names}
    flags = {"stage1_steps": 0, "stage2_objective": "paper", "stage2_lr_scheduler": "constant"}
    output = train(world, tmp_path / "output", **flags, **zero)
    assert difference(output, trained(stage2_steps=0)) < 1e-6


# ----------------------------------------------------------------------------------------------------------- composed


@pytest.fixture(scope="module")
def taught(world):
    """A run whose LoRA is the teacher and the student alike. No test may change it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = ready(world, composed_init="stage1", train_batch_size=6)
    one_of("composed", run)
    return run


def composed_of(run: SimpleNamespace, **changes) -> Composed:
    """The same with other flags."""
    method, own = run.flags.method, run.flags.composed
    for name, value in changes.items():
        if hasattr(own, name):
            own = replace(own, **{name: value})
        else:
            method = replace(method, **{name: value})
    return Composed(run.flags._replace(method=method, composed=own), run.parts)


def test_no_change_is_asked_of_rows_with_the_base_or_the_empty_prompt(taught, monkeypatch):
    predictions, maps = watch(monkeypatch, Composed, "predictions"), watch(monkeypatch, MapMaker, "of_batch")
    targets, objective = watch(monkeypatch, Composed, "target"), composed_of(taught, base_prompt_share=0.5)
    with objective.losses(STAGE2):
        pass
    number = objective.number_of(STAGE2)
    batch = taught.parts.batches.aligned(
        taught.parts.alignment, number, 2, 0.5, timestep_power=taught.flags.composed.composed_timestep_power
    )
    (reference_pred, *teacher_preds, _), full = predictions[0], batch.kinds == FULL
    assert full.sum() == 3 and set(batch.kinds.tolist()) == {FULL, BASE, EMPTY}
    assert torch.equal(targets[0][~full], reference_pred[~full]) and maps[0][~full].abs().max() == 0
    assert all(torch.equal(pred[~full], reference_pred[~full]) for pred in teacher_preds)
    for row in full.nonzero().flatten():
        assert not torch.equal(targets[0][row], reference_pred[row])


@pytest.mark.parametrize(("scale", "base_weight"), [(0, 0.5), (3, 0), (3, 0.5)])
@pytest.mark.parametrize("dual_path", ["two_pass", "single_pass"])
def test_the_teachers_change_is_scaled_and_rid_of_the_base_prompts(taught, monkeypatch, scale, base_weight, dual_path):
    """Only inside the map, and from the original model on."""
    predictions, targets = watch(monkeypatch, Composed, "predictions"), watch(monkeypatch, Composed, "target")
    maps, flags = watch(monkeypatch, MapMaker, "of_batch"), {"sfcm_gamma": 3, "dual_path": dual_path}
    with composed_of(taught, teacher_scale=scale, teacher_base_weight=base_weight, **flags).losses(STAGE2):
        pass
    (reference_pred, full_pred, base_pred, _), sfcm = predictions[0], maps[0]
    assert not torch.equal(full_pred, base_pred)
    # Where it has no weight, the teacher is not asked for the base prompt.
    assert torch.equal(base_pred, reference_pred) == (base_weight == 0)
    change = full_pred - reference_pred - base_weight * (base_pred - reference_pred)
    torch.testing.assert_close(targets[0], reference_pred + scale * sfcm**3 * change)
    assert (targets[0] - reference_pred).abs().max() > 1e-3 or scale == 0


def test_the_teacher_goes_through_a_checkpoint(world, monkeypatch):
    """The student is left as the checkpoint's LoRA has it."""
    first, second = ready(world), prepared(world)
    teacher = one_of("composed", first)
    targets, student = watch(monkeypatch, Composed, "target"), adapter_state(second.parts.models.denoiser, "default")
    going_on = Composed(second.flags, replace(second.parts, alignment=first.parts.alignment))
    going_on.prepare({name: value.clone() for name, value in teacher.state().items()})
    assert difference(going_on.state(), teacher.state()) == 0
    assert difference(adapter_state(second.parts.models.denoiser, "default"), student) == 0
    assert any(value.abs().max() > 0 for name, value in teacher.state().items() if "lora_B" in name)
    for objective in (teacher, going_on):
        with objective.losses(STAGE2):
            pass
    assert torch.equal(*targets)
    for run in (first, second):
        for name, parameter in run.parts.models.denoiser.named_parameters():
            assert parameter.requires_grad == (".lora_" in name and f".{STAGE1_ADAPTER}." not in name), name


# ------------------------------------------------------------------------------------------------- one of one's own


class Small(Objective):
    """A LoRA of small weights."""

    weights = {"small": 2.0}

    def __init__(self, flags, parts) -> None:
        self.models, self.asked = parts.models, []

    @contextmanager
    def losses(self, micro_step):
        self.asked.append(micro_step)
        yield {"small": sum(weight.square().sum() for weight in self.models.adapters.parameters("default"))}


def test_the_step_trains_any_objective_by_its_weights(world):
    run = ready(world, gradient_accumulation_steps=2, optimizer="adamw", max_grad_norm=1e9)
    models, own = run.parts.models, Small(run.flags, run.parts)
    parameters = models.adapters.parameters("default")
    engine = Engine(run.accelerator, parameters, run.flags.optimizer, run.flags.loop, None)
    engine.start_stage(1, 1)
    gradients, update = [], engine.update

    def note_and_update(losses):
        gradients.extend(parameter.grad.clone() for parameter in parameters)
        return update(losses)

    engine.update = note_and_update
    before = [parameter.detach().clone() for parameter in parameters]
    losses = script.train_step(engine, models, [own])
    assert own.asked == [0, 1] and engine.global_step == 1
    assert losses == {"small": pytest.approx(sum(value.square().sum().item() for value in before), rel=1e-5)}
    for gradient, value, parameter in zip(gradients, before, parameters, strict=True):
        torch.testing.assert_close(gradient, 2 * 2 * value)
        assert (parameter.abs() < value.abs())[value.abs() > 0.02].all()


def test_an_objective_that_is_added_is_trained(world, tmp_path, trained, monkeypatch):
    without = trained(stage2_steps=0)
    monkeypatch.setitem(OBJECTIVES, "small", Small)
    monkeypatch.setattr(objectives, "of_stage", lambda stage, method: ("diffusion", "small"))
    losses = watch(monkeypatch, script, "train_step")
    output = train(world, tmp_path / "output", stage2_steps=0, checkpointing_steps=2)
    assert [step.keys() for step in losses] == [{"diffusion", "small"}] * 2
    assert losses[1]["small"] != losses[0]["small"] and (output / "checkpoint-2").is_dir()
    assert difference(output, without) > 1e-3
