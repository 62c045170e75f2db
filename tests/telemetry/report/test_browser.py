"""The page in a browser: headless Chromium opens it from its file, and says what it sees."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from pretrain.telemetry.report.folder import read_run
from pretrain.telemetry.report.page import run_page
from tests.telemetry.report.records import evaluation, eventful, started, train, write_run

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
from screenshots import browse

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium (Debian's package of that name)")

# A page around the page, in frames of two widths, whose script may look into them; what it sees becomes its own text.
PROBE = """<body><iframe src="{page}" style="width:375px;height:900px"></iframe>
<iframe src="{page}" style="width:1180px;height:900px"></iframe><pre></pre><script>
onload = () => { const seen = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement, style = node => frame.contentWindow.getComputedStyle(node);
  const charts = [...page.querySelectorAll("figure svg")], inside = node => node.getBoundingClientRect();
  return { title: page.title, width: root.clientWidth, scrolled: root.scrollWidth, paper: style(page.body).backgroundColor,
    ink: style(page.body).color, tick: style(charts[0].querySelector("text")).fill,
    line: style(charts[0].querySelector("path[style*='--c0']")).stroke,
    charts: charts.map(c => [Math.round(inside(c).width), Math.round(inside(c).height), c.getAttribute("aria-label")]),
    fonts: charts.map(c => parseFloat(style(c.querySelector("text")).fontSize) * inside(c).width / c.viewBox.baseVal.width),
    scripts: page.scripts.length } });
  document.querySelector("pre").textContent = JSON.stringify(seen); };
</script>"""


def look(page, *, dark=False):
    """What each of the two frames shows, and what the console says."""
    probe = page.with_name("probe.html")
    probe.write_text(PROBE.replace("{page}", page.name))
    done = browse(probe, "--window-size=1300,1000", "--virtual-time-budget=20000", "--dump-dom", dark=dark)
    text = re.search(r"<pre>(\[.*?\])</pre>", done.stdout, re.DOTALL)
    assert text, f"the page did not come up: {done.stderr[-2000:]}"
    seen = text[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(seen), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("browser"), eventful())
    (folder / "report.html").write_text(run_page(read_run(folder)))
    return folder / "report.html"


@pytest.fixture(scope="module")
def light(page):
    return look(page)


def test_it_opens_from_its_file_without_a_word_in_the_console(light):
    seen, console = light
    assert console == []
    for frame in seen:
        assert frame["title"] == "law-llama"
        assert frame["scripts"] == 0


def test_the_console_would_be_heard(page):
    """Whatever a page tried to load or to run would be refused, and said."""
    other = page.with_name("other.html")
    loads = '<script>document.title = "mine"</script><img src="http://127.0.0.1:9/x.png">'
    other.write_text(page.read_text().replace("</main>", f"{loads}</main>"))
    seen, console = look(other)
    assert seen[0]["title"] == "law-llama"
    assert len([line for line in console if "Content Security Policy" in line]) >= 2


def test_every_chart_is_there_at_both_widths(light):
    for frame in light[0]:
        assert len(frame["charts"]) == 12
        assert all(width > 250 and height > 140 and len(label) > 15 for width, height, label in frame["charts"])
        assert min(frame["fonts"]) >= 9, "px of the smallest letters"


def test_a_chart_by_itself_is_no_larger_than_one_of_two(tmp_path, light):
    """A run that was scored once has no second chart beside its losses; the letters were 2.4 times as large."""
    folder = write_run(tmp_path, [started(), evaluation(0, "law", "new", 3.0, 0.0), *map(train, range(1, 40))])
    (folder / "report.html").write_text(run_page(read_run(folder)))
    desktop, beside = look(folder / "report.html")[0][1], light[0][1]
    assert desktop["charts"][0][2].startswith("Loss: ")
    assert desktop["fonts"][0] <= 1.2 * beside["fonts"][0] < 20


def test_a_phone_does_not_scroll_sideways(light):
    phone, desktop = light[0]
    assert (phone["width"], desktop["width"]) == (375, 1180)
    assert phone["scrolled"] <= 375
    assert desktop["scrolled"] <= 1180
    assert phone["charts"][0][0] < desktop["charts"][0][0]


def test_it_is_light_and_dark(light, page):
    bright, night = light[0][0], look(page, dark=True)[0][0]

    def brightness(colour):
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    assert brightness(bright["paper"]) > 230 > 90 > brightness(bright["ink"])
    assert brightness(night["paper"]) < 40 < 200 < brightness(night["ink"])
    assert abs(brightness(night["tick"]) - brightness(night["paper"])) > 100, "labels of charts read in the dark"
    assert bright["line"] != night["line"]
