"""Layers over HTTP: what the server gives out and how, and a client that can be cut off at any byte."""

import http.client
import urllib.error
import urllib.request

import pytest
import torch
from layer_server import running, write_small_levels

from s2d.layers.levels import gaussians_of_level
from s2d.layers.manifest import MANIFEST, load_levels
from s2d.layers.records import Encoding
from s2d.layers.serve import build_app, serve
from s2d.layers.stream import Bandwidth, LayerStream, shown_from_prefix

ENCODINGS = [Encoding(), Encoding("quantised", "uint8", "zstd")]


@pytest.fixture(scope="module", params=ENCODINGS, ids=["float32", "quantised"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("levels")
    write_small_levels(path, request.param)
    (path / "secret.txt").write_text("not part of the layers")
    return path


class Watched:
    """An ASGI application that notes requests, and may spoil the bodies of answers."""

    def __init__(self, app):
        self.app, self.requests, self.sent = app, [], 0
        self.break_after = None  # bytes of bodies, then the connection breaks, once
        self.flip_at = None  # this byte of a .bin file is changed

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            self.requests.append((scope["path"], headers.get("range")))
        position = 0

        async def spoiled(message):
            nonlocal position
            body = message.get("body", b"")
            if self.break_after is not None and self.sent + len(body) > self.break_after:
                keep = body[: self.break_after - self.sent]
                self.break_after = None
                await send({**message, "body": keep, "more_body": True})
                raise ConnectionResetError("the test breaks the connection")
            if self.flip_at is not None and scope["path"].endswith(".bin"):
                at = self.flip_at - position
                if 0 <= at < len(body):
                    body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
            position += len(body)
            self.sent += len(body)
            await send({**message, "body": body} if body else message)

        await self.app(scope, receive, spoiled)


@pytest.fixture
def server(folder, tmp_path):
    app = Watched(build_app(folder, allowed_hosts=("127.0.0.1",), viewer_dir=tmp_path / "none"))
    with running(app) as url:
        app.url = url
        yield app


def get(url, **headers):
    request = urllib.request.Request(
        url, headers={key.replace("_", "-"): v for key, v in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))  # fmt: skip


def test_files_come_whole_in_part_and_not_at_all_where_they_are_known(server, folder):
    url = server.url + "layers/rows_1.bin"
    content = (folder / "rows_1.bin").read_bytes()
    digest = load_levels(folder).files["rows_1.bin"].sha256
    status, headers, body = get(url)
    assert (status, body, headers["ETag"]) == (200, content, f'"{digest}"')
    assert headers["Cache-Control"] == "no-cache"
    assert "immutable" in get(f"{url}?sha256={digest}")[1]["Cache-Control"]
    assert get(f"{url}?sha256={'0' * 64}")[1]["Cache-Control"] == "no-cache"

    status, headers, body = get(url, Range="bytes=1000-", If_Range=f'"{digest}"')
    assert (status, body) == (206, content[1000:])
    assert headers["Content-Range"] == f"bytes 1000-{len(content) - 1}/{len(content)}"
    assert get(url, Range="bytes=5-9")[2] == content[5:10]
    assert get(url, Range="bytes=1000-", If_Range='"another"')[2] == content
    assert get(url, Range=f"bytes={len(content)}-")[0] == 416

    assert get(url, If_None_Match=f'"x", W/"{digest}"')[0::2] == (304, b"")
    assert get(url, If_None_Match='"x"')[0] == 200
    status, headers, body = get(server.url + "layers/levels.json")
    assert body == (folder / MANIFEST).read_bytes()
    assert get(server.url + "layers/levels.json", If_None_Match=headers["ETag"])[0] == 304


@pytest.mark.parametrize(
    "path",
    [
        "layers/secret.txt",
        "layers/../secret.txt",
        "layers/%2e%2e/%2e%2e/etc/passwd",
        "layers/..%2f..%2fetc/passwd",
        "layers//etc/passwd",
        "layers/rows_9.bin",
        "secret.txt",
        "%2e%2e/secret.txt",
    ],
)
def test_nothing_else_is_given_out(server, path):
    connection = http.client.HTTPConnection(server.url.split("/")[2])  # sends the path as it is
    connection.request("GET", "/" + path)
    answer = connection.getresponse()
    assert answer.status in (404, 405)
    assert b"not part of" not in answer.read()


def test_a_name_that_was_pointed_at_this_machine_is_refused(server):
    assert get(server.url + "layers/levels.json", Host="evil.example")[0] == 400
    assert "build_viewer.sh" in get(server.url)[2].decode()


def test_what_has_arrived_can_be_shown_at_any_byte(folder):
    levels = load_levels(folder)
    names = [name for k in range(len(levels)) for name in levels.new_files(k)]
    content = {name: (folder / name).read_bytes() for name in names}
    ends, total = {}, 0
    for name in names:
        total += len(content[name])
        ends[name] = total
    complete = {ends[levels.levels[k].rows_file]: k for k in range(len(levels))}
    cuts = {
        0,
        1,
        *range(0, total, total // 60),
        *(e + d for e in ends.values() for d in (-1, 0, 1)),
    }
    level_before, rows_before = -1, 0
    for cut in sorted(cut for cut in cuts if cut <= total):
        have = {n: content[n][: max(0, cut - ends[n] + len(content[n]))] for n in names}
        level, share, gaussians = shown_from_prefix(levels, have)
        assert level >= level_before and gaussians.num >= rows_before and 0 <= share < 1
        level_before, rows_before = level, gaussians.num
        if cut in complete:
            assert level == complete[cut] and share == 0
            assert same(gaussians, gaussians_of_level(levels, level))
        elif level >= 0:
            lower = gaussians_of_level(levels, level)
            assert torch.equal(gaussians.means[: lower.num], lower.means)
            if share == 0:
                assert same(gaussians, lower)
    assert level_before == len(levels) - 1


def test_opacities_move_from_the_old_level_to_the_new_one_with_its_rows(tmp_path):
    levels = write_small_levels(tmp_path)
    have = {name: (tmp_path / name).read_bytes() for name in levels.files}
    have["rows_1.bin"] = have["rows_1.bin"][: len(have["rows_1.bin"]) // 2]
    _, share, shown = shown_from_prefix(levels, have)
    assert 0.2 < share < 0.8
    old, new = (torch.sigmoid(gaussians_of_level(levels, k).opacity_logits[:1500]) for k in (0, 1))
    expected = old + share * (new - old)
    error = (torch.sigmoid(shown.opacity_logits[:1500]) - expected).abs().max()
    assert error < 1e-6  # measured 6e-8


def test_a_stream_shows_level_0_first_and_ends_with_all(server, folder, tmp_path):
    stream = LayerStream(server.url + "layers", tmp_path / "cache", refresh_seconds=0.0)
    shown = list(stream.updates())
    finished = [next(s for s in shown if s.level == k) for k in range(3)]
    for k, state in enumerate(finished):
        assert same(state.gaussians, gaussians_of_level(folder, k))
    assert finished[0].num_bytes < 0.4 * shown[-1].num_bytes
    assert len(shown) > 6, "refines while bytes arrive"
    assert shown[-1].num_bytes == server.sent == sum(p.stat().st_size for p in (tmp_path / "cache").iterdir())  # fmt: skip
    # A second visit asks for the manifest alone.
    server.requests.clear()
    again = list(LayerStream(server.url + "layers", tmp_path / "cache").updates())
    assert same(again[-1].gaussians, shown[-1].gaussians)
    assert [path for path, _ in server.requests] == ["/layers/levels.json"]


def test_a_broken_connection_goes_on_at_its_byte(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("s2d.layers.stream.FIRST_WAIT_SECONDS", 0.01)
    levels = load_levels(folder)
    size = levels.files["rows_0.bin"].bytes
    server.break_after = (folder / MANIFEST).stat().st_size + size // 2
    stream = LayerStream(server.url + "layers", tmp_path, max_level=0)
    *_, shown = stream.updates()
    assert same(shown.gaussians, gaussians_of_level(folder, 0))
    asked = [ranges for path, ranges in server.requests if path.endswith("rows_0.bin")]
    assert len(asked) == 2 and asked[0] is None and asked[1].startswith("bytes=")
    assert stream.num_bytes < size * 1.01 + (folder / MANIFEST).stat().st_size


def test_a_stopped_run_goes_on_where_it_was(server, folder, tmp_path):
    levels = load_levels(folder)
    content = (folder / "rows_0.bin").read_bytes()
    (tmp_path / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    (tmp_path / "rows_0.bin.part").write_bytes(content[:1000])
    list(LayerStream(server.url + "layers", tmp_path, max_level=0).updates())
    assert server.requests[-1] == ("/layers/rows_0.bin", "bytes=1000-")
    assert (tmp_path / "rows_0.bin").read_bytes() == content
    # What was begun of another model is not gone on with.
    other = tmp_path / "other"
    write_small_levels(other, Encoding("float16"))
    for name in levels.files:
        (other / name).unlink()
    (other / "rows_0.bin.part").write_bytes(b"x" * 500)
    list(LayerStream(server.url + "layers", other, max_level=0).updates())
    assert server.requests[-1] == ("/layers/rows_0.bin", None)
    assert (other / "rows_0.bin").read_bytes() == content


@pytest.mark.parametrize("at", [3, 20, 900])
def test_a_flipped_byte_is_refused_by_name_and_not_kept(server, tmp_path, at):
    server.flip_at = at
    stream = LayerStream(server.url + "layers", tmp_path, refresh_seconds=0.0)
    with pytest.raises(ValueError, match=r"rows_0\.bin"):
        list(stream.updates())
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_levels_are_chosen_by_bandwidth_alone(server, tmp_path, caplog):
    stream = LayerStream(server.url + "layers", tmp_path / "a", budget_seconds=0.0)
    with caplog.at_level("INFO", "s2d"):
        assert [shown.level for shown in stream.updates()][-1] == 0
    assert "level 1 stays away" in caplog.text
    stream = LayerStream(server.url + "layers", tmp_path / "b", budget_seconds=600.0)
    assert [shown.level for shown in stream.updates()][-1] == 2


def test_bandwidth_follows_what_the_link_does_now():
    measured = Bandwidth()
    assert measured.bytes_per_second == 0
    for _ in range(50):
        measured.add(1000, 0.1)
    assert measured.bytes_per_second == pytest.approx(10_000)
    for _ in range(50):  # five seconds of a tenth: what came before counts a 32nd
        measured.add(100, 0.1)
    assert 1000 < measured.bytes_per_second < 1400


def test_a_port_that_is_taken_and_a_folder_without_layers_say_what_to_do(server, folder, tmp_path):
    port = int(server.url.split(":")[2].strip("/"))
    with pytest.raises(ValueError, match="Give another --port"):
        serve(folder, port=port)
    with pytest.raises(FileNotFoundError, match=r"tools/layers\.py"):
        serve(tmp_path)


def test_no_server_and_wrong_folder_say_what_to_do(server, tmp_path, monkeypatch):
    monkeypatch.setattr("s2d.layers.stream.FIRST_WAIT_SECONDS", 0.01)
    with pytest.raises(ConnectionError, match="goes on from there"):
        LayerStream("http://127.0.0.1:9/", tmp_path)
    with pytest.raises(ConnectionError, match=r"404.*levels\.json"):
        LayerStream(server.url, tmp_path)
