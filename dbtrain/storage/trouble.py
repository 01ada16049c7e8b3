"""Failures of disks and memory, each as one line with its remedy."""

import errno
import os
import re

from dbtrain.errors import DbtrainError


def bare(error: DbtrainError) -> DbtrainError:
    """The error without its frames, which would keep a model in memory as long as the error is kept.

    A refusal of the file system stays as the cause, so that the error is not taken for bad data.
    """
    error.__cause__ = refused(error)
    error.__traceback__ = error.__context__ = None
    return error


MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "_status_alloc_failed")
"""Texts of devices and allocators, in small letters, when memory ran out."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the machine or of a device."""
    text = " ".join(str(error).split()).lower()
    kinds = {kind.__name__ for kind in type(error).__mro__}  # torch's own by name: nothing heavy is imported here
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or any(sign in text for sign in MEMORY_SIGNS)


def memory_trouble(error: BaseException) -> str | None:
    """One line on memory that ran out, and what to do. None for an error of another kind."""
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
"""Those of these failures that may concern one file alone."""
PATH_REMEDIES = {
    "ENOENT": "check the path",
    "EEXIST": "something else has that name; choose another folder, or move it away",
    "ENOTDIR": "a part of the path is a file; choose another folder",
    "EISDIR": "it is a folder; name a file",
}
"""The same for failures that a wrong path causes. A mistake in this program can look alike: they offer a traceback."""


def refused(error: BaseException) -> OSError | None:
    """The file system's refusal behind an exception, with number and path and without frames. None if there is none.

    Libraries written in Rust (safetensors) raise errors of their own, whose text holds the number.
    """
    seen: BaseException | None = error
    while seen is not None:
        in_text = re.search(r"\(os error (\d+)\)", str(seen))
        number = seen.errno if isinstance(seen, OSError) else int(in_text[1]) if in_text else None
        name = errno.errorcode.get(number or 0, "")
        path = seen.filename if isinstance(seen, OSError) else None
        if name in DISK_REMEDIES or (name in PATH_REMEDIES and path is not None):
            return OSError(number, os.strerror(number or 0), path)
        seen = seen.__cause__
    return None


def disk_trouble(error: BaseException, paths: bool = True) -> str | None:
    """One line on the file system's refusal behind an exception. None if there is none.

    paths: whether a wrong path counts. A wrong path may also be a mistake in a manifest or in this program.
    """
    refusal = refused(error)
    if refusal is None:
        return None
    name = errno.errorcode[refusal.errno or 0]
    where = f"{refusal.filename}: " if refusal.filename is not None else ""
    if name in DISK_REMEDIES:
        return (
            f"{where}{refusal.strerror}; {DISK_REMEDIES[name]}, then run the same command again: "
            "what was finished is kept"
        )
    if not paths:
        return None
    return f"{where}{refusal.strerror}; {PATH_REMEDIES[name]} (`dbtrain --traceback ...` shows where)"


def is_of_one_file(error: BaseException) -> bool:
    """Whether the file system's refusal may concern one file alone, and not a whole disk, share or machine."""
    refusal = refused(error)
    return refusal is not None and errno.errorcode[refusal.errno or 0] in ONE_FILE
