"""The page: its functions here, and the page itself in Chromium against a server in a process of its own."""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import safetensors.torch
import torch
from hub_server import HubServer
from huggingface_hub import hf_hub_download
from PIL import Image
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from playwright.sync_api import expect, sync_playwright

import app
from app import build_demo, check_lengths, draw, parse_args, phrase_table, propose_replacement
from loras.loading import load_lora
from loras.slot import LoraSlot
from pipeline_spf_portrait import SPFPortraitPipeline
from programs.loading import InputError, choose_device, load_pipeline
from toy_portraits.recipe import BASE_MODEL, LORA


ROOT = Path(__file__).resolve().parents[1]
LORA_FILE = LORA / "pytorch_lora_weights.safetensors"
PROMPT, TARGET = "a man, black hair, a white jacket", "blonde hair"
PHRASES = PROMPT.split(", ")
FEW = 6  # steps of a drawing
CHROMIUM = "/usr/bin/chromium"
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def make_pipeline():
    pipeline = load_pipeline(SPFPortraitPipeline, str(BASE_MODEL), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_weaker_lora(path, factor):
    """The toy LoRA with its change multiplied."""
    tensors = safetensors.torch.load_file(LORA_FILE)
    tensors = {key: tensor * (factor if "lora_B" in key else 1) for key, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path)
    return path


def difference(first, second):
    """The largest, of 255."""
    return np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max()


# ----------------------------------------------------------------------------------------------- the page's functions


@pytest.fixture(scope="module")
def pipeline():
    """With the toy LoRA. No test may leave another one on it."""
    pipeline = make_pipeline()
    load_lora(pipeline, str(LORA), "toy")
    return pipeline


@pytest.fixture
def bare_pipeline():
    return make_pipeline()


def test_fields_become_one_call(pipeline):
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    steps = []
    found = draw(
        pipeline, PROMPT, TARGET, "black hair", "a man , ", 5, on_step=lambda *step: steps.append(step), **options
    )
    expected = pipeline(
        PROMPT,
        target_prompt=[("black hair", TARGET)],
        free_phrases=["a man"],
        compare=True,
        return_sfcm=True,
        generator=torch.Generator().manual_seed(5),
        **options,
    )
    assert difference(found.images[0], expected.images[0]) == 0
    assert difference(found.reference_images[0], expected.reference_images[0]) == 0
    assert torch.equal(found.sfcm, expected.sfcm)
    assert steps == [(1, 2), (2, 2)]
    rows = phrase_table(found, "a man , ")
    assert [row[0] for row in rows] == ["a man", "a white jacket"]  # the replaced phrase is none
    assert [row[3] for row in rows] == ["yes", "no"]
    assert rows[0][1] == f"{expected.phrase_distances[0, 0]:.2f}"
    assert rows[1][2] == f"{expected.phrase_maps[0, 1].mean():.2f}"


def test_without_a_target_phrases_have_no_distance(pipeline, bare_pipeline):
    output = draw(pipeline, PROMPT, "", num_inference_steps=1)
    assert [row[:2] for row in phrase_table(output)] == [[phrase, ""] for phrase in PHRASES]
    without_lora = draw(bare_pipeline, PROMPT, "", num_inference_steps=1)
    assert without_lora.sfcm is None and output.sfcm is not None


def test_a_replacement_needs_a_target(pipeline):
    with pytest.raises(ValueError, match="'black hair': the target is empty"):
        draw(pipeline, PROMPT, "", "black hair")


def image_of(pipeline):
    return draw(pipeline, PROMPT, TARGET, num_inference_steps=1).images[0]


def test_the_slot_exchanges_loras_and_a_failed_exchange_leaves_the_former(bare_pipeline, tmp_path):
    slot = LoraSlot(bare_pipeline)
    without = image_of(bare_pipeline)
    slot.use(str(LORA))
    strong = image_of(bare_pipeline)
    assert difference(strong, without) > 0
    adapters = bare_pipeline.get_list_adapters()
    slot.use(str(LORA))
    assert bare_pipeline.get_list_adapters() == adapters  # not loaded again

    (tmp_path / "wrong.safetensors").write_bytes(b"no tensors")
    for wrong in (tmp_path / "wrong.safetensors", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"^{wrong}: "):
            slot.use(str(wrong))
        assert difference(image_of(bare_pipeline), strong) == 0

    path = write_weaker_lora(tmp_path / "other.safetensors", 0.5)
    slot.use(str(path))
    weak = image_of(bare_pipeline)
    assert difference(weak, strong) > 0 and difference(weak, without) > 0
    assert len(bare_pipeline.get_list_adapters()["unet"]) == 1
    slot.use("")
    assert difference(image_of(bare_pipeline), without) == 0
    assert not bare_pipeline.get_list_adapters()


def test_a_file_that_changed_is_read_again(bare_pipeline, tmp_path):
    slot, path = LoraSlot(bare_pipeline), tmp_path / "lora.safetensors"
    shutil.copy(LORA_FILE, path)
    slot.use(str(path))
    before = image_of(bare_pipeline)
    write_weaker_lora(path, 0.0)
    os.utime(path, (1e9, 1e9))  # an older copy put in its place counts, too
    slot.use(str(path))
    assert difference(image_of(bare_pipeline), before) > 0


def test_the_environment_names_model_and_lora_where_flags_do_not(monkeypatch, tmp_path):
    for name in ("SPF_BASE_MODEL", "SPF_LORA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    args = parse_args([])
    assert (args.base_model, args.lora) == (str(BASE_MODEL), [str(LORA.relative_to(ROOT))])
    assert (args.prompt, args.target) == app.TOY_PROMPT
    monkeypatch.chdir(tmp_path)
    assert parse_args([]).lora == [str(LORA)]
    assert parse_args(["--lora", ""]).lora == []
    assert parse_args(["--base_model", "user/model"]).lora == []
    monkeypatch.setenv("SPF_BASE_MODEL", "user/model")
    monkeypatch.setenv("SPF_LORA", "user/lora")
    args = parse_args([])
    assert (args.base_model, args.lora) == ("user/model", ["user/lora"])
    assert (args.prompt, args.target) == app.PROMPT
    assert parse_args(["--lora", "mine", "--lora", "yours"]).lora == ["mine", "yours"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_args(["--base_model", "~/model"]).base_model == str(tmp_path / "model")


def test_a_device_that_is_not_there_is_one_line():
    assert choose_device("cpu") == "cpu"
    for name in ("cuda:77", "abacus"):
        with pytest.raises(InputError, match=f"^--device {name}: .+") as error:
            choose_device(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base_model", "/nowhere"], "--base_model /nowhere: "),
        (["--lora", "/nowhere"], "--lora: /nowhere: no such file or folder"),
        (["--device", "abacus"], "--device abacus: "),
    ],
)
def test_a_mistake_ends_the_program_with_one_line(flags, message):
    with pytest.raises(SystemExit) as stop:
        app.main(flags)
    assert stop.value.code.startswith(f"app.py: error: {message}") and "\n" not in stop.value.code


def test_one_drawing_at_a_time(pipeline):
    (event,) = (event for event in build_demo(LoraSlot(pipeline)).fns.values() if event.api_name == "draw")
    assert event.queue and event.concurrency_limit == 1


@pytest.mark.parametrize("flags", [["--help"], ["--wrong"]])
def test_flags_are_read_before_libraries_are_imported(flags):
    """What takes seconds to import cannot be imported here."""
    block = "import sys; sys.modules |= dict.fromkeys(['torch', 'diffusers', 'transformers', 'gradio', 'numpy']); "
    code = f"{block}import runpy; runpy.run_path({str(ROOT / 'app.py')!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == (0 if flags == ["--help"] else 2), result.stderr
    assert "Traceback" not in result.stderr and "usage:" in result.stdout + result.stderr


# ------------------------------------------------------------------------------------------------------ what is open


@pytest.mark.parametrize(
    ("flags", "environment", "is_open"),
    [
        ([], {}, False),
        (["--host", "localhost"], {}, False),
        (["--host", "127.0.0.2"], {}, False),
        (["--host", "::1"], {}, False),
        (["--host", "0.0.0.0"], {}, True),
        (["--host", "192.168.0.7"], {}, True),
        (["--host", "my-machine"], {}, True),
        (["--share"], {}, True),
        ([], {"GRADIO_SERVER_NAME": "0.0.0.0"}, True),
        (["--host", "127.0.0.1"], {"GRADIO_SERVER_NAME": "0.0.0.0"}, False),
        (["--host", "127.0.0.1"], {"SPACE_ID": "user/space"}, True),
    ],
)
def test_who_reaches_the_page(flags, environment, is_open, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert app.is_open_to_others(parse_args(flags)) == is_open


def test_of_this_machine_others_get_the_loras_that_are_named(bare_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    weaker = write_weaker_lora(tmp_path / "user" / "weaker.safetensors", 0.5)
    slot = LoraSlot(bare_pipeline, [str(LORA), str(LORA_FILE)])
    for source in (str(LORA), f'"{LORA_FILE}"'):
        slot.use(source)
    strong = image_of(bare_pipeline)
    for source in (weaker, LORA.parent, "user", "~/x", "/nowhere", "x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match=f"^{re.escape(str(source))}: not a public LoRA of the Hub"):
            slot.use(str(source))
    # Of a name that may be the Hub's, nothing tells whether there is such a path here.
    messages = set()
    for source in ("user/weaker", "user/nothing"):
        with pytest.raises(ValueError) as raised:
            slot.use(source)
        messages.add(str(raised.value).replace(source, "it"))
    assert len(messages) == 1
    assert difference(image_of(bare_pipeline), strong) == 0
    everything = LoraSlot(bare_pipeline)
    everything.use(str(weaker))
    assert difference(image_of(bare_pipeline), strong) > 0


def test_from_the_hub_others_get_public_loras_of_a_size_without_the_token(bare_pipeline, tmp_path):
    content, token, said = LORA_FILE.read_bytes(), "hf_SECRETofTheTester", {}
    with HubServer("tester", token) as hub, hub.here(tmp_path / "home", token):
        for name in ("public", "large", "private", "named"):
            hub.repos[f"tester/{name}"] = {LORA_FILE.name: content * (3 if name == "large" else 1)}
            hub.add_commit(f"tester/{name}")
        hub.private |= {"tester/private", "tester/named"}
        hf_hub_download("tester/private", LORA_FILE.name)  # with the token, into the cache
        slot = LoraSlot(bare_pipeline, ["tester/named"], 2 * len(content))
        for name in ("named", "public", "large", "private", "none", "public/x.safetensors"):
            try:
                slot.use(f"tester/{name}")
                said[name] = bare_pipeline.get_active_adapters()
            except ValueError as error:
                said[name] = str(error)
    assert said["named"] == ["lora_1"] and said["public"] == ["lora_2"] and slot.source == "tester/public"
    assert re.match(f"tester/large: .*at most {2 * len(content) / 1e6:g} MB are downloaded", said["large"])
    assert said["private"].startswith("tester/private: not found among the public LoRAs of the Hub: ")
    assert said["private"].replace("tester/private", "tester/none") == said["none"]
    assert said["public/x.safetensors"].startswith("tester/public/x.safetensors: no x.safetensors there")

    def asked(name):
        """Methods, and whether with a token, of the requests for a repository's files."""
        paths = [request for request in hub.requests if request.path.startswith(f"/tester/{name}/resolve/")]
        return [(request.method, "authorization" in request.headers) for request in paths]

    assert set(asked("named")) == {("HEAD", True), ("GET", True)}
    assert set(asked("public")) == {("HEAD", False), ("GET", False)}
    assert asked("large") == [("HEAD", False)]
    assert asked("private") == [("HEAD", True), ("GET", True), ("HEAD", False)]
    assert not list((tmp_path / "home").rglob("*public*"))


# ------------------------------------------------------------------------------------------------------- what is long


@pytest.mark.parametrize(
    ("text", "message"),
    [("a hat, " * 3000, "21000 characters are more"), ("a hat, " * 20, "60 tokens are more than the 30 that")],
)
@pytest.mark.parametrize("field", range(4))
def test_what_the_text_encoder_cannot_take_is_refused_before_it_is_read(pipeline, field, text, message):
    demo = build_demo(LoraSlot(pipeline))
    (event,) = (event for event in demo.fns.values() if event.api_name == "draw")
    texts = [PROMPT, TARGET, "", ""]
    texts[field] = text
    start = time.perf_counter()
    with pytest.raises(gr.Error, match=message) as raised:
        event.fn(*texts, "/nowhere", 1.0, 0.0, True, 0, 1, 5.0)
    assert time.perf_counter() - start < 1
    names = ("Prompt", "Target", "Replaces", "May change, too")
    assert str(raised.value).strip("'").startswith(f"{names[field]}: ")


def test_as_long_as_the_text_encoder_takes_is_taken(pipeline):
    check_lengths({"Prompt": "a " * 30}, [pipeline.tokenizer])
    with pytest.raises(ValueError, match="^Prompt: 31 tokens are more than the 30 that"):
        check_lengths({"Prompt": "a " * 31}, [pipeline.tokenizer])


# --------------------------------------------------------------------------------------- what is put into *Replaces*


def test_a_phrase_about_the_targets_noun_is_proposed_until_the_user_decides(pipeline):
    def change(prompt, target, replaces, proposed):
        return propose_replacement(prompt, target, replaces, proposed, [pipeline.tokenizer])

    assert change(PROMPT, TARGET, "", "") == ("black hair", "black hair")
    assert change("a man, red hair", TARGET, "black hair", "black hair") == ("red hair", "red hair")
    assert change("a man, a hat", TARGET, "red hair", "red hair") == ("", "")
    # What the user wrote or took away stays.
    assert change(PROMPT, TARGET, "a man", "") == (None, "black hair")
    assert change(f"{PROMPT}, a wall", TARGET, "", "black hair") == (None, "black hair")
    assert change("", "", "", "") == (None, "")
    assert change("a hat, " * 3000, TARGET, "", "") == (None, "")


# ---------------------------------------------------------------------------------------------- the page in a browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of `python app.py`, with nothing but the port."""
    with serving(tmp_path_factory.mktemp("server")) as address:
        yield address


@contextmanager
def serving(folder, *flags):
    """The address of `python app.py`, started in this other folder, whose output goes into the file `log` there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPF_")}
    environment |= {"GRADIO_TEMP_DIR": str(folder / "cache"), "GRADIO_ANALYTICS_ENABLED": "False"}
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), "--port", str(port), *map(str, flags)],
            cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, log)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def wait_for(address, process, log, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(log.read_text())


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


class Page:
    """The page as a user has it before them."""

    def __init__(self, browser, address, width=1280):
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.elsewhere, self.failures, self.streams = [], [], set()
        self.page.on("request", lambda request: self.look_at(request, address))
        for ended in ("requestfinished", "requestfailed"):
            self.page.on(ended, lambda request: self.streams.discard(request))
        self.page.on("pageerror", lambda error: self.failures.append(str(error)))
        self.page.goto(address)
        self.button = self.page.get_by_role("button", name="Draw", exact=True)
        self.button.wait_for()

    def look_at(self, request, address):
        if not request.url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(request.url)
        if "/queue/data" in request.url:
            self.streams.add(request)

    def fill(self, label, text):
        self.page.get_by_role("textbox", name=re.compile(f"^{label}")).fill(text)

    def fill_prompt(self):
        """The prompt has black hair and the target blonde, so that a replacement is proposed."""
        self.fill("Prompt", PROMPT)
        self.fill("Target", TARGET)
        self.wait_for_proposal("black hair")

    def wait_for_proposal(self, text):
        expect(self.page.get_by_role("textbox", name="Replaces")).to_have_value(text, timeout=60_000)

    def set_number(self, label, value):
        self.page.get_by_label(f"number input for {label}").fill(str(value))

    def draw(self, seed, steps=FEW):
        """Draw with this seed and wait for it; each call of a test has another seed, so that the wait can end."""
        more = self.page.get_by_role("button", name="More")
        if not self.page.get_by_label("Seed").is_visible():
            more.click()
        self.page.get_by_label("Seed").fill(str(seed))
        if steps is not None:  # else as the page has them at first
            self.set_number("Steps", steps)
        status = self.page.locator("#status").get_by_text(f"seed {seed},")
        self.press_draw()
        try:
            status.wait_for(timeout=120_000)
        except PlaywrightTimeout:
            # Gradio's server drops an event now and then; a user presses again.
            self.press_draw()
            status.wait_for(timeout=180_000)
        return {name: self.image(name) for name in ("original", "adapted", "sfcm", "overview")}

    def press_draw(self):
        """Not by the mouse: a button that moves while fields above it change their height may miss a click."""
        self.settle()
        with self.page.expect_request("**/queue/join*", timeout=60_000):
            self.button.press("Enter")

    def image(self, name):
        address = self.page.locator(f"#{name} img").get_attribute("src")
        return Image.open(io.BytesIO(self.page.request.get(address).body())).convert("RGB")

    def error(self):
        toast = self.page.get_by_test_id("toast-text")
        toast.wait_for(timeout=60_000)
        text = toast.inner_text()
        self.page.get_by_test_id("toast-close").click()
        toast.wait_for(state="detached")
        self.settle()
        return text

    def settle(self):
        """Wait until streams of earlier events end: the server drops what comes while it takes leave of one."""
        self.page.wait_for_timeout(100)  # an event of the last field may be on its way
        while self.streams:
            self.page.wait_for_timeout(20)


@pytest.fixture
def page(browser, server):
    page = Page(browser, server)
    yield page
    assert page.elsewhere == [] and page.failures == []
    page.page.close()


def direct(pipeline, seed, prompt=PROMPT, **options):
    arguments = {"target_scale": 1.0, "num_inference_steps": FEW, "guidance_scale": 5.0, "replaces": "black hair"}
    arguments |= options
    return draw(pipeline, prompt, TARGET, seed=seed, **arguments)


@pytest.mark.slow
def test_the_page_draws_what_the_pipeline_draws(page, pipeline):
    page.fill_prompt()
    found, expected = page.draw(1, None), direct(pipeline, 1, num_inference_steps=25)
    assert difference(found["original"], expected.reference_images[0]) <= 1
    assert difference(found["adapted"], expected.images[0]) <= 1
    assert difference(found["original"], found["adapted"]) > 50
    assert difference(found["sfcm"], found["adapted"]) > 50
    assert difference(found["overview"], pipeline.visualize(expected)) <= 1
    cells = page.page.locator("#phrases").get_by_role("gridcell").all_inner_texts()
    assert [cells[i : i + 4] for i in range(0, len(cells), 4)] == phrase_table(expected)

    page.set_number("SFCM guidance", 1)
    guided = page.draw(2)
    assert difference(guided["adapted"], direct(pipeline, 2, sfcm_guidance=1.0).images[0]) <= 1
    assert difference(guided["adapted"], direct(pipeline, 2).images[0]) > 10

    page.set_number("SFCM guidance", 0)
    page.set_number("LoRA strength", 0.5)
    page.page.get_by_label("LoRA in the empty branch").uncheck()
    weaker = page.draw(3)["adapted"]
    expected = direct(pipeline, 3, target_scale=0.5, adapter_in_unconditional=False)
    assert difference(weaker, expected.images[0]) <= 1
    assert difference(weaker, direct(pipeline, 3).images[0]) > 10


@pytest.mark.slow
def test_errors_are_shown_and_the_page_goes_on(page, pipeline):
    page.fill_prompt()
    page.fill("Replaces", "a <i>hat</i>")
    page.button.click()
    assert "'a <i>hat</i>' is not in the base prompt" in page.error()
    page.fill("Replaces", "black hair")
    page.fill("Target", "a white jacket")
    page.wait_for_proposal("")
    page.button.click()
    assert page.error() == f"The target prompt 'a white jacket' is already a phrase of the base prompt '{PROMPT}'."
    page.fill_prompt()
    page.fill("LoRA", "/nowhere/at/all")
    page.button.click()
    assert page.error() == "/nowhere/at/all: no such file or folder"
    page.fill("LoRA", f'"{LORA}"')
    page.fill("Prompt", "a hat, " * 20)
    page.wait_for_proposal("")
    page.button.click()
    assert page.error() == "Prompt: 60 tokens are more than the 30 that the text encoder takes."
    prompt = "a man, a white jacket, (a hat:1.2)"
    page.fill("Prompt", prompt)
    found = page.draw(4, None)["adapted"]
    expected = direct(pipeline, 4, prompt, replaces="", num_inference_steps=25)
    assert difference(found, expected.images[0]) <= 1
    assert "Weights are not read here: (a hat:1.2) is drawn" in page.page.locator("#status").inner_text()


@pytest.mark.slow
def test_loras_are_exchanged_by_path(page, bare_pipeline, tmp_path):
    path = write_weaker_lora(tmp_path / "weaker.safetensors", 0.5)
    page.fill_prompt()
    page.fill("LoRA", str(path))
    weaker = page.draw(5)["adapted"]
    page.fill("LoRA", "")
    without = page.draw(6)["adapted"]
    assert "No LoRA" in page.page.locator("#status").inner_text()
    assert difference(without, direct(bare_pipeline, 6, target_scale=None).images[0]) <= 1
    load_lora(bare_pipeline, str(path), "weaker")
    assert difference(weaker, direct(bare_pipeline, 5).images[0]) <= 1


@pytest.mark.slow
def test_a_phone_shows_the_page_in_its_width(browser, server):
    page = Page(browser, server, width=390)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.button.bounding_box()["width"] > 250
    assert page.elsewhere == []
    page.page.close()
