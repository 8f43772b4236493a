"""LoRAs trained through the real script, each in a process of its own; what is finished is not trained again.

Source: [ours].
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import sfcm_modes
from benchmarks.parts.drawing import ROOT, base_model_digest
from loras import LORA_WEIGHTS


# Of every training: no pictures and no logs.
UNWATCHED = ("--num_validation_images", "0", "--report_to", "none")
NOTE = "benchmark.json"  # of a LoRA's folder: its recipe, and the seconds that it took


def run_folder(output_dir: Path, target_name: str, run_name: str, seed: int) -> Path:
    return output_dir / "runs" / target_name / f"{run_name}-seed{seed}"


def train_into(folder: Path, command: list[str], **depends_on: object) -> Path:
    """Train into a folder, unless the LoRA of this very recipe is there already.

    Flags and the files it starts from are compared with those of a LoRA that is there; the script's code is not.

    Args:
        folder: where the LoRA goes.
        command: the flags but for the output folder.
        depends_on: whatever else the LoRA depends on.

    Raises:
        ValueError: the folder holds a LoRA of other flags, or from other files.
        RuntimeError: the training script failed.
    """
    note, recipe = folder / NOTE, {"command": command, "base_model": base_model_digest(), **depends_on}
    if (folder / LORA_WEIGHTS).is_file() and note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        if {name: found[name] for name in recipe} != recipe:
            raise ValueError(
                f"{folder} was trained with other flags or from another model: remove it or give another --output_dir."
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    code = run_trainer([*command, "--output_dir", str(folder)], folder / "training.log")
    if code != 0 or not (folder / LORA_WEIGHTS).is_file():
        raise RuntimeError(f"The training of {folder} failed with exit code {code}; see {folder / 'training.log'}.")
    note.write_text(json.dumps(recipe | {"seconds": time.time() - start}, indent=2) + "\n", encoding="utf-8")
    print(f"trained {folder.parent.name}, {folder.name} in {time.time() - start:.0f} s", flush=True)
    return folder


def run_trainer(flags: list[str], log: Path) -> int:
    """The exit status of the training script, which goes on from the checkpoint of an interrupted training."""
    program = "benchmarks/sfcm_modes.py" if sfcm_modes.LOST.keys() & set(flags) else "train_spf_portrait_lora.py"
    command = [sys.executable, str(ROOT / program), *flags, "--resume_from_checkpoint", "latest"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
