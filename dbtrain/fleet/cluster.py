"""The Ray that a driver works on: one that is there, or a small one of its own that ends with the driver."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from dbtrain.errors import FleetError, first_line
from dbtrain.fleet.processes import release, start_guard

STORE_BYTES = 100 * 2**20
"""Object store of an embedded Ray; nothing large goes through it."""
UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")
"""What a node of Ray starts that an embedded one needs not: the autoscaler, a reader of logs, a server for requests."""


@contextmanager
def connected(address: str | None, cpus: int) -> Iterator[None]:
    """Connect to the Ray at an address, or to an embedded Ray on the loopback interface (None).

    No runtime_env is set: a worker inherits its node's environment, and others could read a job's settings.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would make its workers, and so all trainers, give way to every other process of the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if address is not None:
        try:
            ray.init(address=address, namespace="dbtrain", log_to_driver=False, configure_logging=False)
        except ray.exceptions.AuthenticationError as error:
            raise FleetError(
                f"--address {address}: Ray's token is missing or wrong ({first_line(error)}); use the cluster's token "
                "file with RAY_AUTH_MODE=token, see docs/operations.md"
            ) from error
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise FleetError(
                f"--address {address}: no Ray cluster answers, or none that takes this token ({first_line(error)}); "
                "start one, or leave it out"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()
        return
    folder = Path(tempfile.mkdtemp(prefix="dbtrain-ray-"))
    guard = start_guard(folder)
    try:
        start_embedded(cpus, folder)
        close_token()
        if not ray.util.get_node_ip_address().startswith("127."):
            raise FleetError("embedded Ray: listens beyond this machine, because ray was imported before the fleet was")
        yield
    finally:
        ray.shutdown()
        release(guard)


def start_embedded(cpus: int, folder: Path) -> None:
    """Start a Ray of this machine alone. FleetError where it does not come up in the 30 s that Ray gives itself."""
    try:
        with lean():
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, namespace="dbtrain",
                log_to_driver=False, configure_logging=False, object_store_memory=STORE_BYTES, _temp_dir=str(folder),
            )  # fmt: skip
    except Exception as error:  # Ray raises a bare one, and others of libraries below it
        raise FleetError(
            f"embedded Ray: did not start ({first_line(error)}); give the machine air, then run the same command again"
        ) from error


@contextmanager
def lean() -> Iterator[None]:
    """Let a node of Ray start without `UNUSED`, which `ray.init` has no words for; each costs more than a second, and
    one is waited for. A Ray that names them otherwise starts them as ever."""
    kind = getattr(sys.modules.get("ray._private.node"), "Node", None)
    real = {name: getattr(kind, name) for name in UNUSED if hasattr(kind, name)}
    for name in real:
        setattr(kind, name, lambda self, **_: setattr(self, "_webui_url", ""))
    try:
        yield
    finally:
        for name, method in real.items():
            setattr(kind, name, method)


def close_token() -> None:
    """Make Ray's token file readable by its owner only; Ray writes it for everybody."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and stat.S_IMODE(token.stat().st_mode) & 0o077:
        token.chmod(0o600)


def has_gpus() -> bool:
    """Whether a machine of the cluster has a GPU at the moment."""
    return ray.cluster_resources().get("GPU", 0) > 0


def room(gpus: float, cpus: float) -> int:
    """How many actors with these resources each fit on the cluster's machines, if nothing else runs there."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    return sum(min(int(machine.get(name, 0) / each + 1e-9) for name, each in wanted.items()) for machine in machines)
