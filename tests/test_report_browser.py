"""The report in a real browser: it is drawn, asks for nothing, and fits a phone."""

import base64
import io

import browser
import fake_runs
import numpy as np
import pytest
from PIL import Image

from experiments.report import write_report

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(browser.executable() is None, reason="there is no Chromium here"),
]
BOX = "document.documentElement"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  path = tmp_path_factory.mktemp("runs") / "a run"
  seeds = [fake_runs.entry(seed) for seed in range(3)]
  lines = [line for seed in range(3) for line in fake_runs.epochs_of(seed)]
  fake_runs.write_run(path, seeds, lines)
  return write_report([path])


@pytest.fixture(scope="module")
def tab(page):
  with browser.tab() as opened:
    opened.call("Page.navigate", url=page.as_uri())
    opened.wait("Page.loadEventFired")
    yield opened


def screenshot(tab, **options):
  data = tab.call("Page.captureScreenshot", format="png", **options)["data"]
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))


def resize(tab, width, height=900):
  tab.call(
    "Emulation.setDeviceMetricsOverride",
    width=width,
    height=height,
    deviceScaleFactor=1,
    mobile=False,
  )


def test_it_asks_for_nothing_but_itself_and_reports_no_error(tab, page):
  requests = [told["request"]["url"] for told in tab.told("Network.requestWillBeSent")]
  assert requests[0] == page.as_uri()
  assert all(url.startswith("data:") for url in requests[1:]), requests
  assert not tab.told("Runtime.exceptionThrown")
  assert not tab.told("Runtime.consoleAPICalled")
  assert not tab.told("Log.entryAdded")


def test_a_request_and_an_error_would_be_seen(tmp_path):
  bad = tmp_path / "bad.html"
  bad.write_text('<img src="https://127.0.0.1:9/x.png"><script>throw Error("no")</script>')
  with browser.tab() as opened:
    opened.call("Page.navigate", url=bad.as_uri())
    opened.wait("Page.loadEventFired")
    assert len(opened.told("Network.requestWillBeSent")) == 2
    assert opened.told("Runtime.exceptionThrown")


@pytest.mark.parametrize("width", [390, 1200])
def test_it_is_drawn_and_does_not_scroll_sideways(tab, width):
  resize(tab, width)
  assert tab.evaluate(f"{BOX}.scrollWidth") <= width
  boxes = tab.evaluate(
    "[...document.querySelectorAll('figure svg')].map(s => {"
    "const b = s.getBoundingClientRect(); return [b.left, b.right, b.height]})"
  )
  assert len(boxes) == 12
  for left, right, height in boxes:
    assert 0 <= left < right <= width
    assert height > 150
  tab.call(
    "Runtime.evaluate", expression="document.querySelector('figure').scrollIntoView()"
  )
  image = screenshot(tab)
  assert image.shape[1] == width
  assert image.std() > 10
  assert np.median(image) > 200


def test_dark_is_dark_and_its_ink_light(tab):
  resize(tab, 1200)
  dark = [{"name": "prefers-color-scheme", "value": "dark"}]
  tab.call("Emulation.setEmulatedMedia", features=dark)
  tab.call(
    "Runtime.evaluate", expression="document.querySelector('figure').scrollIntoView()"
  )
  image = screenshot(tab)
  assert np.median(image) < 60
  assert (image > 180).mean() > 0.005
  ink = tab.evaluate("getComputedStyle(document.querySelector('figure svg')).color")
  assert ink == "rgb(232, 232, 230)"
  tab.call("Emulation.setEmulatedMedia", media="print", features=dark)
  assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(26, 26, 26)"
  tab.call("Emulation.setEmulatedMedia", media="", features=[])


def test_it_prints(tab):
  data = base64.b64decode(tab.call("Page.printToPDF")["data"])
  assert data.startswith(b"%PDF")
  assert len(data) > 20_000
