"""Tests of the pipeline as a custom pipeline of diffusers, in a process that does not know this repository."""

import ast
import json
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from hub_server import HubServer
from pipeline_world import BASE, FULL, ROOT, TARGET, assert_close, draw, lora_file

from families import hub_names
from training.sharing import pipeline_code


PIPELINE_CODE = pipeline_code(hub_names.STABLE_DIFFUSION)
FORMS = ("file", "folder", "hub", "from_pipe", "model")
# The file and the class of each family.
FAMILIES = {
    "sd": ("pipeline_spf_portrait", "SPFPortraitPipeline"),
    "xl": ("pipeline_spf_portrait_xl", "SPFPortraitXLPipeline"),
    "3": ("pipeline_spf_portrait_3", "SPFPortrait3Pipeline"),
}
WORLDS = {"sd": "world", "xl": "xl_world", "3": "sd3_world"}  # fixtures
# What one family needs beside the siblings of all.
OWN_SIBLINGS = {"pipeline_spf_portrait_3": {"joint_attention"}}
# Each form is loaded in a fork of its own: fresh but for the libraries, which take seconds.
SCRIPT = """
import json, os, peft, shutil, sys, torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers import SD3Transformer2DModel, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import StableDiffusion3Pipeline
from diffusers.utils.constants import HF_MODULES_CACHE
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

jobs, call, lora = json.load(open(sys.argv[1]))

def load(form, model, code):
    if form == "from_pipe":
        stock = DiffusionPipeline.from_pretrained(model)
        return DiffusionPipeline.from_pipe(stock, custom_pipeline=code, trust_remote_code=True)
    code = {"custom_pipeline": code} if code else {}
    return DiffusionPipeline.from_pretrained(model, trust_remote_code=True, **code)

def run(form, model, code):
    pipe = load(form, model, code)
    pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**call, generator=torch.Generator().manual_seed(0))
    pipe.visualize(output).save(form + ".png")
    here = sorted({"prompts", "sfcm", "spf_call"} & set(sys.modules))
    facts = [type(pipe).__name__, output.images.tolist(), output.reference_images.tolist(), output.sfcm.shape, here]
    json.dump(facts, open(form + ".json", "w"))

for form, *job in jobs:
    shutil.rmtree(HF_MODULES_CACHE, ignore_errors=True)
    child = os.fork()
    if child == 0:
        sys.stderr = open(form + ".txt", "w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        run(form, *job)
        os._exit(0)
    os.waitpid(child, 0)
"""


def siblings(name):
    """The modules of the repository that one imports as it does in a package."""
    modules = {path.stem for path in ROOT.glob("*.py")}
    nodes = ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
    own = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {node.module or alias.name for node in own for alias in node.names} & modules


def code_of(main):
    """The files of a custom pipeline by their names in a repository."""
    return {"pipeline.py": ROOT / f"{main}.py", **{f"{name}.py": ROOT / f"{name}.py" for name in siblings(main)}}


@pytest.mark.parametrize("main", [main for main, _ in FAMILIES.values()])
def test_the_main_file_names_every_sibling(main):
    """The loader copies what the main file imports, and not what its siblings do."""
    named = siblings(main)
    assert named - OWN_SIBLINGS.get(main, set()) == siblings("pipeline_spf_portrait")
    assert {f"{name}.py" for name in siblings("pipeline_spf_portrait")} == PIPELINE_CODE.keys() - {"pipeline.py"}
    assert set().union(*map(siblings, named)) <= named


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def family_world(family, request):
    return request.getfixturevalue(WORLDS[family])


@pytest.fixture(scope="module")
def loaded(family, family_world, tmp_path_factory):
    """A folder with what each form of loading drew."""
    folder, (main, class_name) = tmp_path_factory.mktemp("custom"), FAMILIES[family]
    model, code, elsewhere = folder / "model", folder / "code", folder / "elsewhere"
    family_world.original.save_pretrained(model)
    code.mkdir()
    elsewhere.mkdir()
    for name, path in code_of(main).items():
        shutil.copy(path, code / name)
    with_code = folder / "model_with_code"  # whose own index names the class
    shutil.copytree(model, with_code)
    for path in code_of(main).values():
        shutil.copy(path, with_code)
    index = json.loads((with_code / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = [main, class_name]
    (with_code / "model_index.json").write_text(json.dumps(index), encoding="utf-8")

    file = str(ROOT / f"{main}.py")
    sources = {"file": file, "folder": str(code), "hub": "tester/spf", "from_pipe": file, "model": ""}
    jobs = [(form, str(with_code if form == "model" else model), sources[form]) for form in FORMS]
    call = {"prompt": BASE, "target_prompt": TARGET, "compare": True, "return_sfcm": True, "guidance_scale": 5.0}
    call |= {"num_inference_steps": 1, "output_type": "np"}
    (elsewhere / "jobs.json").write_text(json.dumps([jobs, call, str(lora_file(family_world, folder / "lora"))]))
    with HubServer("tester", "hf_secret") as server:
        server.repos["tester/spf"] = {name: path.read_bytes() for name, path in code_of(main).items()}
        server.add_commit("tester/spf")
        run = subprocess.run(
            [sys.executable, "-P", "-c", SCRIPT, "jobs.json"],
            cwd=elsewhere,
            env=server.environment(folder / "home") | {"PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
    assert run.returncode == 0, run.stderr
    return elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_loads_as_custom_pipeline_in_a_fresh_process(family, family_world, loaded, form):
    said = (loaded / f"{form}.txt").read_text(encoding="utf-8")
    assert (loaded / f"{form}.json").is_file(), said
    assert "not found in your environment" not in said, "the loader asks for our own modules"
    name, images, references, shape, here = json.loads((loaded / f"{form}.json").read_text(encoding="utf-8"))
    # The siblings came with the pipeline; nothing was found on the path by chance.
    assert (name, shape, here) == (FAMILIES[family][1], [1, 1, 8, 8], [])
    assert_close(np.array(images), draw(family_world.stock, FULL).images)
    assert_close(np.array(references), draw(family_world.original, BASE).images)
    assert PIL.Image.open(loaded / f"{form}.png").width == 4 * 198 + 6
