"""Cut a model's vocabulary down to what its text needs: tokenizer, embeddings and head together.

The tokens of the text it is cut for do not change. A unigram model takes a sentence's likeliest pieces, and they remain
the likeliest when others are gone; a BPE merges the pairs of a word in a fixed order, and every merge that the text
needs is kept. `cut` does not rely on that, it tokenises the text again.
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from common.errors import UserError, reason
from common.files.atomic import digest
from common.files.provenance import Input
from common.t5.model import Model
from common.t5.network import TIED, build_network
from common.text.corpus import Corpus, read_pairs
from common.text.translation import unknown

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPECIAL = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
_HINT = "leave out --vocabulary to keep all tokens"


def cut(model: Model, corpus: Corpus) -> tuple[Model, Input]:
    """Return ``model`` with the tokens that its training text needs, and that text as an input for provenances.

    What stays: tokens of the training text, both languages, prefix included; padding, end, unknown and start token;
    all single characters and bytes, so that any text can be written. The order of tokens stays as well.

    Raises:
        UserError: the tokenizer is of a kind that cannot be cut, or would tokenise the text in another way.
    """
    pairs = read_pairs(corpus, "train")
    # As in `Batches`, but whole: a word that is cut at its limit would leave tokens out.
    sentences = [text for source, target in pairs for text in (model.prefix + source, target)]
    text = Path(corpus.folder.name), digest("\n".join(model.prefix + "\t".join(pair) for pair in pairs)), {}
    config, content = model.network.config, json.loads(model.tokenizer_json)
    pieces, added = _pieces(content), {token["id"] for token in content["added_tokens"]}
    if all(len(piece) == 1 or i in added for i, piece in pieces.items()):
        print("vocabulary: every token is a single character or byte, so there is nothing to cut", file=sys.stderr)
        return model, text

    tokens = _tokenise(model, sentences)
    seen = {i for ids in tokens for i in ids}
    special = {getattr(config, key) for key in _SPECIAL} | ({unknown(model)} - {None})
    special |= {i for entry in _specials(content["post_processor"]) for i in entry["ids"]}
    if max(seen | special) >= config.vocab_size:
        raise UserError("the tokenizer knows more tokens than the model; they do not belong together")
    letters = {i for i, piece in pieces.items() if len(piece) == 1 or _BYTE.fullmatch(piece)}
    kept = sorted(i for i in _with_parts(content["model"], seen | special | letters) if i < config.vocab_size)
    print(f"vocabulary: {len(kept):,} of {config.vocab_size:,} tokens stay; {len(seen):,} occur in the training text",
          file=sys.stderr)
    place = {i: new for new, i in enumerate(kept)}
    small = replace(model, network=cut_network(model.network, kept), tokenizer_json=_cut_tokenizer(content, place))
    before, after = model.tokenizer, small.tokenizer
    if any(after.id_to_token(new) != before.id_to_token(i) for new, i in enumerate(kept)):
        raise UserError(f"the model's tokenizer has gaps between its ids and cannot be renumbered; {_HINT}")
    for sentence, old, new in zip(sentences, tokens, _tokenise(small, sentences), strict=True):
        if old != [kept[i] for i in new]:
            raise UserError(f"cut, the model's tokenizer would read {sentence!r:.80} in another way; {_HINT}")
    return small, text


def _tokenise(model: Model, sentences: list[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in model.tokenizer.encode_batch(sentences)]
    except Exception as error:  # one without an unknown token fails on a new letter
        raise UserError(f"the model's tokenizer cannot read the text: {reason(error, 150)}") from None


def _pieces(content: dict) -> dict[int, str]:
    """Return the pieces of a tokenizer's model by id.

    Raises:
        UserError: it is of a kind that `cut` does not know.
    """
    kind = content["model"]
    if kind["type"] == "Unigram":
        return {i: piece for i, (piece, _) in enumerate(kind["vocab"])}
    if kind["type"] != "BPE":
        raise UserError(f"the model's tokenizer is a {kind['type']}, and only Unigram and BPE can be cut; {_HINT}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if kind.get(key):
            raise UserError(f"the model's tokenizer is a BPE with {key} = {kind[key]!r}, which cannot be cut; {_HINT}")
    return {i: piece for piece, i in kind["vocab"].items()}


def _specials(processor: dict | None) -> list[dict]:
    """Return the entries of a post-processor that hold token ids, under ``ids``."""
    kind = processor["type"] if processor else None
    if kind == "Sequence":
        return [entry for part in processor["processors"] for entry in _specials(part)]
    if kind == "TemplateProcessing":
        return list(processor["special_tokens"].values())
    if kind in (None, "ByteLevel"):
        return []
    raise UserError(f"the model's tokenizer has a post-processor {kind}, whose tokens cannot be renumbered; {_HINT}")


def _with_parts(kind: dict, ids: set[int]) -> set[int]:
    """Return ``ids`` and the tokens without which the tokenizer would not arrive at them."""
    if kind["type"] == "Unigram":  # an unknown letter costs 10 more than the least likely piece
        return ids | {min(range(len(kind["vocab"])), key=lambda i: kind["vocab"][i][1])}
    made = [(kind["vocab"][a + b], {kind["vocab"][a], kind["vocab"][b]}) for a, b in kind["merges"]]
    ids, before = set(ids), 0
    while len(ids) > before:  # one pass and one that finds nothing, unless a file has its merges in an odd order
        before = len(ids)
        for whole, parts in reversed(made):
            if whole in ids:
                ids |= parts
    return ids


def _cut_tokenizer(content: dict, place: dict[int, int]) -> str:
    """Return a tokenizer's JSON with the tokens in ``place`` alone, {id: new id}. Mutates ``content``."""
    kind = content["model"]
    if kind["type"] == "Unigram":
        kind["vocab"] = [entry for i, entry in enumerate(kind["vocab"]) if i in place]
        kind["unk_id"] = place.get(kind["unk_id"])
    else:
        kind["vocab"] = {piece: place[i] for piece, i in kind["vocab"].items() if i in place}
        kind["merges"] = [[a, b] for a, b in kind["merges"] if {a, b, a + b} <= kind["vocab"].keys()]
    content["added_tokens"] = [t | {"id": place[t["id"]]} for t in content["added_tokens"] if t["id"] in place]
    for entry in _specials(content["post_processor"]):
        entry["ids"] = [place[i] for i in entry["ids"]]
    return json.dumps(content, ensure_ascii=False)


def cut_network(network, kept: list[int]):
    """Return a network that shares all weights with ``network``, with the rows ``kept`` of embeddings and head.

    Tied matrices stay tied. The scale d_model^-0.5 in front of a tied head does not depend on the vocabulary.
    """
    config = network.config.to_dict()
    special = {key: kept.index(config[key]) for key in _SPECIAL}
    small = build_network(config | special | {"vocab_size": len(kept)})
    state, rows = {}, {}
    for name, p in network.state_dict(keep_vars=True).items():
        if name in TIED:
            if id(p) not in rows:
                rows[id(p)] = torch.nn.Parameter(p.detach()[kept])
            p = rows[id(p)]
        state[name] = p
    small.load_state_dict(state, assign=True)
    return small
