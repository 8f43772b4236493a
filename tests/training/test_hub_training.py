"""From a training to the Hub: one run in a process of its own, others in this one.

They talk HTTP to the small Hub of hub_server.py. What `loras/hub.py` does, and the way back, is tested in test_hub.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_train
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from hub_server import HubServer
from safetensors import safe_open
from test_train import ROWS, files, make_flags

from families import hub_names
from training.run_file import RUN_FILE
from training.sharing import pipeline_code


ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_SECRETofTheTester"
CARD, LORA, KOHYA = "README.md", "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
PICTURE = "validation/step_000004.png"
CODE = pipeline_code(hub_names.STABLE_DIFFUSION)
TARGET = ROWS[0]["target_prompt"]
PUSH = {"push_to_hub": True, "hub_model_id": "spf", "hub_token": SECRET}
world, fresh_accelerator = test_train.world, test_train.fresh_accelerator


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


@pytest.mark.slow
def test_a_run_pushes_what_others_need_and_its_token_stays_unseen(world, tmp_path):
    """One run in a process of its own, with what must not get to the Hub in its folder."""
    output = tmp_path / "output"
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
        run = run_trainer(flags, tmp_path, server.environment(tmp_path / "home"))
    assert run.returncode == 0, run.stderr
    assert f"The LoRA is on the Hub: {server.url}/tester/spf" in run.stderr

    there, repository = files(output), server.repos["tester/spf"]
    for kind in ("checkpoint-4/", "logs/", "cache/", "stage1/", "validation/step_000001", RUN_FILE):
        assert any(name.startswith(kind) for name in there), f"nothing to leave out: no {kind} in {sorted(there)}"
    assert repository.keys() == {CARD, LORA, KOHYA, PICTURE, *CODE}
    for name in (CARD, LORA, KOHYA, PICTURE):
        assert repository[name] == (output / name).read_bytes()
    for name, path in CODE.items():
        assert repository[name] == path.read_bytes()
    assert len(server.commits["tester/spf"]) == 2  # the empty one, and ours
    assert "tester/spf" not in server.private
    # It is made before anything is trained.
    paths = [request.path for request in server.requests if request.method == "POST"]
    assert paths[0] == "/api/repos/create" and paths[-1] == "/api/models/tester/spf/commit/main"

    assert any(request.headers.get("authorization") == f"Bearer {SECRET}" for request in server.requests)
    secret = SECRET.encode()
    assert all(secret not in request.body and SECRET not in request.path for request in server.requests)
    assert SECRET not in run.stdout + run.stderr
    found = [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert found == [] and len(there) > 30
    assert not any(SECRET in path.name for path in tmp_path.rglob("*"))

    with safe_open(output / KOHYA, "pt") as file:
        alphas = {file.get_tensor(name).item() for name in file.keys() if name.endswith(".alpha")}
        ranks = {len(file.get_tensor(name)) for name in file.keys() if name.endswith(".lora_down.weight")}
    assert alphas == {4.0} and ranks == {2}
    card = repository[CARD].decode()
    assert "'tester/spf'" in card and f"({PICTURE}" in card.replace("<", "") and KOHYA in card
    assert_private(card, world, tmp_path)


@pytest.mark.slow
def test_without_the_kohya_file(world, tmp_path):
    with HubServer("tester", SECRET) as server, server.here(tmp_path / "home"):
        given = {"no-output_kohya_format": True, "stage2_steps": 0, "hub_private_repo": True}
        test_train.train(world, tmp_path / "output", **PUSH, **given)
    assert server.repos["tester/spf"].keys() == {CARD, LORA, *CODE} and server.private == {"tester/spf"}
    assert files(tmp_path / "output") == {CARD, LORA, RUN_FILE}
    assert KOHYA not in (tmp_path / "output" / CARD).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_push_that_is_refused_at_the_end_loses_nothing(world, tmp_path, capfd, caplog):
    output = tmp_path / "output"
    with HubServer("tester", SECRET, echo_token=True) as server, server.here(tmp_path / "home"):
        server.failures = {"/commit/": 500}
        # The name of the repository is the folder's.
        with pytest.raises(SystemExit) as stop:
            test_train.train(world, output, **PUSH | {"hub_model_id": None}, stage2_steps=0)
    assert server.repos == {"tester/output": {}}
    line = stop.value.code
    assert line.startswith("train_spf_portrait_lora.py: error: --push_to_hub: tester/output was not pushed (")
    assert f"the LoRA is whole in {output}" in line and "hf upload tester/output" in line and "500" in line
    assert "\n" not in line and SECRET not in "".join([line, caplog.text, *capfd.readouterr()])
    assert files(output) == {CARD, LORA, KOHYA, RUN_FILE}
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
def test_a_card_that_is_not_pushed_names_no_folder_and_no_token(world, tmp_path, monkeypatch, capfd, caplog):
    """Every flag that takes a path has one, and the environment a token."""
    output = tmp_path / "output"
    monkeypatch.setenv("HF_TOKEN", SECRET)
    test_train.train(
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
    card = (output / CARD).read_text(encoding="utf-8")
    assert "path/to/model" in card and f"`{TARGET}`" in card
    assert_private(card, world, tmp_path)
    assert KOHYA not in card and SECRET not in "".join([caplog.text, *capfd.readouterr()])
