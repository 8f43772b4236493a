"""A real ComfyUI for tests: started without a window on the CPU, asked over HTTP as its interface asks it.

`COMFYUI_PATH` names a checkout of ComfyUI, `COMFYUI_PYTHON` the interpreter that has what it needs, this one if
unset.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
needs_comfyui = pytest.mark.skipif(COMFYUI is None, reason="COMFYUI_PATH names no checkout of ComfyUI")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


class Server:
    """A running ComfyUI; `folder` holds its models, custom nodes and what it writes."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self._address = folder, f"http://127.0.0.1:{port}"

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self._address + path, timeout=60) as answer:
            return json.load(answer)

    def queue(self, graph: dict[str, dict], timeout: float = 300) -> dict:
        """Run a graph in the format of the API; gives its entry of the history.

        Raises RuntimeError: it was refused, or a node failed; with what ComfyUI says.
        """
        body = json.dumps({"prompt": graph}).encode()
        request = urllib.request.Request(self._address + "/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error
        end = time.monotonic() + timeout
        while number not in (history := self.get(f"/history/{number}")):
            if time.monotonic() > end:
                raise TimeoutError(f"The graph was not done after {timeout} s.")
            time.sleep(0.05)
        if history[number]["status"]["status_str"] != "success":
            raise RuntimeError(json.dumps(history[number]["status"]))
        return history[number]

    def files(self, entry: dict, node: str) -> list[Path]:
        """The files that a node of a graph wrote."""
        (files,) = entry["outputs"][node].values()
        return [self.folder / "output" / file["subfolder"] / file["filename"] for file in files]


@contextmanager
def comfyui(folder: Path) -> Iterator[Server]:
    """ComfyUI with this repository's nodes, linked as a user would, and the models in `folder`."""
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "custom_nodes" / "spf-portrait").symlink_to(ROOT / "comfyui", target_is_directory=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        PYTHON, "main.py", "--cpu", "--port", str(port), "--base-directory",
        str(folder), "--disable-api-nodes", "--database-url", f"sqlite:///{folder}/comfyui.db",
        # Else text encoders are held in half precision, on the CPU as well.
        "--fp32-text-enc",
    ]  # fmt: skip
    log = folder / "comfyui.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=COMFYUI, stdout=output, stderr=subprocess.STDOUT)
    try:
        server, end = Server(folder, port), time.monotonic() + 180
        while True:
            try:
                server.get("/system_stats")
                break
            except urllib.error.URLError:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"ComfyUI did not start:\n{log.read_text()[-4000:]}") from None
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder / "models")


def graph_of(workflow: dict, nodes: dict[str, dict]) -> dict[str, dict]:
    """A workflow of the interface in the format of the API; `nodes` is what `/object_info` says."""
    links = {number: [str(node), slot] for number, node, slot, *_ in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] not in nodes:
            continue  # a note
        given, inputs = iter(node["widgets_values"]), {}
        described = nodes[node["type"]]["input"]
        for name, (kind, *options) in (described["required"] | described.get("optional", {})).items():
            if isinstance(kind, list) or kind in WIDGETS:
                inputs[name] = next(given)
                if options and options[0].get("control_after_generate"):
                    next(given)
        assert not [*given], node["type"]
        inputs |= {one["name"]: links[one["link"]] for one in node["inputs"] if one["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph
