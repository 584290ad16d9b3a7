"""Downloads against a server on this machine that breaks off, lies, or has nothing."""

import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from onnxq.errors import OnnxqError
from onnxq.progress import Silent
from onnxq.zoo import download as module
from onnxq.zoo.download import download

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves files of a dictionary.

    `cuts` are the numbers of bytes after which the answers, one after another, break off; `ranges`
    is whether parts may be asked for; `asked` is what was.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cuts, self.ranges, self.asked = files, [], True, []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append((self.path, asked))
        if self.path not in server.files:
            self.send_error(404)
            return
        content, start = server.files[self.path], 0
        if asked and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + server.cuts.pop(0) if server.cuts else len(content)
        self.wfile.write(content[start:end])
        self.close_connection = True

    def log_message(self, *args):
        pass


@contextmanager
def running(made):
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def served(folder):
    """A server of a folder's files."""
    files = {f"/{f.relative_to(folder)}": f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    return running(Server(files))


@pytest.fixture
def server():
    with running(Server({"/a.bin": CONTENT})) as made:
        yield made


def fetch(server, path, sha=SHA, name="a.bin"):
    download(f"{server.address}/{name}", path, sha, Silent())


def test_what_breaks_off_goes_on_from_there(server, tmp_path):
    server.cuts = [100_000, 50_000]
    fetch(server, tmp_path / "new" / "a.bin")
    assert (tmp_path / "new" / "a.bin").read_bytes() == CONTENT
    ranges = [r for _, r in server.asked]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a.bin"]


def test_a_later_call_goes_on_too(server, tmp_path):
    server.cuts = [100_000, 0, 0, 0]
    with pytest.raises(OnnxqError, match=r"breaks off again.*it goes on where this broke off"):
        fetch(server, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin.part").read_bytes() == CONTENT[:100_000]
    server.asked.clear()
    fetch(server, tmp_path / "a.bin")
    assert server.asked == [("/a.bin", "bytes=100000-")]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_without_parts_gives_all_of_it_again(server, tmp_path):
    server.ranges, server.cuts = False, [100_000]
    fetch(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.asked) == 2


@pytest.mark.parametrize("begun", [CONTENT, b"x" * 1000, b"x" * 300_000, b"x" * 400_000])
def test_what_is_there_of_another_file_is_given_up(server, tmp_path, begun):
    (tmp_path / "a.bin.part").write_bytes(begun)
    fetch(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.asked) == (1 if begun == CONTENT else 2)
    assert not (tmp_path / "a.bin.part").exists()


def test_another_file_is_refused(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(OnnxqError, match="the server gives another file: its checksum is"):
        fetch(server, tmp_path / "a.bin", "0" * 64)
    assert [f.name for f in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_what_the_server_has_not(server, tmp_path):
    with pytest.raises(OnnxqError, match=r"cannot be fetched: Not Found \(http.*/b\.bin\)"):
        fetch(server, tmp_path / "b.bin", name="b.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_says_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_S", 0.05)
    release = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda self: release.wait(10))
    with pytest.raises(OnnxqError, match="cannot be fetched: timed out"):
        fetch(server, tmp_path / "a.bin")
    release.set()


def test_no_server(tmp_path):
    with Server({}) as gone:
        address = gone.address
    with pytest.raises(OnnxqError, match=r"cannot be fetched: .*refused"):
        download(f"{address}/a.bin", tmp_path / "a.bin", SHA, Silent())


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a", "a.bin", "/a.bin"])
def test_only_http(url, tmp_path):
    with pytest.raises(OnnxqError, match="is no address of http or https"):
        download(url, tmp_path / "a.bin", SHA, Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OnnxqError, match="cannot be written"):
        fetch(server, tmp_path / "file" / "a.bin")
