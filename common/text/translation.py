"""Translate with a model and score the translations (sacreBLEU, chrF)."""

import json
import re
import time
from dataclasses import dataclass, field

import torch

from common import distributed
from common.runtime import progress
from common.t5.decoding import decode
from common.t5.model import Model
from common.text.batches import Batches

LIMIT_RULE = "2 x source + 16"  # `limit` of new tokens; source: tokens of the longest source sentence of the batch
# Languages that put no spaces between words; sacreBLEU's default would take a sentence for one word.
_BLEU_TOKENIZERS = {
    "zh": {"zh", "zho", "chi", "cmn", "yue", "wuu", "lzh", "nan", "hak", "gan", "cn"},
    "ja-mecab": {"ja", "jpn", "jp"},
    "ko-mecab": {"ko", "kor"},
    "char": {"th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bur", "bo", "bod", "tib", "dz", "dzo"},
}


@dataclass
class Translations:
    """Translations in the order of the text, and how they were made."""

    texts: list[str]
    seconds: float
    hit_limit: float  # the share that was cut at the limit of new tokens
    tokens: int  # generated, ends of sentences among them, start and padding not


@dataclass
class Scores:
    """Corpus scores in 0–100, the signatures that make them comparable, and what a reader of them must know."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    notes: list[str] = field(default_factory=list)


def limit(batch: dict) -> int:
    """Return where a batch's translations are cut, in new tokens: `LIMIT_RULE`."""
    return 2 * batch["input_ids"].shape[1] + 16


def unknown(model: Model) -> int | None:
    """Return the id of the tokenizer's unknown token, which is no text, or None."""
    kind = json.loads(model.tokenizer_json).get("model") or {}
    token = kind.get("unk_token")
    return kind.get("unk_id") if token is None else model.tokenizer.token_to_id(token)


@torch.no_grad()
def translate(model: Model, batches: Batches, device, beams: int = 1,
              max_new_tokens: int | None = None) -> Translations:
    """Translate a split's source sentences, greedily or with beam search; mutates nothing but the network's mode.

    Batches are divided among the processes, so that translations are those of one process; each has all in the end.

    Args:
        max_new_tokens: where a translation without an end is cut; None is `LIMIT_RULE`.
    """
    network, tokenizer = model.network.eval(), model.tokenizer
    config, no_text = network.config, unknown(model)
    texts, unfinished, tokens, began = [""] * len(batches), 0, 0, time.perf_counter()
    with progress(total=len(batches), what="translating", unit=" sentences") as bar:
        for examples in distributed.share(batches.epoch(None)):
            batch = batches.collate(examples, device)
            ids = decode(network, batch["input_ids"], batch["attention_mask"],
                         max_new_tokens or limit(batch), beams)
            unfinished += sum(row[-1] != config.eos_token_id for row in ids)
            tokens += sum(map(len, ids))
            nothing = config.eos_token_id, config.pad_token_id, no_text
            pieces = [[i for i in row if i not in nothing] for row in ids]
            # By id, because a tokenizer need not flag these; flags leave out others, T5's sentinels for example.
            for example, text in zip(examples, tokenizer.decode_batch(pieces, skip_special_tokens=True), strict=True):
                texts[example.number] = text.strip()
            bar.update(distributed.size() * len(examples))
    texts = ["".join(shares) for shares in zip(*distributed.gather(texts), strict=True)]
    unfinished, tokens = map(int, distributed.sums(unfinished, tokens))
    return Translations(texts, time.perf_counter() - began, unfinished / len(batches), tokens)


def bleu_tokenizer(language: str) -> str:
    """Return the name of sacreBLEU's tokeniser for a language such as ``de``, ``zh-TW``, ``ja_XX`` or ``zho_Hans``."""
    main = re.split("[-_]", language.lower())[0]
    return next((name for name, languages in _BLEU_TOKENIZERS.items() if main in languages), "13a")


def score(hypotheses: list[str], references: list[str], target: str, lowercase: bool = False) -> Scores:
    """Score translations into the language ``target`` against one reference each with sacreBLEU and chrF.

    BLEU: Papineni et al. (2002) as standardised by Post (2018), "A Call for Clarity in Reporting BLEU Scores";
    chrF: Popović (2015).
    """
    from sacrebleu.metrics import BLEU, CHRF

    name, notes = bleu_tokenizer(target), []
    try:
        bleu = BLEU(lowercase=lowercase, tokenize=name, force=True)  # force: no advice about sacreBLEU's own flags
    except (ImportError, RuntimeError, AssertionError):  # no MeCab, or with another dictionary
        bleu = BLEU(lowercase=lowercase, tokenize="char", force=True)
        notes.append(f"BLEU of {target} counts characters; to count words as others do: pip install "
                     f"'sacrebleu[{name[:2]}]'")
    b, c = bleu.corpus_score(hypotheses, [references]), CHRF(lowercase=lowercase)
    chrf = c.corpus_score(hypotheses, [references])
    if not b.totals[3]:
        notes.append(f"no translation into {target} is 4 words long, so BLEU is 0 however good they are; see chrF")
    if name == "13a" and 2 * sum(r.endswith(" .") for r in references) > len(references):
        notes.append(f"most {target} references end in a separate full stop: the text looks tokenised, and BLEU of "
                     "tokenised text must not be compared with BLEU of plain text")
    return Scores(b.score, str(bleu.get_signature()), chrf.score, str(c.get_signature()), notes)
