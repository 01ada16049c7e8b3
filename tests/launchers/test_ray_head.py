"""Open, guarded and absent heads behind real sockets. Real Ray heads are in tests/security/test_cluster.py."""

import http.server
import threading

import pytest

from dbtrain.errors import FleetError
from dbtrain_launchers import ray_head


@pytest.fixture
def answering():
    """A way to start an HTTP server that gives one status to every question; its address."""
    servers = []

    def start(status: int, elsewhere: str = "/elsewhere") -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Location", elsewhere)
                self.end_headers()

            def log_message(self, *args): ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "state"),
    [(200, "open"), (204, "open"), (302, "open"), (404, "open"), (500, "open"), (401, "guarded"), (403, "guarded")],
)
def test_only_a_refusal_counts_as_guarded(answering, status, state):
    assert ray_head.head_state(answering(status)) == state


@pytest.mark.parametrize("status", [401, None])
def test_a_redirection_is_an_answer_and_is_not_followed(answering, status):
    """Not to a guarded head, which would speak for the open one, nor to one that is not there."""
    elsewhere = answering(status) if status else "http://127.0.0.1:1"
    assert ray_head.head_state(answering(302, elsewhere)) == "open"


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1", "http://no-such-host.invalid:8265", "http://[", "http://x:port"]
)
def test_no_answer_is_absent(address):
    assert ray_head.head_state(address) == "absent"


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("10.0.0.1", False), ("0.0.0.0", False), ("8.8.8.8", False), ("no-such-host.invalid", False), ("", False)],
)  # fmt: skip
def test_loopback(host, expected):
    assert ray_head.is_loopback(host) is expected


def test_an_open_head_is_refused_unless_it_is_this_machines_own(answering, monkeypatch):
    address = answering(200)
    ray_head.guarded_head(address)
    monkeypatch.setattr(ray_head, "is_loopback", lambda host: False)
    with pytest.raises(FleetError, match="CVE-2023-48022"):
        ray_head.guarded_head(address)


def test_no_head_is_an_error():
    with pytest.raises(FleetError, match="no Ray head answers"):
        ray_head.guarded_head("http://127.0.0.1:1")


@pytest.mark.parametrize(("mode", "refused"), [(0o600, False), (0o400, False), (0o644, True), (0o640, True)])
def test_a_token_that_others_may_read_is_refused(answering, monkeypatch, tmp_path, mode, refused):
    path = tmp_path / "token"
    path.write_text("x")
    path.chmod(mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    if refused:
        with pytest.raises(FleetError, match="chmod 600"):
            ray_head.guarded_head(answering(401))
    else:
        ray_head.guarded_head(answering(401))


def test_no_token_file_is_no_finding(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert ray_head.token_file_finding() == ""
