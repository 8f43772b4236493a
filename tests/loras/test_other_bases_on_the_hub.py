"""Cards and pushes of LoRAs for SDXL and for base models in one file: the examples run, in a process of its own."""

import ast
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from hub_server import HubServer
from pipeline_world import make_components
from safetensors.torch import save_file
from sdxl_world import make_sdxl, save_sdxl_lora, with_copies
from test_hub import BASE, FULL, LOAD, ROOT, SECRET, TARGET, code_blocks, make_facts, save_lora, write_vocabulary
from transformers import CLIPTokenizer

from families.hub_names import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from loras import CARD, KOHYA_WEIGHTS, LORA_WEIGHTS, hub
from loras.card import write_model_card
from loras.writing import save_kohya_lora
from programs.original_layout import one_file
from programs.single_file import find_single_file
from training import sharing
from training.sharing import pipeline_code


def test_the_code_of_a_pipeline_is_all_that_its_file_names(tmp_path, monkeypatch):
    for names in (STABLE_DIFFUSION, STABLE_DIFFUSION_XL):
        code = pipeline_code(names)
        assert code.pop("pipeline.py") == ROOT / names.pipeline_file and all(path.is_file() for path in code.values())
        for path in code.values():  # what a sibling needs is there too
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            needed = {node.module or own.name for node in nodes if node.level == 1 for own in node.names}
            assert needed <= {name.removesuffix(".py") for name in code}
    text = "try:\n    from . import one, two as own\n    from .three import (\n        x,\n    )\nfinally:\n    pass\n"
    (tmp_path / STABLE_DIFFUSION.pipeline_file).write_text(text)
    monkeypatch.setattr(sharing, "_ROOT", tmp_path)
    assert list(pipeline_code(STABLE_DIFFUSION)) == ["pipeline.py", "one.py", "three.py", "two.py"]


def image(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(FULL, num_inference_steps=2, output_type="np", generator=generator).images


def make_world(kind, form, folder):
    """A base model as a folder or one file, a LoRA beside its card, and what is drawn without and with it."""
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), model_max_length=77)
    names, output = (STABLE_DIFFUSION_XL if kind == "xl" else STABLE_DIFFUSION), folder / "output"
    if kind == "xl":
        pipeline = make_sdxl(tokenizer)
        lora = save_sdxl_lora(pipeline, output)
        own = with_copies(pipeline)
    else:
        components = make_components(tokenizer)
        pipeline, own = StableDiffusionPipeline(**components), StableDiffusionPipeline(**make_components(tokenizer))
        lora = save_lora(SimpleNamespace(components=components), output)
    model, file = folder / "model", None
    pipeline.save_pretrained(model)
    if form != "folder":
        path = folder / "base.safetensors"
        marks = {name: torch.empty(0) for name in ("v_pred", "ztsnr") if form == "marked"}
        save_file(one_file(pipeline) | marks, path)
        file = find_single_file(str(path), str(model))
        if marks:
            scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
            own.scheduler = DDIMScheduler.from_config(scheduler.config, **file.scheduler)
            assert own.scheduler.alphas_cumprod[-1] == 0
    save_kohya_lora(lora, output / KOHYA_WEIGHTS)
    base = model if file is None else folder / "base.safetensors"
    facts = make_facts(base_model=str(base), pictures=(), licence=names.licence)
    write_model_card(output, facts, names, file)
    without = image(own)
    own.load_lora_weights(output, weight_name=LORA_WEIGHTS)
    return SimpleNamespace(names=names, output=output, model=model, without=without, expected=image(own))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("xl", "folder"), ("xl", "file"), ("sd", "file"), ("sd", "marked")])
def test_a_push_is_loaded_by_the_examples_of_its_card(kind, form, tmp_path):
    """The process knows neither this repository nor the folder it lies in."""
    world = make_world(kind, form, tmp_path)
    code, elsewhere = pipeline_code(world.names), tmp_path / "elsewhere"
    elsewhere.mkdir()
    with HubServer("tester", SECRET) as server:
        with server.here(tmp_path / "pusher"):
            repo_id = hub.create_hub_repo("x", SECRET, False)
            hub.push_lora(world.output, repo_id, SECRET, code, [KOHYA_WEIGHTS])
        assert server.repos["tester/x"].keys() == {CARD, LORA_WEIGHTS, KOHYA_WEIGHTS, *code}
        for name, path in code.items():
            assert server.repos["tester/x"][name] == path.read_bytes()
        blocks = code_blocks(SimpleNamespace(text=(world.output / CARD).read_text(encoding="utf-8")))
        blocks = [re.sub(r'dtype=torch.float16|\.to\("cuda"\)', "", block).replace(", )", ")") for block in blocks]
        # One step is enough to show that they run.
        blocks = [block.replace(").images[0]", ", num_inference_steps=1).images[0]") for block in blocks]
        blocks = [block.replace("compare=True)", "compare=True, num_inference_steps=1)") for block in blocks]
        # What is local is named by its last part alone.
        blocks = [block.replace("path/to/model", str(world.model)).replace("\n    ,\n", "\n") for block in blocks]
        run = subprocess.run(
            [sys.executable, "-P", "-c", LOAD, json.dumps([blocks, KOHYA_WEIGHTS, [FULL, BASE, TARGET]])],
            cwd=elsewhere, env=server.environment(tmp_path / "reader") | {"PYTHONPATH": ""}, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    own = "SPFPortraitXLPipeline" if kind == "xl" else "SPFPortraitPipeline"
    assert run.stdout.strip().splitlines()[-1] == f"{own} False"  # the siblings came from the repository
    stock, custom, custom_full, without, kohya = np.load(elsewhere / "images.npy")
    size = np.abs(world.expected - world.without).max()
    assert size > 1e-3
    for name, drawn in {"stock": stock, "custom": custom, "full": custom_full, "kohya": kohya}.items():
        assert np.abs(drawn - world.expected).max() < 1e-2 * size, name
    assert np.abs(without - world.without).max() < 1e-2 * size


def test_the_card_of_a_base_in_one_file_says_what_works(tmp_path):
    config = tmp_path / "config"
    config.mkdir()
    file = SimpleNamespace(config=str(config), scheduler={"prediction_type": "v_prediction"})
    for names, kind in ((STABLE_DIFFUSION, StableDiffusionPipeline), (STABLE_DIFFUSION_XL, StableDiffusionXLPipeline)):
        facts = make_facts(base_model="path/to/x.safetensors", repo_id=None)
        text = write_model_card(tmp_path, facts, names, file).read_text(encoding="utf-8")
        stock, custom = code_blocks(SimpleNamespace(text=text))
        for block in (stock, custom):
            ast.parse(block)
            load = f"{kind.__name__}.from_single_file('path/to/x.safetensors', config='path/to/config', scheduler="
            assert load + "DDIMScheduler.from_pretrained('path/to/config', subfolder='scheduler', " in block
            assert ".from_pretrained('path/to/x.safetensors'" not in block and str(tmp_path) not in block
            assert "prediction_type='v_prediction'), dtype=torch.float16)" in block
        assert f"from diffusers import DiffusionPipeline, DDIMScheduler, {kind.__name__}\n" in custom
        assert "DiffusionPipeline.from_pipe(\n" in custom and hasattr(DiffusionPipeline, "from_pipe")
    file = SimpleNamespace(config="user/name", scheduler={})
    text = write_model_card(tmp_path, facts, names, file).read_text(encoding="utf-8")
    assert "from_single_file('path/to/x.safetensors', config='user/name', dtype=torch.float16)" in text
    assert "DDIMScheduler" not in text
