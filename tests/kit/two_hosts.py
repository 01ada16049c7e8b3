"""Two hosts on one machine: network namespaces joined by a virtual cable, for runs over several machines.

Needs root and iproute2. Each host has its own interfaces, addresses and ports; file system and processor are shared.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from tests.kit.main_job import environment

CABLE = "cable0"
"""The interface's name on both hosts."""


def missing() -> str:
    """What keeps this machine from being two hosts; "" for nothing."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "two hosts on one machine need root and iproute2"
    name = f"try{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    ip("netns", "del", name)
    return ""


def missing_job_api() -> str:
    """What keeps Ray's job API from running here; "" for nothing."""
    return "" if find_spec("aiohttp_cors") else "Ray's job API needs pip install 'ray[default]'"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def search_path() -> dict[str, str]:
    """The checkout's packages first, then whatever this process was told to look into."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [environment()["PYTHONPATH"], os.environ.get("PYTHONPATH")]))}


@dataclass
class Host:
    """A network namespace with one address, and the processes that were started in it."""

    name: str
    address: str
    variables: dict[str, str] = field(default_factory=dict)

    def start(self, *words, **options) -> subprocess.Popen:
        """A process on this host, in a session of its own."""
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
        return subprocess.Popen(["ip", "netns", "exec", self.name, *map(str, words)], start_new_session=True,
                                env={**environment(), **search_path(), **self.variables}, **given)  # fmt: skip

    def run(self, *words, timeout_s: float = 120, **options) -> subprocess.CompletedProcess:
        """A process on this host to its end; killed with its children if that takes too long."""
        process = self.start(*words, **options)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"not finished after {timeout_s} s: {words}\n{process.communicate()[0]}") from None
        return subprocess.CompletedProcess(words, process.returncode, output, "")

    def dbtrain(self, *words, **options) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", "dbtrain", *words, **options)

    def pids(self) -> list[int]:
        """Processes that live in this host's network."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def cut(self) -> None:
        """Pull this host's cable: packets vanish, nobody is told."""
        ip("-n", self.name, "link", "set", CABLE, "down")

    def kill(self) -> None:
        """End every process of this host at once, as a power cut does."""
        for _ in range(50):
            pids = self.pids()
            if not pids:
                return
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


@contextmanager
def two_hosts(**variables: str) -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them; whatever happens, their processes and networks are gone afterwards."""
    tag = secrets.token_hex(3)
    net = f"10.{int(tag[:2], 16)}.{int(tag[2:4], 16)}"
    # gloo would look for an address under the machine's name, which both hosts share.
    # Ray's workers would give way to the processes of other tests.
    variables = {"GLOO_SOCKET_IFNAME": CABLE, "RAY_worker_niceness": "0", **variables}
    hosts = [Host(f"db{tag}{letter}", f"{net}.{number}", dict(variables)) for number, letter in ((1, "a"), (2, "b"))]
    try:
        for host in hosts:
            ip("netns", "add", host.name)
        first, second = hosts
        ip("link", "add", CABLE, "netns", first.name, "type", "veth", "peer", "name", CABLE, "netns", second.name)
        for host in hosts:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", CABLE)
            for interface in ("lo", CABLE):
                ip("-n", host.name, "link", "set", interface, "up")
        yield first, second
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)


QUICK_RAY = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
"""A cut-off node is given up after about 4 s, where Ray's own settings wait half a minute."""


@contextmanager
def ray_on(hosts: tuple[Host, Host], folder: Path, token: Path | None, cpus: int = 1) -> Iterator[str]:
    """A Ray cluster with a node on each host, guarded by a token file or open (None); its dashboard's address."""
    for host in hosts:
        host.variables |= QUICK_RAY | {"RAY_AUTH_MODE": "disabled" if token is None else "token"}
        if token is not None:
            host.variables["RAY_AUTH_TOKEN_PATH"] = str(token)
    first, second = hosts
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--num-cpus={cpus}", "--disable-usage-stats"]
    head = ["--head", f"--node-ip-address={first.address}", "--port=6379", f"--dashboard-host={first.address}"]
    done = first.run(*ray, *head, f"--temp-dir={folder}", "--object-store-memory=100000000")
    assert done.returncode == 0, done.stdout
    joined = second.run(*ray, f"--address={first.address}:6379", f"--node-ip-address={second.address}",
                        "--object-store-memory=100000000")  # fmt: skip
    assert joined.returncode == 0, joined.stdout
    address = f"http://{first.address}:8265"
    ask = (
        "import sys, time; from dbtrain_launchers.ray_head import head_state\n"
        "while head_state(sys.argv[1]) == 'absent': time.sleep(0.2)"
    )
    assert first.run(sys.executable, "-c", ask, address, timeout_s=60).returncode == 0
    try:
        yield address
    finally:
        for host in hosts:
            host.kill()
        shutil.rmtree(folder, ignore_errors=True)


def write_token(path: Path) -> Path:
    """A file with a fresh token that only its owner may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(24))
    return path
