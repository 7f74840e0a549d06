"""Reports in a real browser: no errors, charts zoom, tables sort, nothing wider than the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import phasewise as pw
from experiments.reports.page import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra 'dev'")
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

pytestmark = pytest.mark.slow

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with its chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "both"
    pw.compare(
        {
            "model": "llama-3.1-8b",
            "cluster": {"nodes": [{"gpu": "H100-SXM", "count": 2}]},
            "workload": {"rate": 8, "generate": {"requests": 200, "input": {"fixed": 900}, "output": {"fixed": 40}}},
            "system": {"name": "vllm", "tp": 1},
            "compare": {
                "vllm": {"tp": 1},
                "split": {
                    "name": "splitwise", "prefill": {"tp": 1, "replicas": 1}, "decode": {"tp": 1, "replicas": 1}
                },
            },
            "slo": {"ttft_s": 1.0, "tpot_s": 0.1},
        }
    ).save(folder)  # fmt: skip
    return write_report(folder, folder / "report.html")


def opened(browser: Any, page: Path, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    ready = "return window.Bokeh !== undefined && Bokeh.documents.length > 0 && Bokeh.documents.every(d => d.is_idle)"
    WebDriverWait(browser, 30).until(lambda it: it.execute_script(ready))


def chart(browser: Any, name: str, what: str) -> Any:
    return browser.execute_script(f"const m = Bokeh.documents[0].get_model_by_name({name!r}); return {what}")


@pytest.mark.parametrize("width", [1280, 400])
def test_it_opens_without_errors_and_fits(browser: Any, page: Path, width: int) -> None:
    opened(browser, page, width)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.querySelectorAll('.card').length") > 8
    left = chart(browser, "cdf-ttft_s", "Bokeh.index.find_one_by_id(m.id).el.getBoundingClientRect()")
    assert 250 < left["width"] <= width


def test_a_chart_zooms_where_it_is_dragged(browser: Any, page: Path) -> None:
    opened(browser, page, 1280)
    before = chart(browser, "timeline-split", "[m.x_range.start, m.x_range.end]")
    element = chart(browser, "timeline-split", "Bokeh.index.find_one_by_id(m.id).el")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    size = element.size
    drag = webdriver.ActionChains(browser).move_to_element_with_offset(element, 0, -30).click_and_hold()
    drag.move_by_offset(size["width"] // 8, 20).move_by_offset(size["width"] // 8, 10).release().perform()
    after = chart(browser, "timeline-split", "[m.x_range.start, m.x_range.end]")
    assert after[1] - after[0] < 0.5 * (before[1] - before[0])
    assert before[0] <= after[0] < after[1] <= before[1]


def test_a_table_sorts_by_a_click(browser: Any, page: Path) -> None:
    opened(browser, page, 1280)
    first = """
        const view = Bokeh.index.find_one_by_id(m.id);
        const root = view.shadow_el;
        const headers = [...root.querySelectorAll('.slick-header-column')];
        headers.find(h => h.textContent.trim() === 'busy (%)').click();
        return Promise.resolve()"""
    browser.execute_script(f"const m = Bokeh.documents[0].get_model_by_name('replicas'); {first}")
    cells = chart(
        browser, "replicas",
        "[...Bokeh.index.find_one_by_id(m.id).shadow_el.querySelectorAll('.slick-row')]"
        ".sort((a, b) => parseFloat(a.style.top || a.style.transform.match(/[\\d.]+px/)) "
        "- parseFloat(b.style.top || b.style.transform.match(/[\\d.]+px/)))"
        ".map(r => parseFloat(r.querySelectorAll('.slick-cell')[5].textContent))",
    )  # fmt: skip
    assert len(cells) == 4
    assert cells == sorted(cells)
