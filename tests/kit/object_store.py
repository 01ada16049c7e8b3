"""A real S3 server on this machine (moto's), which can be told to fail, to be slow, to cut, to be full, and to kill."""

import logging
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest

BUCKET = "results"
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1"}  # fmt: skip


class Store:
    """The server's other side. behave: what is done at a request's number and environment, before it is answered:
    None answers it; a number is the status that is answered instead. after: called when it has been answered."""

    def __init__(self):
        self.behave = lambda number, environ: None
        self.after = lambda number, environ: None
        self.requests: list[str] = []
        self.problems: list[str] = []

    def objects(self) -> dict[str, bytes]:
        """Content by key of everything that can be seen."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        bucket = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets.get(BUCKET)
        return {key: bytes(value.value) for key, value in (bucket.keys.items() if bucket else ())}

    def keep(self, key: str, content: bytes) -> None:
        """Put other content under a key, behind the server's back."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(BUCKET, key, content)

    def clear(self) -> None:
        """Forget objects, requests and orders."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        backend.reset()
        backend.create_bucket(BUCKET, "us-east-1")
        self.__init__()


@contextmanager
def object_store():
    """A store that `s3://results/...` reaches in this process and its forks. Its client tries nothing twice."""
    pytest.importorskip("moto")
    s3fs = pytest.importorskip("s3fs")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store, app = Store(), DomainDispatcherApplication(create_backend_app)

    def answer(environ, start):
        store.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        number = len(store.requests)
        what = store.behave(number, environ)
        if what == "cut":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            what = 500
        if what is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{what} told to", [("Content-Type", "application/xml")])
            if environ["REQUEST_METHOD"] == "HEAD":
                return []
            return [b"<Error><Code>ToldTo</Code><Message>told to</Message></Error>"]
        try:
            return list(app(environ, start))
        finally:
            store.after(number, environ)

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}.items():
            patch.setenv(name, value)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        store.clear()
        try:
            yield store
        finally:
            server.shutdown()
            s3fs.S3FileSystem.clear_instance_cache()


def kill_at(store: Store, at: int, answered: bool, pid_file) -> None:
    """Kill the process whose id is in a file at the `at`-th request: before it is done, or before its answer."""

    def strike(number, environ):
        if number == at:
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
            time.sleep(0.01)

    setattr(store, "after" if answered else "behave", strike)
