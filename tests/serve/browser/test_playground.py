"""The playground in a real browser, against a server that says what each test needs."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
from clips import encode, synth
from PIL import Image
from serve.browser.scripted import Scripted, until

pytestmark = pytest.mark.browser
HERE = Path(__file__).parent
EXAMPLES = HERE.parents[2] / "examples"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
DONE = "article.reply:not(.busy) .stats"


@pytest.fixture(scope="module")
def served():
    with Scripted() as server:
        yield server


@pytest.fixture
def server(served):
    served.seen.clear()
    served.gone.clear()
    served.go_on.clear()
    return served


def ask(page, text: str, wait: str | None = DONE) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")
    if wait:
        page.wait_for_selector(wait, state="attached")  # the counts of a refused request are empty, and so not to be seen


def media(body: dict, kind: str = "image") -> list[tuple[str, bytes]]:
    """(type, bytes) of the media in the last message."""
    found = [part[f"{kind}_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == f"{kind}_url"]
    return [(url.partition(";")[0].removeprefix("data:"), base64.b64decode(url.partition(",")[2])) for url in found]


def picture(path: Path, size: tuple[int, int], **options) -> Path:
    Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint32).astype(np.uint8).reshape(size[1], size[0], 3)).save(
        path, **options
    )
    return path


# ---- what goes in


def test_picks_several_pictures_removes_one_and_sends_the_rest_unchanged(server, open_page):
    page = open_page(server.url)
    page.set_input_files("#files", [EXAMPLES / "sign.png", EXAMPLES / "shapes.png"])
    page.wait_for_selector("#thumbs li >> nth=1")
    page.get_by_role("button", name="Remove shapes.png").click()
    assert page.locator("#thumbs li").count() == 1
    ask(page, "What does the sign say?")
    assert media(server.seen[0]) == [("image/png", (EXAMPLES / "sign.png").read_bytes())]
    assert server.seen[0]["messages"][-1]["content"][-1] == {"type": "text", "text": "What does the sign say?"}
    assert server.seen[0]["model"] == "mini" and server.seen[0]["stream"] is True
    assert page.locator(".user img").get_attribute("alt") == "sign.png"


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_pastes_and_drops_pictures(server, open_page, how):
    page = open_page(server.url)
    data = (EXAMPLES / "sign.png").read_bytes()
    page.evaluate(
        """([how, data]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "image.png", {type: "image/png"}));
            const options = {bubbles: true, cancelable: true};
            const event = how === "paste" ? new ClipboardEvent("paste", {...options, clipboardData: transfer})
                                          : new DragEvent("drop", {...options, dataTransfer: transfer});
            document.getElementById("question").dispatchEvent(event);
        }""",
        [how, base64.b64encode(data).decode()],
    )
    page.wait_for_selector("#thumbs li")
    ask(page, "and now?")
    assert media(server.seen[0]) == [("image/png", data)]


def test_sends_videos(server, open_page, tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(encode([synth(64, 96, number) for number in range(8)]))
    page = open_page(server.url)
    page.set_input_files("#files", clip)
    page.wait_for_selector("#thumbs li")
    ask(page, "What happens?")
    assert media(server.seen[0], "video") == [("video/mp4", clip.read_bytes())]
    page.wait_for_selector(".user .media video, .user .media .unseen")


def test_says_what_is_neither_picture_nor_video(server, open_page, tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    page = open_page(server.url)
    page.set_input_files("#files", tmp_path / "notes.txt")
    page.get_by_text("notes.txt is neither a picture nor a video.").wait_for()
    assert page.locator("#thumbs li").count() == 0


def test_takes_a_picture_with_the_camera(server, open_page):
    page = open_page(server.url, permissions=["camera"])
    page.click("#webcam")
    until(page, "document.getElementById('viewfinder').videoWidth > 0")
    page.click("#snap")
    page.wait_for_selector("#thumbs li")
    assert page.evaluate("document.getElementById('viewfinder').srcObject") is None  # the camera is off again
    ask(page, "Who is there?")
    ((kind, data),) = media(server.seen[0])
    assert kind == "image/jpeg" and Image.open(io.BytesIO(data)).width >= 320


def test_only_pictures_above_the_limit_are_made_smaller_and_stay_upright(server, open_page, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    large = picture(tmp_path / "large.jpg", (5000, 1000), exif=exif)
    page = open_page(server.url)
    page.set_input_files("#files", large)
    page.get_by_text("made smaller, 1000 × 5000 to 819 × 4096").wait_for()
    ask(page, "Large?")
    ((_, data),) = media(server.seen[0])
    sent = Image.open(io.BytesIO(data))
    assert sent.size == (819, 4096) and 0x0112 not in sent.getexif()


# ---- what comes out


def test_streams_while_the_answer_grows_and_stops_by_key_and_button(server, open_page):
    page = open_page(server.url)
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Stop").click()):
        server.gone.clear()
        ask(page, "endless", wait=None)
        until(page, "(document.querySelector('.reply:last-child .text')?.textContent || '').includes('word5')")
        assert page.locator(".reply.busy").count() == 1
        stop()
        page.wait_for_selector(".reply:last-child:not(.busy)")
        assert server.gone.wait(5)  # the server was told
        assert "stopped" in page.locator(".reply:last-child .stats").inner_text()
        assert "word3" in page.locator(".reply:last-child .text").inner_text()  # what came is kept
        assert page.get_by_role("button", name="Send").is_visible()


def test_several_turns_are_sent_whole_and_reset_forgets_them(server, open_page):
    page = open_page(server.url)
    ask(page, "one")
    page.fill("#question", "two")
    page.press("#question", "Shift+Enter")
    page.keyboard.type("lines")
    page.press("#question", "Enter")
    page.wait_for_selector(".reply:not(.busy) .stats >> nth=1")
    said = [(message["role"], message["content"]) for message in server.seen[1]["messages"]]
    assert said == [("user", "one"), ("assistant", "The sign says Station 42."), ("user", "two\nlines")]
    page.click("#new")
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()
    ask(page, "three")
    assert len(server.seen[2]["messages"]) == 1


def test_asks_again_in_place(server, open_page):
    page = open_page(server.url)
    ask(page, "one")
    ask(page, "two", wait=".reply:not(.busy) .stats >> nth=1")
    page.get_by_role("button", name="Try again").first.click()
    until(page, "document.querySelectorAll('.turn').length === 2 && !document.querySelector('.busy')")
    assert server.seen[2]["messages"] == server.seen[0]["messages"]


def test_the_think_panel_is_open_while_thinking_and_folds_when_the_answer_begins(server, open_page):
    page = open_page(server.url)
    ask(page, "think and hold", wait=None)
    page.wait_for_selector("details.think[open]")
    assert page.locator(".think summary").inner_text() == "Thinking…"
    server.go_on.set()
    page.wait_for_selector(DONE)
    assert page.locator("details.think[open]").count() == 0
    label = page.locator(".think summary").inner_text()
    assert label.startswith("Thought for ") and label != "Thought for 0.0 s"
    page.locator(".think summary").click()
    assert page.locator(".thoughts").inner_text() == "Two words are written on the sign."
    assert page.locator(".text").inner_text() == "The sign says Station 42."


def test_boxes_lie_where_the_server_says_and_can_be_hidden(server, open_page):
    page = open_page(server.url)
    page.get_by_role("button", name="Find a shape").click()
    page.wait_for_selector(".boxes .box >> nth=1")
    image, box = page.locator(".stage img").bounding_box(), page.locator(".box").first.bounding_box()
    page.wait_for_timeout(400)  # it fades in
    image, box = page.locator(".stage img").bounding_box(), page.locator(".box").first.bounding_box()
    scale = image["width"] / 168
    want = (10, 36, 40, 40)
    got = ((box["x"] - image["x"]) / scale, (box["y"] - image["y"]) / scale, box["width"] / scale, box["height"] / scale)
    assert got == pytest.approx(want, abs=2)
    assert page.locator(".box span").all_inner_texts() == ["red circle", "<i>blue</i> rectangle"]
    legend = page.locator(".legend li").all_inner_texts()
    assert legend[0].split() == ["red", "circle", "10,", "36,", "50,", "76"] and legend[3].split() == [
        "point",
        "4",
        "84,",
        "84",
    ]
    assert len(legend) == 4  # what a video shows is not drawn over a picture
    tip, point = page.locator(".polygon svg").bounding_box(), page.locator(".point").bounding_box()
    assert ((tip["x"] - image["x"]) / scale, (tip["y"] - image["y"]) / scale) == pytest.approx((110, 40), abs=2)
    assert (point["x"] + point["width"] / 2 - image["x"]) / scale == pytest.approx(84, abs=2)
    names = [name.bounding_box() for name in page.locator(".marks span").all()]
    for one, other in itertools.combinations(names, 2):  # none lies on another
        apart = one["x"] + one["width"] <= other["x"] or other["x"] + other["width"] <= one["x"]
        assert apart or one["y"] + one["height"] <= other["y"] or other["y"] + other["height"] <= one["y"]
    assert page.locator(".text").inner_text() == "Yes, to the right of the blue square."
    page.get_by_role("button", name="Marks").click()
    assert page.locator(".box:visible").count() == 0


def test_shows_counts_of_the_usage(server, open_page):
    page = open_page(server.url)
    ask(page, "rich")
    stats = page.locator(".stats").inner_text()
    assert "280 tokens in · 256 of pictures · 24 out" in stats and "tokens/s" in stats and "first after" in stats


def test_markdown_becomes_elements_and_code_can_be_copied(server, open_page):
    page = open_page(server.url, permissions=["clipboard-read", "clipboard-write"])
    ask(page, "rich")
    assert page.locator(".text h4").inner_text() == "What is there"
    assert page.locator(".text ol > li").count() == 2 and page.locator(".text ol ul li").count() == 1
    assert page.locator(".text td").all_inner_texts() == ["Station", "7", "42", "2"]
    assert page.locator(".text strong").first.inner_text() == "two words"
    assert page.locator(".text blockquote").inner_text() == "Nothing else is written on it."
    page.locator(".code").get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator(".code code").inner_text()


# ---- what goes wrong


def test_an_error_is_shown_where_it_happened_in_the_servers_words(server, open_page):
    page = open_page(server.url)
    ask(page, "fail")
    said = page.locator("div.problem").inner_text()
    assert "temperature=9 is out of range <b>really</b>" in said and "temperature" in said.splitlines()[-1]
    ask(page, "one", wait=".reply:not(.busy) .stats >> nth=1")  # the conversation goes on


def test_a_stream_that_breaks_keeps_what_came(server, open_page):
    page = open_page(server.url)
    ask(page, "break")
    assert page.locator(".text").inner_text() == "Half an"
    assert page.locator("div.problem").inner_text() == "the worker was lost"


def test_the_key_is_asked_for_and_kept_in_the_session_alone(open_page):
    with Scripted(key="secret-1234") as server:
        page = open_page(server.url, wait="#settings[open]")
        assert page.evaluate("document.activeElement.id") == "s-key"
        page.fill("#s-key", "secret-1234")
        page.keyboard.press("Tab")
        page.wait_for_selector("#model:enabled", state="attached")
        page.keyboard.press("Escape")
        ask(page, "one")
        assert page.locator(".text").inner_text() == "The sign says Station 42."
        assert page.evaluate("JSON.stringify(localStorage)").find("secret") == -1
        assert page.evaluate("document.cookie") == ""
        page.click("#show-code")
        assert "secret" not in page.locator("#snippet").inner_text()


def test_text_of_the_model_and_names_of_files_stay_text(server, open_page, tmp_path):
    named = picture(tmp_path / '"><img src=x onerror=window.hurt=10>.png', (40, 40))
    page = open_page(server.url)
    page.set_input_files("#files", named)
    page.wait_for_selector("#thumbs li")
    ask(page, "attack <img src=x onerror=window.hurt=11>")
    page.click("#show-code")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hurt") is None
    assert page.locator(".text").locator("script, img, svg[onload], iframe").count() == 0
    assert page.evaluate("[...document.querySelectorAll('.text a')].map((a) => a.protocol)") == ["https:", "https:"]
    assert '<img src=x onerror="window.hurt=1">' in page.locator(".text").inner_text()


def test_odd_markdown_neither_fails_nor_takes_long(server, open_page):
    page = open_page(server.url)
    seconds = page.evaluate(
        """async () => {
            const {showMarkdown} = await import("./ui/markdown.js");
            const odd = ["`", "*", "_", "[", "](", "**a ", "> ", "- ", "|", "~~", "#", "\\n", "```\\n", "1. ", "![x]("];
            const began = performance.now();
            for (const piece of odd) for (const tail of ["", "x", "\\n|---|"]) {
                const root = document.createElement("div");
                showMarkdown(root, piece.repeat(8000) + tail);
            }
            return (performance.now() - began) / 1000;
        }"""
    )
    assert seconds < 20


# ---- around it


def test_settings_are_sent_only_where_they_are_set(server, open_page):
    page = open_page(server.url)
    ask(page, "one")
    assert set(server.seen[0]) == {"model", "messages", "stream", "stream_options"}
    page.click("#show-settings")
    for name, value in {
        "temperature": "0.7",
        "top-p": "0.9",
        "max-tokens": "64",
        "fps": "2",
        "max-pixels": "200704",
        "seed": "7",
    }.items():
        page.fill(f"#s-{name}", value)
    page.fill("#s-system", "Be brief.")
    page.select_option("#s-thinking", "off")
    page.keyboard.press("Escape")
    page.select_option("#model", "large")
    ask(page, "two", wait=".reply:not(.busy) .stats >> nth=1")
    sent = server.seen[1]
    chosen = {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 64,
        "fps": 2,
        "max_pixels": 200704,
        "seed": 7,
        "thinking": "off",
        "model": "large",
    }
    assert {name: sent[name] for name in chosen} == chosen
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}


def test_more_of_sampling_and_that_it_is_set_is_seen(server, open_page):
    page = open_page(server.url)
    assert page.get_by_role("button", name="Settings", exact=True).count() == 1
    page.click("#show-settings")
    for name, value in {"top-k": "20", "min-p": "0.05", "repetition-penalty": "1.1", "min-pixels": "3136"}.items():
        page.fill(f"#s-{name}", value)
    page.fill("#s-stop", " END\n\\n\\nUser:\n")
    page.keyboard.press("Escape")
    assert page.get_by_role("button", name="Settings, 5 changed").count() == 1
    ask(page, "one")
    chosen = {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "min_pixels": 3136, "stop": [" END", "\n\nUser:"]}
    assert {name: server.seen[0][name] for name in chosen} == chosen
    page.click("#show-settings")
    page.click("#clear-settings")
    page.keyboard.press("Escape")
    ask(page, "two", wait=".reply:not(.busy) .stats >> nth=1")
    assert set(server.seen[1]) == {"model", "messages", "stream", "stream_options"}
    assert page.get_by_role("button", name="Settings", exact=True).count() == 1


def test_adapters_stand_below_their_model(server, open_page):
    page = open_page(server.url)
    assert page.locator("#model > option").all_inner_texts() == ["mini", "large"]
    assert page.locator("#model > optgroup[label='Adapters of large'] > option").all_inner_texts() == ["receipts"]
    page.select_option("#model", "receipts")
    ask(page, "one")
    assert server.seen[0]["model"] == "receipts"


def test_the_code_for_curl_and_python_sends_the_same_request(server, open_page, tmp_path):
    named = picture(tmp_path / "it's $(touch hurt) `x`.png", (40, 40))
    page = open_page(server.url)
    page.set_input_files("#files", named)
    page.wait_for_selector("#thumbs li")
    page.click("#show-settings")
    page.fill("#s-max-tokens", "7")
    page.fill("#s-fps", "2")
    page.keyboard.press("Escape")
    ask(page, 'say "$HOME" and `id` \\ \\n $(touch hurt) é')
    page.click("#show-code")
    shell = page.locator("#snippet code").inner_text()
    page.click("#tab-python")
    python = page.locator("#snippet code").inner_text()
    want = {name: value for name, value in server.seen[0].items() if not name.startswith("stream")}
    assert _run_shell(shell, tmp_path) == want
    assert _run_python(python, tmp_path) == want
    assert not (tmp_path / "hurt").exists()


def _run_shell(text: str, folder: Path) -> dict:
    """What the command would send: a curl of our own keeps its input."""
    fake = folder / "bin" / "curl"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\ncat > sent.json\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    path = f"{fake.parent}:{os.environ['PATH']}"
    subprocess.run(["sh", "-c", text], cwd=folder, check=True, env={"PATH": path, "HOME": "/nowhere"}, timeout=20)
    return json.loads((folder / "sent.json").read_text())


def _run_python(text: str, folder: Path) -> dict:
    """What the script would send: an ``openai`` of our own keeps the arguments."""

    class Client:
        def __init__(self, **options) -> None:
            self.chat = self.completions = self

        def create(self, **options):
            sent.append({**{k: v for k, v in options.items() if k != "extra_body"}, **options.get("extra_body", {})})
            raise StopIteration

    sent: list[dict] = []
    here = os.getcwd()
    os.chdir(folder)
    try:
        exec(text.replace("from openai import OpenAI", ""), {"OpenAI": Client})
    except StopIteration:
        pass
    finally:
        os.chdir(here)
    return sent[0]


def test_dark_follows_the_system_and_the_button_overrules_it_for_good(server, open_page):
    page = open_page(server.url, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(22, 23, 22)"
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(250, 249, 246)"
    page.reload()
    assert page.evaluate(ground) == "rgb(250, 249, 246)"


@pytest.mark.parametrize("state", ["empty", "talk", "settings", "code", "live"])
def test_a_phone_never_scrolls_sideways(server, open_page, state):
    page = open_page(server.url, **PHONE)
    if state != "empty":
        page.locator(".sample").nth(1).click()
        page.wait_for_selector(DONE)
        ask(page, "rich " + "long" * 60, wait=".reply:not(.busy) .stats >> nth=1")
        page.set_input_files("#files", [EXAMPLES / "sign.png"] * 5)
        page.wait_for_selector("#thumbs li >> nth=4")
    if state in ("settings", "code"):
        page.click(f"#show-{state}")
    if state == "live":
        page.click("#go-live")
    wide = page.evaluate(
        """() => [document.documentElement, document.body, ...document.querySelectorAll("main, header, form, dialog[open]")]
            .filter((node) => node.scrollWidth > node.clientWidth + 1).map((node) => node.id || node.tagName)"""
    )
    assert wide == []
    assert page.evaluate("innerWidth") == 360
    for button in page.locator("header button, .row button").all():
        place = button.bounding_box()
        assert place["x"] >= 0 and place["x"] + place["width"] <= 360 and place["height"] >= 36


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", ["empty", "talk", "settings", "code", "live"])
def test_axe_finds_nothing_serious(server, open_page, scheme, state):
    page = open_page(server.url, color_scheme=scheme, reduced_motion="reduce")
    if state in ("talk", "code"):
        page.locator(".sample").nth(1).click()
        page.wait_for_selector(DONE)
        ask(page, "think rich", wait=".reply:not(.busy) .stats >> nth=1")
        ask(page, "fail", wait="div.problem")
        page.set_input_files("#files", EXAMPLES / "sign.png")
        page.wait_for_selector("#thumbs li")
    if state in ("settings", "code"):
        page.click(f"#show-{state}")
    if state == "live":
        page.click("#go-live")
    page.evaluate((HERE / "data" / "axe.min.js").read_text())
    found = page.evaluate("axe.run().then((result) => result.violations)")
    serious = [(one["id"], one["help"], [node["html"][:120] for node in one["nodes"]]) for one in found]
    assert [one for one, raw in zip(serious, found, strict=True) if raw["impact"] in ("serious", "critical")] == []


def test_every_control_is_reached_by_tab_in_the_order_of_the_page(server, open_page):
    page = open_page(server.url)
    page.locator(".skip").focus()
    order = []
    for number in range(14):
        if number:
            page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        visible = page.evaluate(
            "getComputedStyle(document.activeElement).outlineStyle !== 'none' || document.activeElement.id === 'question'"
        )
        assert visible, order[-1]
    buttons = ["model", "new", "show-code", "theme", "show-settings"]
    assert order == ["skip", *buttons, "sample", "sample", "sample", "question", "pick", "webcam", "go-live", "send"]


def test_the_answer_is_said_to_a_screen_reader_once_it_is_there(server, open_page):
    page = open_page(server.url)
    ask(page, "one")
    assert page.locator("#status[role=status]").inner_text() == "The sign says Station 42."


def test_the_page_is_asked_for_again_only_when_it_changed(server, open_page):
    import httpx

    first = httpx.get(server.url + "ui/app.js")
    assert first.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    again = httpx.get(server.url + "ui/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
    for wrong in ("ui/../page.py", "ui/%2e%2e/page.py", "ui/nothing.js", "ui/index.html"):
        assert httpx.get(server.url + wrong).status_code == 404


def test_a_live_question_while_the_socket_connects_waits_for_it(server, open_page):
    """What is asked before it is open goes out when it opens, in order, and no other greeting before it."""
    page = open_page(server.url)
    told = page.evaluate(
        """async () => {
            class Slow {
                static CONNECTING = 0;
                static OPEN = 1;
                readyState = 0;
                sent = [];
                send(message) { this.sent.push(JSON.parse(message)); }
                close() {}
            }
            window.WebSocket = Slow;
            const { Live } = await import(new URL("ui/live.js", location.href));
            const live = new Live(document.createElement("div"), () => "mini", () => {});
            live.open();
            live.connect();
            live.ask("What?", [], { system: "Be brief." }, new AbortController().signal).next();
            const before = live.socket.sent.length;
            live.socket.readyState = Slow.OPEN;
            live.socket.onopen();
            const first = live.socket.sent;
            live.connect();
            live.socket.readyState = Slow.OPEN;
            live.socket.onopen();
            return { before, first, second: live.socket.sent };
        }"""
    )
    assert told["before"] == 0 and [one["type"] for one in told["first"]] == ["start", "question"]
    assert (told["first"][0]["system"], told["first"][1]["text"]) == ("Be brief.", "What?")
    assert told["second"] == [{"type": "start", "model": "mini"}]
