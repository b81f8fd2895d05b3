"""Fetching from both hubs: what is asked for, what is not, and what a person is told when it fails."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hubs
import pytest

from mirada.errors import CapacityError, CheckpointError, HubError, HubNotFound, HubRefused, SettingsError, UnknownName
from mirada.hub import HubOptions, Progress, is_id, resolve, resolve_with, transfer

MODEL = "org/tiny-vl"
SOURCES = ("hf", "modelscope")


def content(seed: str, size: int) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size)


def files() -> dict[str, bytes]:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    return {
        ".gitattributes": b"*.safetensors filter=lfs",
        "README.md": b"a card",
        "config.json": b'{"model_type": "KeyeVL1_5"}',
        "tokenizer.json": content("t", 5000),
        "merges.txt": b"a b\n",
        "chat_template.jinja": b"{{ messages }}",
        "preprocessor_config.json": b"{}",
        "modeling_keye.py": b"import os",
        "pytorch_model.bin": content("pickle", 3000),
        "training_args.bin": b"pickle",
        "optimizer.json": b"{}",
        "consolidated.safetensors": content("c", 3000),
        "onnx/model.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": content("1", 300_000),
        "model-00002-of-00002.safetensors": content("2", 200_000),
    }


WANTED = {
    "config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "preprocessor_config.json",
    "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
}  # fmt: skip
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A hub on loopback; the environment leads to it, and to a home of this test alone."""
    for name in (
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH",
        "MODELSCOPE_API_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    with hubs.serve(hubs.Hub(files())) as made:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", made.url)
        yield made


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    return request.param


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


# ---- what is fetched


def test_only_what_is_needed_comes_and_comes_whole(hub: Any, source: str) -> None:
    place = resolve(MODEL, source)
    assert contents(place) == {name: hub.files[name] for name in WANTED}
    asked = " ".join(r.path for r in hub.requests)
    assert not any(name in asked for name in (".py", ".bin", "optimizer", "consolidated", "onnx", "README"))


def test_a_second_call_fetches_nothing_and_a_commit_asks_nothing(hub: Any, source: str) -> None:
    place = resolve(MODEL, source)
    hub.requests.clear()
    assert resolve(MODEL, source) == place
    assert [r.path for r in hub.requests if "api" not in r.path or "FilePath" in r.path] == []
    if source == "hf":
        hub.requests.clear()
        assert resolve(MODEL, source, hubs.COMMIT) == place and hub.requests == []


def test_a_directory_is_itself(tmp_path: Path, hub: Any) -> None:
    assert resolve(tmp_path) == tmp_path and resolve_with(tmp_path, {"revision": "x"}) == tmp_path
    assert hub.requests == []


def test_only_the_config(hub: Any, source: str) -> None:
    place = resolve(MODEL, source, weights=False)
    assert set(contents(place)) == {name for name in WANTED if not name.startswith("model-")}
    with pytest.raises(HubNotFound, match="only a part of"):
        resolve(MODEL, source, offline=True)
    assert resolve(MODEL, source, offline=True, weights=False) == place


def test_one_file_of_weights(hub: Any, source: str) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": content("w", 5000), "vocab.json": b"{}"}
    assert set(contents(resolve(MODEL, source))) == set(hub.files)


def test_progress_is_told(hub: Any, source: str) -> None:
    seen: list[Progress] = []
    resolve(MODEL, source, report=seen.append)
    shard = [p for p in seen if p.name == SHARD]
    assert [p.done for p in shard] == sorted(p.done for p in shard)
    assert shard[-1].done == shard[-1].total == 300_000 and shard[0].reused == 0 and len(shard) >= 2


def test_revisions(hub: Any) -> None:
    old = resolve(MODEL)
    hub.commit, hub.files["config.json"] = hubs.OLDER, b'{"model_type": "Keye"}'
    hub.requests.clear()
    new = resolve(MODEL, revision="pr/1")
    assert new != old and (new / "config.json").read_bytes() != (old / "config.json").read_bytes()
    assert hub.sent(SHARD) == []  # equal contents are kept once
    assert (new / SHARD).samefile(old / SHARD)
    assert resolve(MODEL, revision="main", offline=True) == old and resolve(MODEL, revision="pr/1", offline=True) == new
    with pytest.raises(HubNotFound, match=r"has no revision 'v9'"):
        resolve(MODEL, revision="v9")
    with pytest.raises(CheckpointError, match="is not a name"):
        resolve(MODEL, revision="../../../x", offline=True)


def test_places(hub: Any, source: str, tmp_path: Path) -> None:
    standard = {"hf": tmp_path / "hf" / "hub", "modelscope": tmp_path / "cache" / "mirada" / "modelscope"}[source]
    assert resolve(MODEL, source).is_relative_to(standard / "models--org--tiny-vl" / "snapshots")
    assert resolve(MODEL, source, cache_dir=tmp_path / "own").is_relative_to(tmp_path / "own")
    assert resolve_with(MODEL, HubOptions(source=source, cache_dir=str(tmp_path / "two"))).is_relative_to(tmp_path / "two")


def test_an_endpoint_may_be_given(hub: Any, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:1")
    assert resolve(MODEL, source, endpoint=hub.url + "/").is_dir()


# ---- cut and resumed


def test_a_transfer_that_is_cut_goes_on_where_it_stopped(hub: Any, source: str) -> None:
    hub.cuts = {SHARD: [100_000, 50_000]}
    place = resolve(MODEL, source)
    assert (place / SHARD).read_bytes() == hub.files[SHARD]
    assert hub.sent(SHARD) == [100_000, 50_000, 150_000]
    ranges = [r.headers.get("Range") for r in hub.requests if SHARD in r.path and r.sent]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_the_next_run_asks_only_for_the_rest(hub: Any, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TRIES", 2)
    hub.cuts = {SHARD: [123_456, 0, 0]}
    with pytest.raises(HubError, match=r"broke off after 123456 of 300000 bytes.*goes on where it stopped"):
        resolve(MODEL, source)
    assert sum(hub.sent(SHARD)) == 123_456
    hub.requests.clear()
    seen: list[Progress] = []
    place = resolve(MODEL, source, report=seen.append)
    assert hub.sent(SHARD) == [300_000 - 123_456] and (place / SHARD).read_bytes() == hub.files[SHARD]
    assert hub.sent("config.json") == [] and next(p for p in seen if p.name == SHARD).reused == 123_456


def test_a_killed_process_loses_nothing(hub: Any, tmp_path: Path) -> None:
    code = (
        "import os, sys; from mirada.hub import resolve\n"
        "def report(p):\n    if p.name == sys.argv[1] and p.done >= 100_000: os._exit(9)\n"
        "resolve('org/tiny-vl', report=report)"
    )
    hub.files[SHARD] = content("1", 3_000_000)
    done = subprocess.run([sys.executable, "-c", code, SHARD], check=False, timeout=300)
    assert done.returncode == 9
    held = sum(part.stat().st_size for part in (tmp_path / "hf").rglob("*.part"))
    assert 0 < held < 3_000_000
    hub.requests.clear()
    assert (resolve(MODEL) / SHARD).read_bytes() == hub.files[SHARD] and hub.sent(SHARD) == [3_000_000 - held]


def test_a_server_without_ranges_starts_again(hub: Any, source: str) -> None:
    hub.ranges, hub.cuts = False, {SHARD: [100_000]}
    assert (resolve(MODEL, source) / SHARD).read_bytes() == hub.files[SHARD]
    assert hub.sent(SHARD) == [100_000, 300_000]


def test_passing_failures_are_tried_again(hub: Any, source: str) -> None:
    hub.answers = {SHARD: [503, 429, 500], "merges.txt": [502]}
    assert contents(resolve(MODEL, source))[SHARD] == hub.files[SHARD]
    listing = {"hf": "/revision/", "modelscope": "/repo/files"}[source]
    hub.answers = {listing: [503]}
    resolve(MODEL, source)
    hub.answers = {listing: [500] * 9}
    with pytest.raises(HubError, match="answered 500"):
        resolve(MODEL, source)


# ---- checked


def flipped(data: bytes) -> bytes:
    return data[:7] + bytes([data[7] ^ 1]) + data[8:]


@pytest.mark.parametrize("name", [SHARD, "merges.txt", "tokenizer.json"])
def test_other_bytes_than_stated_are_refused_and_not_kept(hub: Any, source: str, name: str) -> None:
    hub.files["merges.txt"] = b"a b\nc d\ne f\n"
    hub.altered = {name: flipped(hub.files[name])}
    with pytest.raises(HubError, match=f"'{name}' arrived with other bytes"):
        resolve(MODEL, source)
    hub.altered = {}
    assert contents(resolve(MODEL, source)) == {n: hub.files[n] for n in WANTED}


def test_a_longer_file_is_refused(hub: Any, source: str) -> None:
    hub.altered = {SHARD: hub.files[SHARD] + b"x"}
    with pytest.raises(HubError, match="longer than the 300000 bytes"):
        resolve(MODEL, source)


def test_a_part_that_is_wrong_is_thrown_away(hub: Any, source: str, tmp_path: Path) -> None:
    folder = resolve(MODEL, source, weights=False).parents[1] / "blobs"
    key = hashlib.sha256(hub.files[SHARD]).hexdigest()
    (folder / f"{key}.part").write_bytes(b"x" * 1000)
    with pytest.raises(HubError, match="other bytes"):
        resolve(MODEL, source)
    (folder / f"{key}.part").write_bytes(b"x" * 400_000)
    assert (resolve(MODEL, source) / SHARD).read_bytes() == hub.files[SHARD]


def test_a_file_that_shrank_on_disk_is_fetched_again(hub: Any, source: str) -> None:
    place = resolve(MODEL, source)
    blob = (place / SHARD).resolve()
    blob.write_bytes(b"half")
    assert (resolve(MODEL, source) / SHARD).read_bytes() == hub.files[SHARD]


# ---- refused


def test_pickles_are_refused_with_the_reason(hub: Any, source: str) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"x" * 2000, "tokenizer.json": b"{}"}
    with pytest.raises(CheckpointError, match=r"only as Python pickles \(pytorch_model.bin\), which can run any code"):
        resolve(MODEL, source)
    assert hub.count("pytorch_model") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.pop(SHARD), rf"lacks the shard '{SHARD}'"),
        (lambda f: f.update({"model.safetensors.index.json": b"{}"}), "is not an index of shards"),
        (lambda f: f.update({"model.safetensors.index.json": b"{"}), "is not JSON"),
        (lambda f: f.pop("config.json"), "holds no config.json"),
        (lambda f: [f.pop(n) for n in list(f) if "safetensors" in n or n.endswith(".bin")], "holds no weights"),
    ],
)
def test_repositories_that_are_no_models(hub: Any, source: str, change: Callable[[dict], object], said: str) -> None:
    change(hub.files)
    with pytest.raises(CheckpointError, match=said) as caught:
        resolve(MODEL, source)
    assert caught.value.fix


def test_a_missing_repository(hub: Any, source: str) -> None:
    with pytest.raises(HubNotFound, match=r"there is no model 'org/tiny-v1'.*check its name") as caught:
        resolve("org/tiny-v1", source)
    assert source == "modelscope" or "private" in caught.value.fix


def test_tokens(hub: Any, source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.token = "right"
    with pytest.raises(HubError) as caught:
        resolve(MODEL, source)
    assert type(caught.value) is {"hf": HubNotFound, "modelscope": HubRefused}[source] and "token" in caught.value.fix
    with pytest.raises(HubRefused, match="token is not valid"):
        resolve(MODEL, source, token="wrong")
    monkeypatch.setenv({"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[source], "right")
    place = resolve(MODEL, source)
    assert contents(place) == {name: hub.files[name] for name in WANTED}
    if source == "hf":
        monkeypatch.delenv("HF_TOKEN")
        (tmp_path / "hf" / "token").write_text("right\n")
        assert resolve(MODEL) == place


def test_a_token_file_that_cannot_be_read_is_named(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(b"\xff\xfe")
    monkeypatch.setenv("HF_TOKEN_PATH", str(file))
    with pytest.raises(SettingsError, match=r"token .*cannot be read") as caught:
        resolve(MODEL)
    assert "HF_TOKEN" in caught.value.fix
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(SettingsError, match="Permission denied"):
        resolve(MODEL)


def test_a_token_never_leaves_for_another_host(hub: Any) -> None:
    hub.token = "right"
    resolve(MODEL, token="right")
    stored = [r for r in hub.requests if "/storage/" in r.path]
    assert len(stored) >= 3 and not any("Authorization" in r.headers for r in stored)
    assert all(r.headers.get("Authorization") == "Bearer right" for r in hub.requests if "/storage/" not in r.path)


def test_a_gated_model_says_what_to_do(hub: Any) -> None:
    hub.token, hub.gated = "right", True
    with pytest.raises(HubRefused, match=r"'org/tiny-vl' is gated.*consent.*open http.*org/tiny-vl, accept"):
        resolve(MODEL)
    assert resolve(MODEL, token="right").is_dir()


def test_what_the_hub_states_is_not_trusted(hub: Any, source: str, tmp_path: Path) -> None:
    for name in ("../../evil.json", "a/../../evil.json"):
        hub.files[name] = b"{}"
    resolve(MODEL, source)
    assert not list(tmp_path.rglob("evil.json"))
    hub.commit = "../../../x"
    if source == "hf":
        with pytest.raises(HubError, match="no commit"):
            resolve(MODEL)


def test_something_else_than_a_hub(hub: Any, source: str) -> None:
    hub.answers = {"/api/": [200]}
    with pytest.raises(HubError, match="does not answer like"):
        resolve(MODEL, source)


def test_names_and_settings(hub: Any, tmp_path: Path) -> None:
    assert is_id("Qwen/Qwen2-VL-2B-Instruct") and is_id("moonshotai/Kimi-VL-A3B-Thinking-2506")
    for name in ("mini", "a/b/c", "../b", "a/..", "/a", "a/", "a b/c", "https://x/y", tmp_path):
        assert not is_id(name)
        with pytest.raises(CheckpointError, match="there is no model"):
            resolve(Path("nowhere") if name is tmp_path else name)
    with pytest.raises(UnknownName, match="modelscope"):
        resolve(MODEL, "modelscop")
    with pytest.raises(SettingsError, match="revison"):
        resolve_with(MODEL, {"revison": "main"})
    assert hub.requests == []


def test_a_full_disk_is_said_before_the_weights(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=400_000))
    with pytest.raises(CapacityError, match=r"needs 0\.0 GB more.*cache-dir") as caught:
        resolve(MODEL)
    assert (caught.value.needed, caught.value.available, caught.value.unit) == (500_000, 400_000, "bytes")
    assert hub.sent(SHARD) == []


# ---- offline


def test_offline(hub: Any, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = " --from modelscope" if source == "modelscope" else ""
    with pytest.raises(HubNotFound, match=rf"nothing of 'org/tiny-vl'.*offline is set.*mirada download org/tiny-vl{extra}$"):
        resolve(MODEL, source, offline=True)
    assert hub.requests == []
    place = resolve(MODEL, source)
    hub.requests.clear()
    assert resolve(MODEL, source, offline=True) == place
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(MODEL, source) == place and hub.requests == []
    (place / SHARD).resolve().unlink()
    with pytest.raises(HubNotFound, match="only a part of"):
        resolve(MODEL, source)


def test_a_hub_out_of_reach(hub: Any, source: str) -> None:
    gone = "http://127.0.0.1:1"
    with pytest.raises(HubError, match=r"cannot be reached.*if a folder was meant; HF_HUB_OFFLINE=1"):
        resolve(MODEL, source, endpoint=gone)
    place = resolve(MODEL, source)
    with pytest.warns(UserWarning, match="cannot be reached.*fetched before"):
        assert resolve(MODEL, source, endpoint=gone) == place


def test_an_interrupted_update_leaves_the_older_one_usable(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old = resolve(MODEL)
    hub.commit, hub.files[SHARD] = hubs.OLDER, content("new", 300_000)
    monkeypatch.setattr(transfer, "TRIES", 1)
    hub.cuts = {SHARD: [1000, 0, 0]}
    with pytest.raises(HubError, match="broke off"):
        resolve(MODEL)
    assert resolve(MODEL, offline=True) == old


# ---- shared with other tools


def test_other_tools_find_what_was_fetched(hub: Any, tmp_path: Path) -> None:
    place = resolve(MODEL, cache_dir=tmp_path / "own")
    code = (
        "import sys; from huggingface_hub import hf_hub_download as get\n"
        "print(get('org/tiny-vl', 'tokenizer.json', cache_dir=sys.argv[1], local_files_only=True))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "own")], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == place / "tokenizer.json"


def test_what_other_tools_fetched_is_found(hub: Any, tmp_path: Path) -> None:
    folder = tmp_path / "hf" / "hub" / "models--org--tiny-vl"  # as the documentation of huggingface_hub's cache shows it
    snapshot = folder / "snapshots" / hubs.COMMIT
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(hubs.COMMIT)
    for name in WANTED:
        data = hub.files[name]
        key = hashlib.sha256(data).hexdigest() if len(data) >= hubs.LFS_FROM else hubs.git_hash(data)
        (folder / "blobs" / key).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{key}")
    assert resolve(MODEL, offline=True) == snapshot
    assert resolve(MODEL) == snapshot and [r.path for r in hub.requests if "/revision/" not in r.path] == []


@pytest.mark.parametrize("model", ["a" * 5000, "o/" + "a" * 5000, 5, None])
def test_what_is_no_name_is_said_to_be_none(model):
    with pytest.raises(CheckpointError, match="there is no model"):
        resolve_with(model)


def test_a_revision_of_any_length_is_answered(tmp_path):
    with pytest.raises(CheckpointError, match="is not a name"):
        resolve(MODEL, revision="x" * 5000, offline=True, cache_dir=tmp_path)


def test_a_place_that_takes_no_files_is_named(hub, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="cannot be kept in") as caught:
        resolve(MODEL, cache_dir=tmp_path / "file")
    assert "cache_dir" in caught.value.fix


def test_redirects_without_end_are_an_error_of_the_hub(tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(HubError, match="cannot be reached"):
            resolve(MODEL, endpoint=f"http://127.0.0.1:{server.server_port}", cache_dir=tmp_path)
        server.shutdown()
