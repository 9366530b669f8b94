"""The pages of runs and sweeps, as text and in a browser."""

import html as entities
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report import made_up

import layerwise as lw
from layerwise.core.errors import UserError
from layerwise.core.telling.outcome import LayerRow, Report, Sweep
from layerwise.report import html, pareto_svg
from layerwise.report._colours import DARK, LIGHT, SERIES, STEPS, contrast
from layerwise.report._svg import axis
from layerwise.report._words import number, percent, round_number, round_size, seconds, size

HOSTILE = "a<script>alert('1')</script>\"&b"
SECTIONS = ("layers", "map", "curves", "forecast", "decisions", "left", "made")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Seen(HTMLParser):
    """What a page holds: tags with their attributes, ids, and its text outside scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def ids(self) -> list[str]:
        return [held["id"] or "" for _, held in self.tags if "id" in held]


def pictures(page: str) -> list[ElementTree.Element]:
    """Every drawing of a page, which must be well-formed."""
    return [ElementTree.fromstring(part) for part in re.findall(r"<svg.*?</svg>", page, re.S)]


PLACES = ("x", "y", "d", "points", "width", "height", "cx", "cy", "r", "transform", "viewBox")


def assert_drawn(page: str) -> None:
    """No figure without a value is drawn or written."""
    for picture in pictures(page):
        for element in picture.iter():
            told = " ".join(element.attrib.get(name, "") for name in PLACES)
            assert not re.search("nan|inf", told), told
    assert not re.search(r"\b(nan|inf)\b", Seen(page).text)


@pytest.fixture(scope="module")
def big() -> str:
    """The page of 301 layers."""
    return html(made_up.report(43))


@pytest.fixture(scope="module")
def real(llama, tmp_path_factory) -> Path:
    """The output of a real run, on a budget and compared with its original."""
    out = tmp_path_factory.mktemp("real") / "out"
    wish = {"budget": "4bits", "group": 16, "allow": {"bits": (2, 3, 4, 8)}, "format": "layerwise"}
    lw.compress(llama, out, **wish, length=32, samples=4, text_samples=4)
    return out


# What a run says


def test_a_run_writes_its_page(real, llama):
    page = (real / "report.html").read_text()
    told = json.loads((real / "report.json").read_text())
    seen = Seen(page)
    assert page == html(Report.from_json(told))
    for row in told["layers"]:
        assert row["layer"] in seen.text
        assert row["why"] in seen.text
    assert str(llama) in seen.text
    assert "Proven" in seen.text
    assert number(told["comparison"]["kl"]) in seen.text
    assert number(told["comparison"]["perplexity"], 4) in seen.text
    assert size(told["bytes_after"]) in seen.text
    assert set(SECTIONS) - {"curves"} <= set(seen.ids())


def test_a_run_says_where_and_how_it_was_made(real, llama):
    told = json.loads((real / "report.json").read_text())
    there = told["environment"]
    assert there.keys() >= {"layerwise", "python", "torch", "transformers", "platform", "cpu"}
    assert there.keys() >= {"device", "threads", "date"}
    assert there["layerwise"] == lw.__version__
    assert there["device"] == "cpu"
    asked = told["recipe"]["compress"]
    assert asked == {
        **{"model": str(llama), "out": str(real), "budget": "4bits", "group": 16},
        **{"format": "layerwise", "samples": 4, "length": 32, "text_samples": 4},
        "allow": {"bits": [2, 3, 4, 8]},
    }
    assert {row["role"] for row in told["layers"]} > {"gate", "up", "down"}
    assert {row["block"] for row in told["layers"]} == {"model.layers.0", "model.layers.1"}
    seen = Seen((real / "report.html").read_text())
    assert all(value in seen.text for value in there.values())
    assert "budget: 4bits" in seen.text


def test_the_page_of_another_run_does_not_go_with_a_model(make_llama, tmp_path):
    folder = make_llama(tmp_path / "model")
    (folder / "report.html").write_text("of another run")
    assert "report.html" not in {file.name for file in lw.open(folder).source.companions}
    lw.compress(folder, tmp_path / "out", bits=8, group=16, proof="none")
    assert "of another run" not in (tmp_path / "out" / "report.html").read_text()


def test_all_that_a_report_has_is_on_its_page():
    report = made_up.report(2)
    seen = Seen(html(report))
    assert [one for one in seen.ids() if one in SECTIONS] == list(SECTIONS)
    for words in ("rank correlation 0.914", "self-noise floor 2.10e-4", "fisher", "75% kept"):
        assert words in seen.text
    assert "one expert saw no token" in seen.text
    links = [held["href"] for tag, held in seen.tags if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]
    for row in report.layers:
        (chosen,) = (c for c in row.curve if c.chosen)
        assert f"{row.layer}: {chosen.label}, {size(chosen.bytes)}, predicted" in seen.text
        assert (
            f"{row.layer}: stored bits {row.stored_bits:.2f}".rstrip("0").rstrip(".") in seen.text
        )


def test_what_there_is_nothing_of_is_left_out():
    report = made_up.report(1)
    rows = [
        replace(
            r,
            curve=(),
            predicted_kl=None,
            measured_kl=None,
            score=None,
            density=1.0,
            rank=0,
            why="",
        )
        for r in report.layers[:1]
    ]
    bare = replace(
        report,
        layers=rows,
        left={},
        comparison=None,
        proof=None,
        prediction=None,
        noise_floor=None,
        notes=(),
        environment={},
        recipe={},
        forecast={},
    )
    page = html(bare)
    seen = Seen(page)
    assert [one for one in seen.ids() if one in SECTIONS] == ["layers", "decisions"]
    for words in ("KL", "Proof", "Perplexity", "score", "density", "nan", "None"):
        assert words not in seen.text
    assert not re.search(r"<(figure|ul|dl|div|tbody|section)[^>]*>\s*</\1>", page)


@pytest.mark.parametrize("blocks", [1, 43])
def test_a_page_stands_alone(blocks, big):
    page = html(made_up.report(blocks)) if blocks < 43 else big
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    seen = Seen(page)
    assert not {tag for tag, _ in seen.tags} & {"link", "img", "iframe", "object", "embed"}
    assert [held for tag, held in seen.tags if tag == "script"] == [{}]
    assert not [held for _, held in seen.tags if "src" in held]
    ids = seen.ids()
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("kind", ["big", "one", "sweep"])
def test_pictures_are_well_formed_and_told_in_words(kind, big):
    made = {"one": made_up.report(1), "sweep": made_up.sweep()}
    drawn = pictures(html(made[kind]) if kind in made else big)
    assert drawn
    for picture in drawn:
        if picture.get("aria-hidden") == "true":
            continue
        assert picture.get("role") == "img"
        assert picture[0].tag == "title"
        assert picture[0].text
        assert picture[1].text in (picture.get("aria-label") or "")


def test_a_bar_for_every_layer_and_a_fold_for_many(big):
    few = html(made_up.report(2))
    assert few.count('<span class="name">') == 14
    assert "<details>" not in few
    assert big.count('<span class="name">') == 301
    assert "<details>" in big
    assert len(big) < 2_000_000


def test_experts_are_shown_by_role():
    report = made_up.report(1)
    gate = next(row for row in report.layers if row.role == "gate")
    experts = [replace(gate, layer=f"model.layers.0.mlp.experts.{n}.gate_proj") for n in range(128)]
    page = html(replace(report, layers=[*report.layers, *experts]))
    assert page.count('<span class="name">') == 7
    assert "gate × 129" in page  # noqa: RUF001
    assert "43 of 129 layers, evenly spaced" in page


def test_nothing_in_a_report_becomes_markup():
    report = made_up.report(1, model=HOSTILE)
    row = replace(
        report.layers[0], layer=HOSTILE, why=HOSTILE, method=HOSTILE, role=HOSTILE, block=HOSTILE
    )
    row = replace(row, notes=(HOSTILE,), curve=[replace(c, label=HOSTILE) for c in row.curve])
    assert report.comparison is not None
    assert report.proof is not None
    hostile = replace(
        report,
        out=HOSTILE,
        format=HOSTILE,
        layers=[row, *report.layers[1:]],
        left={HOSTILE: HOSTILE},
        comparison=replace(report.comparison, text=HOSTILE),
        proof=replace(report.proof, loader=HOSTILE),
        notes=[HOSTILE],
        environment={HOSTILE: HOSTILE},
        recipe={"compress": {"model": HOSTILE, HOSTILE: [HOSTILE]}},
    )
    for page in (html(hostile), html(replace(made_up.sweep(HOSTILE), notes=[HOSTILE]))):
        assert "<script>alert" not in page
        seen = Seen(page)
        assert [held for tag, held in seen.tags if tag == "script"] == [{}]
        assert HOSTILE in seen.text
        assert pictures(page)
    point = replace(made_up.sweep().points[-1], method=HOSTILE, budget=HOSTILE, out=HOSTILE)
    drawn = pareto_svg(replace(made_up.sweep(HOSTILE), points=[point]))
    assert "<script" not in drawn
    assert ElementTree.fromstring(drawn)[0].text == f"Size against quality: {HOSTILE}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1e-9, 1e-300, 1e300])
def test_no_figure_breaks_a_page(value):
    """A page is drawn at the end of hours of work: it must not fail there."""
    report, sweep = made_up.report(2), made_up.sweep()
    row, point = report.layers[0], sweep.points[0]
    curve = [replace(one, error=value) for one in row.curve]
    strange = replace(row, error=value, score=value, predicted_kl=value, measured_kl=value)
    strange = replace(strange, stored_bits=value, density=value, curve=curve)
    assert report.prediction is not None
    for layers in ([strange, *report.layers[1:]], [strange]):
        page = html(
            replace(
                report,
                layers=layers,
                comparison=made_up.comparison(value, value, value),
                noise_floor=made_up.comparison(value, value, value),
                prediction=replace(report.prediction, predicted=value, measured=value),
                forecast={"size_bytes": 0, "peak_bytes": 0, "seconds": value},
                work_seconds=value,
                bytes_before=0,
            )
        )
        assert_drawn(page)
    strange_point = replace(point, kl=value, perplexity=value, top1=value, bits=value)
    for points in ([strange_point, *sweep.points[1:]], [strange_point]):
        floor = made_up.comparison(value, value, value)
        odd = replace(sweep, points=points, noise_floor=floor, original=floor, seconds=value)
        assert_drawn(html(odd))
        assert_drawn(pareto_svg(odd))


# Reading back


def test_a_report_and_a_sweep_are_read_back():
    for outcome in (made_up.report(2), made_up.sweep()):
        kept = json.loads(json.dumps(outcome.as_json()))
        again = type(outcome).from_json(kept)
        assert json.dumps(again.as_json()) == json.dumps(outcome.as_json())
        assert html(again) == html(outcome)


def test_an_older_report_is_read_back():
    kept = json.loads(json.dumps(made_up.report(1).as_json()))
    for name in ("prediction", "noise_floor", "environment", "recipe"):
        del kept[name]
    for row in kept["layers"]:
        for name in ("block", "role", "curve", "predicted_kl", "measured_kl"):
            del row[name]
    kept["of a later version"] = [1, 2, 3]
    old = Report.from_json(kept)
    assert old.prediction is None
    assert old.environment == {}
    assert isinstance(old.layers[0], LayerRow)
    assert old.layers[0].curve == ()
    assert "mlp.gate_proj" in html(old)


def test_a_whole_number_stands_for_a_fraction():
    kept = made_up.report(1).as_json() | {"seconds": 3}
    assert isinstance(Report.from_json(kept).seconds, float)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"layers": None}, "the report: layers is None"),
        ({"layers": [{}]}, "the report: layers[0] lacks 'layer'"),
        ({"comparison": {"tokens": "many"}}, "the report: comparison: tokens is 'many'"),
        ({"bytes_after": "few"}, "the report: bytes_after is 'few', not a whole number"),
        ({"forecast": {"seconds": "soon"}}, "the report: forecast is"),
        ({"notes": "one"}, "the report: notes is 'one'"),
    ],
)
def test_a_damaged_report_is_refused(broken, says):
    with pytest.raises(UserError) as refused:
        Report.from_json(made_up.report(1).as_json() | broken)
    assert refused.value.problem.startswith(says)


# Sweeps


def test_a_sweep_has_its_front_and_every_point():
    sweep = made_up.sweep()
    page = html(sweep)
    seen = Seen(page)
    assert [one for one in seen.ids() if one in (*SECTIONS, "sweep")] == ["sweep", "made"]
    for point in sweep.points:
        assert point.out in seen.text
        assert f"{point.method} at {point.budget}: {size(point.bytes)}" in seen.text
    assert "joint 3bits" in seen.text
    assert "self-noise floor 2.10e-4, below this picture" in seen.text
    near = made_up.comparison(0.011)
    assert "self-noise floor 0.0110<" in html(replace(sweep, noise_floor=near))


def test_the_front_of_a_sweep_is_a_file_of_its_own():
    drawn = pareto_svg(made_up.sweep())
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(root.get("width") or 0) > 0
    style = root.find("{*}style")
    assert style is not None
    assert "prefers-color-scheme:dark" in (style.text or "")
    used = set(re.findall(r'class="([^"]*)"', drawn.partition("</style>")[2]))
    for name in {word for names in used for word in names.split()} - {"small"}:
        assert f".{name}{{" in (style.text or "")
    assert not re.search("https?:", drawn.replace("http://www.w3.org/2000/svg", ""))


def test_uniform_methods_are_grey_and_others_are_not():
    drawn = pareto_svg(made_up.sweep())
    at = re.findall(r'class="fill-(\S+) [^>]*><title>(.*?) at ', drawn)
    looks = {method: colour for colour, method in at}
    assert looks.pop("uniform rtn") == looks.pop("uniform gptq") == "kept"
    assert sorted(looks.values()) == ["series-0", "series-1", "series-2"]


def test_a_sweep_without_kl_shows_perplexity_or_says_that_it_has_neither():
    sweep = made_up.sweep()
    without = replace(sweep, points=[replace(p, kl=None) for p in sweep.points])
    assert "perplexity against the size" in pareto_svg(without)
    bare = replace(sweep, points=[replace(p, kl=None, perplexity=None) for p in sweep.points])
    assert "No point was compared" in pareto_svg(bare)
    page = html(bare)
    assert "No point was compared" not in page
    assert "uniform-rtn-2bits" in page
    assert html(Sweep(model="m", text="", points=()))


# Words, axes, colours


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (number(None), "-"),
        (number(0.0), "0"),
        (number(0.03118), "0.0312"),
        (number(82.0), "82.0"),
        (number(123.4), "123"),
        (number(12345.6), "12,346"),
        (number(0.000021), "2.10e-5"),
        (number(math.inf), "infinite"),
        (percent(0.931), "93.1%"),
        (size(999), "999 B"),
        (size(3_764_000), "3.76 MB"),
        (size(999_700), "1.00 MB"),
        (size(16_060_000_000), "16.1 GB"),
        (round_size(5_000_000), "5 MB"),
        (round_number(1e-5), "1e-5"),
        (round_number(0.25), "0.25"),
        (seconds(12.34), "12.3 s"),
        (seconds(250), "4 min 10 s"),
        (seconds(12_000), "3 h 20 min"),
    ],
)
def test_figures_as_people_read_them(made, words):
    assert made == words


def test_an_axis_holds_its_values_and_labels_round_ones():
    straight = axis([3.0, 9.0], 0, 100)
    assert not straight.log
    assert straight.ticks() == [4, 6, 8]
    assert straight.at(6.0) == pytest.approx(50)
    assert 0 < straight.at(3.0) < 50 < straight.at(9.0) < 100
    wide = axis([1e-5, 0.0, 2.0], 100, 0)
    assert wide.log
    assert wide.ticks()[0] == 0.0
    assert {1e-4, 0.01, 1.0} <= set(wide.ticks())
    assert wide.at(0.0) == 100 > wide.at(1e-5) > wide.at(2.0) > 0
    same = axis([5.0, 5.0], 0, 100)
    assert same.at(5.0) == pytest.approx(50)
    assert axis([0.0], 0, 100).ticks()


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_have_contrast(colours):
    for ground in ("page", "card", "sunk"):
        for ink in ("ink", "muted", "accent", "good"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for place in range(SERIES):
        assert contrast(colours[f"series-{place}"], colours["card"]) >= 3
    for ramp in ("cool", "warm", "leaf"):
        for step in range(STEPS):
            ground = colours[f"{ramp}-{step}"]
            assert contrast(colours[f"on-{ramp}-{step}"], ground) >= 4.5


# In a browser

MEASURE = """
const found = {};
const frames = [...document.querySelectorAll("iframe")];
const name = (node) => node.tagName + "." + (node.getAttribute("class") || node.id);
window.addEventListener("load", () => {
  for (const frame of frames) {
    const page = frame.contentDocument, view = frame.contentWindow, width = frame.clientWidth;
    const shown = [...page.body.querySelectorAll("*")].filter((n) => n.getClientRects().length);
    const held = (node) => node.closest(".scroll, pre, caption, svg, .maps > input");
    const outside = (node) => node.getBoundingClientRect().right > width + 1;
    const clipped = (text) => {
      const box = text.getBoundingClientRect();
      const frame = text.ownerSVGElement.getBoundingClientRect();
      const out = box.left < frame.left - 2 || box.right > frame.right + 2;
      return out || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
    };
    const maps = () => [...page.querySelectorAll(".map")].map((m) => m.getClientRects().length > 0);
    const told = {
      width,
      scroll: page.documentElement.scrollWidth,
      over: shown.filter((n) => !held(n) && outside(n)).map(name),
      texts: shown.filter((n) => n.tagName === "text").length,
      clipped: shown.filter((n) => n.tagName === "text" && clipped(n)).map((n) => n.textContent),
      ground: view.getComputedStyle(page.body).backgroundColor,
      wide: shown.some((n) => n.matches(".wide")),
      maps: maps(),
    };
    const second = page.querySelector("label[for=map-2]");
    if (second) { second.click(); told.turned = maps(); }
    const rows = () => [...page.querySelectorAll("table.sorts tbody tr")].filter((r) => !r.hidden);
    const after = [...page.querySelectorAll("table.sorts th button")]
      .find((b) => ["after", "weight files"].includes(b.textContent));
    const place = after.parentElement.cellIndex;
    const values = () => rows().map((r) => Number(r.cells[place].dataset.value));
    after.click(); told.up = values();
    after.click(); told.down = values();
    const field = page.querySelector("input[type=search]");
    if (field) {
      field.value = frame.id.startsWith("big") ? "layers.7. MLP" : "gptq 3bits";
      field.dispatchEvent(new view.Event("input"));
      told.filtered = rows().map((r) => r.textContent);
    }
    found[frame.id] = told;
  }
  document.body.innerHTML = "";
  document.body.append(JSON.stringify(found));
});
"""


def browse(folder: Path, url: str, *flags: str) -> tuple[str, str]:
    """What headless Chromium made of a page: its document, and what it logged."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", f"--user-data-dir={folder / 'profile'}"),
            *("--enable-logging=stderr", "--hide-scrollbars", *flags, url),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(scheme, real, big, tmp_path):
    """Nothing overflows, nothing is clipped, nothing is logged; a phone is a frame of 375."""
    pages = {
        "real": (real / "report.html").read_text(),
        "big": big,
        "sweep": html(made_up.sweep()),
    }
    frames = "".join(
        f'<iframe id="{name}-{width}" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{entities.escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in (1280, 375)
    )
    file = tmp_path / "frames.html"
    head = '<!DOCTYPE html><meta charset="utf-8"><body style="width:1300px">'
    file.write_text(f"{head}{frames}<script>{MEASURE}</script>")
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    document, logged = browse(tmp_path, file.as_uri(), "--dump-dom", *dark)
    assert "CONSOLE" not in logged, logged
    found = json.loads(re.search(r"\{.*\}", entities.unescape(document), re.S)[0])
    assert found.keys() == {f"{name}-{width}" for name in pages for width in (1280, 375)}
    colour = (LIGHT if scheme == "light" else DARK)["page"]
    ground = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    for name, told in found.items():
        assert told["scroll"] <= told["width"], name
        assert told["over"] == [], name
        assert told["texts"] > 10
        assert told["clipped"] == [], name
        assert told["ground"] == f"rgb{ground}"
        assert told["up"] == sorted(told["up"])
        assert told["down"] == sorted(told["up"], reverse=True)
        if name.startswith("sweep"):
            assert told["wide"] == name.endswith("1280")
            assert told["maps"] == []
        else:
            assert told["maps"].index(True) == 0
            assert told["turned"].index(True) == 1
            assert sum(told["maps"]) == sum(told["turned"]) == 1
        if not name.startswith("real"):
            assert len(told["filtered"]) == (3 if name.startswith("big") else 2)


def test_the_browser_would_tell_of_an_error(tmp_path):
    """The check above bites: what a page logs, or is kept from fetching, is seen."""
    file = tmp_path / "page.html"
    file.write_text(
        html(made_up.report(1)).replace("</main>", '<img src="https://x.test/"></main>')
    )
    _, logged = browse(tmp_path, file.as_uri(), "--dump-dom")
    assert "CONSOLE" in logged


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (500, "dark")])
def test_a_picture_of_the_page(width, scheme, real, tmp_path):
    picture = tmp_path / "page.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    flags = (f"--window-size={width},1600", f"--screenshot={picture}", *dark)
    browse(tmp_path, (real / "report.html").as_uri(), *flags)
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == width
    assert len(data) > 40_000  # an empty page of this size takes a tenth of it
