"""The programs that translate: this toolkit, transformers' ``generate`` and CTranslate2.

All get the same sentences, and time runs from the first string to the last. Starting, loading and a warm-up are not in
it. As in `benchmarks.rounds`, importing this imports no torch.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rounds import Clock, peak

WARM_UP = 16  # sentences
# CTranslate2's batches, of which a benchmark takes the fastest.
CT2_BATCHES = (("examples", 16), ("examples", 32), ("examples", 64), ("examples", 128), ("tokens", 1024),
               ("tokens", 2048), ("tokens", 4096))


@dataclass(frozen=True)
class Job:
    """A program, what it loads, and how it translates.

    Attributes:
        program: shrunk and whole (this toolkit), transformers or ctranslate2.
        path: a model file, or a folder that export_model.py wrote.
        batch: sentences; for ctranslate2 also tokens, see ``unit``; 0: as evaluate.py has its batches.
        unit: of ``batch``, examples or tokens.
        by_length: batches hold sentences of similar length, else the text's order stays. CTranslate2 sorts always.
        limit: most tokens of a translation; one for all programs, or those that never end would cost them unequally.
    """

    program: str
    path: Path
    batch: int = 0
    unit: str = "examples"
    by_length: bool = True
    beams: int = 1
    limit: int = 100
    threads: int = 1
    prefix: str = ""


def measure(job: Job, pairs: list) -> dict:
    """Translate the source sentences of ``pairs`` with a job; return seconds, tokens, texts and peak memory in MB."""
    program = {"ctranslate2": CTranslate2, "transformers": Transformers}.get(job.program, Toolkit)(job)
    program.translate(pairs[:WARM_UP])
    clock = Clock()
    texts, tokens = program.translate(pairs)
    return clock.passed() | {"tokens": tokens, "texts": texts, "peak_mb": peak()}


class Toolkit:
    """This toolkit, as evaluate.py calls it, on the shrunk or on the whole network."""

    def __init__(self, job: Job):
        from common import runtime
        from common.t5 import model
        from common.t5.shrink import shrink

        self.job, self.device, self.model = job, runtime.setup("cpu"), model.load(job.path)
        if job.program == "shrunk":
            self.model.network = shrink(self.model)

    def translate(self, pairs) -> tuple[list[str], int]:
        from common.text.batches import Batches, source_text
        from common.text.translation import translate

        size = self.job.batch

        class Counted(Batches):
            def epoch(self, number):
                order = sorted(self.dataset.examples, key=lambda e: len(e.source))
                return [order[i:i + size] for i in range(0, len(order), size)]

        batches = Counted([(s, "") for s, _ in pairs], self.model) if size else \
            source_text(pairs, self.model, self.job.beams)
        made = translate(self.model, batches, self.device, self.job.beams, self.job.limit)
        return made.texts, made.tokens


class Transformers:
    """``generate`` on a folder of --format hf."""

    def __init__(self, job: Job):
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.job, self.tokenizer = job, AutoTokenizer.from_pretrained(job.path, local_files_only=True)
        self.network = AutoModelForSeq2SeqLM.from_pretrained(job.path, local_files_only=True).eval()

    def translate(self, pairs) -> tuple[list[str], int]:
        job, texts, tokens = self.job, [""] * len(pairs), 0
        sentences, order, end = [job.prefix + s for s, _ in pairs], range(len(pairs)), self.network.config.eos_token_id
        if job.by_length:
            lengths = [len(ids) for ids in self.tokenizer(sentences).input_ids]
            order = sorted(order, key=lengths.__getitem__)
        for i in range(0, len(order), job.batch):
            places = order[i:i + job.batch]
            batch = self.tokenizer([sentences[p] for p in places], return_tensors="pt", padding=True, truncation=True)
            ids = self.network.generate(**batch, do_sample=False, num_beams=job.beams, max_new_tokens=job.limit)
            rows = ids[:, 1:].tolist()
            tokens += sum(row.index(end) + 1 if end in row else len(row) for row in rows)
            for place, text in zip(places, self.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                texts[place] = text.strip()
        return texts, tokens


class CTranslate2:
    """``translate_batch`` on a folder of --format ctranslate2."""

    def __init__(self, job: Job):
        sys.modules.setdefault("torch", None)  # it needs none, and imports what it finds
        import ctranslate2
        from tokenizers import Tokenizer

        self.job, self.tokenizer = job, Tokenizer.from_file(str(job.path / "tokenizer.json"))
        self.translator = ctranslate2.Translator(str(job.path), intra_threads=job.threads)
        self.no_text = self.tokenizer.token_to_id(json.loads((job.path / "config.json").read_text())["unk_token"])

    def translate(self, pairs, unit: str = "", batch: int = 0) -> tuple[list[str], int]:
        job = self.job
        sources = [e.tokens for e in self.tokenizer.encode_batch([job.prefix + s for s, _ in pairs])]
        made = self.translator.translate_batch(
            sources, beam_size=job.beams, max_decoding_length=job.limit, max_batch_size=batch or job.batch,
            batch_type=unit or job.unit)
        ids = [[self.tokenizer.token_to_id(token) for token in result.hypotheses[0]] for result in made]
        tokens = sum(min(len(row) + 1, job.limit) for row in ids)  # with the end, which is not returned
        texts = self.tokenizer.decode_batch([[i for i in row if i not in (None, self.no_text)] for row in ids])
        return [text.strip() for text in texts], tokens


def fastest_batch(job: Job, pairs: list) -> tuple[str, int]:
    """Return CTranslate2's fastest of `CT2_BATCHES` for a job, each tried twice."""
    program, seconds = CTranslate2(job), {}
    program.translate(pairs[:WARM_UP], *CT2_BATCHES[0])
    for choice in CT2_BATCHES * 2:
        began = time.perf_counter()
        program.translate(pairs, *choice)
        seconds[choice] = min(seconds.get(choice, float("inf")), time.perf_counter() - began)
    return min(seconds, key=seconds.get)


def export(path: Path, folder: Path, kinds) -> dict:
    """Write a model file as folders ``folder/kind-type`` for (kind, type) in ``kinds``; return languages and prefix."""
    from common.export import folder as exported
    from common.t5 import model

    loaded = model.load(path)
    for kind, dtype in kinds:
        made = folder / f"{kind}-{dtype}"
        made.mkdir(parents=True)
        exported.write(made, loaded, kind, dtype, made.name)
    return {"source": loaded.source, "target": loaded.target, "prefix": loaded.prefix}


def scores(texts: list[list[str]], references: list[str], target: str) -> list[float]:
    """Return the BLEU of several translations of a text."""
    from common.text.translation import score

    return [score(made, references, target).bleu for made in texts]
