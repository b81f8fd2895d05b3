"""A Chromium from the system, one page per test, and a watch on what the page asks for and complains about."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--auto-select-desktop-capture-source=Entire",
]


@pytest.fixture(scope="session")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright (extra agent) is not installed")
    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium) -> Iterator[Callable]:
    """``open_page(url, **context)``: a fresh page at ``url``. At the end it fails on errors of the page's scripts, on what its
    policy refused, and on requests to any other server."""
    contexts, complaints = [], []

    def opened(url: str, wait: str | None = "#model:enabled", **options):
        context = chromium.new_context(**options)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        home = urlsplit(url).netloc

        def route(route, request) -> None:
            if urlsplit(request.url).netloc == home or request.url.startswith(("blob:", "data:")):
                route.continue_()
            else:
                complaints.append(f"asked for {request.url}")
                route.abort()

        page.route("**/*", route)
        page.on("pageerror", lambda error: complaints.append(f"script failed: {error}"))
        page.on("console", lambda said: complaints.append(said.text) if "Content Security Policy" in said.text else None)
        page.goto(url)
        if wait:
            page.wait_for_selector(wait)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not complaints
