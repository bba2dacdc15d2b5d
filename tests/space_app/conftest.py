"""One server and one browser for all tests of the page. The server runs in this process: tests can look into it."""

import os
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"

from space_app.app import start
from space_app.limits import Limits
from space_app.models import Models
from tests.models_for_tests import folder_of

NANO = Path(__file__).parents[2] / "hub_card" / "querit-reranker-nano"


@pytest.fixture(scope="session")
def sources():
    return {"Nano": str(NANO), "Tiny": str(folder_of("bert"))}


@pytest.fixture(scope="session")
def models(sources):
    return Models(sources)


@pytest.fixture(scope="session")
def limits():
    return Limits()


@pytest.fixture(scope="session")
def site(sources):
    served, address = start(sources, wait=False)
    yield address
    served.close(verbose=False)


@pytest.fixture(scope="session")
def browser(site):
    with sync_playwright() as playwright:
        # The system's browser: playwright's own would have to be fetched.
        yield playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])


@pytest.fixture
def open_page(site, browser):
    """Opens the page as a visitor would; the test fails if it threw an error or asked another host for anything."""
    wrong, contexts = [], []

    def visit(width=1280, height=900, dark=False, fragment=""):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith((site, "data:", "blob:")) else wrong.append(request.url),
        )
        page.goto(site + fragment)
        page.locator("#rank").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong
