"""The finished LoRA for others: the model card, and a repository on the Hub.

Paper: arXiv 2504.00396.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id


CARD = "README.md"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
KOHYA_WEIGHTS = "pytorch_lora_weights_kohya.safetensors"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TAGS = (
    "text-to-image",
    "stable-diffusion",
    "lora",
    "diffusers",
    "diffusers-training",
    "spf-portrait",
    "template:sd-lora",
)

CITATION = """\
@article{xian2025spfportrait,
  title   = {SPF-Portrait: Towards Pure Text-to-Portrait Customization with Semantic Pollution-Free Fine-Tuning},
  author  = {Xian, Xiaole and Liao, Zhichao and Li, Qingyu and Qin, Wenyu and Wan, Pengfei and Xie, Weicheng and
             Zeng, Long and Shen, Linlin and Feng, Pingfa},
  journal = {arXiv preprint arXiv:2504.00396},
  year    = {2025}
}"""


# ------------------------------------------------------------------------------------------------------ the model card


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
    data = ModelCardData(
        base_model=facts.base_model if _is_hub_id(facts.base_model) else None,
        library_name="diffusers",
        license=facts.licence,
        inference=True,
        instance_prompt=", ".join(dict.fromkeys(facts.targets)),
        tags=list(TAGS),
        widget=[{"text": facts.example_prompt, "output": {"url": picture}} for picture in facts.pictures] or None,
    )
    text = "\n\n".join(_card_sections(folder.resolve().name, facts))
    path = folder / CARD
    _write_whole(path, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")).encode())
    return path


def _write_whole(path: Path, content: bytes) -> None:
    # In a folder beside it, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as temporary:
        whole = Path(temporary) / path.name
        whole.write_bytes(content)
        os.replace(whole, path)


def _is_hub_id(base_model: str) -> bool:
    # `from_pretrained` takes the folder where there are both.
    if Path(base_model).exists():
        return False
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return False
    return True


def _card_sections(folder_name: str, facts: CardFacts) -> list[str]:
    lora = facts.repo_id or folder_name
    base = facts.base_model
    pipeline = facts.repo_id or "path/to/pipeline_spf_portrait.py"
    base_link = f"[{base}](https://huggingface.co/{base})" if _is_hub_id(base) else f"the local model {_inline(base)}"
    triggers = "\n".join(f"- {_inline(target)}" for target in dict.fromkeys(facts.targets))
    target = list(facts.example_target)
    if len(target) == 1 and isinstance(target[0], str):
        (target,) = target
    load = load_on_merged = f"pipe.load_lora_weights({lora!r}, weight_name={LORA_WEIGHTS!r})"
    if facts.earlier_loras:
        load, load_on_merged = _load_with_earlier(lora, facts.earlier_loras)
    sections = [
        f"# {lora}",
        f"A LoRA for {base_link}, trained with SPF-Portrait ([arXiv 2504.00396](https://arxiv.org/abs/2504.00396)): "
        "it adds the target attribute to a portrait and keeps what the base prompt asks for as the original model "
        "draws it.",
        *_earlier_section(facts.earlier_loras),
        f"## Trigger words\n\n{triggers}",
        *(f"![Portraits drawn with this LoRA](<{quote(picture)}>)" for picture in facts.pictures),
        "## Use with diffusers",
        f"""```py
import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained({base!r}, dtype=torch.float16).to("cuda")
{load}
image = pipe({facts.example_prompt!r}).images[0]
image.save("portrait.png")
```""",
        "## Use with the SPF-Portrait pipeline",
        "It takes the target apart from the base prompt, and draws the original model's own portrait beside yours. "
        "`trust_remote_code=True` runs code of "
        + ("this repository" if facts.repo_id else "the training repository, where the file lies")
        + ".",
        f"""```py
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    {base!r},
    dtype=torch.float16,
    custom_pipeline={pipeline!r},
    trust_remote_code=True,
).to("cuda")
{load_on_merged}
output = pipe({facts.base_prompt!r}, target_prompt={target!r}, compare=True)
output.images[0].save("portrait.png")
output.reference_images[0].save("original_model.png")
```""",
    ]
    if facts.has_kohya:
        sections.append(_kohya_section(facts))
    rows = [(name, value) for name, value in facts.settings.items() if value is not None]
    if rows:
        table = "\n".join(f"| {_cell(f'--{name}')} | {_cell(value)} |" for name, value in rows)
        sections.append(f"## Training\n\n| flag | value |\n| --- | --- |\n{table}")
    sections += [
        f"## Licence\n\n{_inline(facts.licence)}; the terms of the base model hold too.",
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return sections


def _earlier_section(earlier_loras: Sequence[EarlierLora]) -> list[str]:
    if not earlier_loras:
        return []
    lines = []
    for lora in earlier_loras:
        link = f"[{lora.repo_id}](https://huggingface.co/{lora.repo_id}), file {_inline(lora.weight_name)}"
        name = "an earlier LoRA that is not on the Hub" if lora.repo_id is None else link
        lines.append(f"- {name}, at scale {lora.scale:g}")
    return [
        "## Trained on top of\n\nThis LoRA holds its own attribute alone. It was trained, and is to be used, with\n\n"
        + "\n".join(lines)
        + "\n\nactive as well, loaded in this order and before it."
    ]


def _load_with_earlier(lora: str, earlier_loras: Sequence[EarlierLora]) -> tuple[str, str]:
    """Code that loads all LoRAs side by side, and code that merges the earlier ones into the original model first."""
    names = [f"earlier_{i}" for i in range(1, len(earlier_loras) + 1)]
    scales = [earlier.scale for earlier in earlier_loras]
    lines = []
    for name, earlier in zip(names, earlier_loras):
        source, weight_name = earlier.repo_id, earlier.weight_name
        if source is None:
            source, weight_name = "path/to/the/earlier/lora", LORA_WEIGHTS
        lines.append(f"pipe.load_lora_weights({source!r}, weight_name={weight_name!r}, adapter_name={name!r})")
    own = f"pipe.load_lora_weights({lora!r}, weight_name={LORA_WEIGHTS!r}, adapter_name='spf')"
    side_by_side = [*lines, own, f"pipe.set_adapters({[*names, 'spf']!r}, {[*scales, 1.0]!r})"]
    merged = [
        *lines,
        f"pipe.set_adapters({names!r}, {scales!r})",
        "pipe.fuse_lora()  # the portrait beside yours then has the earlier attributes, too",
        "pipe.unload_lora_weights()",
        own,
    ]
    return "\n".join(side_by_side), "\n".join(merged)


def _kohya_section(facts: CardFacts) -> str:
    text = (
        f"## Use with ComfyUI and A1111\n\nDownload `{KOHYA_WEIGHTS}`.\n\n"
        "- ComfyUI: put it into `models/loras` and load it with the node *Load LoRA*.\n"
        f"- A1111: put it into `models/Lora` and write `<lora:{Path(KOHYA_WEIGHTS).stem}:1>` into the prompt.\n\n"
        f"Then write the trigger words into the prompt, for example: {_inline(facts.example_prompt)}"
    )
    if facts.earlier_loras:
        text += "\n\nLoad what this LoRA was trained on top of as well, at the scale named above."
    if facts.is_dora:
        text += (
            "\n\nThis LoRA is a DoRA. ComfyUI and A1111 apply its magnitude in other ways than PEFT, and diffusers "
            f"ignores it in this file: only `{LORA_WEIGHTS}` with diffusers draws what was trained."
        )
    return text


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


# ------------------------------------------------------------------------------------------------------------- the Hub


def create_hub_repo(hub_model_id: str, token: str | None, private: bool) -> str:
    """Make the repository before the training, so that a wrong name or token ends the program at once.

    Args:
        hub_model_id: "user/name", or "name" for the token's own user. It may exist.
        token: a token of the Hub; None takes the one of `hf auth login` or of the environment.
        private: whether a new repository is private. One that exists keeps its state, so a public one is refused.

    Returns:
        "user/name".

    Raises:
        ValueError: a name that the Hub does not take; no token, an unknown one, or one that may not write; a public
            repository where a private one is wanted; the Hub is out of reach. The message never holds the token.

    Source: [ours].
    """
    try:
        validate_repo_id(hub_model_id)
    except HFValidationError as error:
        raise ValueError(f"--hub_model_id: {error}") from error
    api = HfApi(token=token)
    try:
        account = api.whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError("--hub_token: there is none, and `hf auth login` has stored none either") from error
    except HfHubHTTPError as error:
        raise ValueError(f"--hub_token: the Hub does not take it: {_one_line(error, token)}") from error
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(f"--hub_token: cannot ask {api.endpoint} about it: {_one_line(error, token)}") from error
    # `create_repo` is content with a repository that the token can only read, if it exists.
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("--hub_token: it may only read; pushing needs a token that may write")
    repo_id = hub_model_id if "/" in hub_model_id else f"{account['name']}/{hub_model_id}"
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_public = not api.model_info(repo_id).private
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(f"--hub_model_id: cannot make {repo_id!r}: {_one_line(error, token)}") from error
    if private and is_public:
        raise ValueError(f"--hub_model_id: {repo_id!r} exists and is public, and a private repository is wanted")
    return repo_id


def push_lora(
    folder: Path,
    repo_id: str,
    token: str | None,
    code: Mapping[str, Path],
    files: Sequence[str],
    commit_message: str = "Upload LoRA, pipeline and model card",
) -> str:
    """Upload the model card, the LoRA, what else is listed and the pipeline's code, in one commit.

    The list decides alone: nothing else in the folder, such as checkpoints, caches or logs, is looked at.

    Args:
        folder: the output folder, with README.md and the LoRA.
        repo_id: "user/name", as `create_hub_repo` returns it.
        token: a token of the Hub; None takes the one of `hf auth login` or of the environment.
        code: Python files by their name in the repository; `pipeline.py` is the one that diffusers looks for.
        files: further files as paths relative to `folder`: the LoRA in kohya's format, and pictures.
        commit_message: one line.

    Returns:
        The repository's address.

    Raises:
        ValueError: a file that is missing, leads out of the folder, is of no kind that belongs on the Hub, or holds
            the token.
        OSError: the Hub refused or did not answer. The files are as they were; the message says how to push again.

    Source: [ours].
    """
    sources = {name: _file_to_push(folder, name) for name in dict.fromkeys((CARD, LORA_WEIGHTS, *files))}
    for name, path in code.items():
        if Path(name).name != name or Path(name).suffix != ".py" or not path.is_file():
            raise ValueError(f"{name!r}: {path} is no Python file for the top level of the repository")
        sources[name] = path

    api = HfApi(token=token)
    secret = token or get_token()
    operations = []
    for name, path in sources.items():
        content = path.read_bytes()
        if secret and secret.encode() in content:
            raise ValueError(f"{path} holds the Hub's token, and is not pushed")
        # The bytes that were looked at, whatever becomes of the file.
        operations.append(CommitOperationAdd(name, content))
    try:
        commit = api.create_commit(repo_id, operations, commit_message=commit_message)
    # The transport of large files raises RuntimeError, and metadata that the Hub does not take a ValueError.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        own = [name for name in sources if name not in code]
        includes = [word for name in own for word in ("--include", name)]
        commands = [["hf", "upload", repo_id, str(folder), ".", *includes]]
        commands += [["hf", "upload", repo_id, str(path), name] for name, path in code.items()]
        again = " && ".join(shlex.join(command) for command in commands)
        raise OSError(
            f"--push_to_hub: {repo_id} was not pushed ({_one_line(error, secret)}); nothing is lost, the LoRA is "
            f"whole in {folder}; push it again with: {again}"
        ) from error
    return str(commit.repo_url)


def _file_to_push(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of {folder}, and is not pushed")
    if name not in (CARD, LORA_WEIGHTS, KOHYA_WEIGHTS) and path.suffix.lower() not in PICTURES:
        raise ValueError(f"{name!r} is neither the card, nor a LoRA, nor a picture, and is not pushed")
    if not path.is_file():
        raise ValueError(f"{path} is missing, and cannot be pushed")
    return path


def _one_line(error: Exception, token: str | None) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line.replace(token, "***") if token else line
