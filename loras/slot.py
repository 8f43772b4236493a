"""One LoRA on a pipeline, exchanged by its name for users who may see this machine's files, or may not. [ours]"""

import math
import tempfile
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from loras.finding import clean_source, download_public_lora, find_lora
from loras.loading import LoraPipeline, load_lora
from programs.loading import naming


class LoraSlot:
    """The one LoRA of a pipeline: `source` is what it was asked for with, and `note` what is to be said of its file.

    Args:
        pipeline: without a LoRA.
        named: LoRAs that anybody may use, wherever they are. All others are of public repositories then, are asked for
            without this machine's token, and are not kept. None if the users may have what this machine has.
        max_bytes: the largest file of a LoRA that is not among those named.
    """

    def __init__(
        self, pipeline: LoraPipeline, named: Iterable[str] | None = None, max_bytes: float = math.inf
    ) -> None:
        self.pipeline, self.max_bytes = pipeline, max_bytes
        self.named = None if named is None else tuple(map(_clean, named))
        self.source = self.note = ""
        self._last_change, self._numbers = 0.0, count(1)

    def use(self, source: str) -> None:
        """Have this LoRA on the pipeline, or none for an empty text; a file that changed is read again.

        Raises ValueError: there is no such LoRA, or it is for another model; the former one is still there.
        """
        is_known = self.named is None or _clean(source) in self.named
        changed = _last_change(source) if is_known else 0.0
        if (source, changed) == (self.source, self._last_change):
            return
        former, name = self.pipeline.get_active_adapters(), f"lora_{next(self._numbers)}"
        if not source:
            self.pipeline.unload_lora_weights()
            self.note = ""
        else:
            # On Windows a file cannot be removed while its weights are mapped.
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                with naming(source):
                    found = find_lora(source) if is_known else download_public_lora(source, folder, self.max_bytes)
                self.note = load_lora(self.pipeline, source, name, found)
            if former:
                self.pipeline.delete_adapters(former)
                self.pipeline.set_adapters(name)
        self.source, self._last_change = source, changed


def _clean(source: str) -> str:
    with naming(source):
        return clean_source(source)


def _last_change(source: str) -> float:
    """Of a file, or of the newest LoRA in a folder; 0 for what is on the Hub."""
    with naming(source):
        path = Path(clean_source(source))
        files = [path] if path.is_file() else list(path.glob("*.safetensors")) if source else []
        return max((file.stat().st_mtime for file in files), default=0.0)
