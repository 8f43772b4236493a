"""The command line of the training script, read and checked before any library of models is imported. [ours]

A file of flags may come first, which those behind it win over.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, replace
from types import UnionType
from typing import Any, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from programs.console import FlagFormatter
from training import flags as groups
from training.run_file import read_run_file


POLYNOMIAL_END = 1e-7  # of the learning rate, in diffusers
# Where losses can go that keeps no command line, and with it what was given as a flag.
PRIVATE_TRACKERS = ("tensorboard", "none")


class Flags(NamedTuple):
    """All flags in their groups, checked, with what follows from others filled in; and by name, as they were asked."""

    model: groups.ModelFlags
    data: groups.DataFlags
    columns: groups.ColumnFlags
    pictures: groups.PictureFlags
    lora: groups.LoraFlags
    method: groups.MethodFlags
    composed: groups.ComposedFlags
    paper: groups.PaperFlags
    alignment: groups.AlignmentFlags
    optimizer: groups.OptimizerFlags
    loop: groups.LoopFlags
    output: groups.OutputFlags
    sharing: groups.SharingFlags
    asked: dict[str, Any]


GROUPS = {name: kind for name, kind in get_type_hints(Flags).items() if name != "asked"}


class FlagParser(HfArgumentParser):
    """Flags as the fields of `Flags` say; one that is on or off has a form with --no- as well.

    `run_file` is the file of flags, if there is one, and `from_file` the flags whose value is the file's.
    """

    run_file: str | None = None
    from_file: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__(
            GROUPS.values(),
            prog="train_spf_portrait_lora.py",
            description="Teach Stable Diffusion a portrait attribute as a LoRA, without moving anything else. A file "
            "may come first that holds flags by name, as OUTPUT_DIR/run.yaml of an earlier run does; flags behind it "
            "win over it.",
            usage="%(prog)s [run.yaml] [flags; --help lists them]",
            formatter_class=FlagFormatter,
        )

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Field) -> None:
        kind = get_args(field.type)[0] if isinstance(field.type, UnionType) else field.type
        options = {"type": kind, "default": field.default} | field.metadata
        del options["rules"]
        if field.default is MISSING:
            options |= {"required": True, "default": None}
        if kind is bool:
            del options["type"]
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) in (list, tuple):
            nargs = "+" if get_origin(kind) is list else len(get_args(kind))
            options = {"nargs": nargs} | options | {"type": field.metadata.get("type", get_args(kind)[0])}
        parser.add_argument(f"--{field.name}", **options)

    def error(self, message: str) -> NoReturn:
        named = re.search(r"--(?:no-)?(\w+)", message)
        super().error(f"{self.run_file}: {message}" if named and named[1] in self.from_file else message)

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """The value of each flag by name."""
        if not words or words[0].startswith("-"):
            return vars(self.parse_args(words))
        actions = {action.dest: action for action in self._actions if action.dest != "help"}
        required = [action for action in actions.values() if action.required]
        try:
            said = read_run_file(words[0], actions)
        except ValueError as error:
            self.error(str(error))
        self.run_file, self.from_file = words[0], frozenset(said)
        for action in required:
            action.required = False
        known = vars(self.parse_args([word for one in said.values() for word in one]))
        for action in required:
            action.required = action.dest not in said
        self.from_file = frozenset()
        # What is set already stays where it is not given; a list of several mentions would go on from it.
        lists = {name for name in said if isinstance(actions[name], argparse._ExtendAction)}
        given = vars(self.parse_args(words[1:], argparse.Namespace(**{name: known[name] for name in {*said} - lists})))
        given |= {name: known[name] for name in lists if given[name] is None}
        self.from_file = frozenset(name for name in said if given[name] == known[name])
        return {name: given[name] for name in actions}  # in the order of the groups


def parse_args(input_args: Sequence[str] | None = None) -> Flags:
    """Read and check the flags; a value that cannot work ends the program with a line that names it."""
    parser = FlagParser()
    values = parser.parse(sys.argv[1:] if input_args is None else input_args)
    values["sfcm_timesteps"] = tuple(values["sfcm_timesteps"])
    try:
        given = (kind(**{one.name: values[one.name] for one in fields(kind)}) for kind in GROUPS.values())
        flags = _derive(Flags(*given, asked=values))
        _check_method(flags)
        _check_others(flags)
        _check_tracker(flags.output.report_to)  # last, for it takes seconds
    except ValueError as error:
        parser.error(str(error))
    return flags


def flat(flags: Flags) -> dict[str, Any]:
    """All flags by name."""
    return {name: value for group in flags[:-1] for name, value in vars(group).items()}


def _derive(flags: Flags) -> Flags:
    """Fill in what follows from other flags. Where there is nothing to align, all steps are one stage."""
    lora, method, sharing = flags.lora, flags.method, flags.sharing
    if lora.lora_alpha is None:
        lora = replace(lora, lora_alpha=float(lora.rank))
    scales = lora.reference_lora_scale if isinstance(lora.reference_lora_scale, list) else [lora.reference_lora_scale]
    if lora.reference_lora is None:
        scales = None
    elif len(scales) == 1:
        scales = scales * len(lora.reference_lora)
    if method.preservation != "spf":
        if lora.stage1_lora_path is not None:
            raise ValueError(
                f"--preservation {method.preservation} has no second stage, which --stage1_lora_path is for"
            )
        method = replace(method, stage1_steps=method.stage1_steps + method.stage2_steps, stage2_steps=0)
    if sharing.output_kohya_format is None:
        sharing = replace(sharing, output_kohya_format=sharing.push_to_hub and not lora.use_dora)
    return flags._replace(lora=replace(lora, reference_lora_scale=scales), method=method, sharing=sharing)


def _check_method(flags: Flags) -> None:
    """What the flags of stages, LoRA and alignment must be to each other."""
    lora, method, alignment = flags.lora, flags.method, flags.alignment
    if lora.stage1_lora_path is not None and method.stage1_steps > 0:
        raise ValueError("--stage1_lora_path takes stage 1's place, so it needs --stage1_steps 0")
    if method.stage1_steps == 0 and lora.stage1_lora_path is None and method.stage2_objective != "paper":
        raise ValueError(
            f"--stage2_objective {method.stage2_objective} needs a stage 1: give --stage1_steps or --stage1_lora_path"
        )
    for name in ("sfcm_dir", "save_alignment"):
        if getattr(alignment, name) and method.stage2_steps == 0:
            raise ValueError(f"--{name} is for the alignment of stage 2, and these flags have none")
    if lora.use_dora and method.dual_path == "single_pass":
        raise ValueError("--use_dora needs --dual_path two_pass: DoRA cannot be off in some rows of a batch")
    if alignment.reference_target_prompt is not None:
        if lora.reference_lora is None:
            raise ValueError("--reference_target_prompt needs --reference_lora")
        if method.preservation != "prior" and (method.stage2_steps == 0 or alignment.alignment_source == "data"):
            raise ValueError(
                "--reference_target_prompt is for drawn portraits, and these flags draw none for the alignment"
            )
    if flags.model.tiny_vae_model_name_or_path is not None and not uses_enhancement(method, flags.paper):
        raise ValueError("--tiny_vae_model_name_or_path is for the enhancement loss, which these flags do not compute")


def _check_others(flags: Flags) -> None:
    """What the other flags must be to each other."""
    loop, learning_rate = flags.loop, flags.optimizer.learning_rate
    for name in ("lr_scheduler", "stage2_lr_scheduler"):
        if getattr(loop, name) == "polynomial" and learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"--{name} polynomial ends at {POLYNOMIAL_END:g}, so --learning_rate must be above it, got "
                f"{learning_rate:g}"
            )
    if not flags.pictures.center_crop and flags.data.cache_latents:
        raise ValueError("--no-center_crop takes another crop in each step, so it needs --no-cache_latents")
    if flags.sharing.hub_token is not None and flags.output.report_to not in PRIVATE_TRACKERS:
        raise ValueError(
            f"--hub_token would be kept by --report_to {flags.output.report_to} with the command line: "
            "log in with `hf auth login` instead"
        )


def _check_tracker(name: str) -> None:
    """Whether a tracker's package is installed, which accelerate knows."""
    from accelerate.tracking import get_available_trackers

    if name not in ("all", "none", *(tracker.value for tracker in get_available_trackers())):
        raise ValueError(f"--report_to {name} needs the tracker's own package, which is not installed")


def uses_enhancement(method: groups.MethodFlags, paper: groups.PaperFlags) -> bool:
    """Whether any step computes the enhancement loss."""
    return method.stage2_steps > 0 and method.stage2_objective != "composed" and paper.enhancement_loss != "none"
