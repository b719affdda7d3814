import json
from dataclasses import replace

import pytest

from common.errors import UserError
from common.text import batches as module
from common.text.batches import MAX_TOKENS, Batches, calibration_text, source_text, training_text, validation_text
from common.text.corpus import Corpus


def test_an_epoch_holds_every_pair_once_within_the_budget(text):
    batches = text[0].epoch(0)
    assert sorted(id(e) for b in batches for e in b) == sorted(map(id, text[0].dataset.examples))
    for batch in batches:
        assert len(batch) * max(max(len(e.source), len(e.target)) for e in batch) <= 400


def test_epochs_are_shuffled_anew_and_repeatable(text, origin, made):
    def order(epoch, batches=text[0]):
        return [[e.source for e in b] for b in batches.epoch(epoch)]

    corpus = Corpus(made / "text", "en", "de")
    assert order(0) == order(0) == order(0, training_text(corpus, origin, 400)) != order(1)
    assert order(0) != order(0, training_text(corpus, origin, 400, seed=1))
    assert order(None) == order(None, training_text(corpus, origin, 400, seed=1))


def test_a_sentence_longer_than_the_budget_is_a_batch_of_its_own(origin):
    batches = Batches([("a man " * 30, "ein Mann"), ("a dog", "ein Hund")], origin, 20)
    assert sorted(len(b) for b in batches.epoch(0)) == [1, 1]


def test_a_line_of_a_million_characters_is_cut_and_it_is_said(origin, capsys):
    batches = Batches([("x" * 1_000_000, "ein Mann")], origin)
    ids = batches.dataset.examples[0].source
    assert len(ids) == MAX_TOKENS and ids[-1] == origin.network.config.eos_token_id
    assert "1 sentences were cut at 512 tokens" in capsys.readouterr().err


def test_what_is_translated_lies_beside_sources_of_its_length_whatever_the_references(origin,
                                                                                                    monkeypatch):
    pairs = [("a man", "ein Mann " * 9), ("a man and a dog and a cat", "ein"), ("a dog", "ein Hund")]
    man, cat, dog = (len(origin.tokenizer.encode(source).ids) for source, _ in pairs)
    for beams, tokens in ((1, cat), (6, 6 * cat)):
        monkeypatch.setattr(module, "TRANSLATED_TOKENS", tokens)
        batches = source_text(pairs, origin, beams).epoch(None)
        assert [sorted(len(e.source) for e in batch) for batch in batches] == [sorted([man, dog]), [cat]]
    longest = [max(len(e.source), len(e.target)) for batch in Batches(pairs, origin, 1).epoch(None) for e in batch]
    assert longest == sorted(longest) and longest[-1] > cat  # the first one's reference


def test_labels_are_padded_with_the_ignored_index_and_attention_follows_length(origin):
    batches = Batches([("a man", "ein Mann"), ("a man and a dog", "ein Mann und ein Hund")], origin)
    batch = batches.collate(batches.dataset.examples)
    a, b = batches.dataset.examples
    assert batch["labels"][0].tolist() == a.target + [-100] * (len(b.target) - len(a.target))
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(a.source), len(b.source)]
    assert batch["input_ids"][0].tolist() == a.source + [0] * (len(b.source) - len(a.source))


def test_the_models_prefix_stands_before_each_source(origin):
    plain, prefixed = (Batches([("a man", "ein Mann")], replace(origin, prefix=prefix)) for prefix in ("", "a dog "))
    a, b = (batches.dataset.examples[0] for batches in (plain, prefixed))
    assert len(b.source) > len(a.source) and b.source[-len(a.source):] == a.source and a.target == b.target
    assert plain.sha256 != prefixed.sha256


def test_an_end_is_added_where_the_tokenizer_has_none(origin):
    bare = json.dumps(json.loads(origin.tokenizer_json) | {"post_processor": None})
    ends = [Batches([("a man", "ein Mann")], m).dataset.examples[0].source
            for m in (origin, replace(origin, tokenizer_json=bare))]
    assert ends[0] == ends[1] and ends[0][-1] == origin.network.config.eos_token_id
    assert replace(origin, tokenizer_json=bare).tokenizer.encode("a man").ids == ends[0][:-1]


def test_a_tokenizer_that_fails_on_the_text_is_named(origin):
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram

    model = replace(origin, tokenizer_json=Tokenizer(Unigram([("a", -1.0)])).to_str())  # no unknown token
    with pytest.raises(UserError, match="the model's tokenizer cannot read the text"):
        Batches([("zzz", "a")], model)


def test_calibration_pairs_are_drawn_by_the_seed_and_a_part_of_validation_is_always_the_same(made, origin):
    corpus = Corpus(made / "text", "en", "de")
    shas = [calibration_text(corpus, origin, seed, 20).sha256 for seed in (0, 0, 1)]
    assert shas[0] == shas[1] != shas[2] and len(calibration_text(corpus, origin)) == 200
    assert len(validation_text(corpus, origin, sentences=7)) == 7
    folder, sha, _ = validation_text(corpus, origin).as_input()
    assert folder.name == "text" and sha == validation_text(corpus, origin, 100).sha256
