"""The model card of a finished LoRA, in Markdown with the metadata that the Hub reads.

Paper: arXiv 2504.00396; what names no source is [ours].
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from loras import CARD, KOHYA_WEIGHTS, LORA_WEIGHTS
from loras.loading import ReferenceLora
from programs.loading import is_hub_id
from programs.single_file import SingleFile
from programs.writing import whole


TEMPLATE = Path(__file__).with_name("card.md")
SCHEDULER = "DDIMScheduler"  # it knows every prediction, and a signal that ends at zero


@dataclass(frozen=True)
class HubNames:
    """What is said of all LoRAs for one family of models."""

    pipeline: str  # diffusers' class for a base model
    pipeline_file: str  # of the custom pipeline, in this repository
    tags: tuple[str, ...]
    licence: str  # of the published base model, as the Hub spells it; that of a LoRA where its user names none
    dtype: str = "float16"  # of torch, that the examples load it in
    licence_link: str = ""  # where the text of a licence is that the Hub has no word for
    transformer: str = ""  # diffusers' class for a base model's file, where that is the transformer and no more


@dataclass(frozen=True)
class CardFacts:
    """All that a model card says."""

    base_model: str  # Hub id, or another path
    targets: tuple[str, ...]  # the target prompts, which are the trigger words
    example_prompt: str  # a full prompt, base and target
    base_prompt: str  # its base, for the example with the custom pipeline
    # What is added to it there, or replaces a phrase: texts, and pairs of phrase and text.
    example_target: tuple[str | tuple[str, str], ...]
    settings: dict[str, object]  # the training flags, free of secrets; None is a flag that was not given
    pictures: tuple[str, ...]  # as paths inside the repository, such as "validation/step_000240.png"
    licence: str  # as the Hub spells it, such as "creativeml-openrail-m"
    repo_id: str | None  # on the Hub; None while nothing is pushed, and the examples then name the output folder
    has_kohya: bool  # whether the file for ComfyUI and A1111 lies beside the LoRA
    is_dora: bool = False  # whether it has a magnitude, which the readers of that file treat differently
    # What it was trained on top of, in the order in which they are loaded; of one not on the Hub no more is told.
    earlier_loras: tuple[ReferenceLora, ...] = ()


def loading_code(
    names: HubNames, base_model: str, file: SingleFile | None, config: str = "", options: str = ""
) -> str:  # fmt: skip
    """Python that loads a base model by the class of its family, with further `options` of it, such as a dtype.

    Of one in a file, `config` is where its configurations are, and the models that are not in it. What its file says
    of the prediction is in no other.
    """
    if file is None:
        return f"{names.pipeline}.from_pretrained({base_model!r}{options})"
    if names.transformer:
        read = f"{names.transformer}.from_single_file({base_model!r}, config={config!r}, subfolder='transformer'"
        return f"{names.pipeline}.from_pretrained({config!r}, transformer={read}{options}){options})"
    scheduler = ""
    if file.scheduler:
        said = "".join(f", {name}={value!r}" for name, value in file.scheduler.items())
        scheduler = f", scheduler={SCHEDULER}.from_pretrained({config!r}, subfolder='scheduler'{said})"
    return f"{names.pipeline}.from_single_file({base_model!r}, config={config!r}{scheduler}{options})"


def write_model_card(folder: Path, facts: CardFacts, names: HubNames, file: SingleFile | None = None) -> Path:
    """Write README.md with the metadata that the Hub reads, over one that is there; returns the file.

    The Hub rejects a card whose `base_model` is no id, so a local folder, or the `file` that it is, is named in the
    text alone.
    """
    config = "" if file is None else file.config
    if config and Path(config).is_dir():
        config = f"path/to/{Path(config).resolve().name}"
    targets, is_on_hub = list(dict.fromkeys(facts.targets)), is_hub_id(facts.base_model)
    licence = {"license": facts.licence}
    if names.licence_link and facts.licence == names.licence:
        licence = {"license": "other", "license_name": names.licence, "license_link": names.licence_link}
    data = ModelCardData(
        base_model=facts.base_model if is_on_hub else None, **licence, inference=True,
        instance_prompt=", ".join(targets),
        widget=[{"text": facts.example_prompt, "output": {"url": picture}} for picture in facts.pictures] or None,
    )  # fmt: skip
    target = list(facts.example_target)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        lora=facts.repo_id or folder.resolve().name,
        is_on_hub=is_on_hub,
        targets=targets,
        example_target=target[0] if len(target) == 1 and isinstance(target[0], str) else target,
        # Earlier LoRAs are named by their place: side by side with this one, or merged before it is loaded.
        hub=names,
        one_file=file is not None,
        load=partial(loading_code, names, facts.base_model, file, config),
        classes=_classes(names, file),
        names=[f"earlier_{i}" for i in range(1, len(facts.earlier_loras) + 1)],
        scales=[lora.scale for lora in facts.earlier_loras],
        settings=[(_cell(f"--{name}"), _cell(value)) for name, value in facts.settings.items() if value is not None],
        weights=LORA_WEIGHTS,
        kohya=Path(KOHYA_WEIGHTS).stem,
        licence_link=licence.get("license_link"),
        inline=_inline,
        quote=quote,
        repr=repr,
    )
    path = folder / CARD
    with whole(path) as file:
        populate_model_card(card, list(names.tags)).save(file)
    return path


def _classes(names: HubNames, file: SingleFile | None) -> list[str]:
    """Those of diffusers that `loading_code` names."""
    others = [] if file is None else [*([SCHEDULER] if file.scheduler else []), names.transformer]
    return [*filter(None, others), names.pipeline]


def _inline(text: object) -> str:
    """Code in Markdown, whatever quotes and breaks it holds."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _cell(value: object) -> str:
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    # A bar ends a cell, even inside code.
    return _inline(value).replace("|", r"\|")
