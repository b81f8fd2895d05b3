"""The playground against a real server with the model inside the package."""

from __future__ import annotations

import pytest
from serving import start

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with start(tmp_path_factory.mktemp("page")) as running:
        yield running


def test_a_stranger_asks_with_one_click(real, open_page):
    page = open_page(real.url + "/")
    page.get_by_role("button", name="Read a sign").click()
    page.wait_for_selector(".reply:not(.busy) .stats", timeout=90_000)
    assert page.locator("div.problem").count() == 0
    assert page.locator(".reply .text").inner_text().strip()
    assert page.locator(".empty").count() == 0
    stats = page.locator(".stats").inner_text()
    assert "tokens in" in stats and "of pictures" in stats and "out" in stats


def test_an_error_of_the_real_server_is_shown(real, open_page):
    page = open_page(real.url + "/")
    page.evaluate("document.getElementById('s-temperature').value = '-3'")
    page.get_by_role("button", name="Read a sign").click()
    page.wait_for_selector("div.problem")
    assert "temperature" in page.locator("div.problem").inner_text()


def test_live_video_from_the_camera(real, open_page):
    page = open_page(real.url + "/", permissions=["camera"])
    page.select_option("#model", "echo")
    page.click("#go-live")
    page.get_by_role("button", name="Camera", exact=True).click()
    page.get_by_text("frames of").wait_for(timeout=60_000)
    page.fill("#question", "What is there? say:A green pattern that moves.")
    page.press("#question", "Enter")
    page.wait_for_selector(".reply:not(.busy) .stats", timeout=120_000)
    assert page.locator("div.problem").count() == 0
    assert page.locator(".reply .text").inner_text() == "A green pattern that moves."
    assert "of video" in page.locator(".stats").inner_text() and "frames" in page.locator(".stats").inner_text()
    page.get_by_role("button", name="End live").click()
    assert page.locator("#live").is_hidden()
