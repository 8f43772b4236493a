"""Tests of `caches.py`: real files, real processes, real (tiny, random) models."""

import errno
import hashlib
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

from training import caches
from training.caches import TensorCache, fingerprint, module_fingerprint


FOLDER = Path(__file__).parent
KEYS = [fingerprint("portrait", i) for i in range(4)]
TENSORS = [torch.full((2, 3), float(i)) for i in range(4)]


def must_not_compute(missing: list[int]) -> list[torch.Tensor]:
    raise AssertionError(f"{missing} were to be computed.")


def give(missing: list[int]) -> Iterator[torch.Tensor]:
    for i in missing:
        yield TENSORS[i]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which can import this file."""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path])}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# ----------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_never_changes():
    """Spelled out, for a cache on disk is only found again under the same names."""
    content = b"str 2 \xc3\xa4bytes 1 bint 2 -1float 20 0x1.8000000000000p+1NoneType 4 Nonetuple 17 bool 4 Truestr 0 "
    content = b"tuple %d " % len(content) + content
    assert fingerprint("ä", b"b", -1, 3.0, None, (True, "")) == hashlib.sha256(content).hexdigest()


def test_different_parts_have_different_fingerprints():
    parts = [
        (),
        ("",),
        ("", ""),
        ("ab",),
        ("a", "b"),
        ("b", "a"),
        (("a", "b"),),
        (("a",), "b"),
        ("a", ("b",)),
        (b"ab",),
        ("str 1 a",),
        ("1",),
        (b"1",),
        (1,),
        (1.0,),
        (True,),
        (None,),
        ("None",),
        ((),),
        ((None,),),
        (0.1 + 0.2,),
        (0.3,),
        (0.0,),
        (-0.0,),
        (10**30,),
        ("ä",),
        ("a\u0308",),
        ("\udc80",),
    ]
    assert len({fingerprint(*each) for each in parts}) == len(parts)


@pytest.mark.parametrize("part", [["a"], Path("a"), torch.tensor(1), ("a", {})])
def test_a_fingerprint_of_something_else_is_refused(part):
    with pytest.raises(TypeError, match="A fingerprint is made of str, bytes"):
        fingerprint(part)


def tiny_vae(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return AutoencoderKL(**{**blocks, "block_out_channels": (4,), "norm_num_groups": 4, **changes})


def tiny_clip() -> CLIPTextModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=2))


@pytest.mark.parametrize("make", [tiny_vae, tiny_clip])
def test_a_model_is_the_same_wherever_it_was_loaded_from(make, tmp_path):
    model = make()
    loaded = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        model.save_pretrained(folder)
        loaded.append(type(model).from_pretrained(folder))
    assert len({module_fingerprint(each) for each in [model, *loaded]}) == 1


@pytest.mark.slow
def test_a_model_is_the_same_in_every_process():
    """diffusers lists some settings in the order of a set, which differs with the hash seed."""
    code = "from test_caches import *; print(module_fingerprint(tiny_vae()))"
    output = run_python(code)
    assert output.returncode == 0, output.stderr
    assert output.stdout.strip() == module_fingerprint(tiny_vae())


def test_a_model_with_another_config_is_another():
    """The weights are equal; what is computed from them is not."""
    assert module_fingerprint(tiny_vae(scaling_factor=1.0)) != module_fingerprint(tiny_vae(scaling_factor=2.0))
    clip = tiny_clip()
    before = module_fingerprint(clip)
    clip.config.hidden_act = "gelu"
    assert module_fingerprint(clip) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_changed_weight_makes_another_model(dtype):
    module = torch.nn.Linear(50, 40).to(dtype)
    before = module_fingerprint(module)
    assert module_fingerprint(module) == before
    with torch.no_grad():
        module.weight[-1, -1] += 1
    assert module_fingerprint(module) != before


def test_names_shapes_dtypes_and_buffers_count():
    def module(name: str, value: torch.Tensor) -> torch.nn.Module:
        module = torch.nn.Module()
        module.register_buffer(name, value)
        return module

    zeros = torch.zeros(4)
    modules = [
        torch.nn.Module(),
        module("a", zeros),
        module("b", zeros),
        module("a", zeros.view(2, 2)),
        module("a", torch.zeros(4, dtype=torch.int32)),
        module("a", torch.zeros(8, dtype=torch.bfloat16)),
        module("a", torch.zeros(8, dtype=torch.float16)),
        module("a", torch.tensor(0.0)),
        module("a", torch.zeros(0)),
        module("a", torch.zeros(0, 2)),
        module("a", torch.tensor([False])),
    ]
    assert len({module_fingerprint(each) for each in modules}) == len(modules)
    assert module_fingerprint(module("a", torch.arange(6.0).view(2, 3).t())) == module_fingerprint(
        module("a", torch.arange(6.0).view(2, 3).t().contiguous())
    )


# ------------------------------------------------------------------------------------------------------------ cache


def test_only_what_is_missing_is_computed(tmp_path):
    folder = tmp_path / "made" / "when needed"
    cache = TensorCache(folder)
    torch.testing.assert_close(cache.get_or_compute(KEYS[1:3], lambda missing: TENSORS[1:3]), TENSORS[1:3])
    asked = []

    def compute(missing: list[int]) -> list[torch.Tensor]:
        asked.extend(missing)
        return [TENSORS[i] for i in missing]

    torch.testing.assert_close(TensorCache(folder).get_or_compute(KEYS, compute), TENSORS, rtol=0, atol=0)
    assert asked == [0, 3]
    torch.testing.assert_close(cache.get_or_compute(KEYS[::-1], must_not_compute), TENSORS[::-1], rtol=0, atol=0)
    assert files(folder) == sorted(folder / key[:2] / f"{key}.safetensors" for key in KEYS)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_key_that_comes_twice_is_computed_once(tmp_path, on_disk):
    asked = []
    keys = [KEYS[0], KEYS[1], KEYS[0], KEYS[3]]
    cache = TensorCache(tmp_path if on_disk else None)
    tensors = cache.get_or_compute(keys, lambda missing: asked.extend(missing) or give(missing))
    assert asked == [0, 1, 3]
    torch.testing.assert_close(tensors, [TENSORS[i] for i in (0, 1, 0, 3)])


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = TensorCache(None)
    torch.testing.assert_close(cache.get_or_compute(KEYS, give), TENSORS)
    with pytest.raises(AssertionError, match=r"\[0, 1, 2, 3\] were to be computed"):
        cache.get_or_compute(KEYS, must_not_compute)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.0, -0.0, 1e-40, float("inf")]).to(torch.bfloat16),
        torch.tensor([0.1, 65504.0], dtype=torch.float16),
        torch.tensor(3.5, dtype=torch.float64),
        torch.tensor([[1, 2]], dtype=torch.int64),
        torch.tensor([True, False]),
        torch.zeros(0, 4),
        torch.arange(6.0).view(2, 3).t(),
        torch.ones(1).expand(5),
        torch.ones(3, requires_grad=True) * 2,
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_a_tensor_comes_back_as_it_was(tmp_path, tensor):
    for folder in (None, tmp_path):
        (computed,) = TensorCache(folder).get_or_compute(KEYS[:1], lambda missing: [tensor])
        assert computed.dtype == tensor.dtype and not computed.requires_grad
        assert computed.shape == tensor.shape and torch.equal(computed, tensor)
    (read,) = TensorCache(tmp_path).get_or_compute(KEYS[:1], must_not_compute)
    assert read.dtype == tensor.dtype and read.shape == tensor.shape and torch.equal(read, tensor)


def test_a_result_does_not_keep_its_batch_in_memory():
    batch = torch.zeros(2, 1000)
    tensors = TensorCache(None).get_or_compute(KEYS[:2], lambda missing: iter(batch))
    assert [each.untyped_storage().nbytes() for each in tensors] == [4000, 4000]
    batch.fill_(1)
    assert not any(each.any() for each in tensors)


def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    def compute(missing: list[int]) -> Iterator[torch.Tensor]:
        yield TENSORS[0]
        yield TENSORS[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TensorCache(tmp_path).get_or_compute(KEYS, compute)
    asked = []
    TensorCache(tmp_path).get_or_compute(KEYS, lambda missing: asked.extend(missing) or give(missing))
    assert asked == [2, 3]


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_tensors_than_asked_for(count):
    with pytest.raises(ValueError, match="argument 2 is"):
        TensorCache(None).get_or_compute(KEYS[:2], lambda missing: TENSORS[:count])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: bytes(len(content)),
        lambda content: content.replace(b"tensor", b"sensor"),
        lambda content: content.replace(b'"F32"', b'"F99"'),
    ],
    ids=["empty", "header cut", "a byte lost", "a byte more", "zeros", "another name", "another dtype"],
)
def test_a_damaged_file_is_replaced(tmp_path, caplog, damage):
    cache = TensorCache(tmp_path)
    cache.get_or_compute(KEYS[:2], give)
    path = tmp_path / KEYS[0][:2] / f"{KEYS[0]}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert not caplog.records
    (first, second) = cache.get_or_compute(KEYS[:2], lambda missing: give(missing) if missing == [0] else None)
    assert torch.equal(first, TENSORS[0]) and torch.equal(second, TENSORS[1])
    (record,) = caplog.records
    assert record.levelname == "WARNING" and str(path) in record.getMessage()
    assert path.read_bytes() == whole
    cache.get_or_compute(KEYS[:2], must_not_compute)


def write_and_be_killed(folder: Path) -> None:
    os.replace = lambda *names: os._exit(9)
    TensorCache(folder).get_or_compute(KEYS[:1], give)


def test_a_write_that_was_killed_leaves_no_file_under_the_key(tmp_path):
    """The process ends between the temporary file and its renaming, so nothing is tidied up."""
    process = multiprocessing.get_context("fork").Process(target=write_and_be_killed, args=(tmp_path,))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 9
    (left,) = files(tmp_path)
    assert left.parent.name.startswith(".saving-")
    asked = []
    TensorCache(tmp_path).get_or_compute(KEYS[:1], lambda missing: asked.extend(missing) or give(missing))
    assert asked == [0]
    TensorCache(tmp_path).get_or_compute(KEYS[:1], must_not_compute)


def test_a_full_disk_is_named(tmp_path):
    """A limit on the size of files stands for the disk: the write itself fails, half done."""
    big = torch.zeros(100_000)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(OSError) as error:
            TensorCache(tmp_path).get_or_compute(KEYS[:1], lambda missing: [big])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    path = tmp_path / KEYS[0][:2] / f"{KEYS[0]}.safetensors"
    assert str(error.value) == f"--cache_dir: {path} cannot be written: {os.strerror(errno.EFBIG)}"
    assert files(tmp_path) == []


@pytest.mark.parametrize("call", ["mkdir", "replace"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, call):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path if call == "mkdir" else os, call, refuse)
    with pytest.raises(OSError, match=rf"^--cache_dir: .*{KEYS[0]}.safetensors cannot be written: Permission denied$"):
        TensorCache(tmp_path).get_or_compute(KEYS[:1], give)
    assert files(tmp_path) == []


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match=rf"^--cache_dir: .*{KEYS[0]}.safetensors cannot be read: Not a directory$"):
        TensorCache(tmp_path / "cache").get_or_compute(KEYS[:1], must_not_compute)


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    """Others who share the folder can read it."""
    (tmp_path / "other").write_text("")
    TensorCache(tmp_path / "cache").get_or_compute(KEYS[:1], give)
    (path,) = files(tmp_path / "cache")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def write_and_read_over_and_over(folder: Path, value: float) -> None:
    """What one of two processes does, which ends with 0 only if all that it read was whole and from one writer."""

    def refuse(message: str, *values: object) -> None:
        raise SystemExit(message % values)

    torch.set_num_threads(1)  # the others stayed with the process that this one came from
    caches.logger.warning = refuse
    for i in range(100):
        (tensor,) = TensorCache(folder).get_or_compute(KEYS[:1], lambda missing: [torch.full((50_000,), value)])
        assert tensor.unique().tolist() in ([1.0], [2.0])
        if i % 2:
            (folder / KEYS[0][:2] / f"{KEYS[0]}.safetensors").unlink(missing_ok=True)


def test_two_processes_may_write_the_same_key(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_and_read_over_and_over, args=(tmp_path, value)) for value in (1.0, 2.0)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert not list(tmp_path.rglob(".saving-*"))
