"""Names the formats that are not read, by their first bytes, so that a refusal can say what the file is.

Owns the table of signatures. Never opens, decodes or refuses a capture. A name may be wrong for bytes that only begin like a format.
"""

from __future__ import annotations

import re
import struct

_HEAD_BYTES = 4096
_MARKS = (
    (b"%!PS", "a PostScript document (EPS)"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript document (EPS)"),
    (b"8BPS", "a Photoshop picture (PSD)"),
    (b"gimp xcf", "a GIMP picture (XCF)"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"icns", "an icon (ICNS)"),
    (b"\xff\x0a", "a picture of JPEG XL"),
    (b"\0\0\0\x0cJXL ", "a picture of JPEG XL"),
    (b"II\xbc\x01", "a picture of JPEG XR"),
    (b"\x97JB2\r\n", "a picture of JBIG2"),
    (b"\x8aMNG\r\n", "an animation (MNG)"),
    (b"P7\n", "a picture of PAM"),
    (b"PF\n", "a picture of floating-point numbers (PFM)"),
    (b"Pf\n", "a picture of floating-point numbers (PFM)"),
    (b"v/1\x01", "a picture of floating-point numbers (OpenEXR)"),
    (b"#?RADIANCE", "a picture of floating-point numbers (Radiance HDR)"),
    (b"#?RGBE", "a picture of floating-point numbers (Radiance HDR)"),
    (b"SIMPLE  =", "a picture of FITS"),
    (b"qoif", "a picture of QOI"),
    (b"DDS ", "a texture (DDS)"),
    (b"\x01\xda", "a picture of SGI"),
    (b"\xd7\xcd\xc6\x9a", "a drawing in WMF"),
    (b"AT&TFORM", "a DjVu document"),
    (b"FUJIFILMCCD-RAW", "a raw file of a camera"),
    (b"IIRO", "a raw file of a camera"),
    (b"IIU\0", "a raw file of a camera"),
    (b"IIR\0", "an iris image record"),
    (b"FMR\0", "a minutiae record, which belongs to a finger"),
    (b"PK\3\4", "a ZIP archive"),
    (b"Rar!\x1a\7", "a RAR archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x1f\x8b", "a file packed by gzip"),
    (b"BZh", "a file packed by bzip2"),
    (b"\xfd7zXZ\0", "a file packed by xz"),
    (b"\x28\xb5\x2f\xfd", "a file packed by zstd"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document"),
    (b"\x93NUMPY", "a numpy file"),
    (b"PAR1", "a Parquet table"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
    (b"data:image/", "base64 text of a picture (a data URI)"),
    (b"/9j/", "base64 text of a JPEG file"),
    (b"iVBORw0K", "base64 text of a PNG file"),
    (b"AAAADGpQ", "base64 text of a JPEG 2000 file"),
    (b"UklGR", "base64 text of a WebP file"),
    (b"SUkqA", "base64 text of a TIFF file"),
    (b"TU0AK", "base64 text of a TIFF file"),
    (b"/6D/", "base64 text of a WSQ file"),
    (b"RklSAD", "base64 text of a finger image record"),
    (b"RkFDAD", "base64 text of a face image record"),
    (b"Rk1SAC", "base64 text of a minutiae record"),
    (b"ffd8ff", "hexadecimal text of a JPEG file"),
    (b"FFD8FF", "hexadecimal text of a JPEG file"),
)
_MARKS_AT = (
    (128, b"DICM", "a DICOM file"),
    (257, b"ustar", "a tar archive"),
    (40, b" EMF", "a drawing in EMF"),
    (8, b"AVI ", "a video"),
    (8, b"WAVE", "a sound"),
)
_MEDIA = {
    b"heic": "a picture of HEIC", b"heix": "a picture of HEIC", b"heim": "a picture of HEIC", b"heis": "a picture of HEIC",
    b"hevc": "a picture of HEIC", b"hevx": "a picture of HEIC", b"mif1": "a picture of HEIF", b"msf1": "a picture of HEIF",
    b"avif": "a picture of AVIF", b"avis": "a picture of AVIF", b"jxl ": "a picture of JPEG XL", b"crx ": "a raw file of a camera",
}  # fmt: skip
_XML = (
    (re.compile(rb"39794", re.I), "an ISO/IEC 39794 record in XML"),
    (re.compile(rb"NISTBiometricInformationExchangePackage"), "an ANSI/NIST-ITL file in XML"),
    (re.compile(rb"<svg\b", re.I), "a drawing in SVG"),
    (re.compile(rb"<(?:\w+:)?BIR\b|cbeff|19785", re.I), "a CBEFF record in XML"),
    (re.compile(rb"<html\b|<!doctype html", re.I), "a web page"),
)
_ASN1 = {
    0x64: "an ISO/IEC 39794-4 record",
    0x65: "an ISO/IEC 39794-5 record",
    0x75: "a passport's data group, which holds a CBEFF record",
    0x63: "a passport's data group, which holds a CBEFF record",
    0x7F: "a CBEFF record",
}
_WRAPPED = re.compile(rb"(FIR|FAC|FMR|IIR)\0(?:010|020|030| 20)\0")
_RECORDS = {
    b"FIR": "a finger image record",
    b"FAC": "a face image record",
    b"FMR": "a minutiae record",
    b"IIR": "an iris image record",
}
_PCX = re.compile(rb"\x0a[\x00\x02-\x05]\x01[\x01\x02\x04\x08]", re.S)
_TGA_KINDS, _TGA_BITS = (1, 2, 3, 9, 10, 11), (8, 15, 16, 24, 32)


def unread_kind(content: bytes) -> str | None:
    """The name of a format that is not read; None for other content."""
    head = content[:_HEAD_BYTES]
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    for at, mark, name in _MARKS_AT:
        if head.startswith(mark, at):
            return name
    if head[4:8] == b"ftyp":
        return _MEDIA.get(head[8:12], "a video")
    if b"%PDF-" in head[:1024]:
        return "a PDF document"
    text = head.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").replace(b"\0", b"")
    if text.startswith(b"<"):
        return next((name for pattern, name in _XML if pattern.search(text)), None)
    if len(head) > 4 and head[0] in _ASN1 and _is_whole_asn1(content):
        return _ASN1[head[0]]
    if (wrapped := _WRAPPED.search(head)) is not None and wrapped.start():
        return f"{_RECORDS[wrapped[1]]} of ISO/IEC 19794 inside another record, such as CBEFF"
    if _PCX.match(head):
        return "a picture of PCX"
    return "a picture of TGA" if _is_tga(content) else None


def _is_whole_asn1(content: bytes) -> bool:
    """Whether the length after the tag (ITU-T X.690) is the length of the content."""
    at = 2 if content[0] & 0x1F == 0x1F else 1
    first = content[at]
    size = first & 0x7F if first & 0x80 else 0
    length = int.from_bytes(content[at + 1 : at + 1 + size], "big") if first & 0x80 else first
    return 0 < size <= 4 and at + 1 + size + length == len(content)


def _is_tga(content: bytes) -> bool:
    """Whether the content has the header of a TGA file, which begins without a signature, or its footer."""
    if content.endswith(b"TRUEVISION-XFILE.\0"):
        return True
    if len(content) < 18:
        return False
    _, palette, kind, _, _, _, _, _, width, height, bits, flags = struct.unpack_from("<BBBHHBHHHHBB", content)
    sound = palette == (kind in (1, 9)) and kind in _TGA_KINDS and bits in _TGA_BITS and flags < 0x40
    return bool(sound and width and height)
