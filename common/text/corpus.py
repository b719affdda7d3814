"""Parallel text: find or download the splits, check them, read sentence pairs."""

import gzip
import io
import random
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from common import distributed
from common.errors import UserError
from common.files.atomic import digest, locked, write_bytes

LANGUAGE = re.compile("[A-Za-z0-9_-]{1,20}")  # a part of the names of text files
MULTI30K = Path("data/multi30k")  # the one folder whose missing files are downloaded
DEMO = Path(__file__).parents[2] / "data" / "demo"
# The data set's repository (Elliott et al., 2016, "Multi30K: Multilingual English-German Image Descriptions").
MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/{split}.{language}.gz"
# SHA-256 of the unpacked text, so that another compression of the same text is accepted.
MULTI30K_SHA256 = {
    "train.en": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
    "train.de": "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
    "val.en": "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
    "val.de": "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
    "test_2016_flickr.en": "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
    "test_2016_flickr.de": "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
}
MAX_TEXT_BYTES = 4 << 30
MAX_UNPACKED, MAX_RATIO = 64 << 20, 100  # beyond so many bytes, text that gzip made so much smaller is a bomb


@dataclass(frozen=True)
class Corpus:
    """A folder of parallel text (``train.en``, ``train.de``, …, plain or ``.gz``) and what is read of it."""

    folder: Path
    source: str
    target: str
    max_train: int | None = None  # only the first so many training pairs


def _decode(raw: bytes, path: Path) -> list[str]:
    """Return the lines of a UTF-8 file; only LF and CRLF end a line, so that both languages count alike."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not valid UTF-8") from None
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    for n, line in enumerate(lines, 1):
        if "\r" in line:
            raise UserError(f"{path}: line {n} holds a carriage return that ends no line; save the text with the line "
                            "ends of Unix or Windows")
    return [line.replace("\0", "").strip() for line in lines]


def _unpack(stream, path: Path, packed: int | None = None) -> bytes:
    """Return all that ``stream`` holds, which was unpacked from ``packed`` bytes."""
    limit = MAX_TEXT_BYTES if packed is None else min(MAX_TEXT_BYTES, max(MAX_UNPACKED, MAX_RATIO * packed))
    chunks, size = [], 0
    try:
        while size <= limit and (chunk := stream.read(min(limit + 1 - size, 1 << 24))):  # which is allocated at once
            chunks.append(chunk)
            size += len(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: is not a complete gzip file: {error}") from None
    if size > limit:
        raise UserError(f"{path}: more than {limit >> 20:,} MiB of text" + (
            "" if packed is None else f" out of {packed:,} packed bytes") + " is not read")
    return b"".join(chunks)


def _download(folder: Path, split: str, language: str) -> Path:
    """Download one file of Multi30K, verify it, and only then give it its name."""
    import requests

    url, path = MULTI30K_URL.format(split=split, language=language), folder / f"{split}.{language}.gz"
    if not distributed.first():
        distributed.wait_for_file(path)
        return path
    print(f"downloading {url}", file=sys.stderr)
    try:
        reply = requests.get(url, timeout=30)
        reply.raise_for_status()
        packed = reply.content
    except requests.RequestException as error:
        raise UserError(f"{path}: is not there and cannot be downloaded ({type(error).__name__}); put the text "
                        f"into {folder}, or name its folder with --data, or use --data demo") from None
    text = _unpack(gzip.open(io.BytesIO(packed)), path, len(packed))
    expected = MULTI30K_SHA256.get(f"{split}.{language}")
    if expected and digest(text) != expected:
        raise UserError(f"{url}: the download's SHA-256 is {digest(text)}, expected {expected}; nothing was kept")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(path):
        write_bytes(path, packed)
    return path


def _read_lines(corpus: Corpus, split: str, language: str) -> list[str]:
    for path in (corpus.folder / f"{split}.{language}", corpus.folder / f"{split}.{language}.gz"):
        if path.is_file():
            break
    else:
        if corpus.folder != MULTI30K:
            raise UserError(f"{corpus.folder / f'{split}.{language}'}: is not there, nor with .gz; --data names a "
                            "folder with train.*, val.* and the test set, or multi30k (downloaded), or demo")
        path = _download(corpus.folder, split, language)
    packed = path.stat().st_size if path.suffix == ".gz" else None
    with open(path, "rb") if packed is None else gzip.open(path) as stream:
        return _decode(_unpack(stream, path, packed), path)


def read_pairs(corpus: Corpus, split: str) -> list[tuple[str, str]]:
    """Return the (source, target) sentence pairs of a split; pairs with an empty side are left out.

    Raises:
        UserError: a file is missing and cannot be downloaded, is not UTF-8, or the languages differ in length.
    """
    source, target = (_read_lines(corpus, split, language) for language in (corpus.source, corpus.target))
    if len(source) != len(target):
        raise UserError(f"{corpus.folder}: {split}.{corpus.source} has {len(source):,} lines and "
                        f"{split}.{corpus.target} {len(target):,}; line n of one must translate line n of the other")
    pairs = list(zip(source, target, strict=True))
    if split == "train" and corpus.max_train:
        pairs = pairs[:corpus.max_train]
    full = [pair for pair in pairs if all(pair)]
    if len(full) < len(pairs):
        print(f"{split}: {len(pairs) - len(full):,} of {len(pairs):,} pairs have an empty side and are left out",
              file=sys.stderr)
    if not full:
        raise UserError(f"{corpus.folder}: {split} holds no sentence pair")
    return full


def sample(pairs: list, number: int, seed: int) -> list:
    """Return ``number`` pairs drawn without replacement, or all of them if there are not so many."""
    return random.Random(f"sample/{seed}").sample(pairs, number) if number < len(pairs) else pairs
