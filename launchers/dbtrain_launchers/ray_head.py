"""Check whether a Ray head runs the code of anyone who can reach it, by an HTTP request without a token."""

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
"""A cheap request. Ray protects it like the job API, which runs commands."""

HeadState = Literal["open", "guarded", "absent"]


class Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirection: urllib then raises an HTTPError with the status of the redirection."""

    def redirect_request(self, *_: object) -> None:
        return None


def head_state(address: str) -> HeadState:
    """How the dashboard at http(s)://host:port answers a request without a token.

    `guarded`: by 401 or 403. `open`: by anything else. `absent`: not at all.
    """
    try:
        # A redirection is not followed: the answer of another server would say nothing about this head.
        with urllib.request.build_opener(Stay).open(address.rstrip("/") + QUESTION, timeout=ANSWER_S):
            return "open"
    except urllib.error.HTTPError as error:
        return "guarded" if error.code in (401, 403) else "open"
    except (OSError, ValueError, http.client.InvalidURL):
        return "absent"
    except http.client.HTTPException:
        return "open"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host, at every address of it; False for an unknown host."""
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), None)
    except (OSError, UnicodeError):
        return False
    # The zone of an IPv6 address, as in fe80::1%eth0, is no part of the number.
    numbers = [entry[4][0].split("%")[0] for entry in addresses]  # type: ignore[union-attr]
    return all(ipaddress.ip_address(number).is_loopback for number in numbers)


def guarded_head(address: str) -> None:
    """Raise FleetError unless the head at http(s)://host:port answers and is safe to send a job to.

    Safe is a head that asks for a token, if no others may read the token file; and any head on the loopback address,
    whose safety is up to the owner of this machine.
    """
    state, host = head_state(address), urlsplit(address).hostname or ""
    if state == "absent":
        raise FleetError(f"{address}: no Ray head answers; start one, or give its dashboard's address")
    if state == "open" and not is_loopback(host):
        raise FleetError(
            f"{address}: this head runs the code of anyone who can reach it (CVE-2023-48022); "
            "restart it with RAY_AUTH_MODE=token and a token file, see docs/operations.md"
        )
    finding = token_file_finding()
    if state == "guarded" and finding:
        raise FleetError(finding)


def token_path() -> Path:
    """The file that Ray reads its token from if no variable holds the token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def token_file_finding() -> str:
    """A finding if other users may read Ray's token file; "" if they may not, or if there is no file."""
    path = token_path()
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return ""
    return f"{path}: others may read it (mode {mode:04o}; Ray writes 0644); chmod 600 {path}" if mode & 0o077 else ""
