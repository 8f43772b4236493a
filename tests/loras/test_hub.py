"""The card, and the push against a small Hub: from here, and back in a process of its own."""

import ast
import copy
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from hub_server import HubServer
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from pipeline_world import make_components
from test_prompts import BASE, write_vocabulary
from transformers import CLIPTokenizer

from families.hub_names import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from loras import KOHYA_WEIGHTS, LORA_WEIGHTS, hub
from loras.card import CardFacts, HubNames, write_model_card
from loras.loading import ReferenceLora
from loras.writing import save_kohya_lora
from training.sharing import pipeline_code


ROOT = Path(__file__).resolve().parents[2]
CODE = pipeline_code(STABLE_DIFFUSION)
TARGET = "red hair"
FULL = f"{BASE}, {TARGET}"
SECRET = "hf_SECRETofTheTester"
READ_SECRET = "hf_SECRETthatMayRead"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
PICTURE = "validation/step_000004.png"
CLOSE = 1e-5  # of pixels in [0, 1]; the LoRA itself moves them by hundreds of times as much


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A tiny base model, here and as a folder. No test may change it."""
    folder = tmp_path_factory.mktemp("hub_world")
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), model_max_length=77)
    components = make_components(tokenizer)
    StableDiffusionPipeline(**components).save_pretrained(folder / "model")
    return SimpleNamespace(components=components, model=folder / "model")


def adapted_unet(world, **changes):
    """The UNet with a LoRA whose alpha is not its rank, and which changes something."""
    torch.manual_seed(1)
    unet = copy.deepcopy(world.components["unet"])
    config = {"r": 2, "lora_alpha": 8, "target_modules": list(ATTENTION), "init_lora_weights": False, **changes}
    unet.add_adapter(LoraConfig(**config), "default")
    return unet


def save_adapter(unet, folder: Path, rename: bool = True) -> Path:
    state = get_peft_model_state_dict(unet, adapter_name="default")
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(state) if rename else state,
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return folder / LORA_WEIGHTS


def save_lora(world, folder: Path, rename: bool = True, **changes) -> Path:
    return save_adapter(adapted_unet(world, **changes), folder, rename)


def draw(world, lora: Path | None) -> np.ndarray:
    pipeline = StableDiffusionPipeline(**{**world.components, "unet": copy.deepcopy(world.components["unet"])})
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    generator = torch.Generator().manual_seed(0)
    return pipeline(FULL, num_inference_steps=2, output_type="np", generator=generator).images


# ------------------------------------------------------------------------------------------------------ the model card


def make_facts(**changes) -> CardFacts:
    facts = CardFacts(
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        targets=(TARGET, "a blue hat", TARGET),
        example_target=(TARGET,),
        example_prompt=FULL,
        base_prompt=BASE,
        settings={"rank": 2, "target_prompt": None, "lora_layers": ("a", "b"), "sfcm_mode": "x|y"},
        pictures=(PICTURE,),
        licence="creativeml-openrail-m",
        repo_id="tester/x",
        has_kohya=True,
    )
    return replace(facts, **changes)


def write_card(folder: Path, facts: CardFacts, names: HubNames = STABLE_DIFFUSION) -> Path:
    return write_model_card(folder, facts, names)


def code_blocks(card: ModelCard) -> list[str]:
    return re.findall(r"```py\n(.*?)```", card.text, re.DOTALL)


def test_the_card_says_what_the_hub_and_the_reader_want(tmp_path):
    path = write_card(tmp_path, make_facts())
    assert path == tmp_path / "README.md" and list(tmp_path.iterdir()) == [path]
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "inference": True,
        "instance_prompt": f"{TARGET}, a blue hat",
        "tags": list(STABLE_DIFFUSION.tags),
        "widget": [{"text": FULL, "output": {"url": PICTURE}}],
    }
    for part in (
        f"- `{TARGET}`\n- `a blue hat`\n",
        f"](<{PICTURE}>)",
        "| `--rank` | `2` |\n| `--lora_layers` | `a b` |\n| `--sfcm_mode` | `x\\|y` |\n",
        KOHYA_WEIGHTS,
        "2504.00396",
        "@article{",
        "`creativeml-openrail-m`",
    ):
        assert part in card.text
    assert "--target_prompt" not in card.text
    assert "DoRA" not in card.text
    stock, custom = code_blocks(card)
    assert "StableDiffusionPipeline" in stock and repr(FULL) in stock
    assert "custom_pipeline='tester/x'" in custom and "trust_remote_code=True" in custom


def test_the_card_names_class_tags_and_file_of_the_family(tmp_path):
    for names, others in ((STABLE_DIFFUSION, STABLE_DIFFUSION_XL), (STABLE_DIFFUSION_XL, STABLE_DIFFUSION)):
        card = ModelCard.load(write_card(tmp_path, make_facts(repo_id=None, licence=names.licence), names))
        assert card.data.tags == list(names.tags) and card.data.license == names.licence != others.licence
        stock, custom = code_blocks(card)
        assert f"from diffusers import {names.pipeline}\n" in stock
        assert f"pipe = {names.pipeline}.from_pretrained(" in stock
        assert f"custom_pipeline='path/to/{names.pipeline_file}'" in custom
        assert others.pipeline_file not in custom and f"pipe = {others.pipeline}." not in stock
        ast.parse(stock)


def test_the_card_tells_of_a_dora_and_of_no_kohya_file(tmp_path):
    assert "DoRA" in write_card(tmp_path, make_facts(is_dora=True)).read_text(encoding="utf-8")
    assert "ComfyUI" not in write_card(tmp_path, make_facts(has_kohya=False)).read_text(encoding="utf-8")


def test_the_card_tells_what_the_lora_was_trained_on_top_of(tmp_path):
    earlier = (
        ReferenceLora("hair", Path("x"), ("you/hair", "kohya/hair.safetensors"), "", 0.75),
        ReferenceLora("hat", Path("y"), None, "", 1.0),
    )
    card = ModelCard.load(write_card(tmp_path, make_facts(earlier_loras=earlier)))
    first = "- [you/hair](https://huggingface.co/you/hair), file `kohya/hair.safetensors`, at scale 0.75\n"
    assert first + "- an earlier LoRA that is not on the Hub, at scale 1\n" in card.text
    kohya = card.text.split("## Use with ComfyUI")[1].split("\n## ")[0]
    assert "what this LoRA was trained on top of as well" in kohya
    side_by_side, merged = code_blocks(card)
    load = "pipe.load_lora_weights('you/hair', weight_name='kohya/hair.safetensors', adapter_name='earlier_1')"
    assert load in side_by_side and load in merged
    assert "pipe.set_adapters(['earlier_1', 'earlier_2', 'spf'], [0.75, 1.0, 1.0])" in side_by_side
    assert "pipe.set_adapters(['earlier_1', 'earlier_2'], [0.75, 1.0])\npipe.fuse_lora()" in merged
    for code in (side_by_side, merged):
        ast.parse(code)
    assert "Trained on top of" not in write_card(tmp_path, make_facts()).read_text(encoding="utf-8")


def test_a_local_base_model_is_in_the_text_alone(tmp_path):
    for base in (str(tmp_path / "base" / "model"), "path/to/model", "./gone"):
        card = ModelCard.load(write_card(tmp_path, make_facts(base_model=base)))
        assert card.data.base_model is None
        assert f"local model `{base}`" in card.text and "huggingface.co" not in card.text
    assert all(repr("./gone") in block for block in code_blocks(card))


def test_before_a_push_the_examples_name_the_output_folder(tmp_path):
    folder = tmp_path / "my-lora"
    folder.mkdir()
    card = ModelCard.load(write_card(folder, make_facts(repo_id=None, pictures=())))
    assert "widget" not in card.data.to_dict() and "![" not in card.text
    assert card.text.startswith("\n# my-lora\n")
    assert all("load_lora_weights('my-lora', " in block for block in code_blocks(card))
    assert "custom_pipeline='path/to/pipeline_spf_portrait.py'" in code_blocks(card)[1]


def test_prompts_with_quotes_bars_and_fences_spoil_neither_code_nor_metadata(tmp_path):
    nasty = 'it\'s "red": ``` hair | --- # \\ {x}\nnext - line'
    facts = make_facts(
        targets=(nasty,),
        example_target=(nasty,),
        example_prompt=nasty,
        base_prompt=nasty,
        settings={"target_prompt": nasty},
    )
    card = ModelCard.load(write_card(tmp_path, facts))
    assert card.data.instance_prompt == nasty
    assert card.data.widget[0]["text"] == nasty
    strings = [
        node.value
        for block in re.findall(r"^```py\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Constant)
    ]
    assert strings.count(nasty) == 3  # the full prompt, the base prompt and the target
    row = next(line for line in card.text.splitlines() if line.startswith("| `--target_prompt`"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


# ------------------------------------------------------------------------------------------------------------- the Hub

LOAD = """
import json, sys
import numpy as np
import torch

blocks, kohya, prompts = json.loads(sys.argv[1])

def draw(pipe, *args, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(*args, num_inference_steps=2, output_type="np", generator=generator, **kwargs).images

def run(block):
    names = {}
    exec(block, names)
    return names["pipe"]

stock, custom = map(run, blocks)
full, base, target = prompts
images = [draw(stock, full), draw(custom, base, target_prompt=target), draw(custom, full)]
stock.unload_lora_weights()
images.append(draw(stock, full))
stock.load_lora_weights("tester/x", weight_name=kohya)
images.append(draw(stock, full))
np.save("images.npy", np.stack(images))
print(type(custom).__name__, "attention_processors" in sys.modules)
"""


@pytest.fixture(scope="module")
def output(world, tmp_path_factory) -> Path:
    """An output folder as the trainer leaves it, with all that must not be pushed. No test may change it."""
    folder = tmp_path_factory.mktemp("trained") / "output"
    save_kohya_lora(save_lora(world, folder), folder / KOHYA_WEIGHTS)
    for name in ("checkpoint-4/optimizer.bin", "logs/events", "stage1/" + LORA_WEIGHTS, "cache/latents.pt", ".env"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"private {SECRET}", encoding="utf-8")
    (folder / PICTURE).parent.mkdir()
    Image.new("RGB", (8, 8)).save(folder / PICTURE)
    write_card(folder, make_facts(base_model=str(world.model)))
    return folder


def run_python(source: str, *arguments: str, cwd: Path, env: dict[str, str]) -> str:
    run = subprocess.run(
        [sys.executable, "-c", source, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]


def make_and_push(server: HubServer, output: Path, home: Path, cases: list) -> list:
    """For each name, token, whether private, and whether to push: the error's kind and text, or repository and URL."""
    results = []
    with server.here(home):
        for name, token, private, push in cases:
            try:
                repo_id = name if push == "only" else hub.create_hub_repo(name, token, private)
                url = hub.push_lora(output, repo_id, token, CODE, [KOHYA_WEIGHTS, PICTURE]) if push else None
                results.append([None, repo_id, url])
            except (ValueError, OSError) as error:
                results.append([type(error), str(error), None])
    return results


@pytest.fixture
def pushed(output, tmp_path):
    """A Hub with what was pushed to it; a name alone goes to the token's user."""
    with HubServer("tester", SECRET) as server:
        results = make_and_push(server, output, tmp_path / "pusher", [["x", SECRET, False, True]])
        assert results == [[None, "tester/x", f"{server.url}/tester/x"]]
        yield server


def test_a_push_holds_what_is_listed_and_no_more(pushed, output):
    repository = pushed.repos["tester/x"]
    assert repository.keys() == {"README.md", LORA_WEIGHTS, KOHYA_WEIGHTS, PICTURE, *CODE}
    for name, content in repository.items():
        assert content == CODE.get(name, output / name).read_bytes()
    assert len(pushed.commits["tester/x"]) == 2  # the empty one, and ours
    assert all(SECRET.encode() not in request.body for request in pushed.requests)
    assert any(SECRET in request.headers.get("authorization", "") for request in pushed.requests)


@pytest.mark.slow
def test_a_reader_without_a_token_runs_the_examples_of_the_card(pushed, world, output, tmp_path):
    card = ModelCard(pushed.repos["tester/x"]["README.md"].decode())
    blocks = [
        block.replace("dtype=torch.float16", "safety_checker=None").replace('.to("cuda")', "")
        for block in code_blocks(card)
    ]
    job = json.dumps([blocks, KOHYA_WEIGHTS, [FULL, BASE, TARGET]])
    (tmp_path / "elsewhere").mkdir()
    said = run_python(LOAD, job, cwd=tmp_path / "elsewhere", env=pushed.environment(tmp_path / "reader"))
    assert said == "SPFPortraitPipeline False"  # the siblings came from the repository
    images = np.load(tmp_path / "elsewhere" / "images.npy")
    expected = draw(world, output / LORA_WEIGHTS)
    stock, custom, custom_full, without, kohya = images
    differences = {
        name: np.abs(image - expected).max()
        for name, image in {"stock": stock, "custom": custom, "custom_full": custom_full, "kohya": kohya}.items()
    }
    print(differences)
    assert max(differences.values()) < CLOSE
    assert np.abs(without - expected).max() > 1e-2
    for name in ("portrait.png", "original_model.png"):
        assert (tmp_path / "elsewhere" / name).is_file()


def test_wrong_names_wrong_tokens_and_a_broken_hub_give_one_line(output, tmp_path):
    with HubServer("tester", SECRET, read_token=READ_SECRET, echo_token=True) as server:
        server.failures = {"tester/broken/commit": 500}
        cases = {
            "--hub_model_id": [
                ["no/such/name", SECRET, False, False],
                ["a name", SECRET, False, False],
                ["other/x", SECRET, False, False],
                ["tester/public", SECRET, True, False],
            ],
            "--hub_token": [
                ["x", "hf_WRONG" + SECRET, False, False],
                ["x", READ_SECRET, False, False],
                ["x", None, False, False],
            ],
            "--push_to_hub": [
                ["broken", SECRET, False, True],
                ["tester/missing", SECRET, False, "only"],
                ["tester/public", "hf_WRONG" + SECRET, False, "only"],
            ],
        }
        before = [["public", SECRET, False, False], ["hidden", SECRET, True, True]]
        jobs = before + [case for group in cases.values() for case in group]
        results = make_and_push(server, output, tmp_path, jobs)
        assert results[:2] == [[None, "tester/public", None], [None, "tester/hidden", f"{server.url}/tester/hidden"]]
        assert server.private == {"tester/hidden"}
        flags = [flag for flag, group in cases.items() for _ in group]
        for flag, (kind, message, _) in zip(flags, results[2:], strict=True):
            assert kind == (OSError if flag == "--push_to_hub" else ValueError), message
            assert message.startswith(f"{flag}: ") and "\n" not in message
            assert SECRET not in message and READ_SECRET not in message
        broken = results[2 + flags.index("--push_to_hub")][1]
        assert "500" in broken and f"whole in {output}" in broken and "hf upload tester/broken" in broken
        assert not server.repos["tester/broken"] and not server.repos["tester/public"]
        assert server.repos.keys() == {"tester/public", "tester/hidden", "tester/broken"}
        assert all(SECRET.encode() not in request.body for request in server.requests)


def test_a_hub_out_of_reach_is_one_line_too(output, tmp_path):
    with HubServer("tester", SECRET) as server:
        pass
    ((kind, message, _),) = make_and_push(server, output, tmp_path, [["x", SECRET, False, False]])
    assert kind is ValueError and message.startswith(f"--hub_token: cannot ask {server.url}")
    assert "\n" not in message and SECRET not in message


@pytest.mark.slow
def test_the_commands_of_the_error_push_all_files(output, tmp_path):
    with HubServer("tester", SECRET) as server:
        server.failures = {"/commit/": 500}
        ((_, message, _),) = make_and_push(server, output, tmp_path, [["x", SECRET, False, True]])
        server.failures = {}
        environment = server.environment(tmp_path / "by_hand", SECRET)
        for command in message.split("push it again with: ")[1].split(" && "):
            name, *arguments = shlex.split(command)
            program = Path(sys.executable).with_name(name)
            run = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
        assert server.repos["tester/x"].keys() == {"README.md", LORA_WEIGHTS, KOHYA_WEIGHTS, PICTURE, *CODE}


@pytest.fixture
def push(output, tmp_path, monkeypatch):
    """A push of a copy of the output folder that must end before anything is sent."""
    folder = tmp_path / "output"
    for name in ("README.md", LORA_WEIGHTS, PICTURE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((output / name).read_bytes())
    monkeypatch.setattr(hub.HfApi, "create_commit", lambda *_, **__: pytest.fail("something was sent"))

    def run(files=(), token=SECRET):
        return hub.push_lora(folder, "tester/x", token, CODE, files)

    run.folder = folder
    return run


@pytest.mark.parametrize("path", ["README.md", PICTURE, LORA_WEIGHTS])
def test_a_file_with_the_token_is_refused(push, path, monkeypatch):
    (push.folder / path).write_bytes(b"before hf_SECRETofTheTester after")
    with pytest.raises(ValueError, match="holds the Hub's token") as error:
        push([PICTURE])
    assert str(push.folder / path) in str(error.value) and SECRET not in str(error.value)
    # The same for a token that is not given but stored.
    monkeypatch.setattr(hub, "get_token", lambda: SECRET)
    with pytest.raises(ValueError, match="holds the Hub's token"):
        push([PICTURE], token=None)


def test_a_link_out_of_the_folder_is_refused(push, output):
    (push.folder / PICTURE).unlink()
    (push.folder / PICTURE).symlink_to(output / PICTURE)
    with pytest.raises(ValueError, match=f"{PICTURE} leads out of"):
        push([PICTURE])


@pytest.mark.parametrize(
    "target, argument",
    [
        (("red hair",), "'red hair'"),
        ((("a hat", "a crown"),), "[('a hat', 'a crown')]"),
        (("red hair", "a scarf"), "['red hair', 'a scarf']"),
    ],
)
def test_the_example_adds_or_replaces_as_the_training_did(tmp_path, target, argument):
    card = write_card(tmp_path, make_facts(example_target=target)).read_text(encoding="utf-8")
    assert f"target_prompt={argument}, compare=True" in card
