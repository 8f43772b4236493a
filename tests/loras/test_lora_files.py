"""LoRA files: loaded whole or refused in one line, and read and written in both formats."""

import argparse
import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_hub
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_hub import ATTENTION, CLOSE, FULL, adapted_unet, draw, save_adapter, save_lora

import app
import evaluate_spf_portrait
import export_spf_portrait_lora
import train_spf_portrait_lora
from evaluation.inputs import find_loras
from loras import KOHYA_WEIGHTS, LORA_WEIGHTS
from loras.finding import clean_source, find_lora, find_on_hub
from loras.loading import load_lora, merge_loras
from loras.reading import read_lora
from loras.writing import save_diffusers_lora, save_kohya_lora
from pipeline_spf_portrait import SPFPortraitPipeline
from programs.loading import load_pipeline
from toy_portraits.recipe import BASE_MODEL, HERE, LORA


world = test_hub.world
LORA_FILE = LORA / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_pipeline(StableDiffusionPipeline, str(BASE_MODEL), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def without_lora(pipeline):
    yield
    pipeline.unload_lora_weights()


def toy_image(pipeline):
    options = {"num_inference_steps": 1, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a woman, blonde hair", **options).images


def write_lora(path, change):
    """The toy LoRA with each name and tensor changed."""
    tensors = load_file(LORA_FILE)
    save_file(dict(change(key, tensor.clone()) for key, tensor in tensors.items()), path)
    return path


def test_a_lora_is_loaded_from_file_and_folder(pipeline):
    before = toy_image(pipeline)
    load_lora(pipeline, str(LORA_FILE), "file")
    assert pipeline.get_active_adapters() == ["file"]
    from_file = toy_image(pipeline)
    assert (from_file != before).any()
    load_lora(pipeline, str(LORA), "folder")
    assert pipeline.get_active_adapters() == ["folder"]
    assert (toy_image(pipeline) == from_file).all()


# What a file of another kind holds, and what is said of it.
WRONG = {
    "another_layer": (lambda key, tensor: (key.replace("down_blocks.0", "down_blocks.9"), tensor), "no layer unet."),
    "another_model": (lambda key, tensor: (key.replace("unet.", "transformer."), tensor), "is no LoRA weight"),
    "shape": (lambda key, tensor: (key, torch.cat([tensor] * 2, 1) if "lora_A" in key else tensor), "features, not"),
    "no_lora": (lambda key, tensor: (key.replace("lora", "weight"), tensor), "is no LoRA weight"),
}


@pytest.mark.parametrize("former", [False, True], ids=["without_another", "with_another"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_lora_that_does_not_fit_is_one_line_and_leaves_the_former(pipeline, tmp_path, kind, former):
    if former:
        load_lora(pipeline, str(LORA), "former")
    before = toy_image(pipeline)
    change, message = WRONG[kind]
    path = write_lora(tmp_path / "x.safetensors", change)
    with pytest.raises(ValueError) as raised:
        load_lora(pipeline, str(path), "new")
    assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert pipeline.get_active_adapters() == (["former"] if former else [])
    assert (toy_image(pipeline) == before).all()
    load_lora(pipeline, str(LORA), "next")
    assert pipeline.get_active_adapters() == ["next"]


def test_what_is_no_lora_file_is_named(pipeline, tmp_path):
    damaged, text, empty, several = (tmp_path / n for n in ("a.safetensors", "a.txt", "empty", "several"))
    damaged.write_bytes(b"no tensors at all")
    text.write_text("text", encoding="utf-8")
    empty.mkdir()
    several.mkdir()
    for name in ("one", "two"):
        shutil.copy(LORA_FILE, several / f"{name}.safetensors")
    cases = {
        damaged: "header",
        text: "not a .safetensors file",
        empty: "0 .safetensors files",
        several: "2 .safetensors files",
        tmp_path / "missing": "no such file or folder",
        "missing.safetensors": "no such file or folder",
        "nobody/": "no such file or folder",
        "nobody/nothing": "nobody/nothing: .*(offline|cache)",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message) as raised:
            load_lora(pipeline, str(path), "new")
        assert str(raised.value).startswith(f"{path}: ")


def test_where_a_lora_is_looked_for(tmp_path):
    shutil.copy(LORA_FILE, tmp_path / "only.safetensors")
    assert find_lora(str(tmp_path)) == tmp_path / "only.safetensors"
    shutil.copy(LORA_FILE, tmp_path)
    assert find_lora(str(tmp_path)) == tmp_path / LORA_FILE.name


# ------------------------------------------------------------------------------------- numbers, metadata, embeddings


def write_kohya(path, change=lambda key, tensor: (key, tensor), **more):
    """The toy LoRA in kohya's format, with each name and tensor changed and others added."""
    save_kohya_lora(LORA_FILE, path)
    save_file({**dict(change(key, tensor) for key, tensor in load_file(path).items()), **more}, path)
    return path


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def write_metadata(path, metadata):
    save_file(load_file(LORA_FILE), path, {"lora_adapter_metadata": json.dumps(metadata)})
    return path


def spoil(part, value):
    """A change of one value of one layer's tensor."""

    def change(key, tensor):
        if "down_blocks" in key and f"attn2{part}" in key.replace("_to_q", ".to_q"):
            tensor.view(-1)[-1] = value
        return key, tensor

    return change


LAYER = r"unet\.down_blocks\S*attn2\S*to_q"
TRAINING = [
    "--pretrained_model_name_or_path", BASE_MODEL, "--clip_model_name_or_path", BASE_MODEL / "clip",
    "--train_data_dir", HERE / "blonde_hair", "--resolution", 64, "--output_dir", "out",
]  # fmt: skip
NAN, ALPHA = float("nan"), r"alpha is not a number \("
# How a file of numbers that are none is made, and what every reader of it says.
NO_NUMBERS = {
    "nan": (lambda path: write_lora(path, spoil(".to_q.lora_B", NAN)), rf"weights .* \(NaN\) in layer {LAYER}"),
    "infinite": (
        lambda path: write_lora(path, spoil(".to_q.lora_A", float("-inf"))),
        rf"weights .* \(infinite\) in layer {LAYER}",
    ),
    "kohya": (lambda path: write_kohya(path, spoil(".to_q.lora_up", NAN)), rf"weights .* \(NaN\) in layer {LAYER}"),
    "kohyas_alpha": (lambda path: write_kohya(path, spoil(".to_q.alpha", NAN)), rf"{ALPHA}.*nan.*\) in layer"),
    "alpha": (
        lambda path: write_metadata(path, metadata_of(LORA_FILE) | {"unet.lora_alpha": float("inf")}),
        rf"{ALPHA}inf\) in layer unet",
    ),
    "pattern": (
        lambda path: write_metadata(path, metadata_of(LORA_FILE) | {"unet.alpha_pattern": {"attn2.to_q": [1]}}),
        rf"{ALPHA}\[1\]\) in layer .*to_q",
    ),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_a_lora_of_no_numbers_is_refused_with_file_and_layer(pipeline, tmp_path, kind):
    write, message = NO_NUMBERS[kind]
    path = write(tmp_path / "x.safetensors")
    ours = SPFPortraitPipeline(**pipeline.components, requires_safety_checker=False)
    readers = {
        "load_lora": lambda: load_lora(pipeline, str(path), "new"),
        "merge_loras": lambda: merge_loras(pipeline, [str(path)], [1.0]),
        "convert": lambda: save_diffusers_lora(path, tmp_path / "out"),
        "the pipeline": lambda: ours.load_lora_weights(path),
        "the pipeline, by name": lambda: ours.load_lora_weights(tmp_path, weight_name=path.name),
    }
    for reader, read in readers.items():
        with pytest.raises(ValueError, match=rf"{path}: its {message}") as raised:
            read()
        assert "\n" not in str(raised.value), reader
    assert not pipeline.get_list_adapters() and not (tmp_path / "out").exists()


PROGRAMS = {
    "page": (app, ["--lora"], []),
    "kohya": (export_spf_portrait_lora, ["--lora"], ["--output_kohya", "out/k.safetensors"]),
    "diffusers": (export_spf_portrait_lora, ["--lora"], ["--output_diffusers", "out/d"]),
    "merged": (export_spf_portrait_lora, ["--base_model", BASE_MODEL, "--lora"], ["--output_merged", "out/m"]),
    "evaluation": (evaluate_spf_portrait, ["--toy", "blonde_hair", "--output_dir", "out", "--lora"], []),
    "reference": (train_spf_portrait_lora, [*TRAINING, "--reference_lora"], []),
    "stage1": (train_spf_portrait_lora, [*TRAINING, "--stage1_steps", 0, "--stage1_lora_path"], []),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_refuses_it_in_one_line(tmp_path, monkeypatch, program):
    path = write_lora(tmp_path / "x.safetensors", spoil(".to_q.lora_B", NAN))
    module, before, after = PROGRAMS[program]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        module.main([str(flag) for flag in (*before, path, *after)])
    assert re.search(rf"error: .*{path}: its weights are not numbers \(NaN\) in layer {LAYER}$", stop.value.code)
    assert "\n" not in stop.value.code
    written = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {".safetensors"} and not list(tmp_path.glob("out/*.*"))


def test_a_sum_that_is_no_number_names_the_loras(pipeline, tmp_path):
    path = write_lora(tmp_path / "x.safetensors", lambda key, tensor: (key, tensor * 1e25))
    with pytest.raises(ValueError, match=rf"^2 x {path}: the base model's weights with this are not numbers$"):
        merge_loras(pipeline, [str(path)], [2.0])


# Metadata of a file with all ranks and layers as they are, and the alpha of all layers that is meant.
PARTIAL = {
    "rank_and_alpha_alone": (lambda whole: {"unet.r": whole["unet.r"], "unet.lora_alpha": 3}, 3),
    "alpha_alone": (lambda whole: {"unet.lora_alpha": 3}, 3),
    "no_alpha": (lambda whole: {k: v for k, v in whole.items() if k != "unet.lora_alpha"}, None),
    "null": (lambda whole: whole | {"unet.lora_alpha": None}, None),
    "text": (lambda whole: whole | {"unet.lora_alpha": "3"}, 3),
    "of_the_other_model": (lambda whole: {"text_encoder.lora_alpha": 3}, None),
}


@pytest.mark.parametrize("kind", PARTIAL)
def test_partial_metadata_is_completed_from_the_file(pipeline, tmp_path, kind):
    change, alpha = PARTIAL[kind]
    whole = metadata_of(LORA_FILE)
    path = write_metadata(tmp_path / "x.safetensors", change(whole))
    load_lora(pipeline, str(path), "partial")
    found = toy_image(pipeline)
    meant = whole | {"unet.lora_alpha": whole["unet.r"] if alpha is None else alpha}
    load_lora(pipeline, str(write_metadata(tmp_path / "meant.safetensors", meant)), "whole")
    assert np.abs(found - toy_image(pipeline)).max() < CLOSE
    load_lora(pipeline, str(write_metadata(tmp_path / "other.safetensors", meant | {"unet.lora_alpha": 50})), "other")
    assert np.abs(found - toy_image(pipeline)).max() > 1e-3


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "its metadata lora_adapter_metadata is no JSON"),
        ("[1]", "has another form than diffusers writes"),
        ('{"unet.alpha_pattern": [1]}', "has another form than diffusers writes"),
        ('{"unet.alpha_pattern": {"(": 1}}', "unet.alpha_pattern has a name that is no pattern"),
        ('{"unet.lora_alpha": "much"}', r"its alpha is not a number \(much\) in layer unet"),
    ],
)
def test_metadata_of_another_form_is_one_line(pipeline, tmp_path, metadata, message):
    path = tmp_path / "x.safetensors"
    save_file(load_file(LORA_FILE), path, {"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        load_lora(pipeline, str(path), "new")


def test_metadata_of_another_version_of_peft_is_one_line(pipeline, tmp_path):
    path = write_metadata(tmp_path / "x.safetensors", metadata_of(LORA_FILE) | {"unet.use_tomorrow": True})
    with pytest.raises(ValueError, match=f"^{path}: .*use_tomorrow") as raised:
        load_lora(pipeline, str(path), "new")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", ["target_modules", "lora_alpha"])
def test_the_pipeline_names_what_partial_metadata_lacks(pipeline, tmp_path, missing):
    metadata = {key: value for key, value in metadata_of(LORA_FILE).items() if key != f"unet.{missing}"}
    path = write_metadata(tmp_path / "x.safetensors", metadata)
    ours = SPFPortraitPipeline(**pipeline.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=f"The LoRA {path}: its metadata tells no {missing} of the unet's layers"):
        ours.load_lora_weights(path)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_textual_inversion_beside_a_lora_is_left_out_and_said(pipeline, tmp_path, caplog, form):
    path, embedding = tmp_path / "x.safetensors", {"bundle_emb.mytok.clip_l": torch.ones(2, 64)}
    if form == "kohya":
        write_kohya(path, **embedding)
    else:
        with safe_open(LORA_FILE, "pt") as file:
            save_file({**load_file(LORA_FILE), **embedding}, path, file.metadata())
    load_lora(pipeline, str(path), "bundled")
    assert [record.message for record in caplog.records] == [
        f"{path}: holds a textual inversion (mytok), which is left out: only the LoRA is read"
    ]
    found = toy_image(pipeline)
    caplog.clear()
    load_lora(pipeline, str(LORA), "alone")
    assert np.abs(found - toy_image(pipeline)).max() < CLOSE and not caplog.records
    ours = SPFPortraitPipeline(**pipeline.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=f"The LoRA {tmp_path}/x.safetensors: holds a textual inversion beside"):
        ours.load_lora_weights(tmp_path, weight_name=path.name)


# --------------------------------------------------------------------------------------------------- how it is named


def test_what_is_copied_along_with_a_name_is_taken_off(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my loras").mkdir()
    path = shutil.copy(LORA_FILE, tmp_path / "my loras" / "x.safetensors")
    for source in (f'"{path}"', f" '{path}' ", "~/my loras/x.safetensors", '"~/my loras"'):
        assert find_lora(source) == path and find_on_hub(source) is None
    load_lora(pipeline, f'"{path}"', "quoted")
    with pytest.raises(ValueError, match='^"/nowhere": no such file or folder$'):
        load_lora(pipeline, '"/nowhere"', "new")


def test_an_evaluation_calls_a_lora_by_what_it_is(tmp_path):
    path = shutil.copy(LORA_FILE, tmp_path / "x.safetensors")
    (found,) = find_loras(argparse.Namespace(reference_lora=None, lora=[f"'{path}'"], checkpoints=None))
    assert (found.name, found.path) == ("x", path)


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("https://huggingface.co/user/name", ("user/name", LORA_WEIGHTS)),
        ("https://huggingface.co/user/name/", ("user/name", LORA_WEIGHTS)),
        ("http://hf.co/user/name/tree/main", ("user/name", LORA_WEIGHTS)),
        ("https://huggingface.co/user/name/tree/main/a/b", ("user/name", f"a/b/{LORA_WEIGHTS}")),
        ("https://huggingface.co/user/name/blob/main/x%20y.safetensors", ("user/name", "x y.safetensors")),
        ("'https://huggingface.co/user/name/resolve/main/a/x.safetensors?download=true'",
         ("user/name", "a/x.safetensors")),
        ("user/name", ("user/name", LORA_WEIGHTS)),
        ("user/name/x.safetensors", ("user/name", "x.safetensors")),
        ("user/name/a/x.safetensors", ("user/name", "a/x.safetensors")),
    ],
)  # fmt: skip
def test_an_address_of_the_hub_is_read(address, place):
    assert find_on_hub(address) == place
    assert find_on_hub(clean_source(address)) == place


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://civitai.com/models/1", "not the address of a LoRA on the Hub"),
        ("https://huggingface.co/datasets/user/name", "not the address of a LoRA on the Hub"),
        ("https://huggingface.co/user", "not the address of a LoRA on the Hub"),
        ("https://huggingface.co/user/name/tree/v2", "of the revision 'v2', and only main is read"),
        ("https://huggingface.co/user/name/blob/main/x.ckpt", "not a .safetensors file"),
    ],
)
def test_another_address_is_one_line(pipeline, address, message):
    with pytest.raises(ValueError, match=f"^{address}: {message}"):
        load_lora(pipeline, address, "new")


def edit_lora(path: Path, change, metadata: bool = True) -> Path:
    """The file with other tensors, or without its metadata."""
    with safe_open(path, "pt") as file:
        kept = file.metadata()
    save_file(change(load_file(path)), path, kept if metadata else None)
    return path


LORAS = {
    "alpha": {},
    "patterns": {"rank_pattern": {"attn1.to_q": 3}, "alpha_pattern": {"attn2.to_v": 1, ".*attn1.to_k": 5}},
    "rslora": {"use_rslora": True, "rank_pattern": {"to_v": 3}},
    # With PEFT's names: diffusers loses its own names for the attention where the file's first name is PEFT's.
    "layers": {
        "rename": False,
        "target_modules": [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1"],
    },
}


# -------------------------------------------------------------------------------------------------------- both formats


@pytest.mark.parametrize("changes", LORAS.values(), ids=LORAS)
def test_the_kohya_file_draws_the_same_image(world, tmp_path, changes):
    lora = save_lora(world, tmp_path, **changes)
    save_kohya_lora(lora, tmp_path / KOHYA_WEIGHTS)
    expected, found = draw(world, lora), draw(world, tmp_path / KOHYA_WEIGHTS)
    assert np.abs(found - expected).max() < CLOSE
    assert np.abs(draw(world, None) - expected).max() > 1e-2
    # The alphas decide: with those of diffusers' converter the image is another.
    edit_lora(
        tmp_path / KOHYA_WEIGHTS,
        lambda state: {
            name: torch.tensor(float(len(state[name.replace("alpha", "lora_down.weight")])))
            if name.endswith("alpha")
            else tensor
            for name, tensor in state.items()
        },
    )
    assert np.abs(draw(world, tmp_path / KOHYA_WEIGHTS) - expected).max() > 1e-3


def test_names_and_tensors_are_those_of_diffusers_own_converter_but_for_alpha(world, tmp_path):
    unet = adapted_unet(world)
    save_kohya_lora(save_lora(world, tmp_path), tmp_path / KOHYA_WEIGHTS)
    found = load_file(tmp_path / KOHYA_WEIGHTS)
    peft = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet, adapter_name="default").items()}
    expected = convert_state_dict_to_kohya(peft)
    assert found.keys() == expected.keys()
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in found
    for name, tensor in found.items():
        if name.endswith(".alpha"):
            assert tensor.item() == 8 and expected[name].item() == 2
        else:
            assert torch.equal(tensor, expected[name])


def test_kohya_metadata(world, tmp_path):
    def metadata(**changes):
        save_kohya_lora(save_lora(world, tmp_path, **changes), tmp_path / KOHYA_WEIGHTS)
        with safe_open(tmp_path / KOHYA_WEIGHTS, "pt") as file:
            return file.metadata()

    expected = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "8.0"}
    assert metadata() == {**expected, "ss_v2": "False"}
    mixed = metadata(rank_pattern={"to_q": 3})
    assert (mixed["ss_network_dim"], mixed["ss_network_alpha"]) == ("Dynamic", "8.0")


def test_a_lora_of_stable_diffusion_2_says_so(world, tmp_path):
    def widen(state):
        return {
            name: torch.zeros(len(tensor), 1024) if "attn2.to_k.lora.down" in name else tensor
            for name, tensor in state.items()
        }

    lora = edit_lora(save_lora(world, tmp_path), widen)
    save_kohya_lora(lora, tmp_path / KOHYA_WEIGHTS)
    with safe_open(tmp_path / KOHYA_WEIGHTS, "pt") as file:
        assert file.metadata()["ss_v2"] == "True"


def test_a_dora_magnitude_goes_into_the_file_with_one_number_an_output(world, tmp_path):
    """diffusers drops `dora_scale`, so the file's weights are put together here and compared with PEFT's."""
    modules = [*ATTENTION, "conv1"]
    unet = adapted_unet(world, use_dora=True, target_modules=modules)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "magnitude" in name:
                parameter *= 1.5  # otherwise the magnitude is the one that it starts with
    save_kohya_lora(save_adapter(unet, tmp_path), tmp_path / KOHYA_WEIGHTS)
    state = load_file(tmp_path / KOHYA_WEIGHTS)
    checked = 0
    for name, layer in unet.named_modules():
        if not hasattr(layer, "lora_magnitude_vector"):
            continue
        prefix = f"lora_unet_{name.replace('.', '_')}"
        down, up = state[f"{prefix}.lora_down.weight"], state[f"{prefix}.lora_up.weight"]
        original = layer.base_layer.weight.detach()
        delta = (up.flatten(1) @ down.flatten(1)).reshape(original.shape) * state[f"{prefix}.alpha"] / len(down)
        merged = original + delta
        norm = merged.flatten(1).norm(dim=1).reshape(-1, *[1] * (merged.ndim - 1))
        assert state[f"{prefix}.dora_scale"].shape == norm.shape
        layer.merge()
        expected = layer.base_layer.weight.detach()
        assert torch.allclose(state[f"{prefix}.dora_scale"] / norm * merged, expected, atol=1e-5)
        assert not torch.allclose(merged, expected, atol=1e-2)
        checked += 1
    assert checked == sum(name.endswith(".dora_scale") for name in state) > 20


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda state: {**state, "text_encoder_3.a.lora.up.weight": torch.ones(2, 2)}, True, "'text_encoder_3.a."),
        (lambda state: {f"unet.x.{key}": tensor for key, tensor in state.items()}, True, "'x.unet."),
        (lambda state: {k: v for k, v in state.items() if "lora.up" not in k}, True, "has no lora_up"),
        (lambda state: {k: v[0, 0].clone() for k, v in state.items()}, True, "weights that are no matrices"),
        (lambda state: {}, True, "holds no LoRA"),
    ],
)
def test_what_is_no_lora_of_stable_diffusion_is_refused(world, tmp_path, change, metadata, message):
    lora = edit_lora(save_lora(world, tmp_path), change, metadata)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        save_kohya_lora(lora, tmp_path / KOHYA_WEIGHTS)
    assert str(lora) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_WEIGHTS]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / LORA_WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=LORA_WEIGHTS):
        save_kohya_lora(tmp_path / LORA_WEIGHTS, tmp_path / KOHYA_WEIGHTS)
    with pytest.raises(ValueError, match=f"^{tmp_path}/missing: No such file"):
        save_kohya_lora(tmp_path / "missing", tmp_path / KOHYA_WEIGHTS)


def test_a_write_that_fails_leaves_the_file_that_was_there(world, tmp_path, monkeypatch):
    lora, path = save_lora(world, tmp_path), tmp_path / KOHYA_WEIGHTS
    path.write_bytes(b"before")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_kohya_lora(lora, path)
    assert path.read_bytes() == b"before"
    assert {file.name for file in tmp_path.iterdir()} == {LORA_WEIGHTS, KOHYA_WEIGHTS}


TEXT_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
BOTH = {
    "one_alpha": ({}, {}),
    "patterns": (LORAS["patterns"], {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"fc1": 1, "0.*v_proj": 2}}),
}


def save_lora_of_both_models(world, folder, unet_changes, text_changes):
    """As kohya trains them by default: on the UNet and on all projections of the text encoder."""
    unet, text_encoder = adapted_unet(world, **unet_changes), copy.deepcopy(world.components["text_encoder"])
    config = {"r": 4, "lora_alpha": 8, "target_modules": list(TEXT_MODULES), "init_lora_weights": False}
    text_encoder.add_adapter(LoraConfig(**{**config, **text_changes}), "default")
    models = {"unet": unet, "text_encoder": text_encoder}
    options = {}
    for name, model in models.items():
        state = get_peft_model_state_dict(model, adapter_name="default")
        options[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state)
        options[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **options)
    return folder / LORA_WEIGHTS


def draw_both(world, load):
    """An image by our pipeline on copies of the models, with what `load` puts on it."""
    copies = {name: copy.deepcopy(world.components[name]) for name in ("unet", "text_encoder")}
    pipeline = SPFPortraitPipeline(**{**world.components, **copies})
    pipeline.set_progress_bar_config(disable=True)
    load(pipeline)
    generator = torch.Generator().manual_seed(0)
    return pipeline(FULL, num_inference_steps=2, output_type="np", generator=generator).images


@pytest.mark.parametrize("changes", BOTH.values(), ids=BOTH)
def test_a_lora_of_both_models_goes_to_kohyas_format_and_back(world, tmp_path, changes):
    lora = save_lora_of_both_models(world, tmp_path, *changes)
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back"
    save_kohya_lora(lora, kohya)
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight" in load_file(kohya)
    returned = save_diffusers_lora(kohya, back)
    expected = draw_both(world, lambda pipeline: pipeline.load_lora_weights(tmp_path, weight_name=lora.name))
    without_text = save_lora(world, tmp_path / "unet_alone", **changes[0]).parent
    assert np.abs(draw_both(world, lambda pipeline: pipeline.load_lora_weights(without_text)) - expected).max() > 1e-2
    ways = {
        "diffusers reads kohya's": lambda pipeline: pipeline.load_lora_weights(kohya),
        "diffusers reads what came back": lambda pipeline: pipeline.load_lora_weights(back),
        "load_lora, kohya's": lambda pipeline: load_lora(pipeline, str(kohya), "x"),
        "load_lora, diffusers'": lambda pipeline: load_lora(pipeline, str(lora), "x"),
    }
    differences = {way: np.abs(draw_both(world, load) - expected).max() for way, load in ways.items()}
    assert max(differences.values()) < CLOSE, differences
    assert {model: group.keys() for model, group in read_lora(returned).layers.items()} == {
        model: group.keys() for model, group in read_lora(lora).layers.items()
    }


def test_each_layer_of_a_kohya_file_has_its_own_alpha(world, tmp_path):
    """diffusers itself takes one alpha for the whole attention."""
    kohya = tmp_path / "kohya.safetensors"
    save_kohya_lora(save_lora(world, tmp_path), kohya)
    edit_lora(kohya, lambda state: {k: v * 3 if "attn2_to_v.alpha" in k else v for k, v in state.items()})
    edited = save_lora(world, tmp_path / "edited", alpha_pattern={"attn2.to_v": 24})
    expected = draw(world, edited)
    assert np.abs(draw(world, save_diffusers_lora(kohya, tmp_path / "back")) - expected).max() < CLOSE
    assert np.abs(draw_both(world, lambda pipeline: load_lora(pipeline, str(kohya), "x")) - expected).max() < CLOSE
    assert np.abs(draw(world, kohya) - expected).max() > 1e-3
    layers = read_lora(kohya).layers["unet"]
    assert {layer.alpha for name, layer in layers.items() if name.endswith("attn2.to_v")} == {24}


def test_without_an_alpha_it_is_the_rank(world, tmp_path):
    lora = save_lora(world, tmp_path, lora_alpha=2)
    expected = draw(world, lora)
    edit_lora(lora, lambda state: state, metadata=False)
    kohya = tmp_path / KOHYA_WEIGHTS
    save_kohya_lora(lora, kohya)
    edit_lora(kohya, lambda state: {key: tensor for key, tensor in state.items() if not key.endswith("alpha")})
    assert np.abs(draw(world, save_diffusers_lora(kohya, tmp_path / "back")) - expected).max() < CLOSE


def older_name(name):
    """As diffusers named an attention layer's weights when a processor held them."""
    name = re.sub(r"\.(to_[qkv]|to_out)(\.0)?\.lora\.", r".processor.\1_lora.", name)
    name = re.sub(r"\.self_attn\.([qkv]|out)_proj\.lora_linear_layer\.", r".self_attn.to_\1_lora.", name)
    return name.replace("text_encoder.encoder.", "text_encoder.text_model.encoder.")


def test_older_names_of_diffusers_are_those_of_the_same_layers(world, tmp_path):
    lora = save_lora_of_both_models(world, tmp_path, {}, {})
    expected, layers = draw_both(world, lambda pipeline: load_lora(pipeline, str(lora), "x")), read_lora(lora).layers
    edit_lora(lora, lambda state: {older_name(name): tensor for name, tensor in state.items()})
    names = load_file(lora)
    assert sum(".processor.to_out_lora.up." in name for name in names) > 0
    assert sum(".text_model.encoder.layers.0.self_attn.to_q_lora.down." in name for name in names) == 1
    older = read_lora(lora).layers
    for model in ("unet", "text_encoder"):
        assert older[model].keys() == layers[model].keys()
        assert all(torch.equal(older[model][name].up, layer.up) for name, layer in layers[model].items())
    found = draw_both(world, lambda pipeline: load_lora(pipeline, str(lora), "x"))
    assert np.abs(found - expected).max() < CLOSE


KOHYA_OF_OTHERS = {
    "lora_unet_double_blocks_0_img_attn_proj": "'double.blocks.0.img.attn.proj' is no layer",
    "lora_te3_text_model_encoder_layers_0_mlp_fc1": "is no weight that a LoRA of Stable Diffusion 1.x",
}


@pytest.mark.parametrize("name", KOHYA_OF_OTHERS)
def test_a_kohya_file_for_another_architecture_is_refused(tmp_path, name):
    path = tmp_path / "x.safetensors"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}, path)
    with pytest.raises(ValueError, match=f"^{path}: .*{re.escape(KOHYA_OF_OTHERS[name])}"):
        save_diffusers_lora(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, v: (k.replace("lora_up.weight", "hada_w1_a"), v), "is no weight that a LoRA of"),
        (lambda k, v: (k, v[:1] if "attn2_to_q.lora_down" in k else v), "has the ranks 1 and 2"),
        (lambda k, v: (k.replace("to_q.lora_up.weight", "to_q.dora_scale"), v), "a DoRA in kohya's format"),
    ],
)
def test_a_kohya_file_that_is_no_plain_lora_is_refused(world, tmp_path, change, message):
    kohya = tmp_path / KOHYA_WEIGHTS
    save_kohya_lora(save_lora(world, tmp_path), kohya)
    edit_lora(kohya, lambda state: dict(change(*item) for item in state.items()))
    with pytest.raises(ValueError, match=f"^{kohya}: .*{message}"):
        save_diffusers_lora(kohya, tmp_path / "out")


@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_our_pipeline_refuses_what_does_not_fit_under_every_name(world, tmp_path, form):
    """Stock diffusers says so for some names in many lines, and for others not at all."""
    lora = save_lora(world, tmp_path, rename=form == "diffusers")
    if form == "kohya":
        save_kohya_lora(lora, tmp_path / "kohya.safetensors")
        lora = tmp_path / "kohya.safetensors"
    draw_both(world, lambda pipeline: pipeline.load_lora_weights(lora))
    wide, elsewhere = tmp_path / "wide.safetensors", tmp_path / "elsewhere.safetensors"
    down = ("lora_A", ".lora.down", "lora_down")
    save_file({k: torch.cat([x, x], 1) if any(d in k for d in down) else x for k, x in load_file(lora).items()}, wide)
    edited = {key.replace("down_blocks.0", "down_blocks.9").replace("down_blocks_0", "down_blocks_9"): tensor
              for key, tensor in load_file(lora).items()}  # fmt: skip
    save_file(edited, elsewhere)
    for path, message in ((wide, "has 8 x 16 features, not 8 x 8"), (elsewhere, "no layer unet.down_blocks.9.")):
        with pytest.raises(ValueError, match=f"{path}: is for another architecture: .*{re.escape(message)}"):
            draw_both(world, lambda pipeline, path=path: pipeline.load_lora_weights(path))


@pytest.mark.parametrize("name", ["u/n/../../../other/repo/x.safetensors", "u/n/..\\x.safetensors"])
def test_a_name_that_leads_out_of_its_repository_is_none(name):
    assert find_on_hub(name) is None
