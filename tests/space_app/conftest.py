"""One server and one browser for all tests of the page. The server runs in this process: tests can look into it."""

import os
import threading

import pytest
from playwright.sync_api import expect, sync_playwright

os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"

import querit
from space_app.app import address_of, listen, server_of
from space_app.limits import Limits
from space_app.models import Models
from tests.models_for_tests import folder_of

expect.set_options(timeout=30_000)  # a busy machine is slow, and that is no fault


@pytest.fixture(scope="session")
def sources():
    return {"Nano": str(querit.RELEASED), "Causal": str(folder_of("qwen3")), "Tiny": str(folder_of("bert"))}


@pytest.fixture(scope="session")
def models(sources):
    return Models(sources, at_home=True)


@pytest.fixture(scope="session")
def limits():
    return Limits()


@pytest.fixture(scope="session")
def site(sources, limits):
    # Port 0: any free one.
    with listen("127.0.0.1", 0) as opened:
        server = server_of(Models(sources, at_home=True), limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        yield address_of(opened)
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="session")
def browser():
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
        page.set_default_timeout(30_000)
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
