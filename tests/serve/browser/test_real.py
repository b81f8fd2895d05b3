"""The playground against a real server with the model inside the package."""

from __future__ import annotations

import json
import time

import httpx
import pytest
from clips import encode, synth
from serve.browser.scripted import until
from serve.test_live import fits
from serving import KEY, data_uri, image, png, start, user

pytestmark = pytest.mark.browser
DONE = ".reply:not(.busy) .stats"
MARK = "<|object_ref_start|>the sign<|object_ref_end|><|box_start|>(100,250),(500,750)<|box_end|>"


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


def ask(page, text: str, number: int = 1) -> None:
    """Ask, and wait for answer ``number`` of the page."""
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector(f"{DONE} >> nth={number - 1}", state="attached", timeout=90_000)


def echo(page) -> None:
    page.wait_for_selector("#model:enabled")
    page.select_option("#model", "echo")


def test_pieces_are_shown_as_they_come_and_stop_frees_the_sequence(real, open_page):
    page = open_page(real.url + "/")
    echo(page)
    said = " ".join(f"word{number}" for number in range(400))
    page.fill("#question", f"say:{said}")
    page.press("#question", "Enter")
    shown = "(document.querySelector('.reply.busy .text')?.innerText.length ?? 0)"
    lengths = []
    while len(lengths) < 3:
        until(page, f"{shown} > {lengths[-1] if lengths else 0}", 60)
        lengths.append(page.evaluate(shown))
    assert lengths[-1] < len(said)
    assert page.locator("#send").get_attribute("aria-label") == "Stop"
    page.keyboard.press("Escape")
    page.wait_for_selector(DONE)
    assert "stopped" in page.locator(".stats").inner_text()
    assert said.startswith(page.locator(".reply .text").inner_text().rstrip())
    end = time.monotonic() + 20
    while real.stats("echo")["running"]:
        assert time.monotonic() < end
    ask(page, "say:Still there.", 2)
    assert page.locator(".reply .text").last.inner_text() == "Still there."


def test_boxes_lie_where_the_annotations_of_the_real_server_say(real, open_page, tmp_path):
    (tmp_path / "wide.png").write_bytes(png((300, 200)))
    page = open_page(real.url + "/")
    echo(page)
    page.set_input_files("#files", tmp_path / "wide.png")
    page.wait_for_selector("#thumbs li")
    ask(page, f"say:Look: {MARK}, there.")
    page.wait_for_selector(".boxes .box")
    page.wait_for_timeout(500)  # it fades in
    stage, box = page.locator(".stage img").bounding_box(), page.locator(".box").bounding_box()
    scale = stage["width"] / 300
    left, top = (box["x"] - stage["x"]) / scale, (box["y"] - stage["y"]) / scale
    drawn = [left, top, left + box["width"] / scale, top + box["height"] / scale]
    body = {"model": "echo", "messages": user(f"say:Look: {MARK}, there.", image(data_uri(png((300, 200)))))}
    (told,) = httpx.post(real.url + "/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["annotations"]
    assert drawn == pytest.approx(told["box"], abs=2)
    assert page.locator(".legend li").inner_text().split() == ["the", "sign", "30,", "50,", "150,", "150"]
    assert page.locator(".text").inner_text() == "Look: the sign, there."


def test_real_reasoning_folds_into_its_panel(real, open_page):
    page = open_page(real.url + "/")
    echo(page)
    ask(page, "say:<think>" + "Green letters on white. " * 20 + "</think>It says **Exit**.")
    assert page.locator(".think summary").inner_text().startswith("Thought for ")
    assert page.locator("details.think[open]").count() == 0
    page.locator(".think summary").click()
    assert page.locator(".thoughts").inner_text().startswith("Green letters on white. Green")
    assert page.locator(".text strong").inner_text() == "Exit"


def test_an_adapter_is_chosen_as_a_model(real, open_page):
    page = open_page(real.url + "/")
    page.wait_for_selector("#model:enabled")
    assert page.locator("#model optgroup").get_attribute("label") == "Adapters of mini"
    page.select_option("#model", "loud")
    page.evaluate("document.getElementById('s-max-tokens').value = '4'")
    ask(page, "What is a receipt?")
    lines = [line for line in real.logged() if line.get("path") == "/v1/chat/completions" and line.get("model") == "loud"]
    assert [line["status"] for line in lines] == [200]


def test_a_real_refusal_asks_for_the_key(tmp_path, open_page):
    with start(tmp_path, KEY) as locked:
        page = open_page(locked.url + "/", wait="#settings[open]")
        page.fill("#s-key", KEY)
        page.keyboard.press("Tab")
        page.wait_for_selector("#model:enabled", state="attached")
        page.keyboard.press("Escape")
        echo(page)
        ask(page, "say:Come in.")
        assert page.locator(".reply .text").inner_text() == "Come in."


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
    page.get_by_text("s held").wait_for(timeout=60_000)
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


def test_a_live_conversation_is_the_one_on_the_page(real, open_page, tmp_path):
    page = open_page(real.url + "/", wait=None, permissions=["camera"])
    sent, heard = [], []

    def watch(socket) -> None:
        socket.on("framesent", lambda data: sent.append(json.loads(data)) if isinstance(data, str) else None)
        socket.on("framereceived", lambda data: heard.append(json.loads(data)))

    page.on("websocket", watch)
    echo(page)
    page.click("#go-live")
    page.get_by_role("button", name="Camera", exact=True).click()
    page.get_by_text("s held").wait_for(timeout=60_000)
    starts = lambda: [one for one in sent if one["type"] == "start"]  # noqa: E731
    ask(page, "One? say:Red.")
    ask(page, "Two? say:Blue.", 2)
    first = [{"role": "user", "content": "One? say:Red."}, {"role": "assistant", "content": "Red."}]
    assert starts()[-1] == {"type": "start", "model": "echo", "messages": first}
    page.get_by_role("button", name="Try again").first.click()
    until(page, "document.querySelectorAll('.turn').length === 2 && !document.querySelector('.busy')", 60)
    assert starts()[-1]["messages"] == []
    page.evaluate("document.getElementById('s-system').value = 'Be brief.'")
    page.evaluate("document.getElementById('s-max-tokens').value = '4'")
    page.select_option("#model", "loud")
    ask(page, "Three?", 2)
    assert starts()[-1] == {"type": "start", "model": "loud", "system": "Be brief.", "messages": first}
    page.click("#new")
    page.set_input_files("#files", tmp_path / _picture(tmp_path))
    page.wait_for_selector("#thumbs li")
    page.fill("#question", "And this?")
    num_sent = len(sent)
    page.press("#question", "Enter")
    assert "remove what is attached" in page.locator("#notice").inner_text()
    assert len(sent) == num_sent and page.locator("#thumbs li").count() == 1 and page.input_value("#question") == "And this?"
    page.get_by_role("button", name="Remove one.png").click()
    ask(page, "Four?")
    assert starts()[-1]["messages"] == []
    page.get_by_role("button", name="End live").click()
    assert page.evaluate("document.activeElement.id") == "question"
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("div.problem")
    assert "Live has ended" in page.locator("div.problem").inner_text()
    assert all(fits(one, "client") for one in sent) and all(fits(one, "server") for one in heard)
    assert {one["type"] for one in heard} == {"state", "delta", "done"}


def _picture(folder) -> str:
    (folder / "one.png").write_bytes(png())
    return "one.png"


def test_a_live_answer_is_stopped(real, open_page):
    page = open_page(real.url + "/", wait=None, permissions=["camera"])
    echo(page)
    page.click("#go-live")
    page.get_by_role("button", name="Camera", exact=True).click()
    page.get_by_text("s held").wait_for(timeout=60_000)
    page.fill("#question", "say:" + " ".join(f"word{number}" for number in range(400)))
    page.press("#question", "Enter")
    until(page, "(document.querySelector('.reply.busy .text')?.innerText.length ?? 0) > 3", 60)
    page.keyboard.press("Escape")
    page.wait_for_selector(DONE)
    assert "stopped" in page.locator(".stats").inner_text()
    ask(page, "Again? say:Yes.", 2)
    assert page.locator(".reply .text").last.inner_text() == "Yes."
