"""A finished subject's copy elsewhere: in a folder, or in an object store that fsspec knows.

The copy is `URL/SUBJECT/`, with the files and names of the subject's folder. `record.json` is removed there before
anything changes and written last, after every other file was read back under its digest. So a copy with a record is
whole, and an upload that was killed anywhere is completed by the next one.

`published.json` in the subject's own folder names the copies: {address: [sha256 of each record that was sent there]}.
It is written before the first byte goes out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, cast

from dbtrain.data.location import ADDRESS, PLAIN, REMOTE
from dbtrain.errors import ConfigError, DataError, first_line, shown
from dbtrain.results.card import CARD, CONFIG_FILE
from dbtrain.results.record import RECORD, finished_record
from dbtrain.storage.atomic import file_digest, sweep, sync_folder, write_file

NOTE = "published.json"
BLOCK = 2**25
"""Bytes that are fetched at once when an object is read back."""


class Folder:
    """A subject's copy in a folder of this machine, or of a share. Each file appears whole, by rename."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def digest(self, name: str) -> str | None:
        """sha256 of a file; None if there is no such file."""
        try:
            return file_digest(self.path / name)
        except FileNotFoundError:
            return None

    def put(self, name: str, source: Path) -> None:
        """Copy a file to a name."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        with source.open("rb") as content:
            write_file(path, lambda file: shutil.copyfileobj(content, file))

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        (self.path / name).unlink(missing_ok=True)
        if self.path.is_dir():
            sync_folder(self.path)

    def clear(self) -> None:
        """Remove everything."""
        if self.path.exists():
            shutil.rmtree(self.path)


class Objects:
    """A subject's copy in an object store, which shows an object once the whole of it has arrived."""

    def __init__(self, address: str):
        import fsspec

        try:
            self.files, self.root = fsspec.core.url_to_fs(address, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{shown(address)}: cannot be opened ({first_line(error)}); pip install 'dbtrain[stores]'"
            ) from error

    def read(self, name: str) -> bytes | None:
        """An object's content; None if there is no such object."""
        try:
            return cast(bytes, self.files.cat_file(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None

    def digest(self, name: str) -> str | None:
        """sha256 of an object, which is read for it; None if there is no such object."""
        try:
            with self.files.open(f"{self.root}/{name}", "rb", block_size=BLOCK) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    def put(self, name: str, source: Path) -> None:
        """Send a file."""
        self.files.put_file(str(source), f"{self.root}/{name}")

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        if self.files.exists(f"{self.root}/{name}"):
            self.files.rm_file(f"{self.root}/{name}")

    def clear(self) -> None:
        """Remove everything below the address."""
        if self.files.exists(self.root):
            self.files.rm(self.root, recursive=True)


def copy_at(address: str) -> Folder | Objects:
    """The copy at an address: a path, or SCHEME://NAME/NAME.

    Raises ConfigError for an address that cannot be used: another scheme, a chained one, one with credentials in it,
    and one whose library is not installed.
    """
    match = ADDRESS.match(address)
    if match is None:
        for part in Path(address).parts:
            if part.partition(":")[0] in REMOTE and ":" in part:  # s3:bucket, made absolute
                raise ConfigError(f"publish.to: {shown(address)} is neither a folder nor an address; write {part}//...")
        return Folder(Path(address).expanduser())
    plain = PLAIN.fullmatch(address) and ".." not in address.split("/")
    if match[1].lower() not in REMOTE or not plain:
        raise ConfigError(
            f"publish.to: {shown(address)} cannot be used; give a folder or SCHEME://NAME/NAME with one of "
            f"{', '.join(REMOTE)}, without `..`, `::` or `@`"
        )
    if match[1].lower() == "file":
        return Folder(Path("/" + address.partition("://")[2].lstrip("/")))
    return Objects(address)


def upload(folder: Path, url: str) -> bool:
    """Whether a finished subject had to be uploaded; False if URL/SUBJECT is this very result already.

    Raises DataError for a folder whose files differ from its record, and for a file that does not arrive as it was
    sent; ConfigError where the copy is another training's that was not sent from here.
    """
    record, sent = finished_record(folder), (folder / RECORD).read_bytes()
    address, digest = f"{url.rstrip('/')}/{folder.name}", _sha256(sent)
    copy, notes = copy_at(address), uploads_of(folder)
    if isinstance(copy, Folder) and copy.path.resolve() == folder.resolve():
        raise ConfigError(f"publish.to: {url} is where the run's own results are; give another place")
    there, noted = copy.read(RECORD), notes.get(address, [])
    before = _record_of(there)
    if there is not None and _sha256(there) not in noted and before.get("run") != record["run"]:
        raise ConfigError(
            f"{address}: holds another result (run {str(before.get('run'))[:12]}), which was not sent from here; "
            "use another address, or remove it"
        )
    if digest not in noted:
        sweep(folder, NOTE)
        write_file(folder / NOTE, json.dumps({**notes, address: [*noted, digest]}, indent=1).encode())
    if there == sent:
        return False
    files = result_files(folder, record)
    copy.remove(RECORD)
    for name, want in files.items():
        if copy.digest(name) != want:
            copy.put(name, folder / name)
            if (got := copy.digest(name)) != want:
                raise DataError(f"{address}/{name}: has the sha256 {str(got)[:16]}... there, {want[:16]}... here")
    for name in _named(before) - files.keys():
        copy.remove(name)
    copy.put(RECORD, folder / RECORD)
    if copy.read(RECORD) != sent:
        raise DataError(f"{address}/{RECORD}: is not there as it was sent")
    return True


def result_files(folder: Path, record: dict[str, Any]) -> dict[str, str]:
    """sha256 by name of all files of a finished subject's result but its record: weights, samples, card, recipe."""
    samples = {f"samples/samples/{name}": digest for name, digest in record.get("samples", {}).items()}
    beside = {name: file_digest(folder / name) for name in (CARD, CONFIG_FILE) if (folder / name).exists()}
    return {**record["files"], **samples, **beside}


def uploads_of(folder: Path) -> dict[str, list[str]]:
    """The addresses of a subject's copies, whole or begun, each with the digests of the records sent there."""
    try:
        return dict(json.loads((folder / NOTE).read_text("utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{folder / NOTE}: is damaged ({error}); remove it once you know where copies are") from error


def delete_copy(address: str) -> None:
    """Delete a subject's copy at an address, the record first; one that is gone is no error. Raises DataError where a
    store refuses."""
    try:
        copy = copy_at(address)
        copy.remove(RECORD)
        copy.clear()
    except Exception as error:  # any library's
        raise DataError(f"{address}: the copy was not deleted ({first_line(error)})") from error


def _named(record: dict[str, Any]) -> set[str]:
    """Names of the files of an older result, as its record has them; a plain name only."""
    names = {*record.get("files", {}), *(f"samples/samples/{name}" for name in record.get("samples", {}))}
    return {name for name in names if not name.startswith("/") and ".." not in name.split("/")}


def _record_of(content: bytes | None) -> dict[str, Any]:
    """A record at an address; empty if there is none, or a damaged one."""
    try:
        record = json.loads(content or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
