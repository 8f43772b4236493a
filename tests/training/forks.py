"""The trainer as a program, in forks of one process that has imported it: 0.1 s each instead of many seconds."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train_spf_portrait_lora.py"

# Reads a run a line of JSON, runs it in forks of itself as Python would, and prints their numbers and how they ended.
# A fork ends without taking hundreds of modules apart, which is what takes most of such a process's time, and its
# collector passes over what was imported before it.
FORKING = """
import atexit, gc, json, os, runpy, sys, traceback

def run(rank, ends, flags, folder, largest_file, variables):
    os.chdir(folder)
    os.environ.update(variables)
    if variables:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    for number, end in enumerate(ends, 1):
        os.dup2(end, number)
        os.close(end)
    if largest_file is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.argv, status = [script, *flags], 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status or 0)

script = sys.argv[1]
sys.path.insert(0, os.path.dirname(script))
gc.disable()
import train_spf_portrait_lora

gc.freeze()
gc.enable()
print(json.dumps("ready"), flush=True)
while line := sys.stdin.readline():
    count, pipes, *rest = json.loads(line)
    ends = [os.open(pipe, os.O_WRONLY) for pipe in pipes]
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            run(rank, ends, *rest)
    for end in ends:
        os.close(end)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


def environment(**variables: str) -> dict[str, str]:
    """Of a process with one thread that asks no Hub, and that no setting of accelerate reaches."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return {**kept, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}


class Forks:
    """The process that has imported the trainer. One run at a time."""

    def __init__(self, folder: Path) -> None:
        """Start it.

        Args:
            folder: empty; what the runs write goes through pipes in it. No file could be limited with theirs.
        """
        self._pipes = [folder / "stdout", folder / "stderr"]
        for pipe in self._pipes:
            os.mkfifo(pipe)
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKING, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        assert self.answer() == "ready"

    def answer(self) -> Any:
        """The next line it says, once it does."""
        return json.loads(self._process.stdout.readline())

    def start(
        self, flags: Sequence[str], folder: Path = ROOT, largest_file: int | None = None, processes: int = 1
    ) -> Run:
        """Begin a run.

        Args:
            flags: of the trainer.
            folder: it runs in.
            largest_file: none can grow above so many bytes, which fails as it does on a full disk.
            processes: which train together on the CPU, as a launcher starts them.
        """
        variables = {}
        if processes > 1:
            with socket.socket() as own:
                own.bind(("localhost", 0))
                port = own.getsockname()[1]
            variables = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            variables |= {"LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
        pipes = [*map(str, self._pipes)]
        return Run(self, self._pipes, [processes, pipes, list(flags), str(folder), largest_file, variables])

    def ask(self, request: list[Any]) -> list[int]:
        """Have a run begun; the numbers of its processes."""
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self.answer()

    def speaks(self, timeout: float = 0) -> bool:
        """Whether an answer lies ready, or does within so many seconds."""
        return bool(select.select([self._process.stdout], [], [], timeout)[0])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Run:
    """A run of the trainer: its processes, how they ended, and what they have written so far."""

    def __init__(self, forks: Forks, pipes: Sequence[Path], request: list[Any]) -> None:
        self._forks, self._status = forks, None
        self._written = [bytearray() for _ in pipes]
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in zip(pipes, self._written, strict=True)
        ]
        for reader in self._readers:
            reader.start()
        self.pids = forks.ask(request)

    @staticmethod
    def _read(pipe: Path, written: bytearray) -> None:
        with pipe.open("rb", buffering=0) as file:
            while block := file.read(1 << 16):
                written += block

    @property
    def stdout(self) -> str:
        return self._written[0].decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self._written[1].decode(errors="replace")

    def last_line(self) -> str:
        return self.stderr.strip().splitlines()[-1]

    def ended(self) -> bool:
        return self._status is not None or self._forks.speaks()

    def wait_for(self, condition: Callable[[], bool], timeout: float = 240) -> None:
        """Until it is so, and fail if the run ends before."""
        end = time.monotonic() + timeout
        while not condition():
            assert not self.ended() and time.monotonic() < end, self.stderr
            time.sleep(0.002)

    def wait(self, timeout: float = 240) -> int:
        """Its exit status, or the signal that ended it as a negative number; of several processes the first not 0.

        A run that does not end is ended.
        """
        if self._status is None:
            if not self._forks.speaks(timeout):
                for pid in self.pids:
                    os.kill(pid, signal.SIGKILL)
            self._status = next((status for status in self._forks.answer() if status), 0)
            for reader in self._readers:
                reader.join(60)
        return self._status
