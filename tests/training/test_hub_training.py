"""Tests of the way from a training to the Hub and back: the trainer, the client and the reader are processes.

They talk HTTP to the small Hub of hub_server.py. What `hub.py` itself does is tested in test_hub.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_train
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from hub_server import HubServer
from safetensors import safe_open
from test_train import ROWS, files, make_flags

from training.sharing import PIPELINE_CODE as CODE


ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_SECRETofTheTester"
CARD, LORA, KOHYA = "README.md", "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
PICTURE = "validation/step_000004.png"
BASE, TARGET = ROWS[0]["base_prompt"], ROWS[0]["target_prompt"]
FULL = f"{BASE}, {TARGET}"
CLOSE = 1e-5  # of pixels in [0, 1]
PUSH = {"push_to_hub": True, "hub_model_id": "spf", "hub_token": SECRET}
world, fresh_accelerator = test_train.world, test_train.fresh_accelerator

READ = """
import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

model, kohya, base, target, full = sys.argv[1:]


def draw(pipe, *args, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(*args, num_inference_steps=2, output_type="np", generator=generator, **kwargs).images[0]


custom = DiffusionPipeline.from_pretrained(
    model, custom_pipeline="tester/spf", trust_remote_code=True, safety_checker=None
)
assert type(custom).__name__ == "SPFPortraitPipeline" and "attention_processors" not in sys.modules
custom.load_lora_weights("tester/spf", weight_name="pytorch_lora_weights.safetensors")
stock = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
images = {"without": draw(stock, full)}
stock.load_lora_weights("tester/spf", weight_name="pytorch_lora_weights.safetensors")
images |= {"stock": draw(stock, full), "custom": draw(custom, base, target_prompt=target)}
stock.unload_lora_weights()
stock.load_lora_weights("tester/spf", weight_name=kohya)
images["kohya"] = draw(stock, full)
np.savez("images.npz", **images)
"""


def run_trainer(flags: list[str], cwd: Path, variables: dict[str, str]) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in variables.items() if not name.startswith("ACCELERATE_")}
    return subprocess.run(
        [sys.executable, str(ROOT / "train_spf_portrait_lora.py"), *flags],
        capture_output=True,
        text=True,
        env={**kept, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        cwd=cwd,
        timeout=300,
    )


@pytest.fixture(scope="module")
def pushed(world, tmp_path_factory):
    """A run that is pushed, and the Hub that it is pushed to, with what must not get there in its folder."""
    folder = tmp_path_factory.mktemp("pushed")
    output = folder / "output"
    flags = make_flags(
        world,
        output,
        **PUSH,
        stage2_objective="paper",
        learning_rate=0.05,
        num_validation_images=1,
        validation_steps=1,
        checkpointing_steps=1,
        report_to="tensorboard",
        cache_dir=output / "cache",
    )
    with HubServer("tester", SECRET) as server:
        run = run_trainer(flags, folder, server.environment(folder / "home"))
        assert run.returncode == 0, run.stderr
        yield SimpleNamespace(folder=folder, output=output, server=server, run=run, requests=list(server.requests))


def test_the_repository_holds_what_others_need_and_no_more(pushed):
    there = files(pushed.output)
    for kind in ("checkpoint-4/", "logs/", "cache/", "stage1/", "validation/step_000001"):
        assert any(name.startswith(kind) for name in there), f"nothing to leave out: no {kind} in {sorted(there)}"
    repository = pushed.server.repos["tester/spf"]
    assert repository.keys() == {CARD, LORA, KOHYA, PICTURE, *CODE}
    for name in (CARD, LORA, KOHYA, PICTURE):
        assert repository[name] == (pushed.output / name).read_bytes()
    assert repository["pipeline.py"] == (ROOT / "pipeline_spf_portrait.py").read_bytes()
    assert len(pushed.server.commits["tester/spf"]) == 2  # the empty one, and ours
    assert "tester/spf" not in pushed.server.private
    assert f"The LoRA is on the Hub: {pushed.server.url}/tester/spf" in pushed.run.stderr


def test_the_repository_is_made_before_anything_is_trained(pushed):
    paths = [request.path for request in pushed.requests if request.method == "POST"]
    assert paths[0] == "/api/repos/create" and paths[-1] == "/api/models/tester/spf/commit/main"


def test_the_token_is_in_the_headers_alone(pushed):
    assert any(request.headers.get("authorization") == f"Bearer {SECRET}" for request in pushed.requests)
    secret = SECRET.encode()
    assert all(secret not in request.body and SECRET not in request.path for request in pushed.requests)
    assert SECRET not in pushed.run.stdout + pushed.run.stderr
    found = [path for path in pushed.folder.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert found == [] and len(files(pushed.output)) > 30
    assert not any(SECRET in path.name for path in pushed.folder.rglob("*"))


def test_the_way_back_draws_the_same_image(pushed, world, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(pushed.output)
    generator = torch.Generator().manual_seed(0)
    expected = pipeline(FULL, num_inference_steps=2, output_type="np", generator=generator).images[0]

    # No token, no cache and no folder of the trainer's.
    reader = subprocess.run(
        [sys.executable, "-c", READ, str(world.model), KOHYA, BASE, TARGET, FULL],
        capture_output=True,
        text=True,
        env={**pushed.server.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        timeout=300,
    )
    assert reader.returncode == 0, reader.stderr
    images = np.load(tmp_path / "images.npz")
    differences = {name: float(np.abs(images[name] - expected).max()) for name in images}
    print(differences)
    assert differences.pop("without") > 1000 * CLOSE
    assert differences.keys() == {"stock", "custom", "kohya"} and max(differences.values()) < CLOSE


def test_the_kohya_file_has_the_alpha_of_the_flags(pushed):
    with safe_open(pushed.output / KOHYA, "pt") as file:
        alphas = {file.get_tensor(name).item() for name in file.keys() if name.endswith(".alpha")}
        ranks = {len(file.get_tensor(name)) for name in file.keys() if name.endswith(".lora_down.weight")}
    assert alphas == {4.0} and ranks == {2}


def test_the_card_of_the_repository_names_no_folder(pushed, world):
    card = pushed.server.repos["tester/spf"][CARD].decode()
    assert "'tester/spf'" in card and f"({PICTURE}" in card.replace("<", "") and KOHYA in card
    assert_private(card, world, pushed.folder)


@pytest.mark.slow
def test_without_the_kohya_file(world, tmp_path):
    with HubServer("tester", SECRET) as server:
        given = {"no-output_kohya_format": True, "stage2_steps": 0, "hub_private_repo": True}
        flags = make_flags(world, tmp_path / "output", **PUSH, **given)
        run = run_trainer(flags, tmp_path, server.environment(tmp_path / "home"))
        assert run.returncode == 0, run.stderr
        assert server.repos["tester/spf"].keys() == {CARD, LORA, *CODE} and server.private == {"tester/spf"}
    assert files(tmp_path / "output") == {CARD, LORA}
    assert KOHYA not in (tmp_path / "output" / CARD).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_push_that_is_refused_at_the_end_loses_nothing(world, tmp_path):
    output = tmp_path / "output"
    with HubServer("tester", SECRET, echo_token=True) as server:
        server.failures = {"/commit/": 500}
        # The name of the repository is the folder's.
        flags = make_flags(world, output, **PUSH | {"hub_model_id": None}, stage2_steps=0)
        run = run_trainer(flags, tmp_path, server.environment(tmp_path / "home"))
        assert server.repos == {"tester/output": {}}
    line = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert line.startswith("train_spf_portrait_lora.py: error: --push_to_hub: tester/output was not pushed (")
    assert f"the LoRA is whole in {output}" in line and "hf upload tester/output" in line and "500" in line
    assert SECRET not in run.stdout + run.stderr
    assert files(output) == {CARD, LORA, KOHYA}
    StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None).load_lora_weights(output)


@pytest.mark.slow
def test_the_card_of_a_run_that_began_with_a_dora_says_so(world, tmp_path):
    test_train.train(world, tmp_path / "dora", use_dora=True, stage1_steps=1, stage2_steps=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = {"stage1_steps": 0, "stage1_lora_path": tmp_path / "dora", "stage2_steps": 1}
    output = test_train.train(world, tmp_path / "output", **flags, output_kohya_format=True)
    assert (output / KOHYA).is_file() and "is a DoRA" in (output / CARD).read_text(encoding="utf-8")


def assert_private(card: str, world, folder: Path) -> None:
    assert SECRET not in card
    for path in (folder, world.folder, ROOT, Path.home()):
        assert str(path) not in card
    # An address of the web has another slash or a colon before its own.
    assert re.findall(r"(?<![\w/:.])/(?:[\w.-]+/)*[\w.-]+", card) == []


@pytest.mark.slow
def test_a_card_that_is_not_pushed_names_no_folder_and_no_token(world, tmp_path):
    """Every flag that takes a path has one, and the environment a token."""
    output = tmp_path / "output"
    flags = make_flags(
        world,
        output,
        pretrained_vae_model_name_or_path=world.model / "vae",
        cache_dir=tmp_path / "cache",
        logging_dir=tmp_path / "logs",
        report_to="tensorboard",
        num_validation_images=1,
        checkpointing_steps=2,
        resume_from_checkpoint="latest",
    )
    variables = {**os.environ, "HF_TOKEN": SECRET, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = run_trainer(flags, tmp_path, variables)
    assert run.returncode == 0, run.stderr
    card = (output / CARD).read_text(encoding="utf-8")
    assert "path/to/model" in card and f"`{TARGET}`" in card
    assert_private(card, world, tmp_path)
    assert KOHYA not in card and SECRET not in run.stderr
