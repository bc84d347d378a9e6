"""Pictures, report.html and the model card, made from a run folder and read back with parsers that are not ours."""

import base64
import html.parser
import json
import math
import re
import shutil
import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from deltune.errors import CheckpointError
from deltune.training import svg
from deltune.training.callbacks import Sample
from deltune.training.card import code, fenced, markdown, write_card
from deltune.training.metrics import MetricsFile
from deltune.training.plots import loss_png
from deltune.training.report import write_report
from tests import recorded_run as made

NASTY = "</pre></textarea><script>alert(1)</script><img src=x onerror=alert(1)> \x1b[31mred\x1b[0m & \"'|`#\n---\n{{7*7}} \ud800"
NASTY_DATA = {"examples": 1, "tokens": 2, "trained_tokens": 1, "streaming": False, "sources": [{"name": NASTY, "format": NASTY}], "notes": {NASTY: 3}}
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """A strict reader: every element closed in order; texts and attributes kept by element."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data))

    def all(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return made.write_run(tmp_path_factory.mktemp("runs") / "words")


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


# -- the report -------------------------------------------------------------------------------------------------


def test_the_report_has_all_its_parts(page):
    assert page.all("h2") == ["Curves", "Samples", "Parameters", "Data", "Model and environment", "Use it"]
    assert page.all("summary") == ["Resolved config"]
    assert page.all("title")[0] == "words"
    assert page.all("figcaption") == [
        "Loss", "Learning rate", "Gradient norm", "Tokens per second", "Peak memory in GB", "Model-FLOPs utilisation in percent",
        "Evaluation: perplexity", "Evaluation: token accuracy", "Evaluation: exact match",
    ]  # fmt: skip


def test_the_headline_is_the_metrics_before_and_after(page):
    values = [text for (tag, text) in page.texts if tag == "p"][1:5]
    assert values == ["0.1281", "1.137", "97.1 %", "90.6 %"]
    assert [text for text in page.all("span") if text.startswith("before ")] == ["before 4.18", "before 65.37", "before 5.0 %", "before 0.0 %"]


def test_the_facts_are_those_of_metrics_jsonl(folder, page):
    facts = dict(zip(page.all("dt"), page.all("dd"), strict=True))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"kind": "step"' in line]
    assert facts["tokens"] == f"{sum(s['num_tokens'] for s in steps):,}"
    assert facts["trained parameters"] == "90,112 (2.7 %)"
    assert facts["time"] == "13 s"
    assert facts["checkpoints saved"] == "5"
    assert facts["model · sha256 · config.json"] == "ab" * 32
    assert facts["versions · torch"] == "2.13.0"
    assert facts["loss chain"] == "12" * 32


def test_the_data_tables_hold_what_became_of_the_rows(page):
    cells = page.all("th") + page.all("td")
    for part in (
        ["set", "rows", "examples", "tokens", "trained tokens", "rejected"],  # columns with nothing to say are left out
        ["training", "2,003", "2,000", "84,210", "12,034", "3", "evaluation", "200", "200", "8,423", "1,201", "0"],
        ["training", "words.jsonl", "alpaca", "chat", "1", "1", "id"],
    ):
        assert any(cells[i : i + len(part)] == part for i in range(len(cells)))
    assert "the answer was cut: 7" in page.all("p")


def test_the_report_needs_nothing_from_outside_and_runs_nothing(folder, page):
    text = (folder / "report.html").read_text(encoding="utf-8")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    for _, attributes in page.elements:
        assert not {"src", "href", "action", "data", "srcset", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    [policy] = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_colours_are_variables_given_for_light_and_for_dark(folder):
    style = re.search(r"<style>(.*)</style>", (folder / "report.html").read_text(encoding="utf-8"), re.S)[1]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.S)
    names = re.findall(r"(--[\w-]+):", light)
    assert names == re.findall(r"(--[\w-]+):", dark)
    assert set(re.findall(r"var\((--[\w-]+)\)", style)) == set(names)
    rules = style.split("* {", 1)[1]
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b", rules)


def contrast(first: str, second: str) -> float:
    """WCAG 2.1's contrast ratio of two #rrggbb colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_in_light_and_dark():
    from deltune.training.report_style import STYLE

    for scheme in re.findall(r":root \{(.*?)\}", str(STYLE), re.S):
        colors = dict(re.findall(r"(--[\w-]+): (#\w{6})", scheme))
        for ground in ("--page", "--card", "--soft"):
            assert contrast(colors["--ink"], colors[ground]) >= 7
            assert contrast(colors["--muted"], colors[ground]) >= 4.5
        for line in ("--c1", "--c2", "--c3"):
            assert contrast(colors[line], colors["--card"]) >= 3
        assert contrast(colors["--good"], colors["--good-soft"]) >= 4.5
        assert contrast(colors["--warn"], colors["--warn-soft"]) >= 4.5


def test_samples_stand_side_by_side_with_their_newlines(page):
    texts = page.all("pre")
    assert "Write each letter twice:\nsun" in texts and "sun\nsun\nsun" in texts
    right = [attributes for tag, attributes in page.elements if tag == "div" and attributes.get("class") == "right"]
    assert len(right) == 1  # of four answers one equals its reference


def test_text_of_users_is_text_wherever_it_goes(tmp_path):
    config = made.CONFIG | {"name": "x", "data": {"train": [NASTY.replace("\ud800", "")], "mode": "sft"}}
    run = made.write_run(
        tmp_path / "words",
        steps=3,
        samples=[Sample(NASTY, NASTY, NASTY, NASTY)],
        config=config,
        name=NASTY,
        description={NASTY: NASTY, "data": NASTY_DATA, "model": {"path": NASTY}, "versions": {"deltune": NASTY}},
        parameter_table=[{"module": NASTY, NASTY: 1}],
    )
    file = MetricsFile(run / "metrics.jsonl")
    file.on_start(made.info(run, num_steps=3, start_step=3, name=NASTY, description={NASTY: NASTY}, parameter_table=[{"module": NASTY, NASTY: 1}]))
    file.on_event(3, NASTY)
    file.on_eval(made.EvalRecord(3, {NASTY: 0.5}, False, 0.1))
    file.close()
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "img", "textarea"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "\x1b" not in text and "␛[31mred␛[0m" in text
    shown = [t for t in page.all("pre") if "alert(1)" in t]
    assert len(shown) == 4 and all("\n---\n{{7*7}} �" in t for t in shown)


def test_a_run_that_was_killed_has_a_report(tmp_path):
    page = Page(write_report(made.write_run(tmp_path / "words", steps=90, finished=False)).read_text(encoding="utf-8"))
    assert "not finished" in page.all("span")
    assert "lora on bundled · step 90 of 90" in page.all("p")[0]


@pytest.mark.parametrize("missing", ["config.yaml", "samples.json", "completed.json", "adapter"])
def test_what_is_missing_is_left_out(tmp_path, missing):
    run = made.write_run(tmp_path / "words", steps=40)
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(run).read_text(encoding="utf-8"))
    gone = {"config.yaml": ("summary", "Resolved config"), "samples.json": ("h2", "Samples"), "adapter": ("h2", "Use it")}
    if missing in gone:
        tag, text = gone[missing]
        assert text not in page.all(tag)
    assert "Curves" in page.all("h2")
    write_card(run)


def test_a_run_without_a_step_has_a_report(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(made.info(tmp_path, description={}, parameter_table=[]))
    file.close()
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.all("h1") == ["words "]
    assert page.all("h2") == []


def test_events_are_in_the_report(tmp_path):
    run = made.write_run(tmp_path / "words", steps=5, finished=False)
    file = MetricsFile(run / "metrics.jsonl")
    file.on_start(made.info(run, start_step=5))
    file.on_event(5, "resumed after step 5")
    file.close()
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Events" in page.all("h2") and "resumed after step 5" in page.all("td")


def test_a_damaged_file_is_named(tmp_path):
    run = made.write_run(tmp_path / "words", steps=5)
    (run / "samples.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"samples\.json: not JSON"):
        write_report(run)


def test_a_long_run_stays_a_small_page(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(made.info(tmp_path, num_steps=6000))
    made.play([file], tmp_path, 1, 6000, eval_every=500, save_every=10_000)
    file.close()
    assert write_report(tmp_path).stat().st_size < 500_000


# -- charts -----------------------------------------------------------------------------------------------------


def charts(folder: Path) -> list[ElementTree.Element]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.S)]


def points_of(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_every_chart_is_well_formed_and_inside_its_frame(folder, page):
    found = charts(folder)
    assert len(found) == 10  # the loss for wide and for narrow pages, and eight more
    for chart in found:
        _, _, width, height = map(float, chart.get("viewBox").split())
        assert chart.get("role") == "img" and chart.get("aria-label")
        for path in chart.iter("path"):
            assert all(0 <= x <= width and 0 <= y <= height for x, y in points_of(path.get("d")))
        ticks = [text.text for text in chart.find("g[@class='grid']").iter("text")]
        assert len(ticks) == len(set(ticks)) + ticks.count("0") - (1 if "0" in ticks else 0)


def test_a_curve_passes_through_its_values():
    chart = ElementTree.fromstring(str(svg.line_chart([svg.Series("y", [0, 1, 2, 4], [1.0, 3.0, 2.0, 5.0])], title="Y", width=400, height=200)))
    points = points_of(chart.find(".//path").get("d"))
    # straight lines from value to place: equal steps on an axis are equal distances
    assert [x for x, _ in points] == pytest.approx([points[0][0] + step * (points[3][0] - points[0][0]) / 4 for step in (0, 1, 2, 4)], abs=0.06)
    scale = (points[3][1] - points[0][1]) / 4
    assert [y for _, y in points] == pytest.approx([points[0][1] + (v - 1) * scale for v in (1, 3, 2, 5)], abs=0.06)
    assert scale < 0  # up is more


def test_a_logarithmic_axis_puts_equal_ratios_at_equal_distances():
    drawing = svg.line_chart([svg.Series("y", [1, 2, 3, 4], [1000.0, 10.0, 0.0, 0.1])], title="Y", log=True)
    chart = ElementTree.fromstring(str(drawing))
    d = chart.find(".//path").get("d")
    ys = [y for _, y in points_of(d)]
    assert (ys[1] - ys[0]) == pytest.approx(ys[2] - ys[1], abs=0.15)
    assert d.count("M") == 2  # zero has no place: a gap


def test_values_that_are_not_finite_leave_a_gap():
    values = [1.0, math.nan, 2.0, 3.0, math.inf, 4.0]
    chart = ElementTree.fromstring(str(svg.line_chart([svg.Series("y", list(range(6)), values)], title="Y")))
    d = chart.find(".//path").get("d")
    assert d.count("M") == 3 and d.count("L") == 1 and d.count("h0") == 2
    assert "nan" not in d and "inf" not in d


def test_the_pointer_shows_step_and_values():
    series = [svg.Series("loss", [1, 2, 3], [5.0, 4.0, 3.0]), svg.Series("evaluation", [2], [4.5], 2, "points")]
    chart = ElementTree.fromstring(str(svg.line_chart(series, title="Loss")))
    titles = [title.text for title in chart.iter("title")]
    assert titles == ["step 1 · loss 5", "step 2 · loss 4 · evaluation 4.5", "step 3 · loss 3"]
    columns = [(float(r.get("x")), float(r.get("width"))) for r in chart.iter("rect")]
    assert [x + w for x, w in columns[:-1]] == pytest.approx([x for x, _ in columns[1:]])  # no holes between them


def test_every_evaluation_can_be_pointed_at_in_a_long_run(tmp_path):
    x = list(range(1, 5001))
    series = [svg.Series("loss", x, [1.0 / i for i in x]), svg.Series("evaluation", [0, 777, 1501, 5000], [3.0, 2.0, 1.0, 0.5], 2, "points")]
    titles = re.findall(r"<title>(.*?)</title>", str(svg.line_chart(series, title="Loss")))
    assert len(titles) <= 96
    assert [t.split(" ")[1] for t in titles if "evaluation" in t] == ["0", "777", "1501", "5000"]


@pytest.mark.parametrize("values", [[2.0, 2.0], [0.0, 0.0], [-3.0], [1e-300, 2e-300], [1e300, -1e300]])
def test_flat_single_and_extreme_curves_can_be_drawn(values):
    drawing = svg.line_chart([svg.Series("y", list(range(len(values))), values)], title="Y", from_zero=True)
    chart = ElementTree.fromstring(str(drawing))
    assert all(math.isfinite(c) for path in chart.iter("path") for point in points_of(path.get("d")) for c in point)
    assert points_of(chart.find(".//path").get("d"))


def test_a_chart_without_values_says_so():
    assert "No values" in svg.line_chart([svg.Series("y", [1], [math.nan])], title="Loss")
    assert "No values" in svg.line_chart([], title="Loss")


@pytest.mark.parametrize(
    ("low", "high", "target", "ticks"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]), (0.3, 4.4, 4, [1, 2, 3, 4]), (0, 1.05, 4, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-7, 7, 3, [-5, 0, 5]), (0, 2.1e-4, 4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]), (119, 121, 4, [119, 119.5, 120, 120.5, 121]), (3, 3, 5, [3]),
    ],
)  # fmt: skip
def test_ticks_are_round_numbers_inside_the_range(low, high, target, ticks):
    assert svg.nice_ticks(low, high, target) == pytest.approx(ticks)


def test_logarithmic_ticks():
    assert svg.log_ticks(0.02, 3) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    assert svg.log_ticks(1e-4, 20) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1, 10])
    assert len(svg.log_ticks(1e-20, 1e20)) <= 8


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, "0"), (0.5, "0.5"), (120, "120"), (1000, "1k"), (1500, "1500"), (12_000, "12k"), (2_500_000, "2.5M"), (2e-4, "2e-4"), (1.5e-5, "1.5e-5"), (-3, "-3")],
)
def test_tick_labels_are_short(value, label):
    assert svg.tick_label(value) == label


# -- the picture ------------------------------------------------------------------------------------------------


def pixels(path: Path) -> tuple[int, int, set[bytes]]:
    """(width, height, colours) of an 8-bit RGBA PNG, read with zlib alone."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert (depth, kind) == (8, 6)
    packed, at = b"", 8
    while at < len(data):
        (length,), name = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        packed += data[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += 12 + length
    raw, stride, rows, above = zlib.decompress(packed), 4 * width, [], bytearray(4 * width)
    for y in range(height):
        kind, line = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        for i in range(stride):
            a, b, c = line[i - 4] if i >= 4 else 0, above[i], above[i - 4] if i >= 4 else 0
            nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            line[i] = (line[i] + (0, a, b, (a + b) // 2, nearest)[kind]) % 256
        rows.append(bytes(line))
        above = line
    return width, height, {row[i : i + 3] for row in rows for i in range(0, stride, 4)}


def test_the_picture_is_a_png_of_900_by_500_with_both_curves(folder):
    width, height, colors = pixels(loss_png(folder))
    assert (width, height) == (900, 500)
    assert {base64.b16decode(c) for c in (b"2563EB", b"D9480F", b"66707F")} <= colors  # loss, evaluation, learning rate
    assert not list(folder.glob(".*tmp"))


def test_a_picture_of_nothing_can_be_drawn(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(made.info(tmp_path, name="$x_{$ a very odd name"))
    file.on_step(made.step_record(1, loss=math.nan))
    file.close()
    assert loss_png(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_drawing_needs_no_display_and_leaves_pyplot_alone():
    import subprocess
    import sys

    code = "import sys; from deltune.training import plots, report, console, sinks; assert not {'matplotlib', 'rich', 'tensorboard', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- the card ---------------------------------------------------------------------------------------------------


def front_matter(text: str) -> dict:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_card_says_what_was_trained_on_what_with_what_result(folder):
    text = write_card(folder).read_text(encoding="utf-8")
    assert front_matter(text) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["deltune", "lora", "sft"]}
    assert "A `lora` adapter for `bundled` trained on `words.jsonl` with Deltune 0.1.0, 200 steps." in text
    assert "| exact match | 0.0 % | 90.6 % |" in text
    for fact in ("| adapter.rank | `8` |", "| optim.lr | `0.002` |", "| seed | `42` |", "cd" * 32, "ab" * 32, "ef" * 32, "`2.13.0`"):
        assert fact in text
    assert "license" not in text.lower()


def test_a_hub_base_is_named_where_hubs_look_and_a_local_folder_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    for base, expected in (("owner/name-1.5B", "owner/name-1.5B"), ("mine/model", None), ("/data/model", None), ("./x", None)):
        run = made.write_run(tmp_path / "words", steps=2, description={"model": {"path": base}})
        assert front_matter(write_card(run).read_text()).get("base_model") == expected


def test_a_card_without_an_adapter_is_that_of_a_model(tmp_path):
    run = made.write_run(tmp_path / "words", steps=2, config=made.CONFIG | {"adapter": None})
    (run / "adapter").rmdir()
    (run / "model").mkdir()
    text = write_card(run).read_text()
    assert front_matter(text)["library_name"] == "transformers"
    assert "All weights of `bundled` trained on" in text
    assert "AutoModelForCausalLM.from_pretrained('words/model')" in text and "PeftModel" not in text


def test_code_in_the_card_is_python(folder):
    text = write_card(folder).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")


def markdown_tokens(text: str) -> list:
    """All tokens of a card's body by CommonMark with tables, inline ones too."""
    from markdown_it import MarkdownIt

    blocks = MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    return [token for block in blocks for token in (block, *(block.children or []))]


def test_text_of_users_cannot_leave_its_place_in_the_card(tmp_path):
    description = {"model": {"path": NASTY}, "data": NASTY_DATA, "versions": {NASTY: NASTY}}
    run = made.write_run(tmp_path / "words", steps=2, name=NASTY, description=description)
    text = write_card(run).read_text(encoding="utf-8")
    assert list(front_matter(text)) == ["library_name", "pipeline_tag", "tags"]
    assert text.count("\n---\n") == 1 and "\x1b" not in text
    tokens, usual = markdown_tokens(text), markdown_tokens(write_card(made.write_run(tmp_path / "usual", steps=2)).read_text(encoding="utf-8"))
    kinds = {token.type for token in tokens}
    assert kinds == {token.type for token in usual}  # no html, link, image, rule or emphasis that was not meant
    assert not kinds & {"html_inline", "html_block", "link_open", "hr", "em_open"}
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == ["Results", "How to use it", "Data", "Settings", "Model and environment"]
    shown = [token.content for token in tokens if token.type in ("code_inline", "text") and "alert(1)" in token.content]
    one_line = " ".join(NASTY.replace("\x1b", "␛").replace("\ud800", "?").split())
    assert one_line in [content.replace(r"\|", "|") for content in shown]


@pytest.mark.parametrize("text", ["a", "a`b", "``", "`a``", "x|y", "|", "\\", "a\nb", "<b>"])
def test_a_code_span_gives_back_its_text(text):
    """By CommonMark's rule: the same number of backticks ends it, one space is stripped from both sides."""
    ticks, content = re.fullmatch(r"(`+)(.*?)\1", code(text), re.S).groups()
    if content.startswith(" ") and content.endswith(" ") and content.strip():
        content = content[1:-1]
    assert content.replace(r"\|", "|") == " ".join(text.split())
    assert ticks not in re.findall("`+", content)


def test_markdown_signs_are_escaped():
    assert markdown("a*b_c[d](e)<f>&`g`|#") == r"a\*b\_c\[d\](e)&lt;f&gt;&amp;\`g\`\|\#"


def test_a_code_block_cannot_be_ended_by_its_text():
    assert fenced("a\n````\nb", "python") == "`````python\na\n````\nb\n`````"
