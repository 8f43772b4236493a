"""Nodes for ComfyUI that keep a LoRA to its region, as `sfcm_guidance` of the pipelines does.

The maths is `region_guidance.py`: beside this file in the package of the registry, one folder up in the repository.
"""

import importlib.util
import sys
from pathlib import Path


def _load_region_guidance() -> None:
    """Make the file a module of this package, wherever ComfyUI found the package."""
    here = Path(__file__).resolve().parent
    places = [folder / "region_guidance.py" for folder in (here, here.parent)]
    found = [path for path in places if path.is_file()]
    if not found:
        raise ImportError(
            f"region_guidance.py is neither {places[0]} nor {places[1]}: link the folder comfyui/ of the repository "
            "into custom_nodes, or copy region_guidance.py into the copy of it."
        )
    spec = importlib.util.spec_from_file_location(f"{__name__}.region_guidance", found[0])
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


_load_region_guidance()

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402


__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
