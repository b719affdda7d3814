"""Translate with a model and score the translations (sacreBLEU, chrF)."""

import sys
import time
from dataclasses import dataclass

import torch

from common.data import Batches
from common.models import Model


@dataclass
class Scores:
    """Corpus scores in 0–100 with the signatures that make them comparable, and the time of translation."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    seconds: float


@torch.no_grad()
def translate(model: Model, batches: Batches, device, beams: int = 1, progress: bool = True) -> list[str]:
    """Translate a split's source sentences, greedily or with beam search; returned in the split's order.

    A translation ends after at most twice as many tokens as its batch's longest source, plus 16.
    """
    network, tokenizer = model.network.eval(), model.tokenizer
    config = network.config
    result: dict[int, str] = {}
    places = {id(example): i for i, example in enumerate(batches.dataset.examples)}
    began = time.perf_counter()
    for examples in batches.epoch(None):
        batch = batches.collate(examples, device)
        ids = network.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=beams, do_sample=False,
            max_new_tokens=2 * batch["input_ids"].shape[1] + 16, use_cache=True, pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id, decoder_start_token_id=config.decoder_start_token_id)
        texts = tokenizer.decode_batch(ids.tolist(), skip_special_tokens=True)
        result |= {places[id(e)]: text.strip() for e, text in zip(examples, texts, strict=True)}
        if progress and sys.stderr.isatty():
            print(f"\rtranslated {len(result):,} of {len(batches):,} ({time.perf_counter() - began:.0f} s)",
                  end="", file=sys.stderr)
    if progress and sys.stderr.isatty():
        print(file=sys.stderr)
    return [result[i] for i in range(len(batches))]


def score(hypotheses: list[str], references: list[str], seconds: float, lowercase: bool = False) -> Scores:
    """Score translations against one reference each with sacreBLEU (13a tokenisation) and chrF.

    BLEU: Papineni et al. (2002) as standardised by Post (2018), "A Call for Clarity in Reporting BLEU Scores";
    chrF: Popović (2015).
    """
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(lowercase=lowercase), CHRF(lowercase=lowercase)
    b, c = bleu.corpus_score(hypotheses, [references]), chrf.corpus_score(hypotheses, [references])
    return Scores(b.score, str(bleu.get_signature()), c.score, str(chrf.get_signature()), seconds)
