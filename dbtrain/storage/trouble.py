"""What ended a run for want of disk or memory, in one line with what to do about it."""

import errno
import os
import re

from dbtrain.errors import (
    DbtrainError,
)


def bare(error: DbtrainError) -> DbtrainError:
    """The error without the frames that it came through, which would keep a model in memory for as long as itself. What
    the file system refused stays its cause, so that it can still be told from bad data."""
    error.__cause__ = refused(error)
    error.__traceback__ = error.__context__ = None
    return error


MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "_status_alloc_failed")
"""What devices and allocators say, in small letters, when memory ran out."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the machine or of a device."""
    text = " ".join(str(error).split()).lower()
    kinds = {kind.__name__ for kind in type(error).__mro__}  # torch's own by name: nothing heavy is imported here
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or any(sign in text for sign in MEMORY_SIGNS)


def memory_trouble(error: BaseException) -> str | None:
    """One line on memory that ran out, and what to do, if that is what ended a run; else None."""
    if not out_of_memory(error):
        return None
    return (
        f"memory ran out: {' '.join(str(error).split())[:200] or 'of this machine'}; use train.micro_batch=1, "
        "train.gradient_checkpointing=true or a smaller engine.packed.size, then run the same command again"
    )


DISK_REMEDIES = {
    "ENOSPC": "free space on that disk",
    "EDQUOT": "free space in that quota",
    "EFBIG": "raise the limit on file sizes (ulimit -f)",
    "EROFS": "it is mounted for reading only; choose a folder that can be written",
    "EACCES": "this user has no right to it; change its permissions or choose another folder",
    "EPERM": "this user has no right to it; change its permissions or choose another folder",
    "EIO": "the disk or network share failed; check it",
    "ESTALE": "the network share went away; mount it again",
    "ENOTCONN": "the network share went away; mount it again",
    "ETIMEDOUT": "the machine that holds it does not answer; check the network and that machine",
    "EHOSTDOWN": "the machine that holds it is down; check it",
    "EHOSTUNREACH": "the machine that holds it cannot be reached; check the network",
    "ENODEV": "the disk is gone; check it and mount it again",
    "ENXIO": "the disk is gone; check it and mount it again",
    "EREMOTEIO": "the disk or network share failed; check it",
    "ENOLCK": "the share grants no locks; check its lock service, or mount it with locks",
    "ENAMETOOLONG": "choose a shorter path",
    "EMFILE": "raise the limit on open files (ulimit -n)",
    "ENFILE": "raise this machine's limit on open files (sysctl fs.file-max)",
}
"""What to do about a failure of the file system, by the name of its errno, which not every platform has."""
ONE_FILE = {"EACCES", "EPERM", "EIO", "EREMOTEIO", "ENODEV", "ENXIO", "ENAMETOOLONG"}
"""Which of these may be the trouble of one file alone."""
PATH_REMEDIES = {
    "ENOENT": "check the path",
    "EEXIST": "something else has that name; choose another folder, or move it away",
    "ENOTDIR": "a part of the path is a file; choose another folder",
    "EISDIR": "it is a folder; name a file",
}
"""The same for what a wrong path comes to. A mistake of this program looks alike, so its place can be asked for."""


def refused(error: BaseException) -> OSError | None:
    """What the file system refused, if that is what an exception comes from: its number and path, without any frames.

    Libraries written in Rust (safetensors) raise errors of their own, which tell the number in their text.
    """
    seen: BaseException | None = error
    while seen is not None:
        told = re.search(r"\(os error (\d+)\)", str(seen))
        number = seen.errno if isinstance(seen, OSError) else int(told[1]) if told else None
        name = errno.errorcode.get(number or 0, "")
        path = seen.filename if isinstance(seen, OSError) else None
        if name in DISK_REMEDIES or (name in PATH_REMEDIES and path is not None):
            return OSError(number, os.strerror(number or 0), path)
        seen = seen.__cause__
    return None


def disk_trouble(error: BaseException, paths: bool = True) -> str | None:
    """One line on what the file system refused, if that is what an exception comes from; else None.

    paths: whether a wrong path counts, which may as well be a mistake in a manifest or in this program.
    """
    found = refused(error)
    if found is None:
        return None
    name = errno.errorcode[found.errno or 0]
    where = f"{found.filename}: " if found.filename is not None else ""
    if name in DISK_REMEDIES:
        return (
            f"{where}{found.strerror}; {DISK_REMEDIES[name]}, then run the same command again: "
            "what was finished is kept"
        )
    return f"{where}{found.strerror}; {PATH_REMEDIES[name]} (`dbtrain --traceback ...` shows where)" if paths else None


def is_of_one_file(error: BaseException) -> bool:
    """Whether what the file system refused may be the trouble of one file alone, and not that of a whole disk, share or
    machine."""
    found = refused(error)
    return found is not None and errno.errorcode[found.errno or 0] in ONE_FILE
