"""Parallel text: find or download the splits, check and tokenise them once, batch them by length (torchtext)."""

import gzip
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import UserError, digest, locked, write_bytes

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
MAX_TOKENS = 512  # T5's training length; longer sentences are cut there, which is reported
LABEL_PADDING = -100  # the index torch's cross-entropy ignores


@dataclass(frozen=True)
class DataOptions:
    """Which text a stage reads; built from the flags of `common.cli.add_data`."""

    kind: str
    folder: Path
    source: str
    target: str
    test_set: str
    max_train: int | None = None

    @classmethod
    def from_args(cls, args) -> "DataOptions":
        return cls(args.data, args.data_dir, args.source, args.target, args.test_set, args.max_train_sentences)


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
    return [line.removesuffix("\r").replace("\0", "").strip() for line in lines]


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
    import io

    import requests

    url, path = MULTI30K_URL.format(split=split, language=language), folder / f"{split}.{language}.gz"
    print(f"downloading {url}", file=sys.stderr)
    try:
        reply = requests.get(url, timeout=30)
        reply.raise_for_status()
        packed = reply.content
    except requests.RequestException as error:
        raise UserError(f"{path}: is not there and cannot be downloaded ({type(error).__name__}); put the text "
                        f"into {folder} or name its folder with --data-dir, or use --data demo") from None
    text = _unpack(gzip.open(io.BytesIO(packed)), path, len(packed))
    expected = MULTI30K_SHA256.get(f"{split}.{language}")
    if expected and digest(text) != expected:
        raise UserError(f"{url}: the download's SHA-256 is {digest(text)}, expected {expected}; nothing was kept")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(path):
        write_bytes(path, packed)
    return path


def _read_lines(options: DataOptions, split: str, language: str) -> list[str]:
    for path in (options.folder / f"{split}.{language}", options.folder / f"{split}.{language}.gz"):
        if path.is_file():
            break
    else:
        path = _download(options.folder, split, language)
    packed = path.stat().st_size if path.suffix == ".gz" else None
    with open(path, "rb") if packed is None else gzip.open(path) as stream:
        return _decode(_unpack(stream, path, packed), path)


def read_pairs(options: DataOptions, split: str) -> list[tuple[str, str]]:
    """Return the (source, target) sentence pairs of a split; pairs with an empty side are left out.

    Raises:
        UserError: a file is missing and cannot be downloaded, is not UTF-8, or the languages differ in length.
    """
    if options.kind == "demo":
        if {options.source, options.target} != {"en", "de"}:
            raise UserError(f"--data demo is English and German, not {options.source} and {options.target}")
        from common import demo_corpus

        pairs = demo_corpus.build()["test" if split not in ("train", "val") else split]
        pairs = pairs if options.source == "en" else [(de, en) for en, de in pairs]
    else:
        source, target = (_read_lines(options, split, language) for language in (options.source, options.target))
        if len(source) != len(target):
            raise UserError(f"{options.folder}: {split}.{options.source} has {len(source):,} lines and "
                            f"{split}.{options.target} {len(target):,}; line n of one must translate line n of "
                            "the other")
        pairs = list(zip(source, target, strict=True))
    if split == "train" and options.max_train:
        pairs = pairs[:options.max_train]
    full = [pair for pair in pairs if all(pair)]
    if len(full) < len(pairs):
        print(f"{split}: {len(pairs) - len(full):,} of {len(pairs):,} pairs have an empty side and are left out",
              file=sys.stderr)
    if not full:
        raise UserError(f"{options.folder}: {split} holds no sentence pair")
    return full


def sample(pairs: list, number: int, seed: int) -> list:
    """Return ``number`` pairs drawn without replacement, or all of them if there are not so many."""
    return random.Random(f"sample/{seed}").sample(pairs, number) if number < len(pairs) else pairs


def encode(tokenizer, sentences: list[str], eos: int) -> tuple[list[list[int]], int]:
    """Return the token ids of each sentence, ending in ``eos``, and how many were cut at `MAX_TOKENS`.

    Raises:
        UserError: the tokenizer fails on the text, as one without an unknown token does on a new letter.
    """
    try:
        encodings = tokenizer.encode_batch(sentences)
    except Exception as error:
        raise UserError(f"the model's tokenizer cannot read the text: {str(error):.150}") from None
    cut, result = 0, []
    for encoding in encodings:
        ids = encoding.ids if encoding.ids and encoding.ids[-1] == eos else [*encoding.ids, eos]
        if len(ids) > MAX_TOKENS:
            ids, cut = [*ids[:MAX_TOKENS - 1], eos], cut + 1
        result.append(ids)
    return result, cut


class Batches:
    """A tokenised split that yields padded batches of similar length, in an order fixed by seed and epoch."""

    def __init__(self, pairs, model, batch_tokens: int, seed: int = 0, prefix: str | None = None):
        from torchtext.data import Dataset, Example, RawField

        config = model.network.config
        tokenizer, eos = model.tokenizer, config.eos_token_id
        prefix = model.prefix if prefix is None else prefix
        sources, cut = encode(tokenizer, [prefix + s for s, _ in pairs], eos)
        targets, cut_targets = encode(tokenizer, [t for _, t in pairs], eos)
        if cut + cut_targets:
            print(f"{cut + cut_targets:,} sentences were cut at {MAX_TOKENS} tokens", file=sys.stderr)
        if max(max(ids) for ids in (*sources, *targets)) >= config.vocab_size:
            raise UserError("the tokenizer knows more tokens than the model; they do not belong together")
        fields = [("source", RawField()), ("target", RawField())]
        examples = [Example.fromlist([s, t], fields) for s, t in zip(sources, targets, strict=True)]
        self.dataset = Dataset(examples, fields)
        self.sha256 = digest("\n".join(prefix + "\t".join(pair) for pair in pairs))
        self.batch_tokens, self.seed, self.pad = batch_tokens, seed, config.pad_token_id

    def __len__(self) -> int:
        """Number of sentence pairs."""
        return len(self.dataset)

    def epoch(self, number: int | None) -> list:
        """Return the batches (lists of examples) of a training epoch, or in a fixed order for None."""
        from torchtext.data import BucketIterator
        from torchtext.data.utils import RandomShuffler

        longest = 0

        def size(example, count, so_far):
            nonlocal longest
            length = max(len(example.source), len(example.target))
            longest = length if count == 1 else max(longest, length)
            return count * longest

        iterator = BucketIterator(
            self.dataset, self.batch_tokens, sort_key=lambda e: (len(e.target), len(e.source)),
            batch_size_fn=size, train=number is not None, sort_within_batch=True)
        iterator.random_shuffler = RandomShuffler(random.Random(f"{self.seed}/{number}").getstate())
        iterator.create_batches()
        # torchtext yields an empty batch before a sentence that alone exceeds the budget.
        return [batch for batch in iterator.batches if batch]

    def collate(self, examples, device="cpu") -> dict[str, torch.Tensor]:
        """Pad examples to a batch: input_ids, attention_mask (batch, src_len), labels (batch, tgt_len)."""
        from torch.nn.utils.rnn import pad_sequence

        sources = [torch.tensor(e.source) for e in examples]
        targets = [torch.tensor(e.target) for e in examples]
        ids = pad_sequence(sources, batch_first=True, padding_value=self.pad)
        # By length, not by value: a pad token inside a sentence would be a real token.
        attention = torch.arange(ids.shape[1]) < torch.tensor([len(s) for s in sources])[:, None]
        labels = pad_sequence(targets, batch_first=True, padding_value=LABEL_PADDING)
        return {"input_ids": ids.to(device), "attention_mask": attention.long().to(device),
                "labels": labels.to(device)}

    def fixed(self, device="cpu") -> Iterator[dict[str, torch.Tensor]]:
        """Yield every batch once, in a fixed order."""
        for examples in self.epoch(None):
            yield self.collate(examples, device)


def load_train(args, model, calibration: int | None = None) -> Batches:
    """Read and tokenise the training split that a stage's flags name.

    Args:
        calibration: draw only so many pairs, by ``args.seed``.
    """
    pairs = read_pairs(DataOptions.from_args(args), "train")
    if calibration:
        pairs = sample(pairs, calibration, args.seed)
    return Batches(pairs, model, args.batch_tokens, args.seed, args.source_prefix)


def text_input(args, batches: Batches) -> tuple[Path, str, dict]:
    """Return a text as an input for `common.provenance.provenance`: where it lies, its SHA-256."""
    return Path("demo" if args.data == "demo" else args.data_dir.name), batches.sha256, {}


def load_valid(args, model) -> Batches:
    """Read and tokenise the validation split that a stage's flags name."""
    pairs = read_pairs(DataOptions.from_args(args), "val")
    return Batches(pairs, model, args.batch_tokens, args.seed, args.source_prefix)


def load_batches(args, model, calibration: int | None = None) -> tuple[Batches, Batches]:
    """Read and tokenise (training split, validation split); see `load_train`."""
    valid = load_valid(args, model)
    return load_train(args, model, calibration), valid
