"""Records on disk: every form gives back what was put in; torn ends, pickles and mixtures."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirada import records
from mirada.errors import InputError, MediaUnsupported, MessageError, SettingsError
from mirada.records import JsonlWriter, Mix, Record, Source, files
from mirada.types import Image, Message, Text, ToolCall, Video


def sample(number: int = 0) -> Record:
    return Record(
        f"id-{number}",
        (
            Message("system", "Be brief."),
            Message("user", (Image("a.png", max_pixels=100_000), Text("What is\nthis? é"), Image(b"\x00\xffpng"))),
            Message("assistant", ("It is", ToolCall("zoom", '{"x": 1}', "c1")), reasoning="Let me see."),
            Message("tool", "done", tool_call_id="c1"),
            Message("user", (Video("b.mp4", fps=2.0, video_start=1.5), Video(["1.png", b"two"], nframes=2))),
        ),
        {"source": "made", "score": 0.5},
    )


def plain(number: int) -> Record:
    return Record(str(number), (Message("user", f"question {number}"),))


@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    assert records.write(path, [sample(0), sample(1)]) == 2
    assert list(records.read(path)) == [sample(0), sample(1)]
    assert list(records.read(path, start=1)) == [sample(1)]
    assert not list(tmp_path.glob("*.partial"))


def test_jsonl_keeps_all_and_turns_bytes_into_data_uris(tmp_path):
    path = tmp_path / "a.jsonl"
    records.write(path, [sample()])
    (back,) = records.read(path)
    assert back.messages[1].parts[2] == Image("data:application/octet-stream;base64,AP9wbmc=")
    assert back.messages[4].parts[1].source == ["1.png", "data:application/octet-stream;base64,dHdv"]
    assert back.messages[:1] + back.messages[2:4] == sample().messages[:1] + sample().messages[2:4]
    assert (back.id, back.meta) == (sample().id, sample().meta)


text = st.text(max_size=12)
name = st.text(min_size=1, max_size=12)
part = st.one_of(
    st.builds(Text, text),
    st.builds(Image, name, max_pixels=st.none() | st.integers(1, 9)),
    st.builds(Image, st.binary(min_size=1, max_size=8)),
    st.builds(Video, name, fps=st.none() | st.floats(0.5, 4)),
)
message = st.builds(
    lambda role, parts, reasoning: Message(role, parts, reasoning=reasoning if role == "assistant" else ""),
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.lists(part, max_size=4),
    text,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(message, min_size=1, max_size=3), max_size=3), st.sampled_from([".parquet", ".tar"]))
def test_any_chat_survives(tmp_path, chats, suffix):
    made = [Record(str(i), tuple(chat), {"n": i}) for i, chat in enumerate(chats)]
    path = tmp_path / f"a{suffix}"
    records.write(path, made)
    assert list(records.read(path)) == made


def test_unknown_keys_of_a_record_become_meta():
    made = records.record_from_json({"messages": [{"role": "user", "content": "x"}], "lang": "en", "meta": {"a": 1}})
    assert made.meta == {"lang": "en", "a": 1}


@pytest.mark.parametrize("line", ['{"messages": "x"}', "[1]", "{}", "not json"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": []}\n' + line + "\n")
    with pytest.raises(MessageError, match=r"a\.jsonl:2"):
        list(records.read(path))


def test_pictures_in_memory_are_refused():
    with pytest.raises(MediaUnsupported, match="ndarray"):
        records.message_to_json(Message("user", Image(np.zeros((2, 2, 3), np.uint8))))


# Appending


def test_a_torn_last_line_is_left_out_and_then_cut(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    with JsonlWriter(path) as writer:
        for number in range(3):
            writer.append(plain(number))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole) - len(lines[2]) + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert [record.id for record in records.read(path)] == ["0", "1"]
        with JsonlWriter(path) as writer:
            assert writer.count == 2
            writer.append(plain(2))
        assert path.read_bytes() == whole


def test_a_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    with JsonlWriter(path) as writer:
        writer.append(plain(0))
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert [record.id for record in records.read(path)] == ["0"]
    with JsonlWriter(path) as writer:
        assert writer.count == 1
        writer.append(plain(1))
    assert [record.id for record in records.read(path)] == ["0", "1"]


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00pixels", b"{\n  'a': 1\n}", b"dear diary", b"name\n{cut"])
def test_somebody_elses_file_is_left_as_it_was(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"a\.png' does not hold JSON lines"):
        files.JsonLines(path)
    assert path.read_bytes() == content


def test_a_bad_line_in_the_middle_is_no_torn_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"mess\n{"messages": []}\n')
    with pytest.raises(MessageError):
        list(records.read(path))


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield plain(0)
        raise RuntimeError("no more")

    for suffix in records.SUFFIXES:
        with pytest.raises(RuntimeError):
            records.write(tmp_path / f"a{suffix}", broken())
    assert not list(tmp_path.iterdir())


# Shards


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    records.write(tmp_path / "b.tar", [plain(2)])
    records.write(tmp_path / "a.jsonl", [plain(0), plain(1)])
    records.write(tmp_path / "c.parquet", [plain(3)])
    (tmp_path / "readme.md").write_text("x")
    assert [record.id for record in records.read(tmp_path)] == ["0", "1", "2", "3"]
    assert [record.id for record in records.read(tmp_path, start=2)] == ["2", "3"]


@pytest.mark.parametrize("name", ["none.jsonl", "a.csv", "empty"])
def test_what_holds_no_records(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=name):
        list(records.read(tmp_path / name))
    if name == "a.csv":
        with pytest.raises(SettingsError, match="unknown suffix"):
            records.write(tmp_path / name, [])


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_members_beside_their_json(tmp_path):
    line = json.dumps({"messages": [{"role": "user", "content": [{"image": "k1.png"}, {"image": "other.png"}]}]})
    path = tar_of(tmp_path / "a.tar", {"k1.png": b"png", "k1.json": line.encode(), "k2.json": line.encode()})
    first, second = records.read(path)
    assert first.messages[0].parts == (Image(b"png"), Image("other.png")) and first.id == "k1"
    assert second.messages[0].parts[0] == Image("k1.png")


@pytest.mark.parametrize("name", ["a.pkl", "a.pickle", "a.pyd", "a.pth", "a.pt"])
def test_pickles_are_refused(tmp_path, name):
    with pytest.raises(SettingsError, match="pickle"):
        list(records.read(tar_of(tmp_path / "a.tar", {name: b"x"})))


def test_media_without_messages_and_members_too_large(tmp_path, monkeypatch):
    path = tar_of(tmp_path / "a.tar", {"k.png": b"12345"})
    with pytest.raises(MessageError, match="'k'"):
        list(records.read(path))
    monkeypatch.setattr(files, "MAX_MEMBER_BYTES", 4)
    with pytest.raises(SettingsError, match="5 bytes"):
        list(records.read(path))


def test_parquet_of_others(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": [{"role": "user", "content": "hi"}], "lang": "en"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (made,) = records.read(tmp_path / "a.parquet")
    assert made == Record("0", (Message("user", "hi"),), {"lang": "en"})
    pq.write_table(pa.table({"message": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(MessageError, match="no column 'messages'"):
        list(records.read(tmp_path / "b.parquet"))


# Mixtures


@pytest.fixture
def two(tmp_path):
    records.write(tmp_path / "a.jsonl", [plain(n) for n in range(5)])
    records.write(tmp_path / "b.tar", [plain(100 + n) for n in range(7)])
    return [Source(tmp_path / "a.jsonl", 3.0), Source(tmp_path / "b.tar", 1.0)]


def ids(mix: Mix, count: int) -> list[str]:
    return [record.id for record in itertools.islice(mix, count)]


def test_a_mixture_repeats_follows_its_weights_and_keeps_each_order(two):
    drawn = ids(Mix(two, seed=1), 2000)
    assert drawn == ids(Mix(two, seed=1), 2000)
    assert drawn != ids(Mix(two, seed=2), 2000)
    small = [name for name in drawn if int(name) < 100]
    assert abs(len(small) / 2000 - 0.75) < 0.04
    assert small[:12] == [str(n % 5) for n in range(12)]
    assert max(Counter(small).values()) - min(Counter(small).values()) <= 1


@pytest.mark.parametrize("at", [0, 1, 19, 200])
def test_a_mixture_goes_on_where_it_stopped(two, at):
    whole = ids(Mix(two, seed=4), at + 50)
    first = Mix(two, seed=4)
    ids(first, at)
    state = json.loads(json.dumps(first.state()))
    assert ids(Mix(two, seed=4, state=state), 50) == whole[at:]


def test_mixtures_that_cannot_be(two, tmp_path):
    with pytest.raises(SettingsError, match="no sources"):
        Mix([])
    with pytest.raises(SettingsError, match="weight"):
        Mix([Source(tmp_path / "a.jsonl", 0.0)])
    with pytest.raises(SettingsError, match="2 sources"):
        Mix(two[:1], state=Mix(two).state())
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no records"):
        next(Mix([Source(tmp_path / "empty.jsonl")]))
