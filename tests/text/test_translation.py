"""Translations are cut by id, and scored as the target language asks."""

import json
import logging
from dataclasses import replace

import pytest
import sacrebleu
import torch

from common.t5 import model as models
from common.text import translation
from common.text.batches import Batches
from common.text.translation import bleu_tokenizer, score, translate

PAIRS = [("A man runs.", "Ein Mann rennt."), ("A child eats.", "Ein Kind isst."), ("A dog.", "Ein Hund.")]
SENTENCES = {
    "zh": ["那只狗在公园里跑得很快。", "一个戴红帽子的男人在吃东西。"],
    "ja": ["犬が公園で速く走っている。", "男の人が帽子をかぶる。"],
    "ko": ["개가 공원에서 빨리 달리고 있다.", "남자가 빨간 모자를 쓰고 있다."],
    "th": ["สุนัขวิ่งเร็วในสวนสาธารณะ", "ผู้ชายใส่หมวกสีแดง"],
    "lo": ["ໝາແລ່ນໄວໃນສວນ"], "km": ["ឆ្កែរត់លឿននៅក្នុងសួន"], "my": ["ခွေးသည်ပန်းခြံထဲတွင်လျင်မြန်စွာပြေးသည်"],
    "cs": ["Pes běží rychle v parku."], "ar": ["الكلب يجري بسرعة في الحديقة."],
}


@pytest.fixture
def model(made):
    return models.load(made / "origin.pth")


def generated(model, monkeypatch, rows, **options):
    """Translate `PAIRS` with a search that finds ``rows``, one for each pair."""
    batches = Batches(PAIRS, model, 8192)
    order = [batches.dataset.examples.index(e) for batch in batches.epoch(None) for e in batch]
    monkeypatch.setattr(translation, "decode", lambda *_: [rows[i] for i in order])
    return translate(model, batches, "cpu", **options)


@pytest.mark.parametrize("flagged", [True, False])
def test_a_tokenizer_need_not_flag_its_special_tokens(model, monkeypatch, flagged):
    rows = [model.tokenizer.encode(target).ids for _, target in PAIRS]
    rows[1].insert(3, model.tokenizer.token_to_id("<unk>"))
    if not flagged:
        content = json.loads(model.tokenizer_json)
        model.tokenizer_json = json.dumps(content | {"added_tokens": []})
        assert model.tokenizer.decode([0], skip_special_tokens=True) == "<pad>"
    assert generated(model, monkeypatch, rows).texts == [target for _, target in PAIRS]


def test_a_start_token_that_is_an_ordinary_piece_counts_as_text(model, monkeypatch):
    rows = [model.tokenizer.encode(target).ids for _, target in PAIRS]
    model.network.config.decoder_start_token_id = rows[0][0]
    assert generated(model, monkeypatch, rows).texts == [target for _, target in PAIRS]


def test_translations_without_an_end_are_counted(model, monkeypatch):
    made = generated(model, monkeypatch, [[7, 1], [7, 8], [9, 1]])
    assert made.hit_limit == pytest.approx(1 / 3)


def test_tokens_are_counted_up_to_the_end_of_each_sentence(model, monkeypatch):
    assert generated(model, monkeypatch, [[7, 1], [7, 8, 9], [9, 9, 1]]).tokens == 2 + 3 + 3


def test_translations_end_at_the_limit(model, monkeypatch):
    seen, decode = [], translation.decode
    monkeypatch.setattr(translation, "decode", lambda *a: seen.append(a[3]) or decode(*a))
    batches = Batches(PAIRS, model, 8192)
    for limit in (None, 1):
        translate(model, batches, "cpu", max_new_tokens=limit)
    assert seen == [2 * max(len(e.source) for e in batches.dataset.examples) + 16, 1]


def test_a_translation_equals_one_made_token_by_token(model):
    batches = Batches(PAIRS, model, 8192)
    for example, text in zip(batches.dataset.examples, translate(model, batches, "cpu", max_new_tokens=12).texts,
                             strict=True):
        out = [0]
        with torch.no_grad():
            while len(out) < 13 and (len(out) == 1 or out[-1] != 1):
                logits = model.network(torch.tensor([example.source]), torch.tensor([out]))
                out.append(int(logits[0, -1].argmax()))
        assert text == model.tokenizer.decode(out).strip()


def test_scores_by_hand():
    """Four of four words, in the right order, and one word wrong."""
    same = score(["ein Hund läuft schnell"], ["ein Hund läuft schnell"], "de")
    assert same.bleu == pytest.approx(100) and same.chrf == pytest.approx(100) and not same.notes
    one = score(["ein Hund läuft schnell ."], ["ein Hund rennt schnell ."], "de")
    # n-gram precisions 4/5, 2/4, 1/6 and 1/8 (the last two, 0 of 3 and of 2, are smoothed as sacreBLEU does).
    assert one.bleu == pytest.approx(100 * (4 / 5 * 2 / 4 / 6 / 8) ** 0.25)
    assert 50 < one.chrf < 100 and "nc:6|nw:0" in one.chrf_signature


@pytest.mark.parametrize("language", SENTENCES)
def test_perfect_translations_score_100_in_every_language(language):
    scores = score(SENTENCES[language], SENTENCES[language], language)
    assert scores.bleu == pytest.approx(100) and scores.chrf == pytest.approx(100)


@pytest.mark.parametrize(("languages", "tokenizer"), [
    ("zh zh_CN zh-TW zho_Hans ZH cmn yue cn", "zh"), ("ja ja_XX jpn_Jpan jp", "ja-mecab"),
    ("ko kor_Hang ko-KR", "ko-mecab"),
    ("th tha_Thai lo lao_Laoo km khm_Khmr my my_MM mya_Mymr bo dz", "char"),
    ("de cs ar pt_BR sr_Latn en-zh zhuang tho vi hi", "13a")])
def test_the_tokeniser_follows_the_language_whatever_its_region(languages, tokenizer):
    assert {language: bleu_tokenizer(language) for language in languages.split()} == dict.fromkeys(
        languages.split(), tokenizer)


def test_near_misses_in_chinese_score_as_sacrebleu_does():
    near = [s.replace("很", "真").replace("红", "黑") for s in SENTENCES["zh"]]
    scores = score(near, SENTENCES["zh"], "zh-CN")
    assert scores.bleu == sacrebleu.corpus_bleu(near, [SENTENCES["zh"]], tokenize="zh").score > 50
    assert "tok:zh|" in scores.bleu_signature and not scores.notes


@pytest.mark.parametrize("language", ["ja", "ko"])
def test_without_mecab_characters_are_counted_and_said(language, monkeypatch):
    monkeypatch.setattr(f"sacrebleu.tokenizers.tokenizer_{language}_mecab.MeCab", None)
    scores = score(SENTENCES[language], SENTENCES[language], f"{language}_XX")
    assert scores.bleu == pytest.approx(100) and "tok:char|" in scores.bleu_signature
    assert scores.notes == [f"BLEU of {language}_XX counts characters; to count words as others do: pip install "
                            f"'sacrebleu[{language}]'"]


def test_mecab_is_used_where_it_is_installed():
    pytest.importorskip("MeCab")
    pytest.importorskip("ipadic")
    scores = score(SENTENCES["ja"], SENTENCES["ja"], "ja")
    assert scores.bleu == pytest.approx(100) and "tok:ja-mecab" in scores.bleu_signature and not scores.notes


@pytest.mark.parametrize(("text", "note"), [
    (["Ein Hund läuft schnell ."] * 150, "text looks tokenised"),
    (["Guten Tag", "Ja"], "is 4 words long, so BLEU is 0"),
    (["Guten Tag .", "Ja ."], "is 4 words long, so BLEU is 0")])
def test_what_matters_is_said_in_our_words_and_sacrebleu_says_nothing(text, note, caplog):
    with caplog.at_level(logging.WARNING):
        notes = score(text, text, "de").notes
    assert not caplog.records and note in notes[0]


def test_a_space_before_other_marks_is_no_sign_of_tokenised_text():
    french = ["Où est le chien ?", "Il court vite !", "Il a 5 % de plus."]
    assert score(french, french, "fr").notes == []


def test_the_text_keeps_its_order(model):
    pairs = [(" ".join(["dog"] * n), "Hund") for n in (9, 1, 5, 3, 7)]
    alone = [translate(model, Batches([p], model, 8192), "cpu", max_new_tokens=6).texts[0] for p in pairs]
    assert translate(model, Batches(pairs, model, 20), "cpu", max_new_tokens=6).texts == alone
    assert translate(replace(model), Batches(pairs, model, 8192), "cpu", beams=2, max_new_tokens=6).hit_limit <= 1
