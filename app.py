"""A page in the browser that draws portraits: the original model's, the adapted one, and the map between them.

`python app.py` shows the toy world with a LoRA for blonde hair; `--base_model` and `--lora` name others. As a Space of
the Hub it runs as it is, with SPF_BASE_MODEL, SPF_BASE_CONFIG and SPF_LORA in place of three flags.
Source: [ours].
"""

import argparse
import copy
import html
import ipaddress
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from programs.console import BASE_CONFIG, DTYPES, FlagFormatter, import_libraries, in_home
from toy_portraits.recipe import BASE_MODEL, BASES, LORA


TOY_PROMPT = ("a woman, a green jacket, a purple background", "blonde hair")
PROMPT = ("a woman, a brown jacket, a curtain background", "blonde hair")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=FlagFormatter)
    add, given = parser.add_argument, os.environ.get
    about = (
        "Stable Diffusion 1.x, 2.x, XL, 3 or 3.5: a folder, Hub id, or .safetensors file; the toy world's if not set."
    )
    add("--base_model", type=in_home, default=given("SPF_BASE_MODEL"), help=about)
    add("--base_config", type=in_home, default=given("SPF_BASE_CONFIG"), help=BASE_CONFIG)
    about = (
        "LoRA at first: a file, a folder, or an id or address of the Hub; the toy world has its own, other models "
        "none. More, which every visitor may use, are given by repeating the flag."
    )
    add("--lora", action="append", help=about)
    add("--device", help="Such as cuda:1 or cpu; the best there is if not set.")
    add("--dtype", choices=DTYPES, help="float16 on CUDA and float32 elsewhere if not set.")
    about = "Address to listen on, 0.0.0.0 for all."
    add("--host", default=given("GRADIO_SERVER_NAME", "127.0.0.1"), help=about)
    add("--port", type=int, help="Port; the first free one from 7860 if not set.")
    add("--share", action="store_true", help="Make a public address through gradio's servers.")
    about = "Largest LoRA that others than this machine's users may have downloaded, in megabytes."
    add("--max_lora_mb", type=float, default=500, help=about)
    args = parser.parse_args(input_args)
    if not args.max_lora_mb > 0:
        parser.error(f"--max_lora_mb must be positive, not {args.max_lora_mb:g}")
    args.base_model = args.base_model or str(BASE_MODEL)
    place = Path(args.base_model).resolve()
    args.prompt, args.target = TOY_PROMPT if place in [base.folder for base in BASES.values()] else PROMPT
    near = LORA.is_relative_to(Path.cwd())
    own = str(LORA.relative_to(Path.cwd()) if near else LORA) if place == BASE_MODEL else ""
    at_first = given("SPF_LORA", own)
    args.lora = [lora for lora in args.lora or [at_first] if lora]
    return args


def is_open_to_others(args: argparse.Namespace) -> bool:
    """Whether anybody but this machine's users can reach the page."""
    try:
        is_here = args.host == "localhost" or ipaddress.ip_address(args.host).is_loopback
    except ValueError:  # the name of a machine
        is_here = False
    return not is_here or args.share or "SPACE_ID" in os.environ


if __name__ == "__main__":
    # Flags are read before the libraries are imported, which takes seconds: --help and a wrong flag answer at once.
    ARGS = parse_args()
    import_libraries()

import gradio as gr
import torch
from transformers import PreTrainedTokenizerBase

from families.pipelines import DrawingPipeline, load_drawing_pipeline
from loras.slot import LoraSlot
from pictures import overlay_heat_map
from programs.loading import InputError, choose_device, naming, without_false_alarms
from spf_call import SPFPortraitPipelineOutput
from wording import MAX_CHARACTERS, find_weights, split_phrases, suggest_replacement


HEADERS = ["phrase", "distance", "map", "free"]
DAY = 24 * 60 * 60  # seconds that drawn pictures are kept on the server, and between looks for older ones
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


def check_lengths(texts: Mapping[str, str], tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
    """A ValueError for a text, by its field's name, that is too long: a drawing holds up all others.

    The tokenizers of one model may count words differently, and all of them have to take the text.
    """
    for name, text in texts.items():
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{name}: {len(text)} characters are more than the text encoder takes.")
        for tokenizer in tokenizers:
            limit = tokenizer.model_max_length - 2  # without its beginning and end
            count = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
            if count > limit:
                raise ValueError(f"{name}: {count} tokens are more than the {limit} that the text encoder takes.")


def propose_replacement(
    prompt: str, target: str, replaces: str, proposed: str, tokenizers: Sequence[PreTrainedTokenizerBase]
) -> tuple[str | None, str]:
    """What goes into the field *Replaces* after the prompt or the target was changed, None if it stays as it is, and
    what is proposed now.

    It stays if the proposal is the former one, `proposed`, and if the user wrote something else.
    """
    try:
        check_lengths({"Prompt": prompt, "Target": target}, tokenizers)
        found = suggest_replacement(split_phrases(prompt), target)
    except ValueError:  # said when it is drawn
        found = None
    proposal = "" if found is None else found[0]
    return proposal if proposal != proposed and replaces in ("", proposed) else None, proposal


def draw(
    pipeline: DrawingPipeline, prompt: str, target: str, replaces: str = "", free_phrases: str = "", seed: int = 0,
    on_step: Callable[[int, int], None] | None = None, **options: Any,
) -> SPFPortraitPipelineOutput:  # fmt: skip
    """One call of the pipeline, with the LoRA on it or none, from what the page's fields hold.

    The noise is drawn on the CPU so that every device has the same. `on_step` is called after each step with the
    number of steps done and of all.

    Raises ValueError: what the pipeline says of the prompts and the rest.
    """
    if replaces and not target:
        raise ValueError(f"Nothing is to replace {replaces!r}: the target is empty.")

    def step_ended(pipeline: DrawingPipeline, step: int, timestep: int, tensors: dict) -> dict:
        if on_step is not None:
            on_step(step + 1, pipeline.num_timesteps)
        return tensors

    phrases = [phrase.strip() for phrase in free_phrases.split(",") if phrase.strip()]
    return pipeline(
        prompt, target_prompt=[(replaces, target)] if replaces else target or None, free_phrases=phrases or None,
        compare=True, return_sfcm=True, generator=torch.Generator().manual_seed(seed), callback_on_step_end=step_ended,
        **options,
    )  # fmt: skip


def phrase_table(output: SPFPortraitPipelineOutput, free_phrases: str = "") -> list[list[str]]:
    """A row of texts for each phrase of the first image, as `HEADERS` says; without a target the distance is empty."""
    free, rows = [phrase.strip().lower() for phrase in free_phrases.split(",")], []
    for i, phrase in enumerate(output.phrases[0]):
        distance = "" if output.phrase_distances is None else f"{output.phrase_distances[0, i]:.2f}"
        mean = f"{output.phrase_maps[0, i].mean():.2f}"
        rows.append([phrase, distance, mean, "yes" if phrase.lower() in free else "no"])
    return rows


class Page:
    """What the page does with its fields; all its visitors share the pipeline."""

    def __init__(self, slot: LoraSlot) -> None:
        # Tokenizers of its own and one call at a time: they change their padding with each, and proposals come while a
        # picture is drawn.
        parts = slot.pipeline.components
        self.slot, self.tokenizing = slot, Lock()
        self.tokenizers = [copy.deepcopy(parts[name]) for name in ("tokenizer", "tokenizer_2") if name in parts]

    def propose(self, prompt: str, target: str, replaces: str, proposed: str) -> tuple[Any, str]:
        with self.tokenizing:
            field, proposal = propose_replacement(prompt, target, replaces, proposed, self.tokenizers)
        return gr.skip() if field is None else field, proposal

    def draw(
        self,
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
        """The pictures, what is said of them, the table and the overview."""
        start, lora, pipeline = time.perf_counter(), lora.strip(), self.slot.pipeline
        fields = {"Prompt": prompt, "Target": target, "Replaces": replaces, "May change, too": free_phrases}
        try:
            with self.tokenizing:
                check_lengths(fields, self.tokenizers)
            self.slot.use(lora)
            if seed is None:
                raise ValueError("The seed is empty.")
            output = draw(
                pipeline, prompt.strip(), target.strip(), replaces.strip(), free_phrases, int(seed),
                on_step=lambda done, steps: progress((done, steps), desc="Drawing"),
                target_scale=target_scale if lora else None, sfcm_guidance=sfcm_guidance,
                adapter_in_unconditional=adapter_in_unconditional, num_inference_steps=int(steps),
                guidance_scale=guidance_scale,
            )  # fmt: skip
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
        image, reference = output.images[0], output.reference_images[0]
        sfcm = None if output.sfcm is None else overlay_heat_map(image, output.sfcm[0, 0])
        what = f"LoRA {lora} at strength {target_scale:g}" if lora else "No LoRA: the original model draws both"
        lines = [f"{what}; seed {int(seed)}, {time.perf_counter() - start:.1f} s"]
        if self.slot.note:
            lines.append(f"Its file {self.slot.note}.")
        weights = next(filter(None, map(find_weights, fields.values())), None)
        if weights is not None:
            lines.append(f"Weights are not read here: `{weights}` is drawn as words.")
        status = "\n\n".join(lines)
        return reference, image, sfcm, status, phrase_table(output, free_phrases), pipeline.visualize(output)


def _add_fields(slot: LoraSlot, prompt: str, target: str, proposal: str) -> tuple[gr.Button, list[Any]]:
    """The button, and the fields as `Page.draw` takes them."""
    lora_info = "File, folder, or user/name of the Hub"
    if slot.named is not None:
        lora_info = ", ".join([*slot.named, "or a public user/name of the Hub"])
    fields = [
        gr.Textbox(prompt, label="Prompt", lines=2, info="Phrases, separated by commas"),
        gr.Textbox(target, label="Target", info="What the LoRA has learned"),
    ]
    with gr.Row():
        fields.append(gr.Textbox(proposal, label="Replaces", info="A phrase of the prompt"))
        fields.append(gr.Textbox(label="May change, too", info="Phrases of the prompt"))
    button = gr.Button("Draw", variant="primary")
    fields += [
        gr.Textbox(slot.source, label="LoRA", info=lora_info),
        gr.Slider(0, 2, 1, step=0.05, label="LoRA strength"),
        gr.Slider(0, 1, 0, step=0.05, label="SFCM guidance", info="1 keeps the original model outside the map"),
    ]
    with gr.Accordion("More", open=False):
        more = [
            gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1),
            gr.Slider(1, 100, 25, step=1, label="Steps"),
            gr.Slider(1, 15, 5, step=0.5, label="Guidance scale"),
        ]
        fields += [gr.Checkbox(True, label="LoRA in the empty branch of the guidance"), *more]
    return button, fields


def _add_pictures(has_lora: bool) -> list[Any]:
    """Where the page shows what `Page.draw` returns."""
    picture = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
    with gr.Row():
        shown = [
            gr.Image(label=label, min_width=140, elem_classes="portrait", elem_id=name, **picture)
            for label, name in (("Original", "original"), ("Adapted", "adapted"), ("Map (SFCM)", "sfcm"))
        ]
    status = gr.Markdown("" if has_lora else "No LoRA is loaded.", elem_id="status")
    table = gr.Dataframe(
        headers=HEADERS, label="Phrases: CLIP distance to the target, mean of the map, whether it may change, too",
        interactive=False, elem_id="phrases", wrap=True, column_widths=["40%", "28%", "17%", "15%"],
    )  # fmt: skip
    return [*shown, status, table, gr.Image(label="Overview", show_label=False, elem_id="overview", **picture)]


def build_demo(slot: LoraSlot, prompt: str = PROMPT[0], target: str = PROMPT[1]) -> gr.Blocks:
    """The page, not launched, whose drawings wait for one another, with these prompts at first."""
    page = Page(slot)
    proposal = propose_replacement(prompt, target, "", "", page.tokenizers)[1]
    with gr.Blocks(title="SPF-Portrait", analytics_enabled=False, delete_cache=(DAY, DAY)) as demo:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                button, fields = _add_fields(slot, prompt, target, proposal)
            with gr.Column(scale=5, min_width=300):
                pictures = _add_pictures(bool(slot.source))
        prompt_box, target_box, replaces_box = fields[:3]
        gr.on(
            [button.click, prompt_box.submit, target_box.submit], page.draw, fields, pictures, api_name="draw",
            concurrency_limit=1, show_progress_on=pictures[1], scroll_to_output=True,
        )  # fmt: skip
        proposed = gr.State(proposal)
        gr.on(
            [prompt_box.change, target_box.change], page.propose, [prompt_box, target_box, replaces_box, proposed],
            [replaces_box, proposed], api_visibility="private", queue=False, show_progress="hidden",
            trigger_mode="always_last",
        )  # fmt: skip
    return demo


def run_program(args: argparse.Namespace) -> None:
    try:
        device = choose_device(args.device)
        dtype = getattr(torch, args.dtype or ("float16" if device.startswith("cuda") else "float32"))
        with without_false_alarms():
            pipeline = load_drawing_pipeline(args.base_model, dtype, base_config=args.base_config).to(device)
        pipeline.set_progress_bar_config(disable=True)  # the page shows it
        with naming("--lora"):
            slot = LoraSlot(pipeline, args.lora if is_open_to_others(args) else None, int(args.max_lora_mb * 1e6))
            for lora in reversed(args.lora):  # the first one stays
                slot.use(lora)
        demo = build_demo(slot, args.prompt, args.target)
        with naming("--host and --port"), without_false_alarms():
            demo.launch(server_name=args.host, server_port=args.port, share=args.share, theme=THEME, css=CSS)
    except InputError as error:
        raise SystemExit(f"app.py: error: {error}") from error


def main(input_args: list[str] | None = None) -> None:
    run_program(parse_args(input_args))


if __name__ == "__main__":
    run_program(ARGS)
