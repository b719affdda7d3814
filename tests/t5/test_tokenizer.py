"""The tokens of a folder equal those of transformers' AutoTokenizer, wherever its special tokens stand."""

import json
import shutil

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from common.errors import UserError
from common.t5.tokenizer import read_tokenizer
from tests.small import demo_pairs, make_tokenizer

NAMED = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = NAMED | {"tokenizer_class": "PreTrainedTokenizerFast"}


def token(content, **changes):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
            "special": True} | changes


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """A folder with ``tokenizer.json`` and one with ``spiece.model``."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text").write_text("".join(f"{s}\n{t}\n" for s, t in demo_pairs("train")[:300]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spiece"), vocab_size=200, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write(folder, sources, *copied, config=None, **files):
    """Write a tokenizer's files; ``files`` are JSON contents by name without suffix, functions change what is there."""
    for name in copied:
        shutil.copy(sources / name, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"} | (config or {})))
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content(json.loads(path.read_text())) if callable(content) else content))
    return folder


def both(folder):
    """Return our tokenizer of a folder, and transformers'."""
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    return Tokenizer.from_str(read_tokenizer(folder, config)), AutoTokenizer.from_pretrained(folder)


def check_equal(ours, theirs):
    added = list(theirs.added_tokens_encoder)
    texts = [sentence for pair in demo_pairs("val")[:20] for sentence in pair]
    texts += ["", " ", "a  b", "Ein Mädchen 's Hund , nicht ?", "日本\n"]
    for text in [*texts, f"a{'b'.join(added)}c", f"x {' '.join(added)} y"]:
        ids = theirs(text).input_ids
        assert ours.encode(text).ids == ids
        assert ours.decode([0, *ids, 0]) == theirs.decode([0, *ids, 0], skip_special_tokens=True)


def without_added(content):
    return content | {"added_tokens": []}


CASES = {
    "tokenizer.json alone": (["tokenizer.json"], {}),
    "special tokens in tokenizer_config alone": (
        ["tokenizer.json"], {"tokenizer": without_added, "tokenizer_config": FAST}),
    "of a T5Tokenizer": (["tokenizer.json"], {
        "tokenizer": without_added, "tokenizer_config": NAMED | {"tokenizer_class": "T5Tokenizer"}}),
    "added_tokens_decoder": (["tokenizer.json"], {"tokenizer": without_added, "tokenizer_config": FAST | {
        "added_tokens_decoder": {"0": token("<pad>"), "1": token("</s>"), "300": token("<de>"),
                                 "301": token("hund", special=False, normalized=True)}}}),
    "special_tokens_map": (["tokenizer.json"], {
        "tokenizer": without_added, "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map": NAMED | {"additional_special_tokens": ["<en>", "<de>"]}}),
    "added_tokens": (["tokenizer.json"], {
        "tokenizer_config": FAST | {"additional_special_tokens": ["<de>"]},
        "added_tokens": {"<de>": 300, "Katze": 301}}),
    "cleaned up": (["tokenizer.json"], {"tokenizer_config": FAST | {"clean_up_tokenization_spaces": True}}),
    "a class that transformers lacks": (["tokenizer.json"], {"tokenizer_config": NAMED | {"tokenizer_class": "My"}}),
    "padding and truncation": (["tokenizer.json"], {"tokenizer_config": FAST, "tokenizer": lambda content: content | {
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<pad>"}}}),
    "spiece.model alone": (["spiece.model"], {}),
    "spiece.model with options": (["spiece.model"], {"tokenizer_config": NAMED | {
        "extra_ids": 3, "tokenizer_class": "T5Tokenizer"}, "special_tokens_map": NAMED}),
    "both": (["spiece.model", "tokenizer.json"], {"tokenizer_config": FAST}),
    "ByT5": ([], {"tokenizer_config": NAMED | {"tokenizer_class": "ByT5Tokenizer"}}),
    "ByT5 named in config.json": ([], {"config": {"tokenizer_class": "ByT5Tokenizer"}}),
    "ByT5 with other tokens": ([], {"tokenizer_config": NAMED | {
        "tokenizer_class": "ByT5Tokenizer", "extra_ids": 0, "additional_special_tokens": ["<de>"],
        "clean_up_tokenization_spaces": True}}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_of_transformers(tmp_path, sources, case):
    copied, files = CASES[case]
    ours, theirs = both(write(tmp_path, sources, *copied, **files))
    if case == "padding and truncation":
        theirs.backend_tokenizer.no_padding()
    check_equal(ours, theirs)


def test_the_tokens_of_a_bpe_are_those_of_transformers(tmp_path, sources):
    tokenizer = Tokenizer(models.BPE({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "ab": 5}, [("a", "b")],
                                     unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, sources, tokenizer_config=FAST | {"clean_up_tokenization_spaces": True})
    check_equal(*both(tmp_path))


def test_special_tokens_named_in_tokenizer_config_alone_are_skipped(tmp_path, sources):
    ours, _ = both(write(tmp_path, sources, "tokenizer.json", tokenizer=without_added, tokenizer_config=FAST))
    ids = ours.encode("Ein Hund").ids
    assert ids[-1] == 1 and ours.decode([0, *ids, 0]) == "Ein Hund"


def test_a_sentencepiece_model_gives_its_own_pieces(tmp_path, sources):
    ours, _ = both(write(tmp_path, sources, "spiece.model"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sources / "spiece.model"))
    for source, target in demo_pairs("val")[:20]:
        for sentence in (source, target):
            assert ours.encode(sentence).ids == [*pieces.encode(sentence), 1]


def test_a_byte_is_its_number_plus_three(tmp_path, sources):
    from transformers import ByT5Tokenizer

    ours, _ = both(write(tmp_path, sources, config={"tokenizer_class": "ByT5Tokenizer"}))
    assert ours.encode("Tür").ids == [ord("T") + 3, 0xC3 + 3, 0xBC + 3, ord("r") + 3, 1]
    assert ours.decode([0, 0xC3 + 3, 0xBC + 3, 0xFF + 3, ord("r") + 3, 1, 0, 383]) == "ür"  # 0xFF is no UTF-8
    check_equal(ours, ByT5Tokenizer())


def test_a_byte_order_mark_before_every_file_changes_nothing(tmp_path, sources):
    write(tmp_path, sources, "tokenizer.json", tokenizer=without_added, tokenizer_config=FAST, special_tokens_map=NAMED,
          added_tokens={"<de>": 300})
    config = json.loads((tmp_path / "config.json").read_text())
    before = read_tokenizer(tmp_path, config)
    for path in tmp_path.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_tokenizer(tmp_path, config) == before


@pytest.mark.parametrize(("files", "complaint"), [
    ({"tokenizer_config": {"auto_map": {"AutoTokenizer": ["a.B", None]}}}, "has auto_map, which asks for foreign code"),
    ({"tokenizer_config": {"fast_tokenizer_files": ["tokenizer.4.json"]}}, "has fast_tokenizer_files"),
    ({"tokenizer_config": {"tokenizer_class": "T5ForConditionalGeneration"}}, "'T5ForConditionalGeneration'"),
    ({"tokenizer_config": {"tokenizer_class": "pipeline"}}, "tokenizer_class = 'pipeline'"),
    ({"tokenizer_config": {"tokenizer_class": ["x"]}}, r"tokenizer_class = \['x'\]"),
    ({"tokenizer_config": {"extra_ids": 10**9}}, "has extra_ids = 10+, allowed is 0 to 4,096"),
    ({"tokenizer_config": FAST | {"split_special_tokens": True}}, "the tokens of .* differ"),
    ({"tokenizer_config": []}, "tokenizer_config.json: is no JSON object"),
    ({"tokenizer": {}}, "AutoTokenizer cannot read its tokenizer, or .*: 'added_tokens'"),
    ({"tokenizer": {"added_tokens": [], "model": {"type": "Unigram", "vocab": [["a"]]}}}, "cannot read its tokenizer"),
])
def test_a_folder_whose_tokens_would_differ_is_refused(tmp_path, sources, files, complaint):
    with pytest.raises(UserError, match=complaint):
        read_tokenizer(write(tmp_path, sources, "tokenizer.json", **files), {"model_type": "t5"})


def test_a_bpe_that_transformers_takes_for_a_unigram_says_how_to_name_it(tmp_path, sources):
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match='let tokenizer_config.json say "tokenizer_class": "PreTrainedTokenizerFast"'):
        read_tokenizer(write(tmp_path, sources), {"model_type": "t5"})


def test_a_folder_without_tokenizer_says_what_a_byt5_needs(tmp_path, sources):
    with pytest.raises(UserError, match="neither tokenizer.json nor spiece.model, .* says .*ByT5Tokenizer"):
        read_tokenizer(write(tmp_path, sources), {"model_type": "t5"})


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path, sources):
    (tmp_path / "spiece.model").write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(UserError, match="cannot read its tokenizer"):
        read_tokenizer(write(tmp_path, sources), {"model_type": "t5"})
