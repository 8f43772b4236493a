"""Tests of training on top of earlier LoRAs: the merge, the two paths, what is saved, resumed, told and refused."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from hub_server import HubServer
from huggingface_hub import ModelCard
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load, load_file, save_file
from test_resume import STEPS, assert_same_ending, one_thread  # noqa: F401  (fixture)
from test_train import LAYERS, ROOT, ROWS, WEIGHTS, difference, files, prepared, train, watch, watch_runs

import train_spf_portrait_lora as script
from families.stable_diffusion import StableDiffusion
from loras.loading import ReferenceLora, merge_loras
from pipeline_spf_portrait import SPFPortraitPipeline
from programs.loading import InputError
from prompts import make_prompt_pair
from training import portraits as portraits_module
from training.alignment_prompts import ask_for_reference_targets
from training.arguments import parse_args
from training.flags import LoraFlags
from training.model_checks import find_references
from training.models import load_base_model


CLOSE = 2e-5  # of predictions and embeddings, which the LoRAs move by hundreds of times as much
PROMPT = "a woman, a green hat"
UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
DEFAULTS = {"init_lora_weights": False, "lora_alpha": 3}


# ------------------------------------------------------------------------------------------------------- earlier LoRAs


def stock(world) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_earlier(world, folder: Path, seed: int, text: bool, **changes) -> Path:
    """A LoRA with weights of chance in a folder, in the UNet and perhaps in the text encoder."""
    torch.manual_seed(seed)
    pipeline = stock(world)
    parts = {"unet": UNET_LAYERS} | ({"text_encoder": TEXT_LAYERS} if text else {})
    states = {}
    for part, layers in parts.items():
        model = getattr(pipeline, part)
        model.add_adapter(LoraConfig(r=2, target_modules=list(layers), **DEFAULTS, **changes))
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data *= 0.3
            if ".lora_magnitude_vector." in name:
                parameter.data *= 1.2
        states |= {
            f"{part}_lora_layers": get_peft_model_state_dict(model, adapter_name="default"),
            f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict(),
        }
    StableDiffusionPipeline.save_lora_weights(folder, **states)
    return folder


def to_kohya(lora: Path, path: Path) -> Path:
    """The LoRA as kohya's trainer writes one that has a text encoder's part."""
    state = {}
    for name, weight in load_file(lora / WEIGHTS).items():
        part, layer, side = re.fullmatch(r"(unet|text_encoder)\.(.+)\.lora_([AB])\.weight", name).groups()
        prefix = "lora_unet_" if part == "unet" else "lora_te_text_model_"
        layer = prefix + layer.removeprefix("text_model.").replace(".", "_")
        state[f"{layer}.lora_{'down' if side == 'A' else 'up'}.weight"] = weight
        state[f"{layer}.alpha"] = torch.tensor(float(DEFAULTS["lora_alpha"]))
    save_file(state, path)
    return path


@pytest.fixture(scope="session")
def earlier(world, tmp_path_factory) -> dict[str, Path]:
    """Folders of earlier LoRAs, and one file of kohya's. No test may change them."""
    folder = tmp_path_factory.mktemp("earlier")
    loras = {
        "hair": save_earlier(world, folder / "hair", 1, text=True),
        "hat": save_earlier(world, folder / "hat", 2, text=False),
        "dora": save_earlier(world, folder / "dora", 3, text=False, use_dora=True),
    }
    return loras | {"hair of kohya": to_kohya(loras["hair"], folder / "hair.safetensors")}


def activate(pipeline: StableDiffusionPipeline, loras: list[Path], scales: list[float]) -> StableDiffusionPipeline:
    """Load LoRAs side by side, as users do."""
    names = [f"lora_{i}" for i in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        weight_name = lora.name if lora.is_file() else WEIGHTS
        pipeline.load_lora_weights(lora.parent if lora.is_file() else lora, weight_name=weight_name, adapter_name=name)
    pipeline.set_adapters(names, scales)
    return pipeline


@torch.no_grad()
def predict(pipeline: StableDiffusionPipeline, embeds: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Text embeddings of a prompt, and the UNet's prediction with these or other ones."""
    if embeds is None:
        ids = pipeline.tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt").input_ids
        embeds = pipeline.text_encoder(ids)[0]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, pipeline.unet.config.in_channels, 8, 8, generator=generator)
    return embeds, pipeline.unet(latents, torch.tensor([500]), embeds, return_dict=False)[0]


def largest(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


# ----------------------------------------------------------------------------------------------------------- the merge


@pytest.mark.parametrize(
    "names, scales",
    [
        (["hair of kohya"], [1.0]),
        (["hair", "hat"], [0.7, -0.5]),
        (["hat", "dora", "hair"], [1.0, 0.8, 0.5]),
        *(
            pytest.param(names, scales, marks=pytest.mark.slow)
            for names, scales in ((["hair"], [1.0]), (["hat", "hair"], [0.7, 1.5]), (["dora", "hat"], [0.8, 1.0]))
        ),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_merged_loras_are_those_that_are_active_side_by_side(world, earlier, names, scales):
    loras = [earlier[name] for name in names]
    expected = predict(activate(stock(world), loras, scales))
    merged = stock(world)
    merge_loras(merged, [str(lora) for lora in loras], scales)
    assert not any("lora" in name for model in (merged.unet, merged.text_encoder) for name in model.state_dict())
    assert largest(predict(merged), expected) < CLOSE
    assert (predict(stock(world))[1] - expected[1]).abs().max() > 0.01


def test_a_reference_is_a_file_a_folder_or_neither(world, earlier, tmp_path):
    folder, file = earlier["hair"], earlier["hair"] / WEIGHTS
    digest = hashlib.sha256(file.read_bytes()).hexdigest()

    def find(name, scale):
        return find_references(LoraFlags(reference_lora=[name], reference_lora_scale=[scale]), None)

    assert find(str(folder), 0.5) == (ReferenceLora(str(folder), file, None, digest, 0.5),)
    assert find(str(file), 1.0) == (ReferenceLora(str(file), file, None, digest, 1.0),)
    for name in (tmp_path, tmp_path / "x", "./x", "x", "x.safetensors", "loras/x.safetensors", "a/b/c", "../a/b"):
        with pytest.raises(InputError, match=f"--reference_lora {name}: (no such file or folder|the folder has no)"):
            find(str(name), 1.0)


# ------------------------------------------------------------------------------------------------- a run on top of two


TWO = {"reference_lora_scale": (1.0, 0.6), "learning_rate": 0.05}


@pytest.fixture(scope="module")
def on_top(world, earlier, tmp_path_factory):
    """A run on top of two earlier LoRAs, and its folder. No test may change them."""
    two = earlier["hair"], earlier["hat"]
    before = [hashlib.sha256((lora / WEIGHTS).read_bytes()).digest() for lora in two]
    output = tmp_path_factory.mktemp("on_top") / "output"
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs = watch_runs(monkeypatch)
        train(world, output, **TWO, reference_lora=two, checkpointing_steps=3)
    assert before == [hashlib.sha256((lora / WEIGHTS).read_bytes()).digest() for lora in two]
    return runs[0], output


def test_both_paths_are_those_of_the_loras_side_by_side(world, earlier, on_top):
    run, output = on_top
    earlier_loras = [earlier["hair"], earlier["hat"]]
    reference = predict(activate(stock(world), earlier_loras, [1.0, 0.6]))
    response = predict(activate(stock(world), [*earlier_loras, output], [1.0, 0.6, 1.0]))
    models, table = run.models, run.table
    (row,) = {int(table.reference_rows[i]) for i, row in enumerate(ROWS) if row["base_prompt"] == PROMPT}
    embeds = table.prompt_embeds.states[row][None]
    with models.adapters.only(None):
        assert largest(predict(models.pipeline, embeds), reference) < CLOSE
    with models.adapters.only("default"):
        assert largest(predict(models.pipeline, embeds), response) < CLOSE
    assert largest(reference, response) > 0.01 and largest(reference, predict(stock(world))) > 0.01


def test_the_new_lora_alone_is_saved_and_trained(earlier, on_top):
    run, output = on_top
    for folder in (output, output / "stage1", output / "checkpoint-3"):
        names = load_file(folder / WEIGHTS).keys()
        assert len(names) == LAYERS * 4 * 2 and all(".attn2." in name for name in names)
    assert all(".default." in name for name, value in run.models.denoiser.named_parameters() if value.requires_grad)


@pytest.mark.slow
def test_a_kohya_file_and_diffusers_own_train_the_same_lora(world, trained, earlier, tmp_path):
    kohya = train(world, tmp_path / "kohya", **STEPS, reference_lora=earlier["hair of kohya"])
    assert difference(kohya, trained(**STEPS, reference_lora=earlier["hair"])) < 1e-6


@pytest.mark.slow
def test_without_a_reference_another_lora_is_trained(world, trained, on_top):
    assert difference(on_top[1], trained(learning_rate=0.05)) > 0.01


def test_each_layer_of_a_kohya_file_has_its_own_alpha(world, earlier, tmp_path):
    state, path = load_file(earlier["hair of kohya"]), tmp_path / "mixed.safetensors"
    for name in [name for name in state if name.endswith("to_q.alpha") or name.endswith("q_proj.alpha")]:
        state[name] = state[name] * 4
        state[name.replace(".alpha", ".lora_up.weight")] /= 4
    save_file(state, path)
    flags = parse_args([f"--pretrained_model_name_or_path={world.model}", f"--reference_lora={path}"])
    given = SimpleNamespace(family=StableDiffusion, base_file=None, references=find_references(flags.lora, None))
    pipeline = load_base_model(given, flags.model, torch.float32)
    assert largest(predict(pipeline), predict(activate(stock(world), [earlier["hair"]], [1.0]))) < CLOSE


@pytest.mark.slow
def test_the_new_lora_begins_as_without_earlier_ones(world, earlier, tmp_path):
    flags = {"stage1_steps": 1, "stage2_steps": 0, "learning_rate": 1e-9}
    loras = [train(world, tmp_path / "without", **flags)]
    AcceleratorState._reset_state(reset_partial_state=True)
    loras.append(train(world, tmp_path / "with", **flags, reference_lora=earlier["hair"]))
    assert difference(*loras) < 1e-8


@pytest.mark.slow
def test_in_half_precision_it_is_merged_before_it_is_rounded(world, earlier, tmp_path, monkeypatch):
    runs = watch_runs(monkeypatch)
    train(world, tmp_path / "output", reference_lora=earlier["hair"], mixed_precision="bf16")
    merged = stock(world)
    merge_loras(merged, [str(earlier["hair"])], [1.0])
    for part in ("unet", "text_encoder"):
        found = getattr(runs[0].models.pipeline, part).state_dict()
        for name, weight in getattr(merged, part).state_dict().items():
            own = found[name] if name in found else found[re.sub(r"\.(weight|bias)$", r".base_layer.\1", name)]
            assert own.dtype == torch.bfloat16 and torch.equal(own, weight.bfloat16()), name


@pytest.mark.slow
def test_the_single_pass_trains_the_same(world, earlier, tmp_path):
    loras = []
    for mode in ("two_pass", "single_pass"):
        AcceleratorState._reset_state(reset_partial_state=True)
        flags = {"reference_lora": earlier["hair"], "dual_path": mode, "adam_epsilon": 1e-4}
        loras.append(train(world, tmp_path / mode, **flags, stage2_objective="both"))
    assert difference(*loras) < 1e-4


@pytest.mark.slow
def test_cached_text_embeddings_belong_to_the_text_encoder_that_made_them(world, earlier, tmp_path, monkeypatch):
    tables = watch(monkeypatch, script, "make_prompt_table")
    cache, counts = tmp_path / "cache", []
    for name in (None, "hat", "hair"):
        AcceleratorState._reset_state(reset_partial_state=True)
        reference = None if name is None else earlier[name]
        train(world, tmp_path / f"run of {name}", reference_lora=reference, cache_dir=cache)
        counts.append(len(list(cache.rglob("*.safetensors"))))
    embeds = [table.prompt_embeds.states for table in tables]
    assert torch.equal(embeds[0], embeds[1]) and (embeds[0] - embeds[2]).abs().max() > 0.01
    # The LoRA without a part in the text encoder finds all that is cached.
    assert counts[0] == counts[1] and counts[2] == counts[1] + len(embeds[2])


# ------------------------------------------------------------------------------------------------------------- resumes


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_goes_on_with_the_same_file_at_another_place(world, trained, earlier, tmp_path, step):
    whole = trained(**STEPS, reference_lora=earlier["hair"])
    AcceleratorState._reset_state(reset_partial_state=True)
    moved = shutil.copy(earlier["hair"] / WEIGHTS, tmp_path / "moved.safetensors")
    again = tmp_path / "again"
    shutil.copytree(whole / f"checkpoint-{step}", again / f"checkpoint-{step}")
    train(world, again, **STEPS, reference_lora=moved, resume_from_checkpoint="latest")
    assert_same_ending(again, whole)


def test_a_run_does_not_go_on_with_another_reference(on_top, world, earlier, tmp_path):
    folder = shutil.copytree(earlier["hair"], tmp_path / "hair")
    two = {"reference_lora": (folder, earlier["hat"])}
    output = tmp_path / "output"
    shutil.copytree(on_top[1] / "checkpoint-3", output / "checkpoint-3")
    before = files(output)
    for changes in (
        {**two, "reference_lora_scale": 1.0},
        {"reference_lora": folder, "reference_lora_scale": 1.0},
        {"reference_lora": None, "reference_lora_scale": None},
        {"reference_lora": (earlier["hat"], folder)},
        {**two, "reference_lora": (earlier["dora"], earlier["hat"])},
        two,  # the file at its old place is another one by now
    ):
        if changes is two:
            shutil.copy(earlier["dora"] / WEIGHTS, folder / WEIGHTS)
        with pytest.raises(SystemExit, match=r"checkpoint-3: was trained with reference_lora \(SHA-256, scale\) "):
            train(world, output, **{**TWO, **changes}, checkpointing_steps=3, resume_from_checkpoint="latest")
    assert files(output) == before


# ---------------------------------------------------------------------------------------------- targets of the earlier


def drawn(count: int = 6) -> list:
    return [make_prompt_pair(f"a woman in coat {i}.", "red hair") for i in range(count)]


@pytest.mark.parametrize("count, asked", [(1, 1), (6, 3), (7, 4)])
def test_half_of_the_drawn_portraits_are_asked_for_what_is_there_already(count, asked):
    pairs = drawn(count)
    found = ask_for_reference_targets(pairs, ["sunglasses"], seed=0)
    changed = [(old, new) for old, new in zip(pairs, found, strict=True) if old != new]
    assert len(changed) == asked
    for old, new in changed:
        assert new.base_prompt == f"{old.base_prompt.rstrip('.')}, sunglasses"
        assert new.full_prompt == f"{old.base_prompt.rstrip('.')}, sunglasses, red hair"
        assert new.base_phrases == (*old.base_phrases, "sunglasses") and new.target_prompts == old.target_prompts
    assert found == ask_for_reference_targets(pairs, ["sunglasses"], seed=0)


def test_several_targets_come_alone_together_and_not_at_all():
    found = ask_for_reference_targets(drawn(40), ["sunglasses", "a scarf"], seed=1)
    kinds = [("sunglasses" in pair.base_prompt, "a scarf" in pair.base_prompt) for pair in found]
    assert len(set(kinds)) == 4 and [sum(column) for column in zip(*kinds)] == [20, 20]
    other = ask_for_reference_targets(drawn(40), ["sunglasses", "a scarf"], seed=2)
    assert found != other


def test_a_prompt_that_has_the_target_stays_and_a_phrase_that_contradicts_it_gives_way():
    pairs = [
        make_prompt_pair("a woman, Blonde Hair", "a crown"),
        make_prompt_pair("A man with brown hair, in a suit.", [("a suit", "a robe")], free_phrases=["brown hair"]),
        make_prompt_pair("a man in a suit", "a crown"),
    ]
    found = set(ask_for_reference_targets(pairs * 20, ["blonde hair"], seed=0))
    assert {pair.base_prompt for pair in found} == {
        "a woman, Blonde Hair", "A man with brown hair, in a suit.", "A man with blonde hair, in a suit.",
        "a man in a suit", "a man in a suit, blonde hair",
    }  # fmt: skip
    (given,) = (pair for pair in found if "blonde" in pair.base_prompt and "A man" in pair.base_prompt)
    assert given.full_prompt == "A man with blonde hair, in a robe."
    assert given.base_phrases == ("A man", "blonde hair") and given.free_phrases == ()


def test_a_new_target_with_the_same_noun_is_warned_about(caplog):
    ask_for_reference_targets(drawn(), ["blonde hair", "a scarf"], seed=0)
    (record,) = caplog.records
    assert record.message == "--reference_target_prompt 'blonde hair' may contradict the new target 'red hair'"


@pytest.mark.parametrize("text", ["red hair", "Red  Hair", "hair", "long red hair"])
def test_an_earlier_target_is_not_the_new_one(text):
    with pytest.raises(ValueError, match=f"--reference_target_prompt '{text}' overlaps .* 'red hair'"):
        ask_for_reference_targets(drawn(), [text], seed=0)


def test_the_portraits_are_drawn_from_those_prompts(world, earlier, tmp_path, monkeypatch):
    inputs = watch(monkeypatch, script, "check_inputs")
    asked, draw_latents = [], portraits_module.draw_latents

    def watched(pipeline, prompts, **kwargs):
        asked.extend(prompts)
        return draw_latents(pipeline, prompts, **kwargs)

    monkeypatch.setattr(portraits_module, "draw_latents", watched)
    flags = {"reference_lora": earlier["hair"], "reference_target_prompt": ("sunglasses",), "num_alignment_images": 4}
    train(world, tmp_path / "output", **flags)
    assert sum(prompt.endswith(", sunglasses") for prompt in asked) == 2 and len(asked) == 4
    drawn_pairs = inputs[0].pairs[len(ROWS) :]
    assert [pair.base_prompt for pair in drawn_pairs] == asked
    assert all(("sunglasses" in pair.base_phrases) == ("sunglasses" in pair.full_prompt) for pair in drawn_pairs)


# ------------------------------------------------------------------------------------------------ what others are told


def run_card(code: str, names: dict[str, str]) -> StableDiffusionPipeline:
    """Run an example of the card on this machine; `names` has the real place of each name in it."""
    for name, real in {**names, '"cuda"': '"cpu"', "float16": "float32"}.items():
        assert name in code
        code = code.replace(name, real)
    code = re.sub(r"^(image|output)\b.*$", "", code, flags=re.MULTILINE)
    found = {}
    exec(compile(code, "card", "exec"), found)
    return found["pipe"]


def test_the_card_shows_how_to_load_both_and_names_no_folder(world, earlier, on_top):
    run, output = on_top
    card = ModelCard.load(output / "README.md")
    assert str(earlier["hair"].parent) not in card.content and card.content.count("reference_lora`") == 0
    assert card.text.count("an earlier LoRA that is not on the Hub, at scale") == 2
    side_by_side, merged = re.findall(r"```py\n(.*?)```", card.text, re.DOTALL)
    expected = predict(activate(stock(world), [earlier["hair"], earlier["hat"], output], [1.0, 0.6, 1.0]))
    for code, pipeline_file in ((side_by_side, None), (merged, ROOT / "pipeline_spf_portrait.py")):
        for name in ("hair", "hat"):
            code = code.replace("path/to/the/earlier/lora", str(earlier[name]), 1)
        names = {
            f"path/to/{world.model.name}": str(world.model),
            f"'{output.name}'": repr(str(output)),
        }
        if pipeline_file is not None:
            names["path/to/pipeline_spf_portrait.py"] = str(pipeline_file)
        assert largest(predict(run_card(code, names)), expected) < CLOSE


def test_our_pipeline_compares_with_the_merged_model(world, earlier, on_top):
    pipeline = SPFPortraitPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    activate(pipeline, [earlier["hair"], earlier["hat"]], [1.0, 0.6])
    shared = {"num_inference_steps": 2, "output_type": "np"}
    expected = pipeline(PROMPT, **shared, generator=torch.Generator().manual_seed(0)).images
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(on_top[1], adapter_name="spf")
    generator = torch.Generator().manual_seed(0)
    found = pipeline(PROMPT, target_prompt="red hair", compare=True, **shared, generator=generator)
    assert np.abs(found.reference_images - expected).max() < 1e-4
    assert np.abs(found.images - expected).max() > 1e-3


@pytest.mark.slow
def test_a_reference_of_the_hub_is_found_and_named(world, earlier, tmp_path):
    with HubServer("tester", "hf_SECRETofTheTester") as server, server.here(tmp_path / "home"):
        server.repos["tester/hair"] = {WEIGHTS: (earlier["hair"] / WEIGHTS).read_bytes()}
        server.repos["tester/loras"] = {"kohya/hair.safetensors": earlier["hair of kohya"].read_bytes()}
        for repository in server.repos:
            server.add_commit(repository)
        for i, (name, told) in enumerate(
            {
                "tester/hair": f"https://huggingface.co/tester/hair), file `{WEIGHTS}`, at scale 1",
                "tester/loras/kohya/hair.safetensors": "loras), file `kohya/hair.safetensors`, at scale 1",
            }.items()
        ):
            AcceleratorState._reset_state(reset_partial_state=True)
            output = train(world, tmp_path / f"output {i}", reference_lora=name, cache_dir=tmp_path / "cache")
            assert told in (output / "README.md").read_text(encoding="utf-8")
        for name, told in {"tester/none": "nor found on the Hub", "tester/loras": "name the file, as in"}.items():
            with pytest.raises(SystemExit) as stop:
                train(world, tmp_path / "output", reference_lora=name)
            assert f"error: --reference_lora {name}: " in stop.value.code and told in stop.value.code
            assert "\n" not in stop.value.code
    assert difference(tmp_path / "output 0", tmp_path / "output 1") < 1e-6


def test_a_dry_run_names_the_earlier_loras(world, earlier, tmp_path, capsys):
    train(world, tmp_path / "output", reference_lora=earlier["hat"], reference_lora_scale=0.5, dry_run=True)
    assert f"earlier LoRA   {earlier['hat']}  (scale 0.5)\n" in capsys.readouterr().out


def test_a_dry_run_shows_the_distances_with_an_earlier_loras_text_part(world, earlier, tmp_path, capsys):
    flags = {"reference_lora": earlier["hair"], "reference_lora_scale": 0.5}
    distances = prepared(world, **flags).parts.table.distances
    train(world, tmp_path / "output", dry_run=True, **flags)
    shown = [float(text) for text in re.findall(r"CLIP distance ([\d.]+)", capsys.readouterr().out)]
    assert shown[:2] == pytest.approx(distances[0, :2].tolist(), abs=6e-4)


# ----------------------------------------------------------------------------------------------------------- bad input


def spoil(kind: str, path: Path) -> str:
    """Make another thing of the LoRA in a file; returns what its refusal says."""
    state = load(path.read_bytes())  # mapped from the file, it would change with it
    first = next(name for name in sorted(state) if name.startswith("unet."))
    if kind == "nothing there":
        path.unlink()
        return "the folder has no pytorch_lora_weights.safetensors"
    if kind == "pickle":
        torch.save(state, path)
        return "a pickle is not read"
    if kind == "half a file":
        path.write_bytes(path.read_bytes()[:-100])
        return "no safetensors file"
    if kind == "no LoRA":
        state = {"conv_in.weight": torch.ones(2)}
        says = "'conv_in.weight' is no LoRA weight of"
    elif kind == "no weights":
        state, says = {}, "holds no LoRA"
    elif kind == "another base":
        state = {
            name: torch.cat([weight] * 2, 1).contiguous() if ".attn2.to_k.lora_A" in name else weight
            for name, weight in state.items()
        }
        says = "is for another architecture"
    elif kind == "another text encoder":
        state = {
            name: torch.cat([weight] * 2, 1).contiguous() if ".q_proj.lora_A" in name else weight
            for name, weight in state.items()
        }
        says = "is for another architecture"
    elif kind == "another architecture":
        state = {name.replace("unet.down_blocks.0", "unet.down_blocks.7"): weight for name, weight in state.items()}
        says = "there is no layer unet.down_blocks.7."
    elif kind == "a transformer":
        state = {name.replace("unet.", "transformer."): weight for name, weight in state.items()}
        says = "is no LoRA weight of Stable Diffusion's UNet or text encoder"
    elif kind == "half a pair":
        layer = first.rsplit(".lora_", 1)[0]
        del state[f"{layer}.lora_B.weight"]
        says = "has no lora_up"
    elif kind == "LoHa":
        state = {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(2, 2)}
        says = "is no weight that a LoRA of Stable Diffusion 1.x, 2.x or XL has"
    elif kind == "DoRA of kohya":
        state = {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.ones(2, 1)}
        says = "a DoRA in kohya's format"
    elif kind == "half a pair of kohya":
        state = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 2)}
        says = "has no lora_up"
    elif kind == "SDXL":
        layer = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
        state = {f"{layer}.lora_down.weight": torch.ones(2, 16), f"{layer}.lora_up.weight": torch.ones(32, 2)}
        says = "this is an SDXL LoRA, and the base model is Stable Diffusion 1.x or 2.x"
    save_file(state, path)
    return says


KINDS = (
    "nothing there", "pickle", "half a file", "no LoRA", "no weights", "another base", "another text encoder",
    "another architecture", "a transformer", "half a pair", "LoHa", "DoRA of kohya", "half a pair of kohya", "SDXL",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_lora_of_this_base_model_is_refused(refusal, earlier, tmp_path, kind):
    folder = shutil.copytree(earlier["hair"], tmp_path / "reference")
    says = spoil(kind, folder / WEIGHTS)
    message = refusal(reference_lora=folder)
    assert message.startswith(f"--reference_lora {folder}: ") and says in message


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"reference_lora": None, "reference_lora_scale": 0.5}, ["--reference_lora_scale needs --reference_lora"]),
        ({"reference_lora_scale": "nan"}, ["--reference_lora_scale", "nan"]),
        ({"reference_target_prompt": " "}, ["--reference_target_prompt", "empty"]),
        ({"reference_target_prompt": "a hat", "stage2_steps": 0}, ["--reference_target_prompt", "draw none"]),
        ({"reference_target_prompt": "a hat", "alignment_source": "data"}, ["--reference_target_prompt", "draw none"]),
        ({"reference_target_prompt": "red hair"}, ["--reference_target_prompt 'red hair'", "'red hair'"]),
        ({"reference_target_prompt": "very " * 80 + "old"}, ["--reference_target_prompt", "'red hair' does not fit"]),
        ({"stage1_lora_path": "dora", "stage1_steps": 0}, ["--stage1_lora_path", "DoRA", "--reference_lora"]),
        ({"reference_lora": "some/where"}, ["--reference_lora some/where", "nor found on the Hub"]),
        ({"reference_lora": ("hair", "hat", "hair")}, ["--reference_lora", "hair", "twice"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_flags_that_do_not_go_together(refusal, earlier, flags, parts):
    known = lambda name: str(earlier.get(name, name)) if isinstance(name, str) else name  # noqa: E731
    flags = {
        name: tuple(map(known, value)) if isinstance(value, tuple) else known(value) for name, value in flags.items()
    }
    message = refusal(**{"reference_lora": earlier["hair"], **flags})
    for part in parts:
        assert part in message, message
