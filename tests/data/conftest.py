import http.server
import threading

import pytest

from fr_jax.data import _cifar, _mnist, _tfds_copies

CLOSED = "http://127.0.0.1:1/"  # the port is closed: connections are refused at once


@pytest.fixture
def bare_machine(tmp_path, monkeypatch):
    """No network, no TensorFlow, empty folders; and data sets of the official layout with few records."""
    monkeypatch.setenv("FR_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(_tfds_copies, "can_prepare", lambda: False)
    for name, layout in list(_cifar.FORMATS.items()):
        small = layout._replace(
            train_files=dict.fromkeys(layout.train_files, 30),
            test_files=dict.fromkeys(layout.test_files, 20),
            archive=layout.archive._replace(url=CLOSED + layout.archive.file_name),
            digests={},
        )
        monkeypatch.setitem(_cifar.FORMATS, name, small)
    for name, file in list(_mnist.FILES.items()):
        shape = (150 if name.startswith("train") else 20, *file.shape[1:])
        archive = file.archive._replace(url=CLOSED + file.archive.file_name, mirrors=())
        monkeypatch.setitem(_mnist.FILES, name, _mnist.IdxFile(shape, archive))


class Server:
    """An HTTP server on this machine; it sends only the first ``cut_after`` bytes to the first ``cuts`` requests."""

    def __init__(self, files, *, cut_after=None, cuts=100):
        self.sent = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                body = files.get(self.path[1:])
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                return body or b""

            def do_GET(self):
                body = self.do_HEAD()
                server.sent.append(self.path[1:])
                self.wfile.write(body[: cut_after if len(server.sent) <= cuts else None])

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    """``server(files, cut_after=, cuts=) -> Server``; nothing sleeps before a retry."""
    monkeypatch.setattr("pooch.core.time.sleep", lambda _: None)
    servers = []

    def start(files, **how):
        servers.append(Server(files, **how))
        return servers[-1]

    yield start
    for one in servers:
        one.close()
