"""The layout of the repository, told from its imports alone: arrows run downward, and none in a circle."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
# A module or a folder by the first name of its imports. Each floor imports from those below it alone, a module of a
# folder from its own folder as well. The nodes of ComfyUI find the one module that they take by its path.
FLOORS = (
    {"adapters", "attention_processors", "lora_layers", "wording", "region_guidance", "pictures", "programs"},
    {"prompts", "sfcm", "joint_attention"},
    {"spf_arguments", "spf_observer"},
    {"spf_lora"},
    {"spf_call"},
    {"loras", "pipeline_spf_portrait", "pipeline_spf_portrait_xl", "pipeline_spf_portrait_3"},
    {"families"},
    {"training", "evaluation"},
    {"train_spf_portrait_lora", "evaluate_spf_portrait", "draw_spf_portrait", "app", "export_spf_portrait_lora",
     "toy_portraits", "benchmarks", "tests", "comfyui"},
)  # fmt: skip
# The evaluation knows the toy world's targets, whose regions its renderer draws.
ALSO = {("evaluation", "toy_portraits")}
PURE = {
    "wording": set(), "prompts": {"wording", "transformers"}, "sfcm": {"region_guidance", "torch"},
    "region_guidance": {"torch"}, "training/losses": {"torch"},
    "evaluation/measures": {"numpy"}, "programs/console": {"tqdm"}, "programs/picture_files": {"PIL"},
    "programs/records": set(),
}  # fmt: skip
# Every Python file that belongs to the repository; hidden folders hold environments and caches.
FILES = sorted(
    path for path in ROOT.rglob("*.py") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
# What `import name` can find at the top level of the repository.
OWN = {path.stem for path in ROOT.glob("*.py")} | {
    path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))
}


def imported_modules(source: str) -> set[str]:
    """Names of all imported modules, what is taken from one included, for it may be a module itself.

    A relative import counts as the module of this repository that it names.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            names |= {node.module} if node.module else set()
            names |= {prefix + alias.name for alias in node.names}
    return names


def first_names(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path.read_text(encoding="utf-8"))}


def house_of(path: Path) -> str:
    """The module or the folder that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def floor_of(name: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if name in floor)


def test_the_walk_sees_every_form_of_import():
    source = "import a.b as c\nfrom d.e import f\nfrom . import g\nfrom .h import i\ndef j():\n    import k, l\n"
    assert imported_modules(source) == {"a.b", "d.e", "d.e.f", "g", "h", "h.i", "k", "l"}


def test_every_module_and_folder_has_its_floor():
    assert OWN == set().union(*FLOORS)
    assert ROOT / "tests" / "test_house.py" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_downward(path):
    own = house_of(path)
    for name in first_names(path) & OWN - {own}:
        # Programs, benchmarks and tests use each other; nothing below uses them.
        below = floor_of(name) < floor_of(own) or floor_of(own) == len(FLOORS) - 1
        assert below or (own, name) in ALSO, f"{path.relative_to(ROOT)} imports {name}"


def test_no_circle():
    """Not in a folder either, where `arrows_run_downward` says nothing."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    TopologicalSorter(
        {
            name: imported_modules(path.read_text(encoding="utf-8")) & modules.keys() - {name}
            for name, path in modules.items()
            if not name.startswith("tests.")
        }
    ).prepare()


@pytest.mark.parametrize(("module", "libraries"), PURE.items())
def test_a_pure_module_needs_one_library(module, libraries):
    imported = first_names(ROOT / f"{module}.py")
    assert imported - sys.stdlib_module_names - {"__future__"} == libraries


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_needs_torchvision(path):
    assert "torchvision" not in first_names(path)
