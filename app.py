"""A page in the browser that draws portraits: the original model's, the adapted one, and the map between them.

`python app.py` shows the toy world with a LoRA for blonde hair; `--base_model` and `--lora` name others. As a Space of
the Hub it runs as it is, with SPF_BASE_MODEL and SPF_LORA in place of the two flags.

Source: [ours].
"""

from __future__ import annotations

import argparse
import html
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from checked_loading import InputError, choose_device, load_pipeline, naming
from lora_files import load_lora
from pipeline_spf_portrait import SPFPortraitPipeline, SPFPortraitPipelineOutput, overlay_heat_map
from toy_portraits.recipe import BASE_MODEL, LORA


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOY_PROMPT = ("a woman, a green jacket, a purple background", "blonde hair")
PROMPT = ("a woman, a brown jacket, a curtain background", "blonde hair")
HEADERS = ["phrase", "distance", "map", "free"]
DAY = 24 * 60 * 60  # seconds that drawn pictures are kept on the server, and between looks for older ones
TITLE = "SPF-Portrait"
ABOUT = """# SPF-Portrait
One seed, two portraits: the original model's, and the one with the target. The map (SFCM) says where the target
responds; everything else should stay as it was."""
# Portraits fill their squares, which browsers would not do with the 64 pixels of the toy world.
CSS = """
.portrait .image-container, .portrait .image-frame { aspect-ratio: 1; }
.portrait .image-frame img, .portrait .empty { width: 100%; aspect-ratio: 1; object-fit: contain; }
#overview img { width: 100%; height: auto; }
#phrases [role="grid"] * { font-family: inherit; word-break: normal; }
footer { display: none !important; }
"""
# The fonts of the user's machine: the page loads nothing from elsewhere.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class LoraSlot:
    """The one LoRA of a pipeline, exchanged by its path or id; `source` is what it was asked for with."""

    def __init__(self, pipeline: SPFPortraitPipeline) -> None:
        self.pipeline = pipeline
        self.source = ""
        self._last_change = 0.0
        self._count = 0

    def use(self, source: str) -> None:
        """Have this LoRA on the pipeline, or none for an empty text; a file that changed is read again.

        Raises:
            ValueError: there is no such LoRA, or it is for another model; the former one is still there.
        """
        changed = _last_change(source)
        if (source, changed) == (self.source, self._last_change):
            return
        if source:
            former = self.pipeline.get_active_adapters()
            self._count += 1
            load_lora(self.pipeline, source, f"lora_{self._count}")
            if former:
                self.pipeline.delete_adapters(former)
                self.pipeline.set_adapters(f"lora_{self._count}")
        else:
            self.pipeline.unload_lora_weights()
        self.source, self._last_change = source, changed


def _last_change(source: str) -> float:
    """Of a file, or of the newest LoRA in a folder; 0 for what is on the Hub."""
    path = Path(source)
    files = [path] if path.is_file() else list(path.glob("*.safetensors")) if source else []
    return max((file.stat().st_mtime for file in files), default=0.0)


def draw(
    pipeline: SPFPortraitPipeline,
    prompt: str,
    target: str,
    replaces: str = "",
    free_phrases: str = "",
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
    **options: Any,
) -> SPFPortraitPipelineOutput:
    """One call of the pipeline from what the page's fields hold.

    Args:
        pipeline: with the LoRA on it, or none.
        prompt: the base prompt.
        target: the target; empty for none.
        replaces: the phrase of the prompt whose place the target takes; empty if it is added.
        free_phrases: phrases of the prompt that may change along with the target, separated by commas.
        seed: of the noise, drawn on the CPU so that every device has the same.
        on_step: called after each step with the number of steps done and of all.
        options: further arguments of the call.

    Returns:
        One image, its reference and the map.

    Raises:
        ValueError: what the pipeline says of the prompts and the rest.

    Source: [ours].
    """
    if replaces and not target:
        raise ValueError(f"Nothing is to replace {replaces!r}: the target is empty.")

    def step_ended(pipeline: SPFPortraitPipeline, step: int, timestep: int, tensors: dict) -> dict:
        if on_step is not None:
            on_step(step + 1, pipeline.num_timesteps)
        return tensors

    phrases = [phrase.strip() for phrase in free_phrases.split(",") if phrase.strip()]
    return pipeline(
        prompt,
        target_prompt=[(replaces, target)] if replaces else target or None,
        free_phrases=phrases or None,
        compare=True,
        return_sfcm=True,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=step_ended,
        **options,
    )


def phrase_table(output: SPFPortraitPipelineOutput, free_phrases: str = "") -> list[list[str]]:
    """A row for each phrase of the first image, as `HEADERS` says.

    Args:
        output: of `draw`.
        free_phrases: as it was given to `draw`.

    Returns:
        Texts; the distance is empty where there is no target.

    Source: [ours].
    """
    free = [phrase.strip().lower() for phrase in free_phrases.split(",")]
    rows = []
    for i, phrase in enumerate(output.phrases[0]):
        distance = "" if output.phrase_distances is None else f"{output.phrase_distances[0, i]:.2f}"
        mean = f"{output.phrase_maps[0, i].mean():.2f}"
        rows.append([phrase, distance, mean, "yes" if phrase.lower() in free else "no"])
    return rows


def build_demo(slot: LoraSlot, prompt: str = PROMPT[0], target: str = PROMPT[1]) -> gr.Blocks:
    """The page. All its visitors share the pipeline, so their drawings wait for one another.

    Args:
        slot: of a pipeline that is on its device; its LoRA is what the page shows at first.
        prompt: the base prompt at first.
        target: the target at first.

    Returns:
        The page, not launched.

    Source: [ours].
    """
    pipeline = slot.pipeline

    def draw_page(
        prompt: str,
        target: str,
        replaces: str,
        free_phrases: str,
        lora: str,
        target_scale: float,
        sfcm_guidance: float,
        adapter_in_unconditional: bool,
        seed: int | None,
        steps: int,
        guidance_scale: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how gradio finds it)
    ) -> tuple[Any, ...]:
        start, lora = time.perf_counter(), lora.strip()
        try:
            slot.use(lora)
            if seed is None:
                raise ValueError("The seed is empty.")
            output = draw(
                pipeline,
                prompt.strip(),
                target.strip(),
                replaces.strip(),
                free_phrases,
                int(seed),
                on_step=lambda done, steps: progress((done, steps), desc="Drawing"),
                target_scale=target_scale if lora else None,
                sfcm_guidance=sfcm_guidance,
                adapter_in_unconditional=adapter_in_unconditional,
                num_inference_steps=int(steps),
                guidance_scale=guidance_scale,
            )
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
        image, reference = output.images[0], output.reference_images[0]
        sfcm = None if output.sfcm is None else overlay_heat_map(image, output.sfcm[0, 0])
        what = f"LoRA {lora} at strength {target_scale:g}" if lora else "No LoRA: the original model draws both"
        status = f"{what}; seed {int(seed)}, {time.perf_counter() - start:.1f} s"
        return reference, image, sfcm, status, phrase_table(output, free_phrases), pipeline.visualize(output)

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(DAY, DAY)) as demo:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                prompt_box = gr.Textbox(prompt, label="Prompt", lines=2, info="Phrases, separated by commas")
                target_box = gr.Textbox(target, label="Target", info="What the LoRA has learned")
                with gr.Row():
                    replaces_box = gr.Textbox(label="Replaces", info="A phrase of the prompt")
                    free_box = gr.Textbox(label="May change, too", info="Phrases of the prompt")
                button = gr.Button("Draw", variant="primary")
                lora_box = gr.Textbox(slot.source, label="LoRA", info="File, folder, or user/name of the Hub")
                scale_slider = gr.Slider(0, 2, 1, step=0.05, label="LoRA strength")
                guidance_slider = gr.Slider(
                    0, 1, 0, step=0.05, label="SFCM guidance", info="1 keeps the original model outside the map"
                )
                with gr.Accordion("More", open=False):
                    seed_box = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
                    steps_slider = gr.Slider(1, 100, 25, step=1, label="Steps")
                    cfg_slider = gr.Slider(1, 15, 5, step=0.5, label="Guidance scale")
                    empty_box = gr.Checkbox(True, label="LoRA in the empty branch of the guidance")
            with gr.Column(scale=5, min_width=300):
                with gr.Row():
                    original, adapted, overlay = (
                        gr.Image(
                            label=label, format="png", interactive=False, min_width=140, elem_classes="portrait",
                            elem_id=name, buttons=["download", "fullscreen"],
                        )
                        for label, name in (("Original", "original"), ("Adapted", "adapted"), ("Map (SFCM)", "sfcm"))
                    )  # fmt: skip
                status = gr.Markdown("" if slot.source else "No LoRA is loaded.", elem_id="status")
                table = gr.Dataframe(
                    headers=HEADERS,
                    label="Phrases: CLIP distance to the target, mean of the map, whether it may change, too",
                    interactive=False,
                    elem_id="phrases",
                    wrap=True,
                    column_widths=["40%", "28%", "17%", "15%"],
                )
                overview = gr.Image(
                    label="Overview", show_label=False, format="png", interactive=False, elem_id="overview",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
        gr.on(
            [button.click, prompt_box.submit, target_box.submit],
            draw_page,
            [
                prompt_box, target_box, replaces_box, free_box, lora_box, scale_slider, guidance_slider, empty_box,
                seed_box, steps_slider, cfg_slider,
            ],
            [original, adapted, overlay, status, table, overview],
            api_name="draw",
            concurrency_limit=1,
            show_progress_on=adapted,
            scroll_to_output=True,
        )  # fmt: skip
    return demo


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--base_model",
        default=os.environ.get("SPF_BASE_MODEL"),
        help="Stable Diffusion 1.x or 2.x: a folder or a Hub id; the toy world's if not set.",
    )
    parser.add_argument(
        "--lora",
        default=os.environ.get("SPF_LORA"),
        help="LoRA at first: a file, a folder, or a Hub id; the toy world has its own, other models none.",
    )
    parser.add_argument("--device", help="Such as cuda:1 or cpu; the best there is if not set.")
    parser.add_argument("--dtype", choices=list(DTYPES), help="float16 on CUDA and float32 elsewhere if not set.")
    parser.add_argument("--host", help="Address to listen on, 0.0.0.0 for all; 127.0.0.1 if not set.")
    parser.add_argument("--port", type=int, help="Port; the first free one from 7860 if not set.")
    parser.add_argument("--share", action="store_true", help="Make a public address through gradio's servers.")
    args = parser.parse_args(input_args)
    args.base_model = args.base_model or str(BASE_MODEL)
    is_toy = Path(args.base_model).resolve() == BASE_MODEL
    args.prompt, args.target = TOY_PROMPT if is_toy else PROMPT
    if args.lora is None:
        near = LORA.is_relative_to(Path.cwd())
        args.lora = str(LORA.relative_to(Path.cwd()) if near else LORA) if is_toy else ""
    return args


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    try:
        device = choose_device(args.device)
        dtype = DTYPES[args.dtype or ("float16" if device.startswith("cuda") else "float32")]
        pipeline = load_pipeline(SPFPortraitPipeline, args.base_model, dtype).to(device)
        pipeline.set_progress_bar_config(disable=True)  # the page shows it
        with naming("--lora"):
            slot = LoraSlot(pipeline)
            slot.use(args.lora)
        demo = build_demo(slot, args.prompt, args.target)
        with naming("--host and --port"):
            demo.launch(server_name=args.host, server_port=args.port, share=args.share, theme=THEME, css=CSS)
    except InputError as error:
        raise SystemExit(f"app.py: error: {error}") from error


if __name__ == "__main__":
    main()
