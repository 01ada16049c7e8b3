"""A run as a job of a Ray cluster, by its job API: an entrypoint and a runtime environment, without secrets.

Ray runs the entrypoint in a shell. It shows the entrypoint and the runtime environment to all users of the job API.
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
"""Seconds between two questions for the state of a job whose log has ended."""
EXCLUDES = (
    ".git", ".venv*", "venv", "__pycache__", "*.pyc", ".env*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".netrc",
    ".ssh", ".aws", "auth_token", ".ray-token-*", "/data", "/photos", "/runs", "/demo", "/demo-out", "/shards",
    "/priors", "*.tar", "*.ckpt", "*.log",
)  # fmt: skip
"""Patterns, as in .gitignore, of what is never sent: data, results, installed packages, secrets."""


def render(
    plan: LaunchPlan,
    *,
    address: Annotated[str, typer.Option(help="Address of the head's dashboard.")] = "http://127.0.0.1:8265",
    working_dir: Annotated[Path | None, typer.Option(help="Folder to send, such as a checkout.")] = None,
    wheel: Annotated[Path | None, typer.Option(help="Wheel of dbtrain to send.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="More patterns of files not to send; repeats.")] = None,
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; by default Ray chooses one.")] = None,
) -> Rendered:
    """Run as a job of a running Ray cluster and show its log. The request is the same as that of `ray job submit`.

    \b
    Example:
      dbtrain launch ray --address http://head:8265 \\
        -- batch run /nfs/all.csv --config sdxl_lora --out /nfs/all --ledger /ledger
      dbtrain launch ray --working-dir . -- train subjects.csv --subject rex --config tiny --out /tmp/rex
    """
    # Ray sets the GPUs of a fleet's workers. It does not set those of the job's own process, where `train` runs.
    findings = assigned_gpu_findings(plan, "Ray") if plan.is_batch else []
    if not address.startswith(("http://", "https://")):
        findings.append(f"--address: got {address!r}, want that of the dashboard, such as http://head:8265")
    if working_dir is not None and "://" in str(working_dir):
        findings.append(f"--working-dir: got {str(working_dir)!r}, want a folder of this machine")
    if wheel is not None and working_dir is not None:
        findings.append("--wheel, --working-dir: give one of them; a wheel is sent instead of a working folder")
    if working_dir is not None or wheel is not None:
        findings += relative_findings(plan.words)
    if exclude and working_dir is None:
        findings.append("--exclude: needs --working-dir, as nothing is sent without it")
    refuse(findings)
    environment: dict[str, Any] = {}
    variables = dict(plan.env)
    if working_dir is not None:
        environment |= {"working_dir": str(working_dir), "excludes": [*EXCLUDES, *(exclude or ())]}
        # A checkout has three source roots: the folder itself, which Ray adds to the path, and these two.
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
    """A finding for each output path that is relative: it would lie in the job's folder, which Ray removes later."""
    pairs = [word.split("=", 1) if "=" in word else [word, *words[i + 1 : i + 2]] for i, word in enumerate(words)]
    return [
        f"{name} {value}: lies in the folder that Ray unpacks for the job, and later removes; give an absolute path"
        for name, value in (pair for pair in pairs if len(pair) == 2)
        if name in ("--out", "--ledger") and not value.startswith("/")
    ]


def start(rendered: Rendered) -> int:
    """The exit code of the run, after its log was shown. Ctrl-C stops the run.

    Raises FleetError if no head answers, if anybody may run code on it, or if it does not take the job.
    """
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
    """The request, with an unpacked folder in place of a wheel: Ray would install a wheel with all its dependencies."""
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
    """The exit code of a job. Its log is written to standard output as it comes.

    If the log breaks off, the state is asked for every `poll_s` seconds until the job ends. Raises FleetError if the
    head does not answer, or if the job failed without an exit code.
    """
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
        raise FleetError(f"{job}: its head answers no more ({error}); it may go on, see `ray job status`") from None
    if info.driver_exit_code is not None:
        return info.driver_exit_code
    if info.status == "SUCCEEDED":
        return 0
    raise FleetError(f"{job}: {info.status}: {info.message}")


LAUNCHER = Launcher(render, (), start)
