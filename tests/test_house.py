"""The layout of the repository, told from its imports alone: leaves below, the pipeline on them, scripts on top."""

import ast
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
LEAVES = (
    "attention_processors", "prompts", "sfcm", "losses", "data", "caches", "checkpoints", "checked_loading",
    "console", "hub", "interruption", "lora_files", "metrics", "optimizers", "pictures", "report",
)  # fmt: skip
FLOOR_1 = (
    "conditioning", "evaluation_inputs", "evaluation_models", "evaluation_summary", "pipeline_spf_portrait",
    "training_arguments", "training_inputs", "training_models", "training_sharing",
)  # fmt: skip
PURE_LEAVES = {
    "prompts": {"transformers"}, "sfcm": {"torch"}, "losses": {"torch"}, "metrics": {"numpy"}, "report": {"PIL"},
    "console": {"tqdm"},
}  # fmt: skip
# Every Python file that belongs to the repository; hidden folders hold environments and caches.
FILES = sorted(
    path for path in ROOT.rglob("*.py") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
# What `import name` can find at the top level of the repository.
OWN_MODULES = {path.stem for path in ROOT.glob("*.py")} | {
    path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))
}


def imported_modules(source: str) -> set[str]:
    """First names of all imported modules; a relative import counts as the module of this repository that it names."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    return {name.split(".")[0] for name in names}


def test_the_walk_sees_every_form_of_import():
    source = "import a.b as c\nfrom d.e import f\nfrom . import g\nfrom .h import i\ndef j():\n    import k, l\n"
    assert imported_modules(source) == {"a", "d", "g", "h", "k", "l"}


def test_the_house_is_complete():
    programs = {"train_spf_portrait_lora", "evaluate_spf_portrait", "app", "export_spf_portrait_lora"}
    assert OWN_MODULES == {
        *LEAVES, *FLOOR_1, *programs, "evaluation_arguments", "toy_portraits", "benchmarks", "tests"
    }  # fmt: skip
    assert ROOT / "tests" / "test_house.py" in FILES


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_imports_nothing_of_the_repository(leaf):
    source = (ROOT / f"{leaf}.py").read_text(encoding="utf-8")
    assert imported_modules(source) & OWN_MODULES == set()


@pytest.mark.parametrize(("leaf", "libraries"), PURE_LEAVES.items())
def test_a_pure_leaf_needs_one_library(leaf, libraries):
    source = (ROOT / f"{leaf}.py").read_text(encoding="utf-8")
    assert imported_modules(source) - sys.stdlib_module_names == libraries


@pytest.mark.parametrize("module", FLOOR_1)
def test_floor_1_imports_only_leaves(module):
    imported = imported_modules((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    assert imported & OWN_MODULES and imported & OWN_MODULES <= set(LEAVES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_needs_torchvision(path):
    assert "torchvision" not in imported_modules(path.read_text(encoding="utf-8"))
