"""What the rows of `benchmarks/gpu.py` do, each called with the `Bench` and its row's arguments.

Source: [ours].
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_spf_portrait_lora as trainer  # noqa: E402
from adapters import active_adapters  # noqa: E402
from benchmarks import step_cost  # noqa: E402
from benchmarks.estimate_memory import GIB, PRESETS  # noqa: E402
from benchmarks.gpu import MODELS, Bench, Result  # noqa: E402
from benchmarks.random_stable_diffusion import write_model  # noqa: E402
from loras import LORA_WEIGHTS  # noqa: E402
from pipeline_spf_portrait import SPFPortraitPipeline  # noqa: E402
from toy_portraits.recipe import BASE_MODEL, LORA, training_flags  # noqa: E402


TARGET = "blonde_hair"
QUIET = "--report_to none --num_validation_images 0 --checkpointing_steps 0"
SMALL = "--alignment_inference_steps 2 --sfcm_noise_samples 1"
# Half precision takes a CPU without instructions for it twenty times as long as float32.
COUNTS = {
    "cuda": "--max_train_samples 32 --num_alignment_images 16",
    "cpu": "--max_train_samples 6 --num_alignment_images 3 --train_batch_size 3",
}
FLAGS = {
    "float32": "--mixed_precision no",
    "tf32": "--mixed_precision no --allow_tf32",
    "bf16": "--mixed_precision bf16",
    "fp16": "--mixed_precision fp16",
}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------------------------------------------- training the toy


@contextmanager
def half_on_cpu() -> Iterator[None]:
    """Inside, the trainer's fp16 runs on a CPU: accelerate refuses it, torch's autocast and scaler do not."""
    make = trainer.make_accelerator

    def make_half(args: argparse.Namespace) -> trainer.Accelerator:
        accelerator = make(argparse.Namespace(**{**vars(args), "mixed_precision": "no"}))
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    with patch.object(trainer, "make_accelerator", make_half):
        yield


@contextmanager
def precision_of(bench: Bench, precision: str) -> Iterator[None]:
    """Inside, the trainer runs afresh in this precision: accelerate and torch keep theirs in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_float32_matmul_precision("highest")
    # torch's default lets convolutions of float32 be of TF32, which the reference is not to be.
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, precision != "float32"
    with ExitStack() as stack:
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", before)
        if precision == "fp16" and bench.device == "cpu":
            stack.enter_context(half_on_cpu())
        yield


def run_toy(bench: Bench, name: str, precision: str, flags: str) -> Path:
    """Train the toy with these flags, unless a run of this name is there.

    Returns:
        Its folder, with each step's losses in `losses.json`.
    """
    output = bench.folder / "runs" / name
    if (output / "losses.json").is_file():
        return output
    shutil.rmtree(output, ignore_errors=True)  # of a run that was ended
    arguments = [
        *training_flags(TARGET),
        *shlex.split(f"{QUIET} {SMALL} {COUNTS[bench.device]} {FLAGS[precision]} {flags}"),
    ]
    arguments += ["--stage1_steps", str(bench.steps), "--stage2_steps", str(bench.steps), "--output_dir", str(output)]
    losses, step = [], trainer.train_step

    def watched(*args: Any, **kwargs: Any) -> dict[str, float]:
        losses.append(step(*args, **kwargs))
        return losses[-1]

    with precision_of(bench, precision), patch.object(trainer, "train_step", watched):
        trainer.main(arguments)
    (output / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    return output


def stage2_update(output: Path, objective: str) -> torch.Tensor:
    """What stage 2 has changed of the LoRA: all its numbers at the end less those at its start."""
    start, end = (load_file(folder / LORA_WEIGHTS) for folder in (output / "stage1", output))
    if objective == "composed":  # starts from the original model
        start = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in start.items()}
    return torch.cat([(end[name].double() - start[name].double()).flatten() for name in sorted(end)])


def compare_updates(output: Path, other: Path, objective: str, tolerance: float, least_cosine: float) -> Result:
    """How stage 2's update of a run differs from that of another one, and whether the run is sound."""
    own, theirs = stage2_update(output, objective), stage2_update(other, objective)
    ratio = float(own.norm() / theirs.norm())
    cosine = float(torch.nn.functional.cosine_similarity(own, theirs, dim=0))
    losses = json.loads((output / "losses.json").read_text(encoding="utf-8"))
    dtypes = {value.dtype for value in load_file(output / LORA_WEIGHTS).values()}
    faults = []
    if not abs(ratio - 1) <= tolerance:
        faults.append(f"the norm is not within {tolerance:.0%} of the other's")
    if not cosine >= least_cosine:
        faults.append(f"the cosine is below {least_cosine:g}")
    if not all(np.isfinite(value) for step in losses for value in step.values()):
        faults.append("a loss is not finite")
    if dtypes != {torch.float32}:
        faults.append(f"the LoRA's file holds {', '.join(sorted(map(str, dtypes)))}")
    last = ", ".join(f"{name} {value:.3g}" for name, value in losses[-1].items())
    return Result({"norm": f"{ratio:.4f}", "cosine": f"{cosine:.4f}", "last losses": last}, faults)


# How far the norm may be from float32's, and the least cosine. fp16 and TF32 keep 11 bits of a number and bf16 8. A
# composed target differs little from the prediction (losses of 1e-4), so bf16 rounds much of the gradient away: on a
# CPU its cosine was 0.92, and fp16's 0.998.
TOLERANCES = {"float32": (0.0, 1 - 1e-9), "tf32": (0.05, 0.98), "bf16": (0.1, 0.8), "fp16": (0.05, 0.98)}


def training(bench: Bench, objective: str, precision: str) -> Result:
    """Stage 2's update in a precision against float32's."""
    flags = f"--stage2_objective {objective}"
    reference, own = (run_toy(bench, f"{objective}-{name}", name, flags) for name in ("float32", precision))
    return compare_updates(own, reference, objective, *TOLERANCES[precision])


def eight_bits(bench: Bench) -> Result:
    """AdamW's state in 8 bits against 32, at a rank whose matrices are large enough for bitsandbytes to do so."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return Result(missing="bitsandbytes is not installed")
    precision = "fp16" if bench.device == "cuda" else "float32"
    whole = run_toy(bench, "32-bits", precision, "--rank 256 --lora_alpha 256")
    small = run_toy(bench, "8-bits", precision, "--rank 256 --lora_alpha 256 --use_8bit_adam")
    return compare_updates(small, whole, "composed", 0.1, 0.9)


def xformers(bench: Bench) -> Result:
    """xformers in self-attention against torch's attention."""
    if importlib.util.find_spec("xformers") is None:
        return Result(missing="xformers is not installed")
    whole = run_toy(bench, "composed-fp16", "fp16", "--stage2_objective composed")
    own = run_toy(bench, "xformers", "fp16", "--enable_xformers_memory_efficient_attention")
    return compare_updates(own, whole, "composed", *TOLERANCES["fp16"])


def resume(bench: Bench, precision: str) -> Result:
    """A run that goes on from inside of stage 1, and from inside of stage 2, against one that nothing stopped."""
    half = bench.steps // 2
    flags = f"--stage2_objective both --checkpointing_steps {half}"
    torch.use_deterministic_algorithms(True, warn_only=True)
    whole, again = (run_toy(bench, f"resume-{precision}-{name}", precision, flags) for name in ("whole", "again"))
    cells, faults = {"two undisturbed": largest_difference(whole, again)}, []
    for name, step in (("from stage 1", half), ("from stage 2", bench.steps + half)):
        checkpoint = shlex.join(["--resume_from_checkpoint", str(whole / f"checkpoint-{step}")])
        resumed = run_toy(bench, f"resume-{precision}-{step}", precision, f"{flags} {checkpoint}")
        cells[name] = largest_difference(whole, resumed)
        if not cells[name] <= cells["two undisturbed"]:
            faults.append(f"{name} it is another than undisturbed")
    torch.use_deterministic_algorithms(False)
    return Result({name: "0, to the bit" if value == 0 else f"{value:.1e}" for name, value in cells.items()}, faults)


def largest_difference(one: Path, other: Path) -> float:
    """Of any number of two runs' LoRAs; 0 only where they are the same to the bit."""
    mine, theirs = (load_file(folder / LORA_WEIGHTS) for folder in (one, other))
    return max(float((mine[name].double() - theirs[name].double()).abs().max()) for name in mine)


# -------------------------------------------------------------------------------------------------------- the pipeline


PROMPT, WANTED = "a woman, a green jacket, a purple background", "blonde hair"
# Largest mean difference of pixels from float32, and of the halves of `compare` from two calls of the same kind.
PIXELS = {"float32": 0.001, "bf16": 0.01, "fp16": 0.002}


def load_toy(dtype: torch.dtype) -> SPFPortraitPipeline:
    """The toy base model with the LoRA beside it."""
    pipeline = SPFPortraitPipeline.from_pretrained(BASE_MODEL, safety_checker=None, dtype=dtype)
    pipeline.load_lora_weights(LORA)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: SPFPortraitPipeline, **options: Any) -> Any:
    """Two portraits of fixed noise, which some versions of torch draw in another way in half precision."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    config, side = pipeline.unet.config, pipeline.unet.config.sample_size
    noise = torch.stack([torch.randn(config.in_channels, side, side, generator=own) for own in generators])
    options["latents"] = noise.to(pipeline.text_encoder.dtype)
    shared = {"num_images_per_prompt": 2, "num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "np"}
    return pipeline(PROMPT, generator=generators, **shared, **options)


def draw_all(pipeline: SPFPortraitPipeline, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Pictures (2, H, W, 3) and maps in [0, 1] of calls by name: what `compare` makes, and the same by calls alone."""
    found = {}
    if "map" in names:
        both = draw(pipeline, target_prompt=WANTED, compare=True, return_sfcm=True)
        found["map"] = both.sfcm.numpy()
    else:
        both = draw(pipeline, target_prompt=WANTED, compare=True)
    found |= {"portrait": both.images, "original": both.reference_images}
    if "guided" in names:
        guided = draw(pipeline, target_prompt=WANTED, sfcm_guidance=1.0, adapter_in_unconditional=False)
        found["guided"] = guided.images
    found["portrait alone"] = draw(pipeline, target_prompt=WANTED).images
    if "original alone" in names:
        with active_adapters(pipeline.unet, None):
            found["original alone"] = draw(pipeline).images
    return found


ALL = ("map", "guided", "original alone")


def reference_pictures(bench: Bench) -> dict[str, np.ndarray]:
    """What float32 draws on the CPU."""
    if "pictures" not in bench.kept:
        bench.kept["pictures"] = draw_all(load_toy(torch.float32), ALL)
    return bench.kept["pictures"]


def put(pipeline: SPFPortraitPipeline, device: str, way: str) -> None:
    """Onto the device, in one of the ways that diffusers knows."""
    if way == "offload":
        pipeline.enable_model_cpu_offload()
    elif way == "sequential":
        pipeline.enable_sequential_cpu_offload()
    else:
        pipeline.to(device)
    if way == "compile":
        pipeline.unet = torch.compile(pipeline.unet)


def pipeline(bench: Bench, precision: str, way: str = "") -> Result:
    """Pictures and maps against float32's on the CPU, and the halves of `compare` against two calls."""
    expected = reference_pictures(bench)
    own = load_toy(DTYPES[precision])
    put(own, bench.device, way)
    # Each kind of call is compiled anew, which takes long.
    found = draw_all(own, () if way == "compile" else ALL)
    cells, faults, limit = {}, [], PIXELS[precision]
    for name, values in found.items():
        if not np.isfinite(values).all():
            faults.append(f"{name} is not finite")
        if name in ("portrait", "original", "map", "guided"):
            largest, mean = differences(values, expected[name])
            cells[name] = f"{largest:.3f}, {mean:.5f}"
            if not mean <= limit:
                faults.append(f"{name} is further than {limit:g} from float32's on average")
    pairs = [(name, f"{name} alone") for name in ("portrait", "original") if f"{name} alone" in found]
    halves = [differences(found[name], found[alone]) for name, alone in pairs]
    cells["halves"] = f"{max(own[0] for own in halves):.3f}, {max(own[1] for own in halves):.5f}"
    if not max(mean for _, mean in halves) <= limit:
        faults.append(f"`compare` is further than {limit:g} from two calls on average")
    return Result(cells, faults)


def differences(values: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """The largest and the mean one."""
    distance = np.abs(values.astype(np.float64) - others)
    return float(distance.max()), float(distance.mean())


# --------------------------------------------------------------------------------------------------- time and memory


def write_stable_diffusion_15(folder: Path) -> None:
    write_model(folder)


def copy_toy(folder: Path) -> None:
    shutil.copytree(BASE_MODEL, folder)


def model_folder(bench: Bench, name: str) -> Path:
    """The folder of a model of `MODELS`, written when it is first asked for."""
    folder = bench.folder / "models" / MODELS[name].writer
    if not folder.is_dir():
        unfinished = folder.with_name("unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        globals()[MODELS[name].writer](unfinished)
        unfinished.rename(folder)
    return folder


def weights(bench: Bench, name: str) -> Result:
    """Write a model's weights, and say how large they are."""
    size = sum(path.stat().st_size for path in model_folder(bench, name).rglob("*") if path.is_file())
    return Result({"GB": f"{size / 1e9:.2f}"})


def model_flags(bench: Bench, name: str, precision: str) -> list[str]:
    """Flags of a run of this model on the toy's portraits, without pictures of its own."""
    folder = model_folder(bench, name)
    flags = ["--pretrained_model_name_or_path", str(folder), "--clip_model_name_or_path", str(folder / "clip")]
    flags += ["--train_data_dir", str(ROOT / "toy_portraits" / TARGET), "--max_train_samples", str(step_cost.BATCH)]
    flags += ["--resolution", str(MODELS[name].side), "--alignment_inference_steps", "1", "--sfcm_noise_samples", "1"]
    return [*flags, *shlex.split(FLAGS[precision]), "--report_to", "none", "--checkpointing_steps", "0"]


def forget_runs(bench: Bench) -> None:
    """Give the memory of earlier runs back."""
    bench.kept.clear()
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def preset(bench: Bench, name: str, card: int) -> Result:
    """A whole small training with the README's preset of a card, on so much memory as the card has."""
    flags = model_flags(bench, name, "bf16")
    forget_runs(bench)
    output = bench.folder / "runs" / f"preset-{card}"
    flags += [*shlex.split(PRESETS[card]), "--stage1_steps", "1", "--stage2_steps", "2", "--output_dir", str(output)]
    flags += ["--num_alignment_images", "8", "--num_validation_images", "1", "--validation_inference_steps", "1"]
    if bench.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (card - 1) * 1e9 / total))
    with precision_of(bench, "bf16"):
        trainer.main(flags)
    if bench.device != "cuda":
        return Result({"flags": f"`{PRESETS[card]}`"})
    torch.cuda.set_per_process_memory_fraction(1.0)
    cells = {"flags": f"`{PRESETS[card]}`", "peak": f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB"}
    cells["reserved"] = f"{torch.cuda.max_memory_reserved() / GIB:.1f} GiB"
    return Result({**cells, "README": counted(card)})


def counted(card: int) -> str:
    """What the documentation says of a preset's memory."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    return re.search(rf"^\| {card} GB \| `--.+?` \| (.+?) \|", page, re.MULTILINE)[1]


def runs_of(bench: Bench, name: str, size: str, precision: str) -> dict[str, trainer.Run]:
    """A run for each kind of step, kept until another model, size or precision is asked for."""
    key = (name, size, precision)
    if key not in bench.kept:
        flags = model_flags(bench, name, precision)
        forget_runs(bench)
        flags += ["--train_batch_size", str(step_cost.BATCH), "--num_alignment_images", str(step_cost.BATCH)]
        flags += ["--num_validation_images", "0", "--stage1_steps", "1", "--stage2_steps", "100"]
        flags += ["--output_dir", str(bench.folder / "runs" / f"steps-{size}-{precision}")]
        if size == "tiny":
            flags += ["--resolution", "64"]
        names = (step_cost.PLAIN, step_cost.MADE, step_cost.FOUND, "paper")
        with precision_of(bench, precision):
            bench.kept[key] = step_cost.make_runs(names, flags, 100)
    return bench.kept[key]


def step(bench: Bench, name: str, size: str, precision: str, kind: str) -> Result:
    """Median milliseconds of warm steps of a kind, in all and of the host alone."""
    run, row = runs_of(bench, name, size, precision)[kind], step_cost.ROWS[kind]
    times, hosts, losses = [], [], {}
    for number in range(1, bench.steps + 3):
        if row.found:
            step_cost.make_targets(run, number)
        seconds, host, losses = measured_step(run, number, row.stage)
        times.append(seconds)
        hosts.append(host)
    cells = {"ms": f"{1000 * statistics.median(times[2:]):.0f}"}
    if bench.device == "cuda":
        cells["host ms"] = f"{1000 * statistics.median(hosts[2:]):.0f}"
    faults = [] if all(map(np.isfinite, losses.values())) else ["a loss is not finite"]
    return Result(cells, faults)


def measured_step(run: trainer.Run, number: int, stage: int) -> tuple[float, float, dict[str, float]]:
    """Seconds of a step, those of them in which Python did not wait for the GPU, and the losses."""
    reduce, waits = run.accelerator.reduce, []

    def waiting(*args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        synchronize(run.device)
        waits.append(time.perf_counter() - start)
        return reduce(*args, **kwargs)

    parameters = step_cost.trained_parameters(run)
    synchronize(run.device)
    start = time.perf_counter()
    # The losses are read right after they are reduced, which would wait for the GPU.
    with patch.object(run.accelerator, "reduce", waiting):
        losses = trainer.train_step(run, stage, number, run.optimizer, parameters)
    host = time.perf_counter() - start - sum(waits)
    synchronize(run.device)
    return time.perf_counter() - start, host, losses


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
