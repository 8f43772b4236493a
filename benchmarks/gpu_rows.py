"""What the rows of `benchmarks/gpu.py` do, each called with the `Bench` and its row's arguments.

Source: [ours].
"""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import shlex
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from adapters import active_adapters
from benchmarks import cost
from benchmarks.estimate_memory import GIB, PRESETS
from benchmarks.gpu import MODELS, ROOT, STEPS, Bench, Result
from benchmarks.parts import trainer
from benchmarks.random_stable_diffusion import write_model
from families.pipelines import denoiser_of
from loras import LORA_WEIGHTS
from toy_portraits.pipelines import family_of, load_base
from toy_portraits.recipe import BASE_MODEL, LORA, training_flags


TARGET = "blonde_hair"
QUIET = "--report_to none --checkpointing_steps 0 --num_validation_images 0"
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


def toy_flags(bench: Bench, precision: str, base: str) -> list[str]:
    """Of every training of a toy base, without its steps."""
    flags = f"{QUIET} {SMALL} {COUNTS[bench.device]} {FLAGS[precision]}"
    return [*training_flags(TARGET, base), *shlex.split(flags)]


def run_toy(bench: Bench, name: str, precision: str, flags: str, base: str = "sd") -> Path:
    """Train a toy base with these flags, unless a run of it of this name is there; its folder, with losses in
    `losses.json`."""
    output = bench.folder / "runs" / base / name
    if (output / "losses.json").is_file():
        return output
    shutil.rmtree(output, ignore_errors=True)  # of a run that was ended
    steps = f"--stage1_steps {bench.steps} --stage2_steps {bench.steps}"
    own = [*toy_flags(bench, precision, base), *shlex.split(f"{steps} {flags}"), "--output_dir", str(output)]
    with trainer.precision_of(bench.device, precision):
        losses = trainer.train_watched(own)
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
    sound = {
        f"the norm is not within {tolerance:.0%} of the other's": abs(ratio - 1) <= tolerance,
        f"the cosine is below {least_cosine:g}": cosine >= least_cosine,
        "a loss is not finite": all(np.isfinite(value) for step in losses for value in step.values()),
        f"the LoRA's file holds {', '.join(sorted(map(str, dtypes)))}": dtypes == {torch.float32},
    }
    faults = [fault for fault, is_well in sound.items() if not is_well]
    last = ", ".join(f"{name} {value:.3g}" for name, value in losses[-1].items())
    return Result({"norm": f"{ratio:.4f}", "cosine": f"{cosine:.4f}", "last losses": last}, faults)


# How far the norm may be from float32's, and the least cosine. fp16 and TF32 keep 11 bits of a number and bf16 8. A
# composed target differs little from the prediction (losses of 1e-4), so bf16 rounds much of the gradient away: on a
# CPU its cosine was 0.92, and fp16's 0.998.
TOLERANCES = {"float32": (0.0, 1 - 1e-9), "tf32": (0.05, 0.98), "bf16": (0.1, 0.8), "fp16": (0.05, 0.98)}


def training(bench: Bench, objective: str, precision: str, base: str = "sd") -> Result:
    """Stage 2's update in a precision against float32's."""
    flags = f"--stage2_objective {objective}"
    reference, own = (run_toy(bench, f"{objective}-{name}", name, flags, base) for name in ("float32", precision))
    return compare_updates(own, reference, objective, *TOLERANCES[precision])


def vae(bench: Bench, precision: str) -> Result:
    """The dtype of the VAE of SDXL, which overflows in fp16, its latents, and what it decodes while pictures are
    drawn."""
    output = bench.folder / "runs" / "sdxl" / f"vae-{precision}"
    flags = [*toy_flags(bench, precision, "sdxl"), "--stage1_steps", "1", "--output_dir", str(output)]
    with trainer.precision_of(bench.device, precision):
        run = trainer.prepare([*flags, "--stage2_steps", "1"], 1)
    models, own = run.parts.models, run.parts.models.pipeline.vae
    latents = torch.stack(run.parts.training.latents[:2])
    scaled = latents / own.config.scaling_factor
    with torch.no_grad(), models.drawing(), run.engine.accelerator.autocast():
        drawn = own.decode(scaled.to(own.dtype), return_dict=False)[0]
    with torch.no_grad(), models.at_work("vae"):
        alone = own.decode(scaled.to(own.dtype), return_dict=False)[0]
    wanted, largest = DTYPES["float32" if precision == "fp16" else precision], float((drawn - alone).abs().max())
    sound = {
        f"the VAE is in {own.dtype}": own.dtype == wanted,
        "a latent is not finite": bool(latents.isfinite().all()),
        "what it decodes is not finite": bool(drawn.isfinite().all()),
        "it decodes otherwise than alone": largest <= (0 if precision == "fp16" else PIXELS[precision] * 10),
    }
    cells = {"VAE": str(own.dtype).removeprefix("torch."), "decoded": f"{largest:.1e}"}
    return Result(cells, [fault for fault, is_well in sound.items() if not is_well])


def validation(bench: Bench, precision: str, flags: str, base: str) -> Result:
    """The pictures that a training draws of itself, with its other models lent to the device or kept there."""
    name = f"pictures-{precision}-{'kept' if flags else 'lent'}"
    pictures = "--num_validation_images 1 --validation_inference_steps 4"
    output = run_toy(bench, name, precision, f"{pictures} {flags}", base) / "validation"
    spread = {path.name: float(np.asarray(Image.open(path)).std()) for path in sorted(output.glob("*.png"))}
    # One that is not finite is black.
    faults = [f"{name} is one colour" for name, value in spread.items() if value < 20]
    return Result({"spread": ", ".join(f"{value:.0f}" for value in spread.values())}, faults or _missing(spread, 3))


def _missing(found: dict[str, float], count: int) -> list[str]:
    return [] if len(found) == count else [f"{len(found)} pictures instead of {count}"]


# Flags that need a package, those beside them, and tolerances; bitsandbytes keeps AdamW's state of small matrices as
# it is.
OPTIONS = {
    "bitsandbytes": ("--use_8bit_adam", "--rank 256 --lora_alpha 256", (0.1, 0.9)),
    "xformers": ("--enable_xformers_memory_efficient_attention", "", TOLERANCES["fp16"]),
}


def option(bench: Bench, package: str) -> Result:
    """Stage 2's update with the flag that needs a package, against the one without."""
    if importlib.util.find_spec(package) is None:
        return Result(missing=f"{package} is not installed")
    flag, others, tolerances = OPTIONS[package]
    precision = "fp16" if bench.device == "cuda" else "float32"
    # Without other flags it is the run of `training`.
    whole = run_toy(bench, f"without-{package}" if others else f"composed-{precision}", precision, others)
    own = run_toy(bench, f"with-{package}", precision, f"{others} {flag}")
    return compare_updates(own, whole, "composed", *tolerances)


def resume(bench: Bench, precision: str, base: str = "sd") -> Result:
    """A run of all objectives that goes on from inside of each stage, against one that nothing stopped."""
    half = bench.steps // 2
    flags = f"--stage2_objective {family_of(base).objectives[-1]} --checkpointing_steps {half}"
    torch.use_deterministic_algorithms(True, warn_only=True)
    run = partial(run_toy, bench, precision=precision, base=base)
    whole, again = (run(f"resume-{precision}-{name}", flags=flags) for name in ("whole", "again"))
    cells, faults = {"two undisturbed": largest_difference(whole, again)}, []
    for name, step in (("from stage 1", half), ("from stage 2", bench.steps + half)):
        checkpoint = shlex.join(["--resume_from_checkpoint", str(whole / f"checkpoint-{step}")])
        resumed = run(f"resume-{precision}-{step}", flags=f"{flags} {checkpoint}")
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


PICTURE_STEPS = 10
PROMPT, WANTED = "a woman, a green jacket, a purple background", "blonde hair"
# Largest mean difference of pixels from float32, and of the halves of `compare` from two calls of the same kind.
PIXELS = {"float32": 0.001, "bf16": 0.01, "fp16": 0.002}


def draw(pipeline: DiffusionPipeline, **options: Any) -> Any:
    """Two portraits of fixed noise, which some versions of torch draw in another way in half precision."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    config = denoiser_of(pipeline).config
    shape = config.in_channels, config.sample_size, config.sample_size
    noise = torch.stack([torch.randn(shape, generator=own) for own in generators])
    options |= {"num_images_per_prompt": 2, "num_inference_steps": PICTURE_STEPS, "guidance_scale": 5.0}
    noise = noise.to(pipeline.text_encoder.dtype)
    return pipeline(PROMPT, generator=generators, latents=noise, output_type="np", **options)


def draw_all(pipeline: DiffusionPipeline, few: bool = False) -> dict[str, np.ndarray]:
    """Pictures (2, H, W, 3) and maps in [0, 1]: what `compare` makes, and the same by calls alone."""
    both = draw(pipeline, target_prompt=WANTED, compare=True, return_sfcm=not few)
    found = {"portrait": both.images, "original": both.reference_images}
    found["portrait alone"] = draw(pipeline, target_prompt=WANTED).images
    if not few:
        guided = draw(pipeline, target_prompt=WANTED, sfcm_guidance=1.0, adapter_in_unconditional=False)
        with active_adapters(denoiser_of(pipeline), None):
            found["original alone"] = draw(pipeline).images
        found = {"map": both.sfcm.numpy(), **found, "guided": guided.images}
    return found


def load_toy(base: str, dtype: torch.dtype, device: str = "cpu", way: str = "") -> DiffusionPipeline:
    """A toy base with a LoRA on the device, in one of the ways that diffusers knows; the LoRA is the one beside it, or
    a random one where there is none."""
    pipeline = load_base(base, dtype)
    if base == "sd":
        pipeline.load_lora_weights(LORA)
    else:
        torch.manual_seed(0)
        denoiser = denoiser_of(pipeline)
        layers = family_of(base).lora_targets(denoiser, "cross")
        denoiser.add_adapter(LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, target_modules=layers))
    if way == "offload":
        pipeline.enable_model_cpu_offload()
    elif way == "sequential":
        pipeline.enable_sequential_cpu_offload()
    else:
        pipeline.to(device)
    if way == "compile":
        pipeline.unet = torch.compile(pipeline.unet)
    return pipeline


def pipeline(bench: Bench, precision: str, way: str = "", base: str = "sd") -> Result:
    """Pictures and maps against float32's on the CPU, and the halves of `compare` against two calls."""
    if ("pictures", base) not in bench.kept:
        bench.kept["pictures", base] = draw_all(load_toy(base, torch.float32))
    expected = bench.kept["pictures", base]
    # Each kind of call is compiled anew, which takes long.
    found = draw_all(load_toy(base, DTYPES[precision], bench.device, way), few=way == "compile")
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
    largest, mean = map(max, zip(*halves, strict=True))
    cells["halves"] = f"{largest:.3f}, {mean:.5f}"
    if not mean <= limit:
        faults.append(f"`compare` is further than {limit:g} from two calls on average")
    return Result(cells, faults)


def differences(values: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """The largest and the mean one."""
    distance = np.abs(values.astype(np.float64) - others)
    return float(distance.max()), float(distance.mean())


# --------------------------------------------------------------------------------------------------- time and memory


WRITERS = {"Stable Diffusion 1.5": write_model, "toy": lambda folder: shutil.copytree(BASE_MODEL, folder)}


def model_folder(bench: Bench, name: str) -> Path:
    """The folder of a model of `MODELS`, written when it is first asked for."""
    folder = bench.folder / "models" / name.replace(" ", "-")
    if not folder.is_dir():
        unfinished = folder.with_name("unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[name](unfinished)
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
    flags += ["--train_data_dir", str(ROOT / "toy_portraits" / TARGET), "--max_train_samples", str(cost.BATCH)]
    flags += ["--resolution", str(MODELS[name].side), *shlex.split(FLAGS[precision])]
    return [*flags, "--alignment_inference_steps", "1", "--sfcm_noise_samples", "1", *shlex.split(QUIET)]


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
    cells, cuda = {"flags": f"`{PRESETS[card]}`"}, torch.cuda
    if bench.device == "cuda":
        total = cuda.get_device_properties(0).total_memory
        cuda.set_per_process_memory_fraction(min(1.0, (card - 1) * 1e9 / total))
    with trainer.precision_of(bench.device, "bf16"):
        trainer.train_watched(flags)
    if bench.device == "cuda":
        cuda.set_per_process_memory_fraction(1.0)
        peaks = {"peak": cuda.max_memory_allocated(), "reserved": cuda.max_memory_reserved()}
        cells |= {name: f"{peak / GIB:.1f} GiB" for name, peak in peaks.items()} | {"README": counted(card)}
    return Result(cells)


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
        flags += ["--train_batch_size", str(cost.BATCH), "--num_alignment_images", str(cost.BATCH)]
        flags += ["--output_dir", str(bench.folder / "runs" / f"steps-{size}-{precision}")]
        flags += ["--resolution", "64"] if size == "tiny" else []
        with trainer.precision_of(bench.device, precision):
            bench.kept[key] = cost.make_runs(STEPS, flags, 100)
    return bench.kept[key]


def step(bench: Bench, name: str, size: str, precision: str, kind: str) -> Result:
    """Median milliseconds of warm steps of a kind, in all and of the host alone."""
    run, row = runs_of(bench, name, size, precision)[kind], cost.STEPS[kind]
    times, hosts, losses = [], [], {}
    for number in range(1, bench.steps + 3):
        row.before(run, number)
        seconds, host, losses = trainer.host_step(run, number, row.stage)
        times.append(seconds)
        hosts.append(host)
    cells = {"ms": f"{1000 * statistics.median(times[2:]):.0f}"}
    if bench.device == "cuda":
        cells["host ms"] = f"{1000 * statistics.median(hosts[2:]):.0f}"
    faults = [] if all(map(np.isfinite, losses.values())) else ["a loss is not finite"]
    return Result(cells, faults)
