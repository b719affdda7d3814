"""A model with the vocabulary of its text computes what it computed, token for token."""

import json
import shutil
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from common.errors import UserError
from common.t5 import model as models_of_ours
from common.t5.folder import load_folder
from common.t5.vocabulary import cut
from common.text.batches import Batches
from common.text.corpus import DEMO, Corpus, read_pairs
from common.text.translation import unknown
from tests.small import demo_pairs, save_folder, theirs, write_corpus

PREFIX = "to German: "
SENTINELS = {"tokenizer_class": "T5Tokenizer", "extra_ids": 5, "pad_token": "<pad>", "eos_token": "</s>",
             "unk_token": "<unk>"}


def tied(folder):
    save_folder(folder, tie_word_embeddings=True)


def untied(folder):
    save_folder(folder, untie=True, tie_word_embeddings=False)


def mt5(folder):
    save_folder(folder, "mt5", untie=True, tie_word_embeddings=False)


def spiece(folder):
    """Write a model with sentencepiece's file, sentinels, and rows that no token has."""
    save_folder(folder, vocab_size=320)
    (folder / "tokenizer.json").unlink()
    (folder / "text").write_text("".join(f"{s}\n{t}\n" for s, t in demo_pairs("train")[:300]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spiece"), vocab_size=300, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2)
    (folder / "tokenizer_config.json").write_text(json.dumps(SENTINELS))


def change_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def byte_fallback(folder):
    """Write a model that spells letters it does not know in bytes."""
    def change(content):
        content["model"]["vocab"] += [[f"<0x{byte:02X}>", -9.0] for byte in range(256)]
        content["model"]["byte_fallback"] = True
        content["decoder"] = {"type": "Sequence", "decoders": [
            {"type": "ByteFallback"}, content["decoder"], {"type": "Fuse"}]}
        return content

    save_folder(folder, vocab_size=556)
    change_tokenizer(folder, change)


def bpe(folder):
    shutil.copytree(DEMO / "model", folder)


def specials_last(folder):
    """Write a model whose special tokens are the last ones."""
    def change(content):
        vocab = content["model"]["vocab"]
        content["model"]["vocab"], content["model"]["unk_id"] = vocab[3:] + vocab[:3], 299
        for token in content["added_tokens"]:
            token["id"] += 297
        content["post_processor"]["special_tokens"]["</s>"]["ids"] = [298]
        return content

    save_folder(folder, pad_token_id=297, eos_token_id=298, decoder_start_token_id=297)
    change_tokenizer(folder, change)


KINDS = {f.__name__: f for f in (tied, untied, mt5, spiece, byte_fallback, bpe, specials_last)}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A model with its whole vocabulary, the same one cut to a text of 40 pairs, and which tokens stayed."""
    folder = tmp_path_factory.mktemp("vocabulary")
    KINDS[request.param](folder / "hub")
    write_corpus(folder / "text", (40, 20, 10))
    corpus = Corpus(folder / "text", "en", "de")
    full = load_folder(folder / "hub", "en", "de")
    full.prefix = PREFIX
    small, _ = cut(full, corpus)
    pieces = full.tokenizer.get_vocab()
    kept = [pieces[small.tokenizer.id_to_token(i)] for i in range(small.network.config.vocab_size)]
    text = read_pairs(corpus, "train")
    return SimpleNamespace(kind=request.param, full=full, small=small, kept=kept, text=text, folder=folder)


def test_tokens_stay_in_order_and_the_model_is_smaller(pair):
    assert pair.kept == sorted(set(pair.kept)) and len(pair.kept) < pair.full.network.config.vocab_size - 20
    assert pair.small.tokenizer.get_vocab_size() == len(pair.kept) == pair.small.network.shared.num_embeddings
    assert pair.small.network.lm_head.weight.shape[0] == pair.small.network.lm_head.out_features == len(pair.kept)
    assert (pair.small.prefix, pair.small.source, pair.small.target) == (PREFIX, "en", "de")


def test_the_ids_of_the_training_text_map_one_to_one(pair):
    before, after = (Batches(pair.text, m).dataset.examples for m in (pair.full, pair.small))
    for old, new in zip(before, after, strict=True):
        assert old.source == [pair.kept[i] for i in new.source] and old.target == [pair.kept[i] for i in new.target]


def test_text_is_decoded_as_before(pair):
    for text in (t for both in pair.text for t in both):
        ids = pair.small.tokenizer.encode(text).ids
        assert pair.small.tokenizer.decode(ids) == pair.full.tokenizer.decode([pair.kept[i] for i in ids])


def test_special_tokens_have_their_new_numbers(pair):
    old, new = pair.full.network.config, pair.small.network.config
    for key in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        assert pair.kept[getattr(new, key)] == getattr(old, key)
    assert pair.kept[unknown(pair.small)] == unknown(pair.full)
    assert pair.small.tokenizer.decode([new.pad_token_id, new.eos_token_id], skip_special_tokens=True) == ""


def test_sentinels_and_rows_without_a_token_are_gone(pair):
    assert not [piece for piece in pair.small.tokenizer.get_vocab() if "extra_id" in piece]
    if pair.kind == "spiece":
        assert "<extra_id_4>" in pair.full.tokenizer.get_vocab()
        assert pair.small.tokenizer.encode("<extra_id_4>").ids[-1] == pair.small.network.config.eos_token_id


def both_batches(pair):
    """Return the same sentences as batches of both models."""
    return zip(*(Batches(pair.text, m, 400).fixed() for m in (pair.full, pair.small)), strict=True)


@torch.no_grad()
def test_logits_over_the_kept_tokens_are_unchanged(pair):
    for old, new in both_batches(pair):
        logits = []
        for m, batch in ((pair.full, old), (pair.small, new)):
            start = torch.full_like(batch["labels"][:, :1], m.network.config.decoder_start_token_id)
            tokens = batch["labels"].where(batch["labels"] >= 0, m.network.config.pad_token_id)
            logits.append(m.network(batch["input_ids"], torch.cat([start, tokens[:, :-1]], dim=1),
                                    batch["attention_mask"]))
        torch.testing.assert_close(logits[0][..., pair.kept], logits[1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_greedy_translations_are_those_of_the_full_model_without_the_tokens_that_are_gone(pair):
    gone = sorted(set(range(pair.full.network.config.vocab_size)) - set(pair.kept))
    for old, new in list(both_batches(pair))[:2]:
        ids = [theirs(m.network).generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                                          num_beams=1, do_sample=False, max_new_tokens=12, suppress_tokens=tokens)
               for m, batch, tokens in ((pair.full, old, gone), (pair.small, new, None))]
        assert ids[0].tolist() == [[pair.kept[i] for i in row] for row in ids[1].tolist()]


def test_matrices_that_were_tied_stay_tied_and_others_apart(pair):
    for m in (pair.full, pair.small):
        network = m.network
        assert (network.lm_head.weight is network.shared.weight) == (pair.kind not in ("untied", "mt5"))
        assert network.encoder.embed_tokens.weight is network.shared.weight is network.decoder.embed_tokens.weight
        assert getattr(network.config, "scale_decoder_outputs", False) == (pair.kind not in ("untied", "mt5"))


def test_text_that_the_training_text_never_had_can_be_written(pair):
    letters = [p for p in pair.full.tokenizer.get_vocab() if len(p) == 1 and p.isalnum()]
    assert len(letters) > 30
    text = "".join(letters) + " " + " ".join(letters)
    ids = pair.small.tokenizer.encode(text).ids
    assert unknown(pair.small) not in ids and pair.small.tokenizer.decode(ids) == text
    if pair.kind == "byte_fallback":
        assert pair.small.tokenizer.decode(pair.small.tokenizer.encode("犬 🐶").ids) == "犬 🐶"


def test_the_file_holds_the_cut_model(pair):
    models_of_ours.save(pair.folder / "m.pth", pair.small)
    loaded = models_of_ours.load(pair.folder / "m.pth")
    assert loaded.tokenizer_json == pair.small.tokenizer_json and not loaded.network.lm_head.weight.is_meta
    for name, p in pair.small.network.state_dict().items():
        assert torch.equal(p, loaded.network.state_dict()[name])


def with_tokenizer(folder, tokenizer, lines=("ab abc", "abcd"), vocab_size=None):
    """Return a small model with this tokenizer, and a corpus of these lines."""
    save_folder(folder / "hub", vocab_size=vocab_size or max(tokenizer.get_vocab().values()) + 1)
    tokenizer.save(str(folder / "hub" / "tokenizer.json"))
    (folder / "hub" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for name in ("train.en", "train.de"):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return load_folder(folder / "hub", "en", "de"), Corpus(folder, "en", "de")


def words(model):
    """Return a tokenizer that splits text at spaces and gives the words to ``model``."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


SPECIALS = ["<pad>", "</s>", "<unk>"]


def bpe_of(*pieces, merges=(), **options):
    return models.BPE({p: i for i, p in enumerate([*SPECIALS, *pieces])}, list(merges), unk_token="<unk>", **options)


@pytest.mark.parametrize("merges", [
    [("a", "b"), ("ab", "c"), ("c", "a"), ("abc", "a"), ("▁", "abc")],
    [("▁", "abc"), ("abc", "a"), ("c", "a"), ("ab", "c"), ("a", "b")]], ids=["as trained", "in an odd order"])
def test_a_bpe_keeps_what_its_tokens_are_merged_from_and_loses_the_other_merges(tmp_path, merges):
    model, corpus = with_tokenizer(tmp_path, words(
        bpe_of("▁", "a", "b", "c", "ab", "abc", "ca", "abca", "▁abc", merges=merges)), ["abc"])
    assert model.tokenizer.encode("abc").tokens == ["▁abc"]
    small, _ = cut(model, corpus)
    assert small.tokenizer.encode("abc").tokens == ["▁abc"]
    assert set(small.tokenizer.get_vocab()) == {*SPECIALS, "▁", "a", "b", "c", "ab", "abc", "▁abc"}


def test_an_unknown_letter_costs_what_it_did(tmp_path):
    pieces = [*((t, 0.0) for t in SPECIALS), ("▁", -9.0), ("ab", -9.0), ("cd", -9.0), ("▁abc", -1.0), ("zz", -100.0),
              ("yy", -50.0)]
    model, corpus = with_tokenizer(tmp_path, words(models.Unigram(pieces, unk_id=2)), ["abcd", "abc"])
    small, _ = cut(model, corpus)
    assert small.tokenizer.encode("abcd").tokens == ["▁", "ab", "cd"]  # not ▁abc and an unknown letter for 9 + 10
    assert set(model.tokenizer.get_vocab()) - set(small.tokenizer.get_vocab()) == {"yy"}


def test_words_beyond_the_limit_of_a_sentence_count(tmp_path):
    model, corpus = with_tokenizer(tmp_path, words(
        bpe_of("▁", "a", "b", "▁a", "▁b", "▁ab", merges=[("▁", "a"), ("▁", "b"), ("▁a", "b")])),
        [" ".join(["a"] * 600 + ["ab"])])
    small, _ = cut(model, corpus)
    assert "▁ab" in small.tokenizer.get_vocab() and "▁b" not in small.tokenizer.get_vocab()


def test_added_tokens_that_the_text_has_stay(tmp_path):
    tokenizer = words(bpe_of("▁", "a", "b"))
    tokenizer.add_tokens(["<de>", "<fr>", "<en>"])
    model, corpus = with_tokenizer(tmp_path, tokenizer, ["<en>a", "b"])
    small, _ = cut(model, corpus)
    assert small.tokenizer.encode("<en>a").tokens[0] == "<en>"
    assert "<fr>" not in small.tokenizer.get_vocab() and small.tokenizer.token_to_id("<en>") == 6


def test_of_a_byt5_there_is_nothing_to_cut(tmp_path, capsys):
    save_folder(tmp_path / "hub", vocab_size=384)
    (tmp_path / "hub" / "tokenizer.json").unlink()
    (tmp_path / "hub" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    write_corpus(tmp_path / "text", (5, 5, 5))
    model = load_folder(tmp_path / "hub", "en", "de")
    assert cut(model, Corpus(tmp_path / "text", "en", "de"))[0] is model
    assert "every token is a single character or byte, so there is nothing to cut" in capsys.readouterr().err


def bert(tokenizer):
    tokenizer.post_processor = processors.BertProcessing(("</s>", 1), ("<pad>", 0))
    return tokenizer


LETTERS = ("▁", "a", "b", "c", "d", "ab", "abc")
REFUSED = {
    "WordLevel": (lambda: words(models.WordLevel({p: i for i, p in enumerate(SPECIALS)}, unk_token="<unk>")),
                  "is a WordLevel, and only Unigram and BPE can be cut; leave out --vocabulary"),
    "suffix": (lambda: words(bpe_of(*LETTERS, end_of_word_suffix="</w>")), "end_of_word_suffix = '</w>', which cannot"),
    "post-processor": (lambda: bert(words(bpe_of(*LETTERS))), "a post-processor BertProcessing, whose tokens cannot"),
    "random merges": (lambda: words(bpe_of(*LETTERS, merges=[("a", "b"), ("ab", "c")], dropout=0.5)),
                      r"cut, the model's tokenizer would read '(abc )+.* in another way; leave out --vocabulary")}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_cannot_be_cut_is_refused(tmp_path, case):
    make, complaint = REFUSED[case]
    model, corpus = with_tokenizer(tmp_path, make(), ["abc " * 100])
    with pytest.raises(UserError, match=complaint):
        cut(model, corpus)


def test_ids_with_gaps_that_would_not_last_are_refused(tmp_path):
    ids = dict(zip([*SPECIALS, "▁", "a", "b", "c", "d", "ab"], [*range(8), 12], strict=True))
    tokenizer = words(models.BPE(ids, [("a", "b")], unk_token="<unk>"))
    tokenizer.add_tokens(["<de>"])
    assert tokenizer.token_to_id("<de>") == 9
    model, corpus = with_tokenizer(tmp_path, tokenizer, ["<de>ab"])
    with pytest.raises(UserError, match="has gaps between its ids and cannot be renumbered; leave out --vocabulary"):
        cut(model, corpus)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model, corpus = with_tokenizer(tmp_path, words(bpe_of(*LETTERS)), ["abcd"], vocab_size=6)
    with pytest.raises(UserError, match="the tokenizer knows more tokens than the model"):
        cut(model, corpus)
