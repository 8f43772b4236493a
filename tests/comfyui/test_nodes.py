"""The nodes of ComfyUI against small stand-ins of what they call; `test_real_comfyui.py` has the real thing."""

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from region_guidance import RunningMap, keep_to_region, noise_difference


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "custom_node_of_a_test"
WORKFLOWS = sorted((ROOT / "comfyui" / "example_workflows").glob("*.json"))


@pytest.fixture
def stand_ins(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stand_ins"))
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("comfy", "folder_paths", PACKAGE):
            del sys.modules[name]


def load_package(folder: Path):
    """As ComfyUI loads a folder of `custom_nodes`."""
    places = {"submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location(PACKAGE, folder / "__init__.py", **places)
    package = sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


@pytest.fixture
def nodes(stand_ins, tmp_path):
    package = load_package(ROOT / "comfyui")
    sys.modules["folder_paths"].FOLDER = tmp_path
    save_file({"lora_unet_a.lora_up.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    return package.NODE_CLASS_MAPPINGS


class Patcher:
    """A model whose prediction is a known function of row and hooks, and which counts what is asked of it."""

    def __init__(self):
        self.model, self.model_options, self.current_hooks = self, {}, None
        self.model_config = self
        self.patchings, self.rows, self.lora_names = 0, [], {"lora_unet_a": "a.weight"}
        self.pattern = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def apply_hooks(self, hooks):
        self.patchings += self.current_hooks is not hooks
        self.current_hooks = hooks

    def predict(self, x, sigma, embeds, hooks):
        strength = 0.0 if hooks is None else sum(strength for _, strength in hooks.hooks)
        self.rows.append((float(embeds), strength))
        return x * 0.5 + sigma * embeds * (1 + strength) * self.pattern + strength * self.pattern.flip(-1)


NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
SIGMAS = torch.tensor([3.0, 2.0, 1.0])
FULL, BASE, NEGATIVE, BASE_ADAPTED = 1.0, 0.3, -0.2, 0.4


def conditioning(value, **values):
    return [[torch.tensor(value), values]]


def make_guider(nodes, patcher, **changes):
    inputs = {
        "model": patcher, "lora_name": "lora.safetensors", "lora_strength": 0.7, "full_prompt": conditioning(FULL),
        "base_prompt": conditioning(BASE), "negative": conditioning(NEGATIVE), "cfg": 3.0, "guidance": 1.0,
        "exponent": 2.0, "compared_with": "words", "lora_in_negative": True,
    }  # fmt: skip
    (guider,) = nodes["SPFPortraitLoraKeptToRegion"]().get_guider(**inputs | changes)
    return guider


def draw(guider):
    return guider.sample(NOISE, None, lambda x, denoised: x + 0.5 * (denoised - x), SIGMAS)


def by_hand(patcher, guidance=1.0, exponent=2.0, compared=("words",), words=BASE, negative=0.7, cfg=3.0):
    """The same run, written out."""
    x, running = NOISE, RunningMap()

    def predict(sigma, embeds, strength):
        return patcher.predict(x, sigma, torch.tensor(embeds), SimpleNamespace(hooks=[(None, strength)]))

    for sigma in SIGMAS:
        full, reference = predict(sigma, FULL, 0.7), predict(sigma, BASE, 0.0)
        held = {"words": predict(sigma, words, 0.7), "paths": reference}
        differences = torch.cat([noise_difference(full, held[name]) for name in compared], 1)
        full = keep_to_region(full, reference, running.add(differences) ** exponent, guidance)
        other = torch.zeros_like(x) if cfg == 1 else predict(sigma, NEGATIVE, negative)
        x = x + 0.5 * (other + (full - other) * cfg - x)
    return x, running.map()


@pytest.mark.parametrize(
    ("changes", "kwargs"),
    [
        ({}, {}),
        ({"guidance": 0.4, "exponent": 3.0}, {"guidance": 0.4, "exponent": 3.0}),
        ({"compared_with": "paths", "lora_in_negative": False}, {"compared": ("paths",), "negative": 0.0}),
        ({"compared_with": "both"}, {"compared": ("paths", "words")}),
        ({"base_prompt_with_lora": conditioning(BASE_ADAPTED)}, {"words": BASE_ADAPTED}),
        ({"cfg": 1.0}, {"cfg": 1}),
    ],
)
def test_a_run_is_the_formula(nodes, changes, kwargs):
    patcher = Patcher()
    drawn = draw(guider := make_guider(nodes, patcher, **changes))
    expected, region = by_hand(Patcher(), **kwargs)
    torch.testing.assert_close(drawn, expected)
    torch.testing.assert_close(guider.region.map(), region)
    ordinary = draw(make_guider(nodes, Patcher(), **changes | {"guidance": 0.0}))
    assert not torch.allclose(drawn, ordinary, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, {(FULL, 0.7), (BASE, 0.0), (BASE, 0.7), (NEGATIVE, 0.7)}),
        ({"compared_with": "paths"}, {(FULL, 0.7), (BASE, 0.0), (NEGATIVE, 0.7)}),
        ({"lora_in_negative": False}, {(FULL, 0.7), (BASE, 0.0), (BASE, 0.7), (NEGATIVE, 0.0)}),
        ({"cfg": 1.0}, {(FULL, 0.7), (BASE, 0.0), (BASE, 0.7)}),
        ({"guidance": 0.0}, {(FULL, 0.7), (NEGATIVE, 0.7)}),
    ],
)
def test_a_step_predicts_each_row_once(nodes, changes, rows):
    draw(make_guider(nodes, patcher := Patcher(), **changes))
    steps = [patcher.rows[start : start + len(rows)] for start in range(0, len(patcher.rows), len(rows))]
    assert len(steps) == len(SIGMAS)
    for step in steps:
        assert {(round(embeds, 6), strength) for embeds, strength in step} == rows


def test_weights_are_patched_once_a_step(nodes):
    draw(make_guider(nodes, patcher := Patcher()))
    assert patcher.patchings == len(SIGMAS)


def test_rows_with_hooks_of_their_own_stay_one_group(nodes):
    """A prompt that comes with another LoRA's hooks has both, and is predicted with the others that do."""
    other = sys.modules["comfy.hooks"].HookGroup([(None, 0.2)])
    own = {name: conditioning(value, hooks=other) for name, value in (("full_prompt", FULL), ("base_prompt", BASE))}
    guider = make_guider(nodes, patcher := Patcher(), negative=conditioning(NEGATIVE, hooks=other), **own)
    draw(guider)
    groups = {id(row[0]["hooks"]) for row in guider.original_conds.values()}
    assert len(groups) == 2 and patcher.patchings <= len(SIGMAS) + 1
    assert {round(strength, 6) for _, strength in patcher.rows} == {0.2, 0.9}


def test_a_region_is_of_the_last_run(nodes):
    guider = make_guider(nodes, Patcher())
    assert guider.region is None
    draw(guider)
    first = guider.region
    draw(guider)
    assert guider.region is not first and torch.equal(guider.region.map(), first.map())


def test_the_mask_has_the_pictures_size(nodes):
    draw(guider := make_guider(nodes, Patcher()))
    (mask,) = nodes["SPFPortraitLoraRegionMask"]().get_mask(guider, torch.zeros(2, 64, 64, 3))
    assert mask.shape == (2, 64, 64) and mask.min() >= 0 and mask.max() <= 1
    coarse = torch.nn.functional.avg_pool2d(mask, 8)
    assert torch.corrcoef(torch.stack([coarse.flatten(), guider.region.map().flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize(
    ("prepare", "pictures", "message"),
    [
        (lambda nodes: object(), 2, "This guider finds no region"),
        (lambda nodes: make_guider(nodes, Patcher()), 2, "found no region: draw with it first"),
        (lambda nodes: drawn_with(make_guider(nodes, Patcher(), guidance=0.0)), 2, "with a guidance above 0"),
        (lambda nodes: drawn_with(make_guider(nodes, Patcher())), 3, "drew 2 pictures last, but 3 are connected"),
    ],
)
def test_a_mask_that_cannot_be_is_an_error(nodes, prepare, pictures, message):
    guider = prepare(nodes)
    with pytest.raises(ValueError, match=message):
        nodes["SPFPortraitLoraRegionMask"]().get_mask(guider, torch.zeros(pictures, 64, 64, 3))


def drawn_with(guider):
    draw(guider)
    return guider


def test_latents_of_films_are_refused(nodes):
    with pytest.raises(ValueError, match=r"latents have the shape \[1, 4, 3, 8, 8\]"):
        make_guider(nodes, Patcher()).sample(torch.zeros(1, 4, 3, 8, 8), None, None, SIGMAS)


def test_another_node_that_predicts_itself_is_refused(nodes):
    patcher = Patcher()
    patcher.model_options = {"sampler_calc_cond_batch_function": lambda step: None}
    with pytest.raises(ValueError, match="sampler_calc_cond_batch_function"):
        draw(make_guider(nodes, patcher))


def test_a_lora_of_nothing_is_refused(nodes, tmp_path):
    save_file({"lora_unet_b.lora_up.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors has no weights under names that .* knows for Patcher"):
        make_guider(nodes, Patcher(), lora_name="other.safetensors")
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        make_guider(nodes, Patcher(), lora_name="gone.safetensors")


def test_a_lora_of_the_text_encoder_is_told(nodes, tmp_path, caplog):
    weights = {"lora_unet_a.lora_up.weight": torch.ones(2, 2), "lora_te_text_model_x.lora_up.weight": torch.ones(2, 2)}
    save_file(weights, tmp_path / "both.safetensors")
    with caplog.at_level(logging.INFO):
        make_guider(nodes, Patcher())
        assert not caplog.records
        make_guider(nodes, Patcher(), lora_name="both.safetensors")
    assert "both.safetensors also changes the text encoder" in caplog.text


def test_the_interface_lists_the_loras(nodes, tmp_path):
    for name, node in nodes.items():
        described = node.INPUT_TYPES()
        assert len(node.RETURN_TYPES) == 1 and callable(getattr(node, node.FUNCTION)), name
        assert "required" in described
    described = nodes["SPFPortraitLoraKeptToRegion"].INPUT_TYPES()["required"]
    assert described["lora_name"][0] == ["lora.safetensors"] and described["compared_with"][0][0] == "words"


def test_the_package_of_the_registry_brings_the_maths_along(stand_ins, tmp_path):
    package = shutil.copytree(ROOT / "comfyui", tmp_path / "spf-portrait")
    with pytest.raises(ImportError, match="region_guidance.py is neither"):
        load_package(package)
    shutil.copy(ROOT / "region_guidance.py", package)
    assert "SPFPortraitLoraKeptToRegion" in load_package(package).NODE_CLASS_MAPPINGS


def test_a_link_to_the_folder_finds_the_maths(stand_ins, tmp_path):
    (tmp_path / "spf-portrait").symlink_to(ROOT / "comfyui", target_is_directory=True)
    load_package(tmp_path / "spf-portrait")
    assert Path(sys.modules[f"{PACKAGE}.region_guidance"].__file__) == ROOT / "region_guidance.py"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_workflow_is_whole(nodes, path):
    """Its links join what is there, and its values are those of the node's inputs."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for number, source, slot, target, place, kind in workflow["links"]:
        assert number in by_id[source]["outputs"][slot]["links"] and by_id[source]["outputs"][slot]["type"] == kind
        assert by_id[target]["inputs"][place]["link"] == number and by_id[target]["inputs"][place]["type"] == kind
    assert set(nodes) <= {node["type"] for node in workflow["nodes"]}
    (guider,) = (node for node in workflow["nodes"] if node["type"] == "SPFPortraitLoraKeptToRegion")
    described = nodes[guider["type"]].INPUT_TYPES()
    kinds = {name: kind for part in described.values() for name, (kind, *_) in part.items()}
    sockets = {name: kind for name, kind in kinds.items() if kind in ("MODEL", "CONDITIONING")}
    assert {one["name"]: one["type"] for one in guider["inputs"]} == sockets
    assert len(guider["widgets_values"]) == len(described["required"]) - 4
