"""Mutated files of every kind, and the parsers that must read or refuse them: for test_fuzz and benchmarks/fuzz."""

import contextlib
import gzip
import hashlib
import io
import json
import signal
import zipfile
from pathlib import Path

import torch

import plot_loss
from common import bank, composition, configs, data, hub, models, search, training
from common.files import UserError
from common.provenance import ancestry
from tests.conftest import save_folder, write_corpus

SECONDS = 20
ODD = [None, True, False, -1, 0, 1, 2, 0.5, 1.0, 1e308, -0.0, 2**31, 2**63, 10**400, "", "x", "\x1b[2J", "\ud800",
       "0" * 64, "é" * 300, "encoder.block.0.layer.0.SelfAttention", "../../etc/passwd", [], {}, [[]], [0], {"a": []},
       {"": None}]


class Hang(BaseException):
    """A parser took longer than `SECONDS`."""


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
            data[a:a] = rng.choice((b"\0", b"\xff\xfe", b"\n", b'"', b",", b"[" * 200, b"9" * 30, b"1e999", b"NaN"))
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
            return configs.sealed(content)
    return json.dumps(content).encode()


def mutate_bank(data: bytes, rng) -> bytes:
    """Mutate a bank: its bytes, or its index with a fitting SHA-256, or its data with fitting checksums."""
    kind = rng.randrange(4)
    if kind == 0:
        return flip(data, rng)
    length = int.from_bytes(data[-40:-32], "little")
    body, index = bytearray(data[128:-40 - length]), json.loads(data[-40 - length:-40])
    if kind == 1:
        for entry in rng.sample(index["variants"], 2):
            body[entry["offset"] + rng.randrange(entry["bytes"])] ^= 1 << rng.randrange(8)
            part = body[entry["offset"]:entry["offset"] + entry["bytes"]]
            entry["sha256"] = hashlib.sha256(part).hexdigest()
    else:
        index = swap(index, rng)
    text = json.dumps(index).encode()
    tail = text + len(text).to_bytes(8, "little")
    whole = bytes(body) + tail + hashlib.sha256(tail).digest()
    return bank._header(len(whole)) + whole


def mutate_sealed(data: bytes, rng) -> bytes:
    """Mutate a sealed file: its bytes, the same with a new seal, its pickle in a sound zip, or its content."""

    kind = rng.randrange(8)
    if kind == 0:
        return flip(data, rng)
    file = io.BytesIO()
    if kind == 1:
        file.write(flip(data[:-models._SEAL_BYTES - 2], rng) + b"\0\0")
    elif kind == 2:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
            for entry in old.infolist():
                raw = old.read(entry)
                new.writestr(entry.filename, flip(raw, rng) if entry.filename.endswith(".pkl") else raw)
    else:
        torch.save(swap(torch.load(io.BytesIO(data), weights_only=True), rng), file)
    if file.tell() < 22:
        return file.getvalue()
    models._seal_file(file)
    return file.getvalue()


class Parsers:
    """Valid samples of every kind in ``folder``, and what reads them: ``parsers[kind]() `` parses ``paths[kind]``."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)
        write_corpus(folder, (12, 4, 2))
        save_folder(folder / "hub", d_model=8, d_kv=2, d_ff=8, num_heads=2, num_layers=1, num_decoder_layers=1)
        model = hub.load_folder(folder / "hub", "en", "de")
        conf = [{"encoder.block.0.layer.0.SelfAttention": 0.5, "encoder.block.0.layer.1.DenseReluDense.wi": 0.8},
                {"decoder.block.0.layer.1.EncDecAttention.o": 0.25}]
        (folder / "conf.json").write_text(json.dumps(conf))
        scheme = configs.make_scheme(conf)
        origin = {"stage": "x", "arguments": {"a": 1}, "inputs": {"m": {"file": "f", "sha256": "", "provenance": {}}}}
        configs.write_scheme(folder / "scheme.json", scheme, origin)
        with bank.create(folder / "bank.npy", "0" * 64, configs.scheme_digest(scheme), None, origin) as writer:
            for variant in composition.prune_scheme(model.network, scheme):
                writer.add(variant)
                composition.install(model, variant)
        opened, of = bank.load(folder / "bank.npy"), {"model": "0" * 64, "bank": "1" * 64}
        search.write(folder / "sensitivity.json", search.Sensitivity(2.0, dict.fromkeys(opened.entries, 2.5)), of)
        sizes = search.kept_weights(model.network, opened)[0]
        model.provenance = origin
        models.save(folder / "model.pth", model)
        torch.manual_seed(0)

        class Text:
            sha256 = "0" * 64

            def epoch(self, number):
                return [[1.0, 2.0], [3.0, 4.0]]

            def collate(self, examples, device):
                return torch.tensor(examples)

            def fixed(self, device):
                return [torch.ones(2)]

        class Toy(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x).square().sum(), 1

        def train(epochs, resume=True):
            options = training.FitOptions(epochs, 1e-3, folder / "cp", resume=resume)
            training.fit(Toy(2, 2), Text(), Text(), options, device="cpu", stats=folder / "stats.csv",
                         fingerprint={"a": 1}, log=lambda text: None)

        train(1, resume=False)

        def read_model():
            loaded = models.load(folder / "model.pth")
            batches = data.Batches([("A man.", "Ein Mann.")], loaded, 100)
            training.evaluate(training.TranslationLoss(models.place(loaded.network, "cpu")), batches, "cpu")
            models.save(folder / "again.pth", loaded)
            ancestry(loaded.provenance)

        def read_bank():
            opened = bank.load(folder / "bank.npy")
            for key in opened.entries:
                composition.install(model, opened.read(key))
            ancestry(opened.provenance)

        def read_sensitivity():
            search.front(search.read(folder / "sensitivity.json", opened, of), sizes).configuration(0)

        self.paths = {"configuration": folder / "conf.json", "scheme": folder / "scheme.json",
                      "sensitivity": folder / "sensitivity.json",
                      "bank": folder / "bank.npy", "statistics": folder / "stats.csv", "corpus": folder / "train.en",
                      "packed corpus": folder / "val.en.gz", "checkpoint": folder / "cp" / "checkpoint.pth",
                      "model": folder / "model.pth", "hub folder": folder / "hub" / "config.json"}
        (folder / "val.en.gz").write_bytes(gzip.compress((folder / "val.en").read_bytes()))
        (folder / "val.en").unlink()
        self.samples = {kind: path.read_bytes() for kind, path in self.paths.items()}
        text = data.DataOptions("multi30k", folder, "en", "de", "test")
        self.parsers = {
            "configuration": lambda: configs.make_scheme(configs.read_configurations(folder / "conf.json")),
            "scheme": lambda: ancestry(configs.read_scheme(folder / "scheme.json")[1]), "bank": read_bank,
            "sensitivity": read_sensitivity, "statistics": lambda: plot_loss.read(folder / "stats.csv"),
            "corpus": lambda: data.read_pairs(text, "train"), "packed corpus": lambda: data.read_pairs(text, "val"),
            "checkpoint": lambda: train(2), "model": read_model,
            "hub folder": lambda: models.read_config(folder / "hub")}

    def mutate(self, kind: str, rng) -> bytes:
        """Return a mutant of the kind's sample."""
        if kind in ("configuration", "scheme", "sensitivity", "hub folder"):
            return mutate_json(self.samples[kind], rng)
        if kind in ("bank", "checkpoint", "model"):
            return (mutate_bank if kind == "bank" else mutate_sealed)(self.samples[kind], rng)
        if kind == "packed corpus" and rng.randrange(2):
            return gzip.compress(flip(gzip.decompress(self.samples[kind]), rng), 1)
        if kind == "statistics" and rng.randrange(4):
            header, rows = self.samples[kind].split(b"\n", 1)
            return header + b"\n" + flip(rows, rng)
        return flip(self.samples[kind], rng)

    def outcome(self, kind: str, mutant: bytes) -> str | None:
        """Parse a mutant; return None for success, the text of a `UserError`; all else is raised."""
        self.paths[kind].write_bytes(mutant)
        before = signal.signal(signal.SIGALRM, hang)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            self.parsers[kind]()
        except UserError as error:
            return str(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return None


def hang(signum, frame):
    raise Hang


def complaint(message: str) -> str | None:
    """Say what is wrong with an error message for a user, or return None."""
    if not message.strip() or len(message) > 6000 or "Traceback" in message:
        return "no short message"
    if any(not line.startswith("  ") for line in message.split("\n")[1:]):
        return "more than one sentence"
    return None
