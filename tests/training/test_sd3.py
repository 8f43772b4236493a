"""Tests of training on Stable Diffusion 3: flow matching, joint attention, and three text encoders or two.

On a tiny random base model of the real classes. Runs go through `main`, as a user's do.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.hooks import UserCpuOffloadHook
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from sd3_world import write_sd3, write_sd3_lora
from test_train import CARD, WEIGHTS, copy_model, difference, files, prepared, train, watch, watch_runs

import train_spf_portrait_lora as script
from adapters import original_rows
from families.stable_diffusion_3 import T5_TOKENS, StableDiffusion3
from joint_attention import JointAttentionCapture
from pipeline_spf_portrait_3 import SPFPortrait3Pipeline
from programs.original_layout import transformer_weights
from sfcm import SFCM_MODES
from training.engine import Engine
from training.objectives import make_objectives
from training.prompt_table import BASE, EMPTY, FULL


CLIP_TOKENS, BLOCKS = 32, 4  # of the tiny model


@pytest.fixture(scope="session")
def sd3_world(world, tmp_path_factory) -> SimpleNamespace:
    """The tiny world with a Stable Diffusion 3. No test may change it."""
    return SimpleNamespace(**vars(world) | {"model": write_sd3(tmp_path_factory.mktemp("sd3") / "model")})


@pytest.fixture(scope="session")
def without_t5(world, tmp_path_factory) -> SimpleNamespace:
    """The same without T5."""
    return SimpleNamespace(**vars(world) | {"model": write_sd3(tmp_path_factory.mktemp("sd3") / "model", False)})


@pytest.fixture(params=["T5", "no T5"])
def either(request, sd3_world, without_t5) -> SimpleNamespace:
    return sd3_world if request.param == "T5" else without_t5


def load(world, lora=None):
    missing = {} if (world.model / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(world.model, **missing)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline


# -------------------------------------------------------------------------------------------------------- both stages


def test_both_stages_train_and_the_stock_pipeline_loads_the_lora(either, tmp_path):
    output = train(either, tmp_path / "output", num_validation_images=1)
    pictures = {f"validation/{name}.png" for name in ("step_000000", "step_000004", "alignment")}
    assert files(output) == {WEIGHTS, CARD, "run.yaml", f"stage1/{WEIGHTS}", *pictures}
    assert difference(output / "stage1", output) > 0.005

    def draw(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline("a man, red hair", num_inference_steps=2, generator=generator, output_type="np").images

    pipeline = load(either, output)
    layers = {name: own for name, own in pipeline.transformer.named_modules() if isinstance(own, BaseTunerLayer)}
    image = {f"transformer_blocks.{i}.attn.to_{part}" for i in range(BLOCKS) for part in ("q", "k", "v", "out.0")}
    assert layers.keys() == image and {scale for own in layers.values() for scale in own.scaling.values()} == {2.0}
    assert np.abs(draw(pipeline) - draw(load(either))).max() > 1e-4
    card = (output / CARD).read_text(encoding="utf-8")
    assert "- sd3\n" in card and "pipeline_spf_portrait_3.py" in card and "StableDiffusion3Pipeline" in card


def test_all_attention_is_that_of_text_and_image(sd3_world, tmp_path):
    """The last block does not go on with its text, and the second attention is in the first two alone."""
    transformer = load(sd3_world).transformer
    names = StableDiffusion3.lora_targets(transformer, "all")
    assert len(names) == 4 * BLOCKS + 4 * BLOCKS - 1 + 4 * 2 and len(set(names)) == len(names)
    output = train(sd3_world, tmp_path / "output", lora_target="all")
    assert len(load_file(output / WEIGHTS)) == 2 * len(names)


@pytest.mark.parametrize("preservation", ["mask", "prior", "dop", "cat"])
def test_other_ways_to_keep_a_portrait(sd3_world, tmp_path, preservation):
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.loads(line) for line in (sd3_world.data / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        image = Image.open(sd3_world.data / row["file_name"])
        image.save(data / row["file_name"])
        row["mask_file_name"] = f"mask_{row['file_name']}"
        Image.new("L", image.size, 255).save(data / row["mask_file_name"])
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = train(
        sd3_world, tmp_path / "output", train_data_dir=data, preservation=preservation, stage1_steps=3, stage2_steps=0
    )
    assert all(value.isfinite().all() for value in load_file(output / WEIGHTS).values())


def test_a_run_goes_on_exactly(either, tmp_path):
    options = {"stage1_steps": 3, "stage2_steps": 3, "checkpointing_steps": 2, "random_flip": True}
    options |= {"alignment_source": "both"}
    whole = train(either, tmp_path / "whole", **options)
    for step in (2, 4):
        own = tmp_path / f"from_{step}"
        train(either, own, resume_from_checkpoint=whole / f"checkpoint-{step}", **options)
        assert difference(whole, own) == 0


@pytest.mark.parametrize("flags", [{"use_dora": True}, {"mixed_precision": "bf16", "num_validation_images": 1}])
def test_dora_and_half_precision_train(sd3_world, tmp_path, monkeypatch, flags):
    runs = watch_runs(monkeypatch)
    output = train(sd3_world, tmp_path / "output", **flags)
    weights = load_file(output / WEIGHTS)
    assert all(value.isfinite().all() for value in weights.values())
    assert any("magnitude" in name for name in weights) == ("use_dora" in flags)
    dtype = torch.float32 if "use_dora" in flags else torch.bfloat16
    assert {getattr(runs[0].models.pipeline, name).dtype for name in StableDiffusion3.text_encoders} == {dtype}


def test_presence_and_an_earlier_lora(sd3_world, tmp_path):
    earlier = write_sd3_lora(tmp_path / "earlier")
    output = train(
        sd3_world, tmp_path / "output", reference_lora=earlier, reference_lora_scale=0.5, target_presence=1.0
    )
    assert (output / WEIGHTS).is_file()
    stage1 = train(sd3_world, tmp_path / "more", stage1_lora_path=output / "stage1", stage1_steps=0)
    assert (stage1 / WEIGHTS).is_file()


# -------------------------------------------------------------------------------------------------------- equalities


@torch.no_grad()
def test_prompts_are_encoded_as_the_stock_pipeline_does(either):
    parts, stock = prepared(either).parts, load(either)
    count = len(parts.table.distances)
    rows = torch.tensor([FULL * count, BASE * count + 1, EMPTY * count])
    found = parts.table.response(rows, torch.zeros(3, 6))
    assert found.states.shape[1] == CLIP_TOKENS + T5_TOKENS
    for i, text in enumerate(("a woman, a green hat, red hair", "a man, a red hat", "")):
        states, _, pooled, _ = stock.encode_prompt(text, None, None, do_classifier_free_guidance=False)
        torch.testing.assert_close(found.states[i : i + 1], states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.pooled[i : i + 1], pooled, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prompts_encoded_in_each_step_are_those_encoded_once(either, tmp_path):
    tables = [prepared(either, **changes).parts.table for changes in ({}, {"no-cache_text_embeddings": True})]
    for _ in range(2):  # from the cache on the disk as well
        tables.append(prepared(either, cache_dir=tmp_path).parts.table)
    count = len(tables[0].distances)
    rows, sizes = torch.tensor([FULL * count, BASE * count + 1, EMPTY * count]), torch.zeros(3, 6)
    first = tables[0].response(rows, sizes)
    for table in tables[1:]:
        own = table.response(rows, sizes)
        torch.testing.assert_close(own.states, first.states)
        torch.testing.assert_close(own.pooled, first.pooled)


@torch.no_grad()
def test_portraits_are_drawn_as_from_their_prompts(either):
    """By the table's embeddings, with the empty prompt as the negative one."""
    run = prepared(either, num_alignment_images=2, alignment_guidance_scale=3.0)
    calls = []
    pipeline = run.parts.models.pipeline
    with pytest.MonkeyPatch.context() as patch:
        drawing = StableDiffusion3Pipeline.__call__
        patch.setattr(StableDiffusion3Pipeline, "__call__", lambda self, *args, **kwargs: (
            calls.append(kwargs), drawing(self, *args, **kwargs))[1])  # fmt: skip
        script.prepare_alignment(run.flags, run.inputs, run.parts, run.accelerator)
    (call,) = calls
    texts = [pair.base_prompt for pair in run.inputs.pairs[len(run.inputs.rows) :]]
    with run.parts.models.adapters.only(None):
        latents = pipeline(**call).images
        prompts = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        asked = {name: value for name, value in call.items() if name not in prompts} | {"prompt": texts}
        torch.testing.assert_close(pipeline(**asked).images, latents, atol=1e-4, rtol=1e-4)


def first_losses(world, **changes):
    """The loss and gradients of the first batch of stage 2, and its map."""
    run = prepared(world, base_prompt_share=0.5, train_batch_size=4, **changes)
    parts, models = run.parts, run.parts.models
    torch.manual_seed(5)
    for layer in models.adapters.layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    alignment = script.prepare_alignment(run.flags, run.inputs, parts, run.accelerator)
    parts = type(parts)(**{**vars(parts), "alignment": alignment})
    (objective,) = make_objectives(2, run.flags, parts)
    objective.prepare(None)
    with objective.losses(2) as losses:
        losses["composed"].backward()
    gradients = {name: own.grad.clone() for name, own in models.denoiser.named_parameters() if own.grad is not None}
    return losses["composed"].item(), gradients, torch.stack(list(alignment.sfcm))


def test_single_pass_and_checkpointing_compute_the_same(sd3_world):
    options = {"composed_init": "stage1"}
    loss, gradients, maps = first_losses(sd3_world, **options)
    largest = max(value.abs().max() for value in gradients.values())
    for changes in ({"dual_path": "single_pass"}, {"gradient_checkpointing": True}):
        other, own, found = first_losses(sd3_world, **options, **changes)
        torch.testing.assert_close(found, maps, atol=1e-4, rtol=0)
        assert own.keys() == gradients.keys() and other == pytest.approx(loss, rel=1e-4)
        assert max((own[name] - gradients[name]).abs().max() for name in own) < 1e-4 * largest


@torch.no_grad()
def test_without_its_adapters_it_is_the_original_model_to_the_bit(sd3_world):
    parts = prepared(sd3_world).parts
    models, original = parts.models, load(sd3_world).transformer.eval()
    batch = parts.batches.training(parts.training, 0)
    embeds = parts.table.response(batch.rows, batch.time_ids)
    for layer in models.adapters.layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    expected = StableDiffusion3.predict(original, batch.noisy_latents, batch.timesteps, embeds)
    with models.adapters.only(None):
        assert torch.equal(models.predict(batch.noisy_latents, batch.timesteps, embeds), expected)
        with models.capture.store(models.capture.layers) as store, store.record():
            assert torch.equal(models.predict(batch.noisy_latents, batch.timesteps, embeds), expected)
    with original_rows(models.denoiser, range):
        assert torch.equal(models.predict(batch.noisy_latents, batch.timesteps, embeds), expected)
    assert not torch.allclose(models.predict(batch.noisy_latents, batch.timesteps, embeds), expected)


@torch.no_grad()
def test_latents_are_shifted_and_scaled_and_come_back(sd3_world):
    pipeline, pixels = load(sd3_world), torch.rand(2, 3, 16, 16) * 2 - 1
    vae = pipeline.vae
    latents = StableDiffusion3.to_latents(vae, pixels)
    encoded = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents, (encoded - vae.config.shift_factor) * vae.config.scaling_factor)
    torch.testing.assert_close(StableDiffusion3.to_pixels(vae, latents), vae.decode(encoded).sample)


def test_steps_capture_no_attention(sd3_world, tmp_path, monkeypatch):
    """It is asked for while the bank of maps is filled, and never in a step."""
    captured, steps = watch(monkeypatch, JointAttentionCapture, "store"), []
    step = script.train_step
    monkeypatch.setattr(script, "train_step", lambda *given: (steps.append(len(captured)), step(*given))[1])
    train(sd3_world, tmp_path / "output")
    assert len(steps) == 4 and steps[0] == steps[1] == 0 < steps[2] == steps[3] == len(captured)


@pytest.mark.parametrize("mode", SFCM_MODES)
def test_every_map_can_be_trained_with(sd3_world, tmp_path, mode):
    output = train(sd3_world, tmp_path / "output", sfcm_mode=mode)
    assert all(value.isfinite().all() for value in load_file(output / WEIGHTS).values())


# ------------------------------------------------------------------------------------- its transformer in one file


@pytest.fixture(scope="session")
def file(sd3_world, tmp_path_factory):
    """Its transformer in the original layout."""
    file = tmp_path_factory.mktemp("sd3") / "transformer.safetensors"
    tensors = transformer_weights(load(sd3_world).transformer.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16", "num_validation_images": 1}], ids=["", "bf16"])
def test_a_training_from_its_transformer_in_a_file_is_that_of_the_folder(
    sd3_world, file, tmp_path, caplog, options
):
    """Another LoRA is merged first, in float32; the whole text is read without the transformer."""
    caplog.set_level("INFO")
    if not options:
        options = {"reference_lora": write_sd3_lora(tmp_path / "earlier"), "reference_lora_scale": 0.5}
    one = {"pretrained_model_name_or_path": file, "base_config": sd3_world.model}
    folder = train(sd3_world, tmp_path / "folder", **options)
    single = train(sd3_world, tmp_path / "single", **options, **one)
    assert difference(folder, single) == 0.0 and difference(single / "stage1", single) > 0.005
    pictures = [(path.name, path.read_bytes()) for path in sorted((folder / "validation").glob("*.png"))]
    assert pictures == [(path.name, path.read_bytes()) for path in sorted((single / "validation").glob("*.png"))]
    card, name = (single / CARD).read_text(encoding="utf-8"), sd3_world.model.name
    read = "SD3Transformer2DModel.from_single_file("
    assert f"{read}'path/to/{file.name}', config='path/to/{name}', subfolder='transformer', dtype=torch.b" in card
    assert str(file.parent) not in card and str(sd3_world.model.parent) not in card
    if "reference_lora" not in options:
        own = f"from_pretrained({str(sd3_world.model)!r}, transformer={read}{str(file)!r}, config="
        assert f"Draw: pipe = DiffusionPipeline.from_pipe(StableDiffusion3Pipeline.{own}" in caplog.text


def test_a_dry_run_on_its_transformer_in_a_file_reads_no_weight_of_it(
    sd3_world, file, tmp_path, capsys, monkeypatch
):
    printed = []
    monkeypatch.setattr(SD3Transformer2DModel, "from_single_file", lambda *given, **named: pytest.fail("was read"))
    for changes in ({}, {"pretrained_model_name_or_path": file, "base_config": sd3_world.model}):
        train(sd3_world, tmp_path / "output", dry_run=True, **changes)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "CLIP distance" in printed[0]


# ----------------------------------------------------------------------------------------------------------- memory


def test_large_embeddings_stay_on_the_cpu_and_text_encoders_are_let_go(sd3_world, monkeypatch):
    """Seen in their `to`: on a machine without a GPU both places are one."""
    moves = []
    for kind in {type(model) for model in load(sd3_world).components.values() if isinstance(model, torch.nn.Module)}:
        own = kind.to

        def to(self, *place, own=own):
            moves.append((type(self).__name__, str(place[0])))
            return own(self, *place)

        monkeypatch.setattr(kind, "to", to)
    parts = prepared(sd3_world).parts
    order = [name for name, place in moves if not place.startswith("torch.")]
    assert order[order.index("AutoencoderKL") :] == ["AutoencoderKL", "AutoencoderKL", "SD3Transformer2DModel"]
    assert parts.models._kept == {"transformer"} and parts.table.prompt_embeds.states.device.type == "cpu"
    assert parts.models.pipeline.vae.use_slicing


def test_text_encoders_come_one_after_another(sd3_world, monkeypatch):
    """Each leaves before the next one computes."""
    models, events = prepared(sd3_world).parts.models, []
    pipeline, offload = models.pipeline, UserCpuOffloadHook.offload
    names = {id(getattr(pipeline, name)): name for name in StableDiffusion3.text_encoders}
    for name in names.values():
        getattr(pipeline, name).register_forward_pre_hook(lambda *_, name=name: events.append(("computes", name)))

    def leave(self):
        events.append(("leaves", names[id(self.model)]))
        offload(self)

    monkeypatch.setattr(UserCpuOffloadHook, "offload", leave)
    tokenizers = [getattr(pipeline, name) for name in StableDiffusion3.tokenizers]
    ids = torch.tensor(StableDiffusion3.tokenize(tokenizers, [""]))
    with models.encoding():
        StableDiffusion3.encode(pipeline, ids)
        assert events == [(event, name) for name in names.values() for event in ("computes", "leaves")]
    assert not any(hasattr(getattr(pipeline, name), "_hf_hook") for name in names.values())


def test_the_transformer_gives_way_to_t5(sd3_world, monkeypatch):
    models = prepared(sd3_world).parts.models
    pipeline, moves = models.pipeline, []
    for name in ("transformer", "text_encoder_3"):
        kind = type(getattr(pipeline, name))
        own = kind.to
        monkeypatch.setattr(
            kind, "to", lambda self, place, name=name, own=own: (moves.append((name, str(place))), own(self, place))[1]
        )
    forward = pipeline.text_encoder_3.forward
    monkeypatch.setattr(
        pipeline.text_encoder_3, "forward", lambda *args, **kwargs: (moves.append("T5"), forward(*args, **kwargs))[1]
    )
    options = {"num_inference_steps": 1, "output_type": "latent", "height": 16, "width": 16}
    with models.drawing():
        moves.clear()
        pipeline("a woman, a hat", guidance_scale=1.0, **options)
    assert [move for move in moves if move == "T5" or move[0] == "transformer"] == [
        ("transformer", "cpu"), "T5", ("transformer", "cpu")
    ]  # fmt: skip
    assert ("text_encoder_3", "cpu") in moves


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"stage2_objective": "paper"}, "--stage2_objective paper: Stable Diffusion 3 is trained by composed alone"),
        ({"stage2_objective": "both"}, "--stage2_objective both: Stable Diffusion 3 is trained by composed alone"),
        ({"snr_gamma": 5.0}, "--snr_gamma weighs noise by a table of betas, and Stable Diffusion 3 is of flow"),
        ({"output_kohya_format": True}, "--output_kohya_format: a LoRA for Stable Diffusion 3 has no names in it"),
        ({"prediction_type": "epsilon"}, "--prediction_type epsilon: .* is of flow matching, which has one"),
        ({"sfcm_timesteps": (900, 1200)}, "--sfcm_timesteps: HIGH is 1200, above the model's 1000 timesteps"),
        ({"lora_layers": "attn3.to_q"}, "--lora_layers: no layer of the transformer has a name that ends in"),
        ({"resolution": 18}, "--resolution must be a multiple of 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_cannot_do_is_refused_by_its_flag(sd3_world, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(SPFPortrait3Pipeline, "from_pretrained", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit, match=message):
        train(sd3_world, tmp_path / "output", **flags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer/config.json": {"pooled_projection_dim": 50}}, "takes 50 pooled numbers .* have 18"),
        ({"transformer/config.json": {"joint_attention_dim": 64}}, "text of width 64, and text_encoder_3 has 32"),
        ({"transformer/config.json": {"out_channels": 8}}, "takes 4 channels and gives 8"),
        ({"transformer/config.json": {"in_channels": 16, "out_channels": 16}}, "4 latent channels, the denoiser 16"),
        ({"scheduler/scheduler_config.json": {"use_dynamic_shifting": True}}, "use_dynamic_shifting"),
        ({"scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"}}, "not that of flow matching"),
        ({"model_index.json": {"text_encoder_2": [None, None]}}, "without its text_encoder_2"),
        ({"transformer/config.json": {"_class_name": "FluxTransformer2DModel"}}, "the FluxTransformer2DModel of a"),
    ],
)
def test_what_is_no_base_model_is_refused(sd3_world, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(SPFPortrait3Pipeline, "from_pretrained", lambda *args: pytest.fail("weights were loaded"))
    model = copy_model(sd3_world, tmp_path, changes)
    with pytest.raises(SystemExit, match=message):
        train(sd3_world, tmp_path / "output", pretrained_model_name_or_path=model)


def test_a_lora_for_the_other_family_is_refused_by_name(world, sd3_world, tmp_path):
    earlier = write_sd3_lora(tmp_path / "earlier")
    with pytest.raises(SystemExit, match="--reference_lora .*Stable Diffusion 3 LoRA, and the base model is Stable"):
        train(world, tmp_path / "output", reference_lora=earlier, reference_lora_scale=1.0)
    unet = train(world, tmp_path / "unet")
    with pytest.raises(SystemExit, match="--reference_lora .*the base model is Stable Diffusion 3"):
        train(sd3_world, tmp_path / "other", reference_lora=unet, reference_lora_scale=1.0)


def test_latents_that_are_not_finite_are_found_before_any_step(sd3_world, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "start_stage", lambda *args: pytest.fail("a stage was begun"))
    to_latents = StableDiffusion3.to_latents
    monkeypatch.setattr(StableDiffusion3, "to_latents", staticmethod(lambda vae, pixels: to_latents(vae, pixels) / 0))
    with pytest.raises(SystemExit, match=r"metadata.jsonl, line 1: the VAE makes .* not finite"):
        train(sd3_world, tmp_path / "output")


def test_a_dry_run_shows_the_prompts_in_both_parts_of_the_text(sd3_world, tmp_path, capsys):
    train(sd3_world, tmp_path / "output", dry_run=True)
    printed = capsys.readouterr().out
    assert "Nothing was trained" in printed and not (tmp_path / "output").exists()
    assert "red hair  (tokens 8, 9, 39, 40 of the full prompt)" in printed
