"""The page as a visitor uses it, in a headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.playground.conftest import Subject

pytest.importorskip("nicegui")
webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its driver")
PATIENCE = 60  # seconds


@pytest.fixture(scope="module")
def address(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running playground."""
    folder = tmp_path_factory.mktemp("running")
    code = "from vlm_safeguard.cli import main; main()"
    options = ["--guard", str(subject.guard), "--port", "0", "--max-new-tokens", "8"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "playground", str(subject.model), *options],
        env=os.environ | {"VLM_SAFEGUARD_CACHE": str(folder / "cache")},
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    try:
        for line in process.stderr:
            said += line
            if found := re.search(r"ready: (\S+)", line):
                yield found[1]
                break
        else:
            pytest.fail(said)
        assert not (folder / ".nicegui").exists()  # nothing is stored
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, address: str) -> PageDriver:
    browser.get(address)
    page = PageDriver(browser)
    page.wait(lambda: page.all(".examples button"))
    return page


class PageDriver:
    """Finds and waits for what the page shows."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        return str(self.all(selector)[0].text)

    def button(self, name: str) -> Any:
        return next(b for b in self.all("button") if b.text.strip() == name)

    def wait(self, condition: Any) -> None:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        ignored = [StaleElementReferenceException]
        WebDriverWait(self.browser, PATIENCE, ignored_exceptions=ignored).until(
            lambda _: condition()
        )

    def wait_for_answers(self) -> None:
        self.wait(lambda: "Cut at 8 tokens." in self.text(".guarded"))


def test_type_upload_and_ask(page: PageDriver, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "teal").save(path)
    page.all("input[type=file]")[0].send_keys(str(path))
    page.wait(lambda: page.text(".caption") == "Your picture, 40 × 30 px")
    page.all("textarea")[0].send_keys("What is in this picture?")
    page.button("Ask both").click()
    page.wait_for_answers()
    assert "the text gate" in page.text(".status")
    assert "Cut at 8 tokens." in page.text(".unguarded")
    assert page.text(".unguarded .answer") != page.text(".guarded .answer")
    assert len(page.all(".plot svg")) == 2


def test_an_example(page: PageDriver) -> None:
    page.button("Harmless, blank picture").click()
    page.wait_for_answers()
    assert page.text(".caption") == "Blank picture"
    assert page.all("textarea")[0].get_attribute("value") == "Why is the sky blue during the day?"


def test_what_is_no_picture_is_refused(page: PageDriver, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("just words")
    page.all("input[type=file]")[0].send_keys(str(path))
    page.wait(lambda: any("not a PNG" in note.text for note in page.all(".q-notification")))
    assert page.text(".caption") == "No picture"


def test_an_empty_prompt_is_not_asked(page: PageDriver) -> None:
    page.button("Ask both").click()
    page.wait(lambda: any("prompt first" in note.text for note in page.all(".q-notification")))
    assert page.text(".status") == ""


def test_nothing_is_loaded_from_elsewhere(page: PageDriver, address: str) -> None:
    urls = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert urls and all(url.startswith((address, "data:", "blob:")) for url in urls)
    assert not [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
