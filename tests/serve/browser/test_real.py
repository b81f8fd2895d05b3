"""The playground against a real server with the model inside the package."""

from __future__ import annotations

import pytest
from clips import encode, synth
from serve.browser.scripted import until
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


@pytest.mark.parametrize("source", ["Camera", "Screen"])
def test_live_video_while_frames_keep_coming(real, open_page, source):
    page = open_page(real.url + "/", permissions=["camera"])
    page.select_option("#model", "echo")
    page.click("#go-live")
    page.get_by_role("button", name=source, exact=True).click()
    page.get_by_text("frames of").wait_for(timeout=60_000)
    track = "document.querySelector('#live video').srcObject.getVideoTracks()[0]"
    assert page.evaluate(f"{track}.getSettings().displaySurface ?? null") == (None if source == "Camera" else "monitor")
    page.fill("#question", "What is there? say:A green pattern that moves.")
    page.press("#question", "Enter")
    page.wait_for_selector(".reply:not(.busy) .stats", timeout=120_000)
    assert page.locator("div.problem").count() == 0
    assert page.locator(".reply .text").inner_text() == "A green pattern that moves."
    stats = page.locator(".stats").inner_text()
    assert "of video" in stats and "frames" in stats
    held = _held(page)
    until(page, f"parseInt(document.querySelector('#live .state').innerText.split('·')[1]) > {held}")
    if source == "Screen":  # the browser's own bar ends the sharing
        page.evaluate(f"{track}.dispatchEvent(new Event('ended'))")
    else:
        page.get_by_role("button", name="End live").click()
    assert page.locator("#live").is_hidden()


def _held(page) -> int:
    """Frames in the server's window, as the page says."""
    return int(page.locator("#live .state").inner_text().split("·")[1].split()[0])


def test_a_video_is_answered(real, open_page, tmp_path):
    clip = tmp_path / "clip.webm"
    clip.write_bytes(encode([synth(64, 96, number) for number in range(8)], form="webm", codec="libvpx"))
    page = open_page(real.url + "/")
    page.select_option("#model", "echo")
    page.set_input_files("#files", clip)
    page.wait_for_selector("#thumbs video")
    page.fill("#question", "What happens? say:Stripes move.")
    page.press("#question", "Enter")
    page.wait_for_selector(".reply:not(.busy) .stats", timeout=90_000)
    assert page.locator(".reply .text").inner_text() == "Stripes move."
    assert "of video" in page.locator(".stats").inner_text()
    assert page.locator(".user video").evaluate("(video) => video.videoWidth") == 96  # it is shown, not named
