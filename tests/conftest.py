"""What all tests share: the repository's modules are importable, and nothing asks the Hub."""

import os
import sys
from pathlib import Path


# Before any library of the Hub is imported: they read it once.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest_plugins = ["tiny_unet"]  # its fixtures
