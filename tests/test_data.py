import gzip
import hashlib
import io

import pytest
import requests

from common import data
from common.data import Batches, DataOptions, read_pairs
from common.files import UserError


def options(folder, **changes):
    return DataOptions(**({"kind": "multi30k", "folder": folder, "source": "en", "target": "de",
                           "test_set": "test_2016_flickr"} | changes))


def corpus(folder, source: bytes, target: bytes):
    (folder / "train.en").write_bytes(source)
    (folder / "train.de").write_bytes(target)
    return options(folder)


@pytest.mark.parametrize(("raw", "lines"), [
    (b"a\nb\n", ["a", "b"]), (b"a\nb", ["a", "b"]), (b"a\r\nb\r\n", ["a", "b"]), (b"\xef\xbb\xbfa\nb\n", ["a", "b"]),
    ("a\u2028b\nc\x85d\n".encode(), ["a\u2028b", "c\x85d"]), (b" a \nb\0\n", ["a", "b"]),
])
def test_lines_end_at_line_feeds_alone(tmp_path, raw, lines):
    pairs = read_pairs(corpus(tmp_path, raw, b"x\ny\n"), "train")
    assert [s for s, _ in pairs] == lines


def test_unequal_line_counts_are_refused(tmp_path):
    with pytest.raises(UserError, match="train.en has 3 lines and train.de 2"):
        read_pairs(corpus(tmp_path, b"a\nb\nc\n", b"a\nb\n"), "train")


def test_pairs_with_an_empty_side_are_left_out_and_told(tmp_path, capsys):
    assert read_pairs(corpus(tmp_path, b"a\n\nc\n", b"x\ny\n \n"), "train") == [("a", "x")]
    assert "2 of 3 pairs have an empty side" in capsys.readouterr().err


def test_invalid_utf8_names_the_line(tmp_path):
    with pytest.raises(UserError, match="train.de: line 2 is not valid UTF-8"):
        read_pairs(corpus(tmp_path, b"a\nb\n", b"a\n\xff\n"), "train")


def test_a_corpus_without_a_pair_is_refused(tmp_path):
    with pytest.raises(UserError, match="train holds no sentence pair"):
        read_pairs(corpus(tmp_path, b"", b""), "train")


def test_gzip_reads_like_plain_text(tmp_path):
    corpus(tmp_path, b"a\nb\n", b"x\ny\n")
    plain = read_pairs(options(tmp_path), "train")
    for language in ("en", "de"):
        path = tmp_path / f"train.{language}"
        (tmp_path / f"train.{language}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert read_pairs(options(tmp_path), "train") == plain


def test_a_truncated_gzip_is_refused(tmp_path):
    corpus(tmp_path, b"a\n", b"x\n")
    (tmp_path / "train.de").unlink()
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b"x\n" * 1000)[:-6])
    with pytest.raises(UserError, match="train.de.gz: is not a complete gzip file"):
        read_pairs(options(tmp_path), "train")


class Reply:
    def __init__(self, content):
        self.content = content

    def raise_for_status(self):
        pass


def test_a_download_is_verified_before_it_gets_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "get", lambda url, timeout: Reply(gzip.compress(b"not Multi30K\n")))
    with pytest.raises(UserError, match="the download's SHA-256 is .* nothing was kept"):
        read_pairs(options(tmp_path / "new"), "train")
    assert not (tmp_path / "new").exists()


def test_a_good_download_is_kept_and_read(tmp_path, monkeypatch):
    seen = []

    def get(url, timeout):
        seen.append(url)
        return Reply(gzip.compress(b"a line\n"))

    monkeypatch.setattr(requests, "get", get)
    for language in ("en", "de"):
        monkeypatch.setitem(data.MULTI30K_SHA256, f"train.{language}", hashlib.sha256(b"a line\n").hexdigest())
    assert read_pairs(options(tmp_path / "new"), "train") == [("a line", "a line")]
    read_pairs(options(tmp_path / "new"), "train")
    assert [url.rsplit("/", 1)[1] for url in seen] == ["train.en.gz", "train.de.gz"]


def test_no_network_is_one_sentence_with_the_ways_out(tmp_path, monkeypatch):
    def get(url, timeout):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(UserError, match="train.en.gz: is not there and cannot be downloaded .*--data-dir.*--data demo"):
        read_pairs(options(tmp_path), "train")


def test_the_demo_corpus_knows_two_languages():
    with pytest.raises(UserError, match="--data demo is English and German, not en and fr"):
        read_pairs(options(None, kind="demo", target="fr"), "train")


def test_an_epoch_holds_every_pair_once_within_the_budget(text):
    batches = text[0].epoch(0)
    assert sorted(id(e) for b in batches for e in b) == sorted(map(id, text[0].dataset.examples))
    for batch in batches:
        assert len(batch) * max(max(len(e.source), len(e.target)) for e in batch) <= 400


def test_epochs_are_shuffled_anew_and_repeatable(text):
    def order(epoch):
        return [[e.source for e in b] for b in text[0].epoch(epoch)]

    assert order(0) == order(0) and order(0) != order(1)


def test_a_sentence_longer_than_the_budget_is_a_batch_of_its_own(origin):
    batches = Batches([("a man " * 30, "ein Mann"), ("a dog", "ein Hund")], origin, 20)
    assert sorted(len(b) for b in batches.epoch(0)) == [1, 1]


def test_a_line_of_a_million_characters_is_cut_and_told(origin, capsys):
    batches = Batches([("x" * 1_000_000, "ein Mann")], origin, 2048)
    assert len(batches.dataset.examples[0].source) == data.MAX_TOKENS
    assert "1 sentences were cut at 512 tokens" in capsys.readouterr().err


def test_labels_are_padded_with_the_ignored_index_and_attention_follows_length(origin):
    batches = Batches([("a man", "ein Mann"), ("a man and a dog", "ein Mann und ein Hund")], origin, 2048)
    batch = batches.collate(batches.dataset.examples)
    a, b = batches.dataset.examples
    assert batch["labels"][0].tolist() == a.target + [-100] * (len(b.target) - len(a.target))
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(a.source), len(b.source)]


def test_the_prefix_stands_before_each_source(origin):
    plain = Batches([("a man", "ein Mann")], origin, 100).dataset.examples[0].source
    prefixed = Batches([("a man", "ein Mann")], origin, 100, prefix="a dog ").dataset.examples[0].source
    assert len(prefixed) > len(plain) and prefixed[-len(plain):] == plain


def test_no_read_asks_for_more_memory_than_a_little(tmp_path):
    """A plain file of two bytes must not need the 4 GiB that a text may have."""
    asked = []

    class Stream(io.BytesIO):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

    assert data._unpack(Stream(b"ab"), tmp_path / "t.en") == b"ab" and 0 < max(asked) <= 1 << 24
