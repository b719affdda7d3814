"""Mutated and hostile files of every kind, and the parsers that must read or refuse them."""

import contextlib
import hashlib
import io
import json
import pickle
import resource
import signal
import zipfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings

from common.errors import UserError
from common.files import archive
from common.files.jsonfile import sealed
from common.files.provenance import ancestry
from common.training import loop

SECONDS = 30  # of CPU time, however busy the machine is
ODD = [None, True, False, -1, 0, 1, 2, 0.5, 1.0, 1e308, -0.0, 2**31, 2**63, 10**400, "", "x", "\x1b[2J", "\ud800",
       "0" * 64, "é" * 300, "encoder.block.0.layer.0.SelfAttention", "../../etc/passwd", [], {}, [[]], [0], {"a": []},
       {"": None}]


def examples(number: int):
    """Return settings: the same examples every time, no shrinking of a seed."""
    return settings(max_examples=number, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck))


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class Hang(BaseException):
    """Something took more CPU time than it may."""


@contextlib.contextmanager
def cpu_limit(seconds: float):
    """Raise `Hang` when the block has used so much CPU time."""
    def stop(signum, frame):
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def address_space(left: int):
    """Leave the process so many bytes of address space beyond those that it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def reseal(data: bytes, comment: bool = True) -> bytes:
    """Return a zip file with a new seal; ``comment``: it has one already, which does not fit any more."""
    file = io.BytesIO()
    file.write(data[:-archive._SEAL_BYTES - 2] + b"\0\0" if comment else data)
    archive._seal_file(file)
    return file.getvalue()


def sealed_pickle(value) -> bytes:
    """Return a sealed file around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps(value, 2))
        zipped.writestr("archive/version", "3\n")
        zipped.writestr("archive/byteorder", "little")
    return reseal(file.getvalue(), comment=False)


def flip(data: bytes, rng) -> bytes:
    """Return bytes after one to three random changes: a flipped bit, a cut, an insertion, a splice, a repetition."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        kind = rng.randrange(6)
        if kind <= 1 and a < len(data):
            data[a] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[a:] = b""
        elif kind == 3:
            data[a:a] = rng.choice((b"\0", b"\xff\xfe", b"\n", b"\r", b'"', b",", b"[" * 200, b"9" * 30, b"NaN"))
        elif kind == 4:
            data[a:min(b, a + 500)] = b""
        else:
            data[a:a] = data[b:b + rng.randrange(200)]
    return bytes(data)


def swap(value, rng):
    """Return a copy of JSON-like data (tensors may occur) with one node replaced, removed, renamed or doubled."""
    if isinstance(value, torch.Tensor) and rng.randrange(3):
        kind = rng.randrange(5)
        return (value.double(), value.flatten()[1:], value.to("meta"), value.new_full(value.shape, 3),
                torch.full(value.shape, float("nan")))[kind]
    if not isinstance(value, (dict, list)) or not value or rng.randrange(8) == 0:
        if isinstance(value, str) and value[:1] in ("{", "[") and rng.randrange(4):
            return json.dumps(swap(json.loads(value), rng))  # JSON inside a model file
        return rng.choice(ODD)
    copy = value.copy()
    at = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    kind = rng.randrange(10)
    if kind == 0:
        del copy[at]
    elif kind == 1 and isinstance(copy, dict):
        copy[rng.choice(["", "x", 3, "\ud800", str(at) + "0"])] = copy[at]
    elif kind == 2:
        copy[at] = copy[rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))]
    else:
        copy[at] = swap(copy[at], rng)
    return copy


def mutate_json(data: bytes, rng) -> bytes:
    """Mutate a JSON file, mostly by its values; a scheme may get a digest that fits."""
    if rng.randrange(3) == 0:
        return flip(data, rng)
    content = swap(json.loads(data), rng)
    if isinstance(content, dict) and rng.randrange(4) and content.pop("digest", None):
        with contextlib.suppress(UnicodeEncodeError):  # half a character: no digest of it can be written
            return sealed(content)
    return json.dumps(content).encode()


def mutate_bank(data: bytes, rng) -> bytes:
    """Mutate a bank: its bytes, or its index with a fitting SHA-256, or its data with fitting checksums."""
    from common.pruning.bank import _header

    kind, length = rng.randrange(4), int.from_bytes(data[-40:-32], "little")
    if kind == 0:
        return flip(data, rng)
    body, index = bytearray(data[128:-40 - length]), json.loads(data[-40 - length:-40])
    if kind > 1:
        index = swap(index, rng)
    else:
        for entry in rng.sample(index["variants"], 2):
            body[entry["offset"] + rng.randrange(entry["bytes"])] ^= 1 << rng.randrange(8)
            entry["sha256"] = hashlib.sha256(body[entry["offset"]:entry["offset"] + entry["bytes"]]).hexdigest()
    text = json.dumps(index).encode()
    tail = text + len(text).to_bytes(8, "little")
    whole = bytes(body) + tail + hashlib.sha256(tail).digest()
    return _header(len(whole)) + whole


def mutate_sealed(data: bytes, rng) -> bytes:
    """Mutate a sealed file: its bytes, the same with a new seal, its pickle in a sound zip, or its content."""
    kind, file = rng.randrange(8), io.BytesIO()
    if kind <= 1:
        mutant = flip(data, rng)
        return mutant if kind == 0 or len(mutant) < 200 else reseal(mutant)
    if kind == 2:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
            for entry in old.infolist():
                raw = old.read(entry)
                new.writestr(entry.filename, flip(raw, rng) if entry.filename.endswith(".pkl") else raw)
    else:
        torch.save(swap(torch.load(io.BytesIO(data), weights_only=True), rng), file)
    return reseal(file.getvalue(), comment=False)


class ToyText:
    """Text of a `Toy`: two batches an epoch."""

    sha256 = "0" * 64

    def epoch(self, number):
        return [[1.0, 2.0], [3.0, 4.0]]

    def collate(self, examples, device):
        return torch.tensor(examples)

    def fixed(self, device):
        return [torch.ones(2)]


class Toy(torch.nn.Linear):
    """An objective of six weights."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(2, 2)

    def forward(self, x):
        return super().forward(x).square().sum(), 1


def train_toy(folder: Path, objective=None, **options) -> loop.FitResult:
    """Train a `Toy`; its checkpoint goes to ``folder``/cp."""
    options = {"epochs": 2, "lr": 1e-3, "stats": folder / "s.csv", "checkpoint": folder / "cp"} | options
    return loop.fit(objective or Toy(), ToyText(), ToyText(), loop.FitOptions(**options), device="cpu",
                    fingerprint={"a": 1}, log=lambda text: None)


class Parsers:
    """Valid samples of every kind in ``folder``, and what reads them: ``parsers[kind]()`` parses ``paths[kind]``."""

    def __init__(self, folder: Path, made: Path):
        """``made`` is the folder of the fixture, whose tokenizer is used."""
        from common.pruning import bank, composition, configurations, variants
        from common.pruning import scheme as schemes
        from common.t5 import model as models
        from common.t5.header import read_header
        from common.t5.network import build_network

        origin = models.load(made / "origin.pth")
        conf = [{"encoder.block.0.layer.0.SelfAttention": 0.5, "encoder.block.0.layer.1.DenseReluDense.wi": 0.8},
                {"decoder.block.0.layer.1.EncDecAttention.o": 0.25}]
        told = {"stage": "x", "arguments": {"a": 1}, "inputs": {"m": {"file": "f", "sha256": "", "provenance": {}}}}
        self.paths = {"configuration": folder / "conf.json", "scheme": folder / "scheme.json",
                      "bank": folder / "bank.npy", "model": folder / "model.pth", "header": folder / "header.pth",
                      "checkpoint": folder / "cp" / "checkpoint.pth"}
        (folder / "conf.json").write_text(json.dumps(conf))
        schemes.write_scheme(folder / "scheme.json", schemes.make_scheme(conf), told)
        network = build_network({  # the smallest T5 that has every kind of module
            "model_type": "t5", "d_model": 8, "d_kv": 2, "d_ff": 8, "num_heads": 2, "num_layers": 1,
            "num_decoder_layers": 1, "vocab_size": origin.network.config.vocab_size, "pad_token_id": 0,
            "eos_token_id": 1, "decoder_start_token_id": 0}).to_empty(device="cpu")
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
        tiny = models.Model(network, origin.tokenizer_json, provenance=told)
        with bank.create(folder / "bank.npy", "0" * 64, "0" * 64, None, told) as writer:
            for variant in variants.prune_scheme(tiny, schemes.make_scheme(conf)):
                writer.add(variant)
                composition.install(tiny, variant)
        for name in ("model.pth", "header.pth"):
            models.save(folder / name, tiny)
        train_toy(folder, epochs=1)
        self.samples = {kind: path.read_bytes() for kind, path in self.paths.items()}

        def read_model():
            loaded = models.load(folder / "model.pth")
            models.save(folder / "again.pth", loaded)
            ancestry(loaded.provenance)

        def read_bank():
            opened = bank.load(folder / "bank.npy")
            for key in opened.entries:
                composition.install(tiny, opened.read(key))
            ancestry(opened.provenance)

        self.parsers = {
            "configuration": lambda: schemes.make_scheme(configurations.read_configurations(folder / "conf.json")),
            "scheme": lambda: ancestry(schemes.read_scheme(folder / "scheme.json")[1]), "bank": read_bank,
            "checkpoint": lambda: train_toy(folder, resume=True), "model": read_model,
            "header": lambda: read_header(folder / "header.pth")}

    def mutate(self, kind: str, rng) -> bytes:
        """Return a mutant of the kind's sample."""
        change = {"bank": mutate_bank, "checkpoint": mutate_sealed, "model": mutate_sealed,
                  "header": mutate_sealed}.get(kind, mutate_json)
        return change(self.samples[kind], rng)

    def outcome(self, kind: str, mutant: bytes) -> str | None:
        """Parse a mutant; return None for success, the text of a `UserError`; all else is raised."""
        self.paths[kind].write_bytes(mutant)
        try:
            with cpu_limit(SECONDS):
                self.parsers[kind]()
        except UserError as error:
            return str(error)
        return None


def complaint(message: str) -> str | None:
    """Say what is wrong with an error message for a user, or return None."""
    if not message.strip() or len(message) > 6000 or "Traceback" in message:
        return "no short message"
    if any(not line.startswith("  ") for line in message.split("\n")[1:]):
        return "more than one sentence"
    return None
