"""Read images from tar shards in random order, without unpacking.

A record is a pair of members, `KEY.jpg` (or `.jpeg`, `.png`) and `KEY.cls` with the class number as text, as WebDataset
writes them. Each shard is scanned once, when opened, to index its images; after that, an image takes one `pread`.
"""

import os
import re
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from resnet_backbone.data.decode import read_ends
from resnet_backbone.data.errors import DatasetError, nearest_existing, some
from resnet_backbone.data.interface import ClassificationSource, PackedStrings

RECORD_EXTENSIONS = (".jpg", ".jpeg", ".png")
_OPEN_FILES = 64  # shards that a process keeps open at once


class ShardSource(ClassificationSource):
    """All records of the shards that match a pattern, in stored order.

    Class names come from `classes.txt` next to the shards, one line per class in class-number order: either `name` or
    `wnid<TAB>words`, where the words are the name. Without that file they are "0", "1", ...

    Safe in forked and spawned workers: each process opens the shards itself on its first read.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self._shards = _existing(pattern)
        keys, labels, shard_of, offsets, sizes = [], [], [], [], []
        for number, shard in enumerate(self._shards):
            for key, (offset, size, label) in _index(shard).items():
                keys.append(key)
                labels.append(label)
                shard_of.append(number)
                offsets.append(offset)
                sizes.append(size)
        if not keys:
            raise DatasetError(
                f"{pattern} holds no record; expected pairs of KEY.jpg (or .jpeg, .png) and KEY.cls in its shards"
            )
        self._keys = PackedStrings(keys)
        self._shard_of = np.array(shard_of, np.int32)
        self._offsets = np.array(offsets, np.int64)
        self._sizes = np.array(sizes, np.int64)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()
        labels = np.array(labels, np.int64)
        super().__init__(self._read_class_names(labels), labels)

    def _read_class_names(self, labels: np.ndarray) -> list[str]:
        path = Path(self._shards[0]).parent / "classes.txt"
        if path.exists():
            names = _class_names(path)
            expected = f"{path} names the classes 0...{len(names) - 1}"
        else:
            names = [str(number) for number in range(labels.max() + 1)]
            expected = "class numbers begin at 0"
        wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if len(wrong):
            raise DatasetError(
                f"{self.describe(wrong[0])} has the class {labels[wrong[0]]} ({len(wrong)} such records), but "
                f"{expected}; correct the .cls members or classes.txt"
            )
        return names

    def read(self, index: int) -> bytes:
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        try:
            data = os.pread(self._file(int(self._shard_of[index])), size, offset)
        except OSError as error:
            raise DatasetError(f"{self.describe(index)} cannot be read: {error.strerror or error}") from None
        if len(data) != size:
            raise DatasetError(
                f"{self.describe(index)} has {len(data)} of its {size} bytes: the shard was changed after it was "
                "opened; start again with the complete shard"
            )
        return data

    def ends(self, index: int) -> tuple[bytes, bytes]:
        return read_ends(self._file(int(self._shard_of[index])), int(self._offsets[index]), int(self._sizes[index]))

    def describe(self, index: int) -> str:
        return f"{self._shards[self._shard_of[index]]}:{self._keys[index]}"

    def _file(self, shard: int) -> int:
        if self._process != os.getpid():
            # A forked worker cannot rely on the parent's files, which the parent may close at any time.
            self._files, self._process = OrderedDict(), os.getpid()
        if shard not in self._files:
            while len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self._shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close the shards; reading reopens them."""
        if self._process == os.getpid():
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        # Without `_files`, the constructor raised; without `os`, the interpreter is at its end.
        if "_files" in self.__dict__ and os is not None:
            self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": OrderedDict(), "_process": -1}


def expand_braces(pattern: str) -> list[str]:
    """Expand `'a-{08..10}.tar'` to `['a-08.tar', 'a-09.tar', 'a-10.tar']`; several ranges give all combinations."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        if "{" in pattern or "}" in pattern:
            raise DatasetError(
                f"the shard pattern {pattern!r} has braces without a range of numbers; expected for example "
                "'train-{000000..000007}.tar' (quoted in a shell)"
            )
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise DatasetError(f"the shard pattern {pattern!r} counts down from {first} to {last}; swap the two numbers")
    rest = expand_braces(pattern[match.end() :])
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [pattern[: match.start()] + number + tail for number in numbers for tail in rest]


def _existing(pattern: str) -> list[str]:
    """Expand a pattern to its shards, all of which exist."""
    shards = expand_braces(pattern)
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if not missing:
        return shards
    if len(missing) == len(shards):
        found = "does not exist" if len(shards) == 1 else f"names {len(shards)} shards, of which none exists"
        where = nearest_existing(Path(missing[0]))
        raise DatasetError(f"{pattern} {found} ({where}); correct the path")
    there = len(shards) - len(missing)
    raise DatasetError(
        f"{pattern}: {len(missing)} of {len(shards)} shards are missing ({some(missing)}), {there} exist; complete "
        "them or correct the range"
    )


def _index(shard: str) -> dict[str, tuple[int, int, int]]:
    """Index a shard: each record's offset, size and class number, by key, in stored order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with open(shard, "rb") as file:
            descriptor = file.fileno()
            for name, offset, size in _members(file):
                key, extension = os.path.splitext(name)
                extension = extension.lower()
                if extension == ".cls":
                    if key in labels:
                        raise DatasetError(f"{shard}:{key} has two classes; give each record a key of its own")
                    labels[key] = _class_number(os.pread(descriptor, size, offset), shard, key)
                elif extension in RECORD_EXTENSIONS:
                    if key in images:
                        raise DatasetError(f"{shard}:{key} holds two images; give each record a key of its own")
                    images[key] = (offset, size)
    except tarfile.TarError as error:
        with open(shard, "rb") as file:
            packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"))
        found = "is compressed, so it cannot be read at random" if packed else f"is no complete tar archive ({error})"
        advice = "unpack it to a plain .tar" if packed else "copy or write it again"
        raise DatasetError(f"{shard} {found}; {advice}") from None
    except OSError as error:
        raise DatasetError(f"{shard} cannot be read: {error.strerror or error}") from None
    for key in images:
        if key not in labels:
            raise DatasetError(f"{shard}:{key} has an image but no {key}.cls; add its class number or remove it")
    for key in labels:
        if key not in images:
            expected = " or ".join(key + extension for extension in RECORD_EXTENSIONS)
            raise DatasetError(f"{shard}:{key} has a .cls but no image; expected {expected} in the same shard")
    return {key: (*place, labels[key]) for key, place in images.items()}


def _members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Yield the name, offset and size of each file in a tar archive; raise TarError unless it is whole."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # would grow without limit
            if member.isreg():
                yield member.name, member.offset_data, member.size
    # tarfile takes a damaged header, after the first one, for the end. The end is a block of zeros, and nothing else.
    file.seek(archive.offset)
    if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it is cut off at byte {archive.offset}")
    file.seek(archive.offset)
    while block := file.read(2**20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"there is no file's header at byte {archive.offset}, but more than zeros follow")


def _class_number(text: bytes, shard: str, key: str) -> int:
    try:
        if (number := int(text)) < 2**31:
            return number
        raise ValueError
    except ValueError:
        found = text[:20].decode("utf-8", "replace").strip()
        raise DatasetError(
            f"{shard}:{key}.cls holds {found!r}; expected the number of a class as text, such as 17"
        ) from None


def _class_names(path: Path) -> list[str]:
    """Read names from `classes.txt`; words two classes share (a crane is a bird and a machine) also get the wnid."""
    lines = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    words = [line[-1].strip() for line in lines]
    if not words:
        raise DatasetError(f"{path} is empty; expected one line per class: NAME or WNID<TAB>WORDS")
    count = Counter(words)
    return [
        f"{word} ({line[0]})" if len(line) > 1 and count[word] > 1 else word
        for line, word in zip(lines, words, strict=True)
    ]
