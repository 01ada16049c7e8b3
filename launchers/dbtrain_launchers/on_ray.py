"""A run as a job of a Ray cluster, through its job API: an entrypoint, a runtime environment, and no secrets.

Ray runs an entrypoint with a shell and shows it, and the runtime environment, to whoever may ask the job API.
"""

import json
import shlex
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dbtrain.errors import FleetError
from dbtrain_launchers.plan import Launcher, LaunchPlan, Rendered, assigned_gpu_findings, refuse
from dbtrain_launchers.ray_head import guarded_head

POLL_S = 5.0
"""Seconds between looks at a job whose log broke off."""
EXCLUDES = (
    ".git", ".venv*", "venv", "__pycache__", "*.pyc", ".env*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".netrc",
    ".ssh", ".aws", "auth_token", ".ray-token-*", "/data", "/photos", "/runs", "/demo", "/demo-out", "/shards",
    "/priors", "*.tar", "*.ckpt", "*.log",
)  # fmt: skip
"""What a working folder never sends, in .gitignore's notation: data, results, other people's code, secrets."""


def render(
    plan: LaunchPlan,
    *,
    address: Annotated[str, typer.Option(help="The head's dashboard.")] = "http://127.0.0.1:8265",
    working_dir: Annotated[Path | None, typer.Option(help="Folder to send, such as a checkout.")] = None,
    wheel: Annotated[Path | None, typer.Option(help="dbtrain's wheel to send.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="More patterns not to send; repeats.")] = None,
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; by default Ray chooses one.")] = None,
) -> Rendered:
    """Run as a job of a running Ray cluster and show its log; the request is what `ray job submit` would send.

    \b
    Example:
      dbtrain launch ray --address http://head:8265 \\
        -- batch run /nfs/all.csv --config sdxl_lora --out /nfs/all --ledger /ledger
      dbtrain launch ray --working-dir . -- train subjects.csv --subject rex --config tiny --out /tmp/rex
    """
    # `train` runs in the job's own process, whose GPUs Ray leaves alone; a fleet's workers get theirs from Ray.
    findings = assigned_gpu_findings(plan, "Ray") if plan.is_batch else []
    if not address.startswith(("http://", "https://")):
        findings.append(f"--address: got {address!r}, want the dashboard's, such as http://head:8265")
    if working_dir is not None and "://" in str(working_dir):
        findings.append(f"--working-dir: got {str(working_dir)!r}, want a folder of this machine")
    if wheel is not None and working_dir is not None:
        findings.append("--wheel, --working-dir: give one of them; a wheel takes the working folder's place")
    if working_dir is not None or wheel is not None:
        findings += relative_findings(plan.words)
    if exclude and working_dir is None:
        findings.append("--exclude: needs --working-dir, as nothing is sent without it")
    refuse(findings)
    environment: dict[str, Any] = {}
    variables = dict(plan.env)
    if working_dir is not None:
        environment |= {"working_dir": str(working_dir), "excludes": [*EXCLUDES, *(exclude or ())]}
        # A checkout keeps its packages in three source roots; Ray itself adds only the folder.
        variables.setdefault("PYTHONPATH", "kernels:launchers")
    if wheel is not None:
        environment["working_dir"] = str(wheel)
    if variables:
        environment["env_vars"] = variables
    request = {
        "entrypoint": shlex.join(["python", "-m", "dbtrain", *plan.cluster_words]),
        "runtime_env": environment,
        **({"submission_id": submission_id} if submission_id else {}),
    }
    return Rendered(("POST", f"{address.rstrip('/')}/api/jobs/"), json.dumps(request, indent=2) + "\n")


def relative_findings(words: Sequence[str]) -> list[str]:
    """What would be written into the folder that Ray unpacks for a job, and removes when it needs the room."""
    pairs = [word.split("=", 1) if "=" in word else [word, *words[i + 1 : i + 2]] for i, word in enumerate(words)]
    return [
        f"{name} {value}: lies in the folder that Ray unpacks for the job, and later removes; give a path from / on"
        for name, value in (pair for pair in pairs if len(pair) == 2)
        if name in ("--out", "--ledger") and not value.startswith("/")
    ]


def start(rendered: Rendered) -> int:
    """The exit code of the run, whose log is shown; Ctrl-C stops the run. Raises FleetError for an unsafe head."""
    address = rendered.command[1].removesuffix("/api/jobs/")
    guarded_head(address)
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise FleetError("Ray's job client is not installed; pip install 'ray[default]'") from None
    try:
        client = JobSubmissionClient(address)
        with unpacked(json.loads(rendered.stdin)) as request:
            job = client.submit_job(**request)
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise FleetError(f"{address}: the job was not accepted: {str(error).strip().splitlines()[-1]}") from None
    sys.stderr.write(f"{job}: submitted to {address}\n")
    return follow(client, job)


@contextmanager
def unpacked(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The request with a folder where it names a wheel: Ray would install a wheel with all that it depends on."""
    wheel = request["runtime_env"].get("working_dir", "")
    if not wheel.endswith(".whl"):
        yield request
        return
    with tempfile.TemporaryDirectory(prefix="dbtrain-wheel-") as folder:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        except (OSError, zipfile.BadZipFile) as error:
            raise FleetError(f"{wheel}: the wheel cannot be read: {error}") from None
        yield request | {"runtime_env": request["runtime_env"] | {"working_dir": folder}}


def follow(client: Any, job: str, poll_s: float = POLL_S) -> int:
    """The exit code of a job, whose log goes to standard output as it comes; where that breaks off, the job's end is
    waited for."""
    import asyncio

    async def show() -> None:
        async for lines in client.tail_job_logs(job):
            sys.stdout.write(lines)
            sys.stdout.flush()

    try:
        try:
            asyncio.run(show())
        except Exception as error:
            sys.stderr.write(f"{job}: its log breaks off ({error}); waiting for its end\n")
        while not (info := client.get_job_info(job)).status.is_terminal():
            time.sleep(poll_s)
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    except (OSError, RuntimeError) as error:
        raise FleetError(f"{job}: its head answers no more ({error}); it may go on, ask `ray job status`") from None
    if info.driver_exit_code is not None:
        return info.driver_exit_code
    if info.status == "SUCCEEDED":
        return 0
    raise FleetError(f"{job}: {info.status}: {info.message}")


LAUNCHER = Launcher(render, (), start)
