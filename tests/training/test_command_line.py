"""Tests of the trainer's command line: whatever is wrong with what it is given ends it with one line.

The tables of wrong values are test_inputs.py's, which runs them in its own process. Here the script is the program: in
a process of its own, or, since importing the libraries takes most of such a process's time, in the fork of one that
has imported them.
"""

import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import test_train
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from forks import SCRIPT, environment
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from test_inputs import WRONG_FLAGS, WRONG_ROWS
from test_train import ROWS, copy_model, make_flags, write_data


SECRET = "hf_SECRETofTheTester"
WEIGHTS = "pytorch_lora_weights.safetensors"
MODEL_WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a UNet or a VAE
world = test_train.world

# Python imports it when it starts, if it lies in PYTHONPATH: packages seem not to be installed.
HIDE = """
import os
import sys
from importlib.machinery import PathFinder


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        hidden = name.partition(".")[0] in os.environ["HIDDEN_PACKAGES"].split(",")
        return None if hidden else PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(context):
        return PathFinder.find_distributions(context)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all that lies in a folder; of links, their own."""
    stats = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def flags_for(world, folder: Path, changes: dict) -> list[str]:
    return make_flags(world, **{"output_dir": folder / "output", **changes})


def the_one_line(code: int, stdout: str, stderr: str) -> str:
    """What a refusal says after its name, once all has been checked that every refusal must be."""
    assert code in (1, 2), f"{code}\n{stderr}"
    assert stdout == "" and "Traceback" not in stderr and SECRET not in stderr, stderr
    *before, line = stderr.splitlines()
    assert line.startswith("train_spf_portrait_lora.py: error: "), stderr
    # Before it libraries may speak, and argparse shows its usage.
    assert not any("train_spf_portrait_lora.py: error" in earlier for earlier in before), stderr
    assert [earlier for earlier in before if earlier.startswith("usage: ")] == before[-1:] * (code == 2)
    return line.split("error: ", 1)[1]


@pytest.fixture
def refusal(world, tmp_path) -> Callable[..., str]:
    """The one line with which a process of its own ends; nothing may be left behind."""

    def refuse(variables: dict[str, str] | None = None, **changes) -> str:
        given = flags_for(world, tmp_path, changes)
        before = listing(tmp_path)
        run = subprocess.run(
            [sys.executable, str(SCRIPT), *given],
            capture_output=True,
            text=True,
            env=environment(**(variables or {})),
            cwd=tmp_path,
            timeout=300,
        )
        line = the_one_line(run.returncode, run.stdout, run.stderr)
        assert listing(tmp_path) == before
        return line

    return refuse


@pytest.fixture
def launch(forks, tmp_path) -> Callable[[list[str]], tuple[int, str, str]]:
    """Runs a command line; the code it ended with, its stdout and its stderr."""

    def run(arguments: list[str]) -> tuple[int, str, str]:
        own = forks.start(arguments, tmp_path)
        return own.wait(), own.stdout, own.stderr

    return run


@pytest.fixture
def forked_refusal(world, tmp_path, launch) -> Callable[..., str]:
    """As `refusal`, in a fork."""

    def refuse(**changes) -> str:
        before = listing(tmp_path)
        line = the_one_line(*launch(flags_for(world, tmp_path, changes)))
        assert listing(tmp_path) == before
        return line

    return refuse


def assert_named(line: str, parts: list[str]) -> None:
    for part in parts:
        assert part in line, line


# ------------------------------------------------------------------------------------------------- the tables' values


def identify(value) -> str:
    return " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else ""


@pytest.mark.slow
@pytest.mark.parametrize("flags, parts", WRONG_FLAGS, ids=identify)
def test_a_wrong_flag(forked_refusal, flags, parts):
    assert_named(forked_refusal(**flags), parts)


@pytest.mark.slow
@pytest.mark.parametrize("rows, parts", WRONG_ROWS, ids=lambda value: "")
def test_a_wrong_row(forked_refusal, tmp_path, rows, parts):
    assert_named(forked_refusal(train_data_dir=write_data(tmp_path / "data", rows)), parts)


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"rank": 0}, ["--rank must be at least 1, got 0"]),
        pytest.param(
            {"pretrained_model_name_or_path": "missing"},
            ["--pretrained_model_name_or_path missing"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=identify,
)
def test_a_wrong_flag_in_a_process_of_its_own(refusal, flags, parts):
    assert_named(refusal(**flags), parts)


def test_a_launched_fork_is_a_program_with_all_its_mistakes(world, tmp_path, launch):
    """Else the tables above could pass whatever the script does."""
    code, stdout, stderr = launch(["--help"])
    assert code == 0
    with pytest.raises(AssertionError):
        the_one_line(code, stdout, stderr)
    code, _, stderr = launch(make_flags(world, tmp_path / "output", stage1_steps=5, learning_rate=1e20))
    assert code == 1 and "Traceback" not in stderr
    assert "error: 'diffusion' is" in stderr.splitlines()[-1] and stderr.endswith("there is no earlier checkpoint\n")


# --------------------------------------------------------------------------------------------------- missing packages


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, package",
    [
        ({"optimizer": "prodigy"}, "prodigyopt"),
        ({"use_8bit_adam": True}, "bitsandbytes"),
        ({"enable_xformers_memory_efficient_attention": True}, "xformers"),
        ({"report_to": "tensorboard"}, "tensorboard"),
        ({"report_to": "wandb"}, "wandb"),
    ],
    ids=identify,
)
def test_a_package_that_is_not_installed(refusal, tmp_path, flags, package):
    (tmp_path / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    variables = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HIDDEN_PACKAGES": f"{package},{package}X",
    }
    line = refusal(variables, **flags)
    ((name, value),) = flags.items()
    flag = f"--{name}" if value is True else f"--{name} {value}"
    assert line.startswith(f"{flag} needs the ") and "package" in line


# ---------------------------------------------------------------------------------------------------------- pictures


def png_of_absurd_size(path: Path, side: int = 60_000) -> None:
    """A whole header, and next to nothing after it."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("kind", ["absurd size", "half"])
def test_a_picture_that_does_not_decode(forked_refusal, tmp_path, kind):
    data = write_data(tmp_path / "data")
    if kind == "absurd size":
        png_of_absurd_size(data / "3.png")
    else:
        whole = (data / "3.png").read_bytes()
        (data / "3.png").write_bytes(whole[: len(whole) // 2])
    line = forked_refusal(train_data_dir=data)
    assert_named(line, [f"{data / 'metadata.jsonl'}, line 4", str(data / "3.png")])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dots", "dots inside", "absolute", "link"])
def test_a_picture_outside_the_data_folder(forked_refusal, tmp_path, kind):
    names = {"dots": "../0.png", "dots inside": "a/../../0.png", "absolute": str(tmp_path / "0.png"), "link": "l.png"}
    data = write_data(tmp_path / "data", [ROWS[0], {**ROWS[1], "file_name": names[kind]}])
    shutil.copy(data / "0.png", tmp_path / "0.png")
    (data / "l.png").symlink_to(tmp_path / "0.png")
    reason = "is not in the folder" if kind == "absolute" else "out of the folder"
    assert_named(forked_refusal(train_data_dir=data), [f"{data / 'metadata.jsonl'}, line 2", names[kind], reason])


# ------------------------------------------------------------------------------------------------------------- models


def cut(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def pickle_instead(path: Path) -> None:
    """The same weights as a pickle, under the name that libraries look for."""
    name = {"model.safetensors": "pytorch_model.bin"}.get(path.name, path.with_suffix(".bin").name)
    torch.save(load_file(path), path.with_name(name))
    path.unlink()


def another_shape(path: Path) -> None:
    state = load_file(path)
    name = next(name for name, value in state.items() if value.ndim > 1)
    state[name] = torch.cat([state[name], state[name]])
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("spoil", [cut, pickle_instead, another_shape, Path.unlink], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize(
    "flag, part, file",
    [
        ("pretrained_model_name_or_path", "unet", MODEL_WEIGHTS),
        ("pretrained_model_name_or_path", "vae", MODEL_WEIGHTS),
        ("pretrained_model_name_or_path", "text_encoder", "model.safetensors"),
        ("pretrained_vae_model_name_or_path", ".", MODEL_WEIGHTS),
        ("tiny_vae_model_name_or_path", ".", MODEL_WEIGHTS),
        ("clip_model_name_or_path", ".", "model.safetensors"),
    ],
    ids=lambda value: value.split("_model")[0],
)
@pytest.mark.slow
def test_weights_that_do_not_load(forked_refusal, world, tmp_path, flag, part, file, spoil):
    folder = tmp_path / "spoilt"
    if flag == "tiny_vae_model_name_or_path":
        tiny_vae().save_pretrained(folder)
    else:
        source = {"pretrained_vae_model_name_or_path": world.model / "vae", "clip_model_name_or_path": world.clip}
        shutil.copytree(source.get(flag, world.model), folder)
    spoil(folder / part / file)
    assert_named(forked_refusal(**{flag: folder}, stage2_objective="paper"), [f"--{flag} {folder}"])


def tiny_vae(**changes) -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        **changes,
    )


def vae(**changes) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, model, parts",
    [
        ("pretrained_vae_model_name_or_path", vae(latent_channels=8), ["8 latent channels", "the denoiser 4"]),
        ("pretrained_vae_model_name_or_path", tiny_vae(), ["not an AutoencoderKL", "'AutoencoderTiny'"]),
        ("tiny_vae_model_name_or_path", tiny_vae(latent_channels=8), ["8 latent channels", "the denoiser 4"]),
        ("tiny_vae_model_name_or_path", vae(), ["not an AutoencoderTiny", "'AutoencoderKL'"]),
    ],
    ids=["channels", "a tiny one", "channels of a tiny one", "no tiny one"],
)
def test_another_vae_that_does_not_fit(forked_refusal, tmp_path, flag, model, parts):
    model.save_pretrained(tmp_path / "vae")
    line = forked_refusal(**{flag: tmp_path / "vae"}, stage2_objective="paper")
    assert_named(line, [f"--{flag} {tmp_path / 'vae'}", *parts])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_model_with_a_part_missing(forked_refusal, world, tmp_path, part):
    model = copy_model(world, tmp_path, {})
    shutil.rmtree(model / part)
    line = forked_refusal(pretrained_model_name_or_path=model)
    assert_named(line, [f"--pretrained_model_name_or_path {model}", part])


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, values, parts",
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, ["'sample'"]),
        ("unet/config.json", {"in_channels": 9}, ["unet: it takes 9 channels", "no model for text to image"]),
        ("unet/config.json", {"addition_embed_type": "text_time"}, ["Stable Diffusion 1.x, 2.x, XL, 3 and 3.5"]),
        ("vae/config.json", {"latent_channels": 16}, ["16 latent channels, the denoiser 4"]),
    ],
    ids=["prediction type", "inpainting", "SDXL's UNet alone", "latents"],
)
def test_a_model_of_another_kind(forked_refusal, world, tmp_path, file, values, parts):
    model = copy_model(world, tmp_path, {file: values})
    line = forked_refusal(pretrained_model_name_or_path=model)
    assert_named(line, [f"--pretrained_model_name_or_path {model}", *parts])


@pytest.mark.slow
@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "text_encoder/config.json"])
@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_model_with_a_broken_config(forked_refusal, world, tmp_path, file, content):
    model = copy_model(world, tmp_path, {})
    (model / file).write_text(content, encoding="utf-8")
    line = forked_refusal(pretrained_model_name_or_path=model)
    assert_named(line, [f"--pretrained_model_name_or_path {model}"])


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer"])
def test_clip_with_a_file_missing(forked_refusal, world, tmp_path, file):
    clip = shutil.copytree(world.clip, tmp_path / "clip")
    for path in clip.iterdir():
        if path.name == file or (file == "tokenizer" and path.name in ("vocab.json", "merges.txt", "tokenizer.json")):
            path.unlink()
    line = forked_refusal(clip_model_name_or_path=clip, stage2_objective="paper")
    assert_named(line, [f"--clip_model_name_or_path {clip}"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["empty folder", "not safetensors", "half", "pickle", "text encoder's"])
def test_an_earlier_lora_that_does_not_load(forked_refusal, world, tmp_path, kind):
    folder = tmp_path / "earlier"
    folder.mkdir()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    model = "text_encoder" if kind == "text encoder's" else "unet"
    state = {f"{model}.{name}.lora_A.weight": torch.ones(2, 16), f"{model}.{name}.lora_B.weight": torch.ones(8, 2)}
    save_file(state, folder / WEIGHTS)
    if kind == "empty folder":
        (folder / WEIGHTS).unlink()
    elif kind == "not safetensors":
        (folder / WEIGHTS).write_bytes(b"nonsense" * 10)
    elif kind == "half":
        cut(folder / WEIGHTS)
    elif kind == "pickle":
        pickle_instead(folder / WEIGHTS)
    line = forked_refusal(stage1_steps=0, stage1_lora_path=folder)
    assert_named(line, [f"--stage1_lora_path {folder}"])


@pytest.mark.slow
def test_an_earlier_dora_in_one_pass(forked_refusal, launch, world, tmp_path):
    given = make_flags(world, tmp_path / "dora", use_dora=True, stage1_steps=1, stage2_steps=0)
    assert launch(given)[0] == 0
    flags = {"stage1_steps": 0, "stage1_lora_path": tmp_path / "dora", "stage2_objective": "paper"}
    line = forked_refusal(**flags, dual_path="single_pass")
    assert_named(line, [f"--stage1_lora_path {tmp_path / 'dora'}", "DoRA", "--dual_path two_pass"])


# ------------------------------------------------------------------------------------------------ folders and machine


@pytest.mark.slow
def test_an_output_folder_with_checkpoints(forked_refusal, tmp_path):
    (tmp_path / "output" / "checkpoint-12").mkdir(parents=True)
    line = forked_refusal()
    assert_named(line, [f"--output_dir {tmp_path / 'output'}", "checkpoint-12", "--resume_from_checkpoint latest"])


@pytest.mark.slow
def test_a_checkpoint_that_is_none(forked_refusal, tmp_path):
    (tmp_path / "output" / "checkpoint-12").mkdir(parents=True)
    line = forked_refusal(resume_from_checkpoint="checkpoint-12")
    assert_named(line, ["--resume_from_checkpoint checkpoint-12", "manifest.json"])


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["output_dir", "cache_dir"])
@pytest.mark.parametrize("below", ["", "more/folder"])
def test_a_folder_that_is_a_file(forked_refusal, tmp_path, flag, below):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert_named(forked_refusal(**{flag: tmp_path / "file" / below}), [f"--{flag} {tmp_path / 'file' / below}"])


@pytest.mark.slow
def test_logs_below_a_file(forked_refusal, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "logs").write_text("mine", encoding="utf-8")
    assert_named(forked_refusal(report_to="tensorboard"), [f"--logging_dir {tmp_path / 'output' / 'logs'}"])


@pytest.mark.slow
def test_a_data_folder_without_data(forked_refusal, tmp_path):
    (tmp_path / "data").mkdir()
    assert_named(forked_refusal(train_data_dir=tmp_path / "data"), [f"--train_data_dir {tmp_path / 'data'}", "empty"])


@pytest.mark.slow
def test_a_data_set_that_does_not_exist(forked_refusal, tmp_path):
    line = forked_refusal(train_data_dir=None, dataset_name=tmp_path / "missing", cache_dir=tmp_path)
    assert_named(line, ["--dataset_name", str(tmp_path / "missing")])


@pytest.mark.slow
def test_a_variant_that_the_model_does_not_have(forked_refusal, world):
    assert_named(forked_refusal(variant="fp16"), [f"--pretrained_model_name_or_path {world.model}", "fp16"])


@pytest.mark.slow
def test_fp16_on_a_cpu(refusal):
    line = refusal({"ACCELERATE_USE_CPU": "true"}, mixed_precision="fp16")
    assert_named(line, ["--mixed_precision fp16 needs a GPU"])


# ------------------------------------------------------------------------------------------------------------ the Hub


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"hub_token": f"{SECRET}wrong", "hub_model_id": "spf"}, ["--hub_token", "does not take it"]),
        ({"hub_token": None}, ["--hub_token", "there is none"]),
        ({"hub_token": SECRET, "hub_model_id": "no/such/name"}, ["--hub_model_id", "'no/such/name'"]),
        ({"hub_token": SECRET, "hub_model_id": "other/spf"}, ["--hub_model_id", "'other/spf'"]),
    ],
    ids=["wrong token", "no token", "wrong name", "another's name"],
)
def test_a_push_that_would_be_refused_ends_before_any_weights_load(refusal, world, tmp_path, flags, parts):
    # Weights that do not load would be complained of first.
    model = copy_model(world, tmp_path, {})
    cut(model / "unet" / MODEL_WEIGHTS)
    with HubServer("tester", SECRET) as server:
        variables = {**server.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        line = refusal(variables, pretrained_model_name_or_path=model, push_to_hub=True, **flags)
        assert not server.repos
    assert_named(line, parts)
