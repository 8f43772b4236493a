"""What all tests share: the repository's modules are importable, and nothing asks the Hub."""

import gc
import os
import sys
from pathlib import Path

import pytest


gc.disable()  # until what the imported libraries made is frozen
# Before any library of the Hub is imported: they read it once.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest_plugins = ["tiny_unet"]  # its fixtures


def pytest_collection_finish():
    """The collector, which every run of the trainer calls, passes over what the imported libraries made."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from test_prompts import write_vocabulary
    from transformers import CLIPTokenizer

    folder = write_vocabulary(tmp_path_factory.mktemp("tokenizer"))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


@pytest.fixture
def own_world(tokenizer):
    """Tiny pipelines, see `pipeline_world.py`."""
    from pipeline_world import World

    return World(tokenizer)


@pytest.fixture(scope="session")
def world(tokenizer):
    """The same, shared: no test may change it."""
    from pipeline_world import World

    return World(tokenizer)


@pytest.fixture(scope="session")
def bare_world(tokenizer):
    """The same without a LoRA, shared: no test may change it."""
    from pipeline_world import World

    return World(tokenizer, lora=False)


@pytest.fixture
def own_xl_world(tokenizer):
    """The same of Stable Diffusion XL."""
    from pipeline_world import XLWorld

    return XLWorld(tokenizer)


@pytest.fixture(scope="session")
def xl_world(tokenizer):
    """The same, shared: no test may change it."""
    from pipeline_world import XLWorld

    return XLWorld(tokenizer)


@pytest.fixture(scope="session")
def bare_xl_world(tokenizer):
    """The same without a LoRA, shared: no test may change it."""
    from pipeline_world import XLWorld

    return XLWorld(tokenizer, lora=False)


@pytest.fixture
def own_sd3_world():
    """The same of Stable Diffusion 3, see `sd3_world.py`."""
    from sd3_world import SD3World

    return SD3World()


@pytest.fixture(scope="session")
def sd3_world():
    """The same, shared: no test may change it."""
    from sd3_world import SD3World

    return SD3World()


@pytest.fixture(scope="session")
def bare_sd3_world():
    """The same without a LoRA and without T5, shared: no test may change it."""
    from sd3_world import SD3World

    return SD3World(with_t5=False, lora=False)


@pytest.fixture(scope="session")
def toy_xl_folder(tmp_path_factory):
    from toy_bases import write_toy_xl

    return write_toy_xl(tmp_path_factory.mktemp("toy_xl"))


@pytest.fixture(scope="session")
def toy_3_folder(tmp_path_factory):
    from toy_bases import write_toy_3

    return write_toy_3(tmp_path_factory.mktemp("toy_3"))


@pytest.fixture
def toy_3(toy_3_folder, monkeypatch):
    """The base `sd3` is a random one, see `toy_bases.py`; its folder."""
    from toy_portraits.recipe import BASES

    monkeypatch.setitem(BASES, "sd3", BASES["sd3"]._replace(folder=toy_3_folder))
    return toy_3_folder


@pytest.fixture
def toy_bases(toy_xl, toy_3):
    """The bases but the first are random ones; their folders by name."""
    return {"sdxl": toy_xl, "sd3": toy_3}


@pytest.fixture
def toy_xl(toy_xl_folder, monkeypatch):
    """The base `sdxl` is a random one, see `toy_bases.py`; its folder."""
    from toy_portraits.recipe import BASES

    monkeypatch.setitem(BASES, "sdxl", BASES["sdxl"]._replace(folder=toy_xl_folder))
    return toy_xl_folder
