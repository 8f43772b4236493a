"""What all tests share: the repository's modules are importable, and nothing asks the Hub."""

import gc
import os
import sys
from pathlib import Path

import pytest


# Before any library of the Hub is imported: they read it once.
gc.disable()
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest_plugins = ["tiny_unet"]  # its fixtures


def pytest_collection_finish():
    """What the imported libraries made stays: the collector, which every run of the trainer calls, passes over it."""
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
