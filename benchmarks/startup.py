"""CPU seconds until `--help` and a wrong flag are answered: `python benchmarks/startup.py`.

The least of several tries of each program, user and system time of the process and its children.
Source: [ours].
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("train_spf_portrait_lora.py", "evaluate_spf_portrait.py", "export_spf_portrait_lora.py", "app.py")
FLAGS = ("--help", "--no_such_flag")
TRIES = 5


def cpu_seconds(command: list[str]) -> float:
    """Of a process that says something and ends, by itself or with an error."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    print(f"| program | {' | '.join(FLAGS)} |\n| --- | --- | --- |")
    for program in PROGRAMS:
        command = [sys.executable, str(ROOT / program)]
        seconds = [min(cpu_seconds([*command, flag]) for _ in range(TRIES)) for flag in FLAGS]
        print(f"| {program} | {seconds[0]:.2f} | {seconds[1]:.2f} |", flush=True)
