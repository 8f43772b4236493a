"""The report's files: one page that needs nothing else, tables, and the plot."""

import csv
import json
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from test_summary import ORIGINAL, PLAIN, judged

from evaluation.report import PictureRow, format_number, response_plot, without_nan, write_report, write_tables
from evaluation.summary import summarise


class Page(HTMLParser):
    """Cells with numbers by LoRA and measure, all addresses, and whether every element is closed."""

    VOID = {"meta", "img", "br"}

    def __init__(self):
        super().__init__()
        self.cells, self.addresses, self.open, self.lora, self.cell = {}, [], [], None, None

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("src", "href", "action", "data", "srcset") if name in attrs]
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.lora = attrs.get("data-lora")
        if tag == "td" and "data-measure" in attrs:
            self.cell = (self.lora, attrs["data-measure"])
            self.cells.setdefault(self.cell, []).append([float(attrs["data-value"]), ""])

    def handle_data(self, data):
        if self.cell is not None:
            self.cells[self.cell][-1][1] += f" {data}"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "td":
            self.cell = None


def read_page(path):
    """The page, with all that would be loaded from elsewhere refused."""
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == [] and page.addresses and all(a.startswith("data:image/") for a in page.addresses)
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    return page


def check_page(page, document):
    """Every number of metrics.json stands in the page, as a value and as text."""
    expected = {
        (lora["name"], name): estimate
        for lora in document["loras"]
        for name, estimate in lora["measures"].items()
        if estimate["value"] is not None
    }
    assert set(page.cells) == set(expected)
    for key, estimate in expected.items():
        for value, text in page.cells[key]:
            numbers = [number for number in estimate.values() if number is not None]
            assert value == estimate["value"]
            assert re.findall(r"-?\d+\.\d+", text) == [format_number(number) for number in numbers]


@pytest.fixture
def document():
    run = [judged(f"checkpoint-{i}", "checkpoint", 1 + i, i / 2, 0.2 + 0.15 * i**0.5) for i in (1, 2, 3)]
    document = summarise([ORIGINAL, PLAIN, *run], {"dino": "no <network> & no file"}, 100, 0)
    prompt = {"prompt": "p000", "base": "<b>a man</b>", "target": "a hat", "full": "<b>a man</b>, a hat"}
    settings = {"pretrained_model_name_or_path": "x", "num_inference_steps": 5, "guidance_scale": 5.0}
    settings |= {"num_resamples": 100, "device": None}
    return document | {"prompts": [prompt], "seeds": [0, 1], "region": "The region.", "settings": settings}


def test_the_page_holds_the_numbers_of_the_tables_and_loads_nothing(tmp_path, document):
    picture = Image.new("RGB", (64, 64), "red")
    rows = [("plain", [PictureRow("p000-s0: <b>a man</b>", [picture] * 4)])]
    document["loras"][1]["measures"]["identity"] = {"value": float("nan"), "low": None, "high": None}
    document["measures"]["identity"] = document["measures"]["dino"]
    write_tables(tmp_path, document, [{"lora": "plain", "portrait": "p000-s0", "change": float("nan")}])
    write_report(tmp_path, document, rows)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == json.loads(json.dumps(without_nan(document)))
    page = read_page(tmp_path / "report.html")
    check_page(page, written)
    assert len(page.addresses) == 5
    text = (tmp_path / "report.html").read_text()
    assert "<b>a man" not in text and "no &lt;network&gt; &amp; no file" in text
    with (tmp_path / "metrics.csv").open() as file:
        lines = {(line["lora"], line["measure"]): line for line in csv.DictReader(file)}
    assert len(lines) == 5 * 7
    assert lines["plain", "dino"]["reason"] == "no <network> & no file" and lines["plain", "dino"]["value"] == ""
    assert lines["plain", "identity"]["value"] == ""
    for lora in written["loras"]:
        assert float(lines[lora["name"], "change"]["low"]) == lora["measures"]["change"]["low"]
    assert (tmp_path / "portraits.csv").read_text().splitlines() == ["lora,portrait,change", "plain,p000-s0,"]


def test_no_name_or_text_of_a_user_is_markup(tmp_path, document):
    hostile = '"><script>alert(1)</script><img src=http://x/y onerror=z>'
    document |= {"verdict": hostile, "keep": hostile, "pollution_note": hostile, "region": hostile}
    document["loras"][2] |= {"name": hostile, "flags": ["no response"]}
    document["prompts"] = [dict.fromkeys(document["prompts"][0], hostile)]
    document["settings"] |= {"pretrained_model_name_or_path": hostile, "lora": [hostile]}
    document["not_computed"] = {"dino": hostile}
    document["rank_correlations"] = [{"proxy": "dino", "truth": "change", "spearman": float("nan"), "loras": 4}]
    rows = [(hostile, [PictureRow(hostile, [Image.new("RGB", (64, 64))] * 4)])]
    write_report(tmp_path, document, rows)
    page = read_page(tmp_path / "report.html")
    assert len(page.addresses) == 5 and (hostile, "pollution") in page.cells
    assert "<script" not in (tmp_path / "report.html").read_text()


def test_large_pictures_are_made_small_in_the_page(tmp_path, document):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8))
    document["response_measure"] = None
    write_report(tmp_path, document, [("plain", [PictureRow("", [noise] * 4)])])
    page = read_page(tmp_path / "report.html")
    assert all(address.startswith("data:image/jpeg") for address in page.addresses) and len(page.addresses) == 4
    assert (tmp_path / "report.html").stat().st_size < 4 * 80_000 and not (tmp_path / "response.png").exists()


def test_the_plot_marks_the_checkpoint_to_keep(document):
    ringed = np.asarray(response_plot(document))
    assert document["keep"] is not None
    plain = np.asarray(response_plot(document | {"keep": None}))
    changed = np.argwhere((ringed != plain).any(-1))
    assert len(changed) and (np.ptp(changed, axis=0) <= 48).all()
    assert response_plot(document | {"response_measure": None}) is None


def test_the_plot_takes_any_name_and_needs_no_interval(document):
    for lora, name in zip(document["loras"], ("$a^", "m" * 200, "模型", "_%\\alpha$$", "")):
        lora["name"] = name
    document["pollution_unit"] = "1 is $a^"
    for lora in document["loras"]:
        for estimate in lora["measures"].values():
            estimate |= {"low": None, "high": None}
    document["loras"][3]["measures"]["pollution"]["value"] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert response_plot(document).size == (920, 680)


def test_numbers_have_three_decimals_and_no_negative_zero():
    assert [format_number(value) for value in (None, 0.12349, -0.0001, 17.0)] == ["–", "0.123", "0.000", "17.000"]
