"""The bytes of one sample in a shard: two tar members, written and checked without any freedom.

`<key>.<ext>` is the encoded image, `<key>.json` its provenance. Times, owners and modes are fixed, so that equal
samples have equal bytes. What is read must be exactly such a pair: no links, devices, folders, other names or members.
"""

import json
import tarfile

from dbtrain.values import Role, Sample

BLOCK = 512
IMAGE_EXTENSIONS = ("png", "jpg", "webp")
META = "json"


def to_tar(sample: Sample) -> bytes:
    """The tar members of a sample, a multiple of 512 bytes."""
    meta = {"caption": sample.caption, "subject": sample.subject, "role": int(sample.role), "size": len(sample.image)}
    text = json.dumps(sample.meta | meta, sort_keys=True, separators=(",", ":")).encode()
    return _member(f"{sample.key}.{sample.extension}", sample.image) + _member(f"{sample.key}.{META}", text)


def problem(content: bytes, key: str) -> str | None:
    """What keeps these bytes from being the sample `key`; None if nothing does."""
    names, offset = [], 0
    while offset < len(content):
        try:
            member = _header(content, offset)
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            return f"has a damaged tar header at byte {offset} ({error})"
        if member.type != tarfile.REGTYPE or member.size < 0:
            return f"holds {member.name!r}, which is not a plain file"
        names.append(member.name)
        offset += BLOCK + _padded(member.size)
    wanted = [[f"{key}.{extension}", f"{key}.{META}"] for extension in IMAGE_EXTENSIONS]
    if names not in wanted or offset != len(content):
        return f"holds {names}, want {wanted[0]}"
    return None


def members(content: bytes) -> dict[str, bytes]:
    """The contents of a sample's members by their extension; of bytes with which there is no `problem`."""
    found, offset = {}, 0
    while offset < len(content):
        member = _header(content, offset)
        start = offset + BLOCK
        found[member.name.rpartition(".")[2]] = content[start : start + member.size]
        offset = start + _padded(member.size)
    return found


def _header(content: bytes, offset: int) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(content[offset : offset + BLOCK], "utf-8", "strict")


def from_tar(key: str, image: bytes, extension: str, meta: bytes) -> Sample:
    """The sample in its members' contents; ValueError, TypeError or KeyError if they are no sample."""
    values = json.loads(meta)
    caption, subject = values.pop("caption"), values.pop("subject")
    if not isinstance(caption, str) or not isinstance(subject, str):
        raise TypeError("caption and subject must be text")
    if not all(type(values.get(side, 1)) is int and values.get(side, 1) > 0 for side in ("width", "height")):
        raise TypeError("width and height must be whole numbers above 0")
    if values.pop("size") != len(image):
        raise ValueError("the image's size differs from the one written down")
    return Sample(key, subject, Role(values.pop("role")), caption, image, extension, values)


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(_padded(len(content)) - len(content))


def _padded(size: int) -> int:
    return -size % BLOCK + size
