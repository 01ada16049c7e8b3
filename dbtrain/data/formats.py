"""Formats of pictures, known by how a file begins, and which of them can be read here."""

import re
from functools import cache
from importlib.util import find_spec

READ = {"JPEG": "JPEG", "PNG": "PNG", "WebP": "WEBP", "AVIF": "AVIF", "HEIC": "HEIF"}
"""The formats that can be photos, by our name for each, and Pillow's."""
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".webp", ".avif", ".heic", ".heif", ".hif")
"""File name endings (lower case) that say that a file is meant as a photo. What it is, its content says."""
RAW_SUFFIXES = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .gpr .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 "
    ".rwl .sr2 .srf .srw .x3f".split()
)
"""Endings of raw photos, which most cameras write as TIFF."""
OTHER_SUFFIXES = frozenset(".gif .bmp .tif .tiff .jxl .jp2 .j2k .psd .ico .tga .svg".split())
"""Endings of other pictures. A file of this kind among the photos was probably meant as one."""
START = 64
"""Bytes of a file's start that `picture_kind` needs."""
BEGINNINGS = [
    (re.compile(start, re.DOTALL), kind)
    for start, kind in (
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"RIFF....WEBP", "WebP"),
        (rb"....ftyp(avif|avis|(mif1|msf1).{0,44}avi[fs])", "AVIF"),
        (rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", "HEIC"),
        (rb"....ftypcrx |FUJIFILM|IIR[OS]|IIU\0|FOVb|\0MRM|II\x1a\0\0\0HEAPCCDR", "raw"),
        (rb"II\*\0|MM\0\*", "TIFF"),
        (rb"GIF8[79]a", "GIF"),
        (rb"BM.{4}\0\0\0\0", "BMP"),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
        (rb"8BPS", "Photoshop"),
    )
]


def picture_kind(start: bytes) -> str | None:
    """The format of a picture that begins so, such as JPEG, TIFF or raw; None if it begins like none."""
    return next((kind for beginning, kind in BEGINNINGS if beginning.match(start)), None)


@cache
def readable() -> dict[str, str]:
    """The part of `READ` that this installation can decode. HEIC needs the extra `photos`."""
    from PIL import features

    able = {"AVIF": features.check("avif"), "HEIC": _heif_opener()}
    return {kind: name for kind, name in READ.items() if able.get(kind, True)}


def missing(kind: str | None) -> str:
    """What to do about a picture of a format that is not read here."""
    if kind == "HEIC":
        return "install the extra that reads it, `pip install dbtrain[photos]`, or convert it to JPEG"
    if kind == "AVIF":
        return "install Pillow 11.3 or newer, which reads it, or convert it to JPEG"
    if kind == "raw":
        return "develop it to JPEG or PNG, or move it elsewhere"
    return "convert it to JPEG or PNG, or move it elsewhere"


def _heif_opener() -> bool:
    if find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    # One thread a photo: photos are decoded side by side already. Thumbnails and depth maps are never used.
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.options.THUMBNAILS = pillow_heif.options.DEPTH_IMAGES = pillow_heif.options.AUX_IMAGES = False
    pillow_heif.register_heif_opener()
    return True
