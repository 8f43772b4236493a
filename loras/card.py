"""The model card of a finished LoRA, in Markdown with the metadata that the Hub reads.

Paper: arXiv 2504.00396.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from loras import CARD, KOHYA_WEIGHTS, LORA_WEIGHTS
from programs.writing import whole


TEMPLATE = Path(__file__).with_name("card.md")
TAGS = (
    "text-to-image",
    "stable-diffusion",
    "lora",
    "diffusers",
    "diffusers-training",
    "spf-portrait",
    "template:sd-lora",
)


@dataclass(frozen=True)
class EarlierLora:
    """A LoRA that the one of the card was trained on top of.

    Args:
        repo_id: "user/name" on the Hub; None for one that is not there, of which nothing more is told.
        weight_name: its file in the repository.
        scale: how strongly it was active.
    """

    repo_id: str | None
    weight_name: str
    scale: float


@dataclass(frozen=True)
class CardFacts:
    """All that a model card says.

    Args:
        base_model: Hub id or local folder of the base model.
        targets: the target prompts, which are the trigger words.
        example_prompt: a full prompt, base and target.
        base_prompt: its base, for the example with the custom pipeline.
        example_target: what is added to it there, or replaces a phrase: texts, and pairs of phrase and text.
        settings: the training flags and their values, free of secrets; None is a flag that was not given.
        pictures: pictures as paths inside the repository, such as "validation/step_000240.png".
        licence: as the Hub spells it, such as "creativeml-openrail-m".
        repo_id: "user/name" on the Hub; None while nothing is pushed, and the examples then name the output folder.
        has_kohya: whether the file for ComfyUI and A1111 lies beside the LoRA.
        is_dora: whether the LoRA has a magnitude (DoRA), which the readers of that file treat differently.
        earlier_loras: what it was trained on top of, in the order in which they have to be loaded.
    """

    base_model: str
    targets: tuple[str, ...]
    example_prompt: str
    base_prompt: str
    example_target: tuple[str | tuple[str, str], ...]
    settings: dict[str, object]
    pictures: tuple[str, ...]
    licence: str
    repo_id: str | None
    has_kohya: bool
    is_dora: bool = False
    earlier_loras: tuple[EarlierLora, ...] = ()


def write_model_card(folder: Path, facts: CardFacts) -> Path:
    """Write README.md with the metadata that the Hub reads, over one that is there.

    The Hub rejects a card whose `base_model` is no id, so a local folder is named in the text alone.

    Args:
        folder: the output folder, which exists.
        facts: what the card says.

    Returns:
        The file.

    Raises:
        ValueError: no target prompt.

    Source: [ours].
    """
    if not facts.targets:
        raise ValueError("targets: a model card needs at least one target prompt")
    targets, is_on_hub = list(dict.fromkeys(facts.targets)), _is_hub_id(facts.base_model)
    data = ModelCardData(
        base_model=facts.base_model if is_on_hub else None,
        license=facts.licence,
        inference=True,
        instance_prompt=", ".join(targets),
        widget=[{"text": facts.example_prompt, "output": {"url": picture}} for picture in facts.pictures] or None,
    )
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
        names=[f"earlier_{i}" for i in range(1, len(facts.earlier_loras) + 1)],
        scales=[lora.scale for lora in facts.earlier_loras],
        settings=[(_cell(f"--{name}"), _cell(value)) for name, value in facts.settings.items() if value is not None],
        weights=LORA_WEIGHTS,
        kohya=Path(KOHYA_WEIGHTS).stem,
        inline=_inline,
        quote=quote,
        repr=repr,
    )
    path = folder / CARD
    with whole(path) as file:
        populate_model_card(card, list(TAGS)).save(file)
    return path


def _is_hub_id(base_model: str) -> bool:
    # `from_pretrained` takes the folder where there are both.
    if Path(base_model).exists():
        return False
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return False
    return True


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
