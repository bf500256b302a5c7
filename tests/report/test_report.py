"""The HTML report: what it says, what it refers to, the numbers in it."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Bbox
from PIL import Image

from expedit_d2.analysis.flops import Flops
from expedit_d2.analysis.timing import Timing
from expedit_d2.comparison import PLAIN, Comparison, Conditions, Row, Workload, describe
from expedit_d2.projects import load_cfg, load_model
from expedit_d2.report import (
    Picture,
    best_row,
    draw_pictures,
    headline,
    read_pictures,
    write_report,
)
from expedit_d2.report.figures import Point, draw_tradeoff
from expedit_d2.report.summary import tradeoffs
from expedit_d2.settings import Settings
from support.repository import SEGMENTER, VITDET, load_tool

VOID = {"meta", "img", "br", "link", "input", "hr"}
BASE = 0.2  # seconds of the plain model


def flops(blocks: float) -> Flops:
    return Flops(
        embed=1e8, before=blocks / 2, clustering=0, after=blocks / 2, reconstruction=0, head=2e9
    )


def row(name, setting, metrics, agreement, blocks, speedup) -> Row:
    return Row(
        name=name,
        settings=setting,
        metrics=dict(zip(("box AP", "mask AP"), metrics, strict=True)),
        agreement={"instances": agreement},
        flops=flops(blocks),
        parameters=2_310_000,
        latency=Timing(BASE / speedup, 0.9 * BASE / speedup, 1.2 * BASE / speedup),
        baseline=Timing(BASE, BASE, BASE),
        throughput=5.5 * speedup,
        baseline_throughput=5.5,
        peak_memory=int(80 * 2**20 / speedup),
    )


ROWS = [
    row(PLAIN, None, (50.0, 40.0), 100.0, 4e9, 1.0),
    row("mild", Settings(3, ratio=0.8), (50.0, 39.9), 99.25, 3e9, 1.21),
    row("quick", Settings((0, 1), keep=0.5, method="merge"), (49.9, 39.84), 98.5, 2e9, 1.52),
    row("coarse", Settings(3, ratio=0.4, method="pool"), (41.0, 31.0), 71.75, 1.5e9, 1.83),
]
CONDITIONS = Conditions(
    device="some processor",
    threads=2,
    dtype="float32",
    torch="2.9.1",
    date="2026-01-02T03:04:05",
    timed_images=7,
    batch=8,
    command="python tools/compare.py --output 'a b'",
)
COMPARISON = Comparison("ViTDet", "collage_val", 200, CONDITIONS, ROWS)


def without_metrics(comparison: Comparison) -> Comparison:
    return replace(comparison, rows=[replace(r, metrics={}) for r in comparison.rows])


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.html = html
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(tmp_path, comparisons, pictures=()) -> Page:
    return Page(write_report(comparisons, pictures, tmp_path / "new" / "r.html").read_text("utf-8"))


def picture(title="an image") -> Picture:
    left = np.zeros((500, 1500, 3), np.uint8)
    left[..., 0] = 200
    return Picture(title, {"image": left, "semantic, plain": left})


def test_every_number_of_every_row_is_in_the_page(tmp_path):
    text = page_of(tmp_path, [COMPARISON]).text
    plain = ROWS[0]
    for r in ROWS:
        assert r.name in text
        for metric, value in r.metrics.items():
            assert f"{value:.2f}" in text
            assert f"{100 * value / plain.metrics[metric]:.1f} % kept" in text
        assert f"{r.agreement['instances']:.2f}" in text
        for part in ("transformer", "total"):
            now, was = getattr(r.flops, part), getattr(plain.flops, part)
            assert f"{now / 1e9:.2f}" in text
            assert f"{100 - 100 * now / was:.1f} % saved" in text
        ms = 1000 * r.latency.median
        assert f"{ms:.1f}" in text and f"{0.9 * ms:.1f}-{1.2 * ms:.1f}" in text
        assert f"{BASE / r.latency.median:.2f}×" in text
        assert f"{r.throughput:.2f}" in text
        assert f"{r.peak_memory / 2**20:.1f}" in text
    for value in (*vars(CONDITIONS).values(), "2.31 M", "200 images"):
        assert str(value) in text
    assert describe(ROWS[2].settings) in text


def test_nothing_is_fetched(tmp_path):
    html = write_report([COMPARISON], [picture()], tmp_path / "r.html").read_text("utf-8")
    page = Page(html)
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
            target = attributes.get(name) or ""
            assert not re.match(r"(\w+:)?//", target) or tag == "a", (tag, name, target)
    assert [a["href"] for a in page.all("a")] == ["https://arxiv.org/abs/2210.01035"]
    assert not page.all("link") and "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    # Ids that figures refer to are there, and once.
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)", html) + re.findall(r'href="#([^"]*)"', html)
    assert used and set(used) <= set(ids)


def test_page_is_accessible(tmp_path):
    page = page_of(tmp_path, [COMPARISON, without_metrics(COMPARISON)], [picture()])
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("title")) == 1
    assert all(image["alt"] for image in page.all("img"))
    figures = page.all("svg")
    assert len(figures) == 6 and all(f["role"] == "img" and f["aria-label"] for f in figures)
    assert len(page.all("table")) == 2 and len(page.all("h2")) == 3
    assert {a["scope"] for a in page.all("th")} == {"col", "row"}


def test_names_are_escaped(tmp_path):
    name = "<b>x</b> & $y$ \"'"
    rows = [ROWS[0], replace(ROWS[2], name=name)]
    hostile = Comparison(name, name, 1, replace(CONDITIONS, command=name), rows)
    page = page_of(tmp_path, [hostile], [picture(name)])
    assert not page.all("b")
    # Title, headings, headline, table, settings, conditions, figures, picture.
    assert page.text.count(name) >= 8
    assert page.all("img")[0]["alt"] == f"{name}: image"


@pytest.mark.parametrize("case", ["no metrics", "one row", "flops only", "not a number"])
def test_parts_may_be_missing(tmp_path, case):
    nothing = dict.fromkeys(
        ("latency", "baseline", "throughput", "baseline_throughput", "peak_memory")
    )
    comparison = {
        "no metrics": without_metrics(COMPARISON),
        "one row": replace(COMPARISON, rows=ROWS[:1]),
        "flops only": replace(
            COMPARISON, rows=[replace(r, metrics={}, agreement={}, **nothing) for r in ROWS]
        ),
        "not a number": replace(
            COMPARISON,
            rows=[ROWS[0], replace(ROWS[1], metrics={"box AP": float("nan"), "mask AP": 0.0})],
        ),
    }[case]
    page = page_of(tmp_path, [comparison])
    assert not page.all("img")
    figures = {"no metrics": 2, "one row": 0, "flops only": 0, "not a number": 2}[case]
    assert len(page.all("svg")) >= figures
    assert bool(page.all("svg")) == bool(figures)
    heads = ["".join(row) for row in re.findall(r"<th[^>]*>([^<]*)", page.html)]
    assert "GFLOPs" in heads and ("memory" in heads) == (case != "flops only")
    with pytest.raises(ValueError, match="at least one comparison"):
        write_report([], [], tmp_path / "r.html")


def test_figures_show_the_rows():
    plots = {(plot.y_label, plot.x_label): plot.points for plot in tradeoffs(COMPARISON)}
    assert len(plots) == 4
    methods = ["plain", "expedit", "merge", "pool"]
    kept = [100, 99.75, 99.6, 77.5]  # of mask AP, or of box AP 100, 100, 99.8, 82
    agreement = [100, 99.25, 98.5, 71.75]
    speedup, saved = [1, 1.21, 1.52, 1.83], [100 - 100 * b / 4.1 for b in (4.1, 3.1, 2.1, 1.6)]
    for (y_label, x_label), points in plots.items():
        assert [p.name for p in points] == [r.name for r in ROWS]
        assert [p.method for p in points] == methods
        assert all(p.front for p in points)  # each is faster and worse than the one before
        y = kept if "metric" in y_label else agreement
        x = speedup if "speed" in x_label else saved
        assert [p.y for p in points] == pytest.approx(y)
        assert [p.x for p in points] == pytest.approx(x, abs=1e-9)
    slow = replace(ROWS[1], latency=Timing(0.3, 0.3, 0.3))
    plot = tradeoffs(replace(COMPARISON, rows=[ROWS[0], slow, *ROWS[2:]]))[0]
    assert [p.front for p in plot.points] == [True, False, True, True]


def test_markers_stand_where_the_numbers_are():
    """Read back from the SVG: places are affine in x, and in arcsinh of y - 100."""
    points = [
        Point("plain", "plain", 1.0, 100.0, True),
        *(Point(f"s{i}", "merge", 1 + 0.2 * i, 100 - 3.0 * i, True) for i in range(1, 5)),
        Point("aside", "pool", 1.1, 60.0, False),
    ]
    svg = draw_tradeoff(points, "speed-up", "kept, %", "k")
    marks = re.findall(r'<use xlink:href="[^"]*" x="([\d.]+)" y="([\d.]+)" style="fill: #', svg)
    places = np.array(marks, float)
    assert len(places) == 7  # two more in the legend, behind these
    for values, column in (
        ([p.x for p in points[1:]], 0),
        ([np.arcsinh(p.y - 100) for p in points[1:]], 1),
    ):
        found = places[:5, column]
        scale, offset = np.polyfit(values, found, 1)
        assert np.abs(scale * np.array(values) + offset - found).max() < 0.01
        assert (scale > 0) == (column == 0)
    for point in points:
        assert f">{point.name}<" in svg


def texts_of(svg: str) -> list[tuple[str, Bbox]]:
    """Every upright text in a figure, and its box as the font has it."""
    found = []
    for tag, text in re.findall(r"<text ([^>]*)>([^<]*)", svg):
        if "rotate(-90" in tag:
            continue
        place = re.search(r'x="([\d.-]+)" y="([\d.-]+)"', tag)
        x, y = (place or re.search(r"translate\(([\d.-]+) ([\d.-]+)\)", tag)).groups()
        size = float(re.search(r"([\d.]+)px", tag)[1])
        path = TextPath((0, 0), text, size=size).get_extents()
        anchor = re.search(r"text-anchor: (\w+)", tag)
        share = {"middle": 0.5, "end": 1.0}.get(anchor and anchor[1], 0.0)
        left, y = float(x) - share * path.width, float(y)
        found.append((text, Bbox([(left, y - path.y1), (left + path.width, y - path.y0)])))
    return found


def crowd(seed: int) -> list[Point]:
    rng = np.random.default_rng(seed)
    names = [
        f"method=merge alpha=0-{i} keep=0.{i}" if seed % 2 else f"a{i}_{i}x{i}" for i in range(8)
    ]
    x = np.sort(rng.uniform(1.3, 1.3 + 0.05 * 4**seed, 8))
    y = np.sort(rng.uniform(99.9 - 4**seed, 99.9, 8))[::-1]
    return [Point("plain", "plain", 1.0, 100.0, True)] + [
        Point(name, "merge", *place, True) for name, *place in zip(names, x, y, strict=True)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_names_in_a_figure_neither_overlap_nor_leave_it(seed):
    points = crowd(seed)
    svg = draw_tradeoff(points, "speed-up", "kept, %", "k")
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    words = {word for point in points for word in point.name.split()}
    boxes = []
    # The last texts are those of the points, after the legend's and the axes'.
    for text, box in texts_of(svg):
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height, text
        if set(text.split()) <= words and text != "merge":
            boxes.append((text, box))
    assert len(boxes) >= 3
    for number, (text, box) in enumerate(boxes):
        for other, another in boxes[:number]:
            assert not box.overlaps(another), (text, other)


@pytest.mark.parametrize("low", [99.9, 99.0, 90.0, 40.0, 1.0])
def test_labels_of_the_stretched_axis_do_not_touch(low):
    points = [Point("plain", "plain", 1, 100, True), Point("a", "merge", 1.2, low, True)]
    texts = texts_of(draw_tradeoff([*points, Point("b", "pool", 1.3, 119, False)], "x", "y", "k"))
    left = min(box.x1 for text, box in texts if text == "100")
    ticks = [box for text, box in texts if re.fullmatch(r"[\d.]+", text) and abs(box.x1 - left) < 4]
    assert len(ticks) >= 3
    for number, box in enumerate(ticks):
        assert not any(box.overlaps(other) for other in ticks[:number])


def test_headline_is_the_fastest_that_keeps_enough():
    assert best_row(COMPARISON).name == "quick"
    assert headline(COMPARISON) == (
        "quick: 49 % fewer GFLOPs in the transformer, 1.52 times as fast, 99.6 % or more of every "
        "metric (box AP, mask AP) kept, 98.5 % agreement with the plain model."
    )
    # 98.5 is enough without metrics, 97.9 is not.
    bare = without_metrics(COMPARISON)
    assert headline(bare) == (
        "quick: 49 % fewer GFLOPs in the transformer, 1.52 times as fast, 98.5 % agreement with "
        "the plain model."
    )
    worse = [replace(r, agreement={"instances": r.agreement["instances"] - 0.6}) for r in bare.rows]
    assert best_row(replace(bare, rows=worse)).name == "mild"
    # A single metric is called by its name.
    one = replace(COMPARISON, rows=[replace(r, metrics={"mIoU": 50.0}) for r in ROWS])
    assert headline(one).endswith(
        "1.52 times as fast, 100.0 % of mIoU kept, 98.5 % agreement with the plain model."
    )


def test_headline_says_so_when_nothing_keeps_enough():
    rows = [ROWS[0], ROWS[3]]
    assert best_row(replace(COMPARISON, rows=rows)) is None
    text = headline(replace(COMPARISON, rows=rows))
    assert text.startswith(
        "No setting is faster and keeps 99.5 % of every metric and agrees with the plain model in "
        "98 %; nearest is coarse: "
    )
    assert "77.5 %" in text and "71.8 % agreement" in text
    slow = replace(ROWS[1], latency=Timing(0.3, 0.3, 0.3))
    assert best_row(replace(COMPARISON, rows=[ROWS[0], slow])) is None
    assert headline(replace(COMPARISON, rows=ROWS[:1])) == "Only the plain model was evaluated."


def test_pictures_are_embedded_and_small(tmp_path):
    page = page_of(tmp_path, [COMPARISON], [picture()])
    for attributes in page.all("img"):
        head, data = attributes["src"].split(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size == (1024, 341)
            assert (attributes["width"], attributes["height"]) == ("1024", "341")
            assert np.abs(np.asarray(image, int) - (200, 0, 0)).max() < 10
    assert "semantic, plain" in page.text


def test_pictures_are_drawn_from_a_model():
    cfg = load_cfg(SEGMENTER, ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8)
    items = [{"image": pixels[0], "file_name": "some/photo.jpg"}, *({"image": p} for p in pixels)]
    workload = Workload("s", load_model(cfg), "no data set", [[item] for item in items], None)
    drawn = draw_pictures(workload, ROWS[2], 2)
    assert [p.title for p in drawn] == ["Image photo, setting quick", "Image 2, setting quick"]
    for one in drawn:
        titles = list(one.panels)
        assert titles[:4] == ["image", "clusters", "semantic, plain", "semantic, merge"]
        assert len(titles) == 5
    with pytest.raises(ValueError, match="the row 'plain' has no settings"):
        draw_pictures(workload, ROWS[0], 2)


def test_the_image_that_agrees_least_is_drawn_beside_the_first_ones():
    cfg = load_cfg(SEGMENTER, ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8)
    items = [[{"image": p, "file_name": f"some/{n}.jpg"}] for n, p in enumerate(pixels)]
    workload = Workload("s", load_model(cfg), "no data set", items, None)
    worst = replace(ROWS[2], worst=("some/2.jpg", 12.34))
    title = "Image 2, setting quick: lowest agreement, 12.3 %"
    drawn = draw_pictures(workload, worst, 1)
    assert [p.title for p in drawn] == ["Image 0, setting quick", title]
    among = draw_pictures(workload, replace(worst, worst=("some/0.jpg", 12.34)), 1)
    assert len(among) == 1 and "lowest agreement" in among[0].title
    assert draw_pictures(workload, worst, 0) == []
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        draw_pictures(workload, worst, -1)


def test_panels_can_be_enlarged(tmp_path):
    page = page_of(tmp_path, [COMPARISON], [picture()])
    assert len([b for b in page.all("button") if b["class"] == "enlarge"]) == len(page.all("img"))
    assert "showModal" in page.html and "http" not in re.sub(r'href="[^"]*"', "", page.html)


@pytest.mark.slow
def test_comparing_ends_with_a_report(confident_opts, tmp_path, capsys):
    options = ["--timed", "1", "--batch", "1", "--first", "2", "--output", str(tmp_path / "out")]
    options += ["--config-file", VITDET, "--setting", "half: alpha=1 ratio=0.5"]
    load_tool("compare").run([*options, "--pictures", "1", "--", *confident_opts])
    file = tmp_path / "out" / "vitdet.html"
    assert str(file) in capsys.readouterr().out
    page = Page(file.read_text("utf-8"))
    # The first image, and the one that agrees least if that is another one.
    assert len(page.all("img")) in (5, 10) and "setting half" in page.text
    assert page.text.count(": lowest agreement, ") == 1


def test_tool_reads_results_and_pictures(tmp_path, capsys):
    tool = load_tool("report")
    results, output = tmp_path / "results.json", tmp_path / "out" / "page.html"
    results.write_text(COMPARISON.to_json(), encoding="utf-8")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (40, 30)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    tool.run([str(results), "--pictures", str(folder), "--output", str(output)])
    assert str(output) in capsys.readouterr().out
    page = Page(output.read_text("utf-8"))
    assert [image["alt"] for image in page.all("img")] == ["a", "b"]
    assert "1.52×" in page.text
    with pytest.raises(SystemExit, match="there are no images at 'none.png'"):
        tool.run([str(results), "--pictures", "none.png"])
    with pytest.raises(SystemExit, match="is not the JSON of a comparison"):
        results.write_text("[1, 2]")
        tool.run([str(results)])
    with pytest.raises(FileNotFoundError, match="there are no images at"):
        read_pictures([tmp_path / "out"])
