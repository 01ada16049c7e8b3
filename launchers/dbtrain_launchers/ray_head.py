"""Whether a Ray head runs the code of anyone who can reach it: asked over HTTP as a stranger would, without a token."""

import http.client
import ipaddress
import os
import socket
import stat
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from dbtrain.errors import FleetError

ANSWER_S = 5.0
"""Seconds to wait for a head's answer."""
QUESTION = "/api/version"
"""A cheap question under the same guard as the job API, which runs a command for whoever may post to it."""

HeadState = Literal["open", "guarded", "absent"]


class Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which then is an error with the answer's code."""

    def redirect_request(self, *_: object) -> None:
        return None


def head_state(address: str) -> HeadState:
    """What the dashboard at http(s)://host:port tells somebody without a token.

    `guarded` is 401 or 403 and nothing else: whatever else answers is counted as open. `absent` does not answer.
    """
    try:
        # Nothing is sent but the question, and a redirection is an answer.
        with urllib.request.build_opener(Stay).open(address.rstrip("/") + QUESTION, timeout=ANSWER_S):
            return "open"
    except urllib.error.HTTPError as error:
        return "guarded" if error.code in (401, 403) else "open"
    except (OSError, ValueError, http.client.InvalidURL):
        return "absent"
    except http.client.HTTPException:
        return "open"


def is_loopback(host: str) -> bool:
    """Whether every address of a host can be reached from this machine only; False for an unknown host."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(entry[4][0].split("%")[0]).is_loopback for entry in found)  # type: ignore[union-attr]


def guarded_head(address: str) -> None:
    """Nothing; raises FleetError when no head answers at http(s)://host:port, or one that runs anybody's code does.

    An open head on the loopback address is left to the person who owns the machine.
    """
    state, host = head_state(address), urlsplit(address).hostname or ""
    if state == "absent":
        raise FleetError(f"{address}: no Ray head answers; start one, or give its dashboard's address")
    if state == "open" and not is_loopback(host):
        raise FleetError(
            f"{address}: this head runs the code of anyone who can reach it (CVE-2023-48022); "
            "restart it with RAY_AUTH_MODE=token and a token file, see docs/operations.md"
        )
    found = token_file_finding()
    if state == "guarded" and found:
        raise FleetError(found)


def token_path() -> Path:
    """The file that Ray's token comes from when no variable holds it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def token_file_finding() -> str:
    """What is wrong with Ray's token file, such as others' right to read it; "" for nothing or for no file."""
    path = token_path()
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return ""
    return f"{path}: others may read it (mode {mode:04o}; Ray writes 0644); chmod 600 {path}" if mode & 0o077 else ""
