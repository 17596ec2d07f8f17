"""Read `torch.save` files using `torch.load` with `weights_only`, after checking what it would miss.

It misses altered bytes, compressed records and trailing data. In torch's zip format the tensors live in the mapped
file, so a false size claim can neither take memory nor read past the file.
"""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from resnet_backbone.weights.pickles import Unreadable, check_pickle, refused

LEGACY_START = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number as a pickle, after two bytes of protocol
DAMAGED = "Copy or download it again, or use an earlier checkpoint."


def load_torch(path: Path) -> Any:
    """Load a `torch.save` file onto the CPU, in the zip format or the one before torch 1.6.

    Executes nothing. Zip-format tensors live in the mapped file: see `owned`.

    Raises:
        Unreadable: the file is truncated, altered, hostile, or holds more than tensors and plain containers.
    """
    with path.open("rb") as file:
        try:
            if file.read(2) == b"PK":
                _check_zip(path)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            file.seek(0)
            for _ in range(5):  # magic number, version, machine, content, keys; tensor data follows
                check_pickle(file)
            file.seek(0)
            payload = torch.load(file, map_location="cpu", weights_only=True)
            if left := path.stat().st_size - file.tell():
                raise Unreadable(f"is damaged: {left:,} bytes follow its last tensor, expected none. {DAMAGED}")
            return payload
        except Unreadable:
            raise
        except Exception as error:  # torch's reader may raise anything on a foreign file
            if name := re.search(r"GLOBAL (\S+)", str(error)):
                raise refused(name[1]) from error
            raise unreadable(error) from error


def owned(value: Any) -> Any:
    """Copy containers and tensors; each tensor owns its memory, independent of the file."""
    if isinstance(value, torch.Tensor):
        if value.nbytes > value.untyped_storage().nbytes():
            raise Unreadable(f"is damaged: a tensor of {value.nbytes:,} bytes has fewer in the file. {DAMAGED}")
        return value.detach().clone()  # keeps the memory format, which a bit-exact resume depends on
    if isinstance(value, dict):
        return {key: owned(item) for key, item in value.items()}
    return type(value)(map(owned, value)) if type(value) in (list, tuple) else value


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip archive as torch and NumPy write them: stored or deflated."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a damaged table of contents may claim anything
        size = path.stat().st_size
        raise Unreadable(f"is cut off or damaged ({size:,} bytes; {first_sentence(error)}). {DAMAGED}") from error
    # Other methods allocate as much memory as the archive claims.
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in archive.infolist()):
        archive.close()
        raise Unreadable(
            "is damaged: it is a zip archive with another compression than deflate, as torch and NumPy write none. "
            f"{DAMAGED}"
        )
    return archive


def unreadable(error: Exception) -> Unreadable:
    """Wrap a library's error about a weights file."""
    return Unreadable(
        f"is cut off, damaged, or holds more than tensors ({first_sentence(error)}); nothing in it was executed. "
        f"{DAMAGED}"
    )


def first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text.split(". ")[0][:120] or type(error).__name__).rstrip(".")


def _check_zip(path: Path) -> None:
    """Check the archive's claims about its records against the file."""
    size = path.stat().st_size
    with open_zip(path) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        folder = next(iter(sizes), "").split("/")[0]
        if f"{folder}/constants.pkl" in sizes:
            raise Unreadable(
                "is a TorchScript program, which holds code, so it was not opened. Save its weights alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), OTHER)."
            )
        if f"{folder}/data.pkl" not in sizes:
            some = ", ".join(map(repr, list(sizes)[:3])) or "nothing"
            raise Unreadable(
                f"cannot be read as weights: it is a zip archive with {some:.200}, not torch's or NumPy's. Give "
                "a file of weights."
            )
        if sum(sizes.values()) > size or any(member.compress_type for member in archive.infolist()):
            raise Unreadable(
                f"is damaged: torch compresses nothing, and its members claim {sum(sizes.values()):,} bytes where the "
                f"file has {size:,}. {DAMAGED}"
            )
        try:
            damaged = archive.testzip()
        except Exception as error:  # a damaged header may claim anything
            raise Unreadable(f"is cut off or damaged ({size:,} bytes; {first_sentence(error)}). {DAMAGED}") from error
        if damaged is not None:
            raise Unreadable(
                f"was altered after it was written: the checksum of its record {damaged[:80]!r} does not fit. {DAMAGED}"
            )
        with archive.open(f"{folder}/data.pkl") as pickle:
            check_pickle(io.BytesIO(pickle.read()))
