import gzip
import hashlib
from pathlib import Path

import pytest
import requests

from common.errors import UserError
from common.text import corpus
from common.text.corpus import DEMO, MULTI30K, Corpus, read_pairs


def texts(folder, source: bytes, target: bytes) -> Corpus:
    """Write a training split."""
    (folder / "train.en").write_bytes(source)
    (folder / "train.de").write_bytes(target)
    return Corpus(folder, "en", "de")


@pytest.mark.parametrize(("raw", "lines"), [
    (b"a\nb\n", ["a", "b"]), (b"a\nb", ["a", "b"]), (b"a\r\nb\r\n", ["a", "b"]), (b"\xef\xbb\xbfa\nb\n", ["a", "b"]),
    ("a\u2028b\nc\x85d\n".encode(), ["a\u2028b", "c\x85d"]), (b" a \nb\0\n", ["a", "b"])])
def test_only_line_feeds_end_a_line(tmp_path, raw, lines):
    assert [s for s, _ in read_pairs(texts(tmp_path, raw, b"x\ny\n"), "train")] == lines


@pytest.mark.parametrize(("raw", "line"), [(b"a\rb\rc\r", 1), (b"a\nb\rc\n", 2), (b"a\nb\r\r\n", 2)])
def test_a_lone_carriage_return_is_refused_by_line(tmp_path, raw, line):
    with pytest.raises(UserError, match=f"train.en: line {line} holds a carriage return that ends no line"):
        read_pairs(texts(tmp_path, raw, raw), "train")


def test_unequal_line_counts_are_refused(tmp_path):
    with pytest.raises(UserError, match="train.en has 3 lines and train.de 2; line n of one must translate line n"):
        read_pairs(texts(tmp_path, b"a\nb\nc\n", b"a\nb\n"), "train")


def test_pairs_with_an_empty_side_are_left_out_and_it_is_said(tmp_path, capsys):
    assert read_pairs(texts(tmp_path, b"a\n\nc\n", b"x\ny\n \n"), "train") == [("a", "x")]
    assert "2 of 3 pairs have an empty side" in capsys.readouterr().err


def test_the_first_pairs_alone_can_be_read(tmp_path):
    texts(tmp_path, b"a\nb\nc\n", b"x\ny\nz\n")
    assert read_pairs(Corpus(tmp_path, "en", "de", 2), "train") == [("a", "x"), ("b", "y")]


def test_invalid_utf8_names_the_line(tmp_path):
    with pytest.raises(UserError, match="train.de: line 2 is not valid UTF-8"):
        read_pairs(texts(tmp_path, b"a\nb\n", b"a\n\xff\n"), "train")


def test_a_corpus_without_a_pair_is_refused(tmp_path):
    with pytest.raises(UserError, match="train holds no sentence pair"):
        read_pairs(texts(tmp_path, b"", b""), "train")


def pack(folder, data: bytes):
    """Replace the training split by packed text."""
    for language in ("en", "de"):
        (folder / f"train.{language}.gz").write_bytes(data)
        (folder / f"train.{language}").unlink(missing_ok=True)
    return Corpus(folder, "en", "de")


def test_gzip_reads_like_plain_text(tmp_path):
    assert read_pairs(pack(tmp_path, gzip.compress(b"a\nb\n")), "train") == [("a", "a"), ("b", "b")]


def test_a_truncated_gzip_is_refused(tmp_path):
    with pytest.raises(UserError, match="train.en.gz: is not a complete gzip file"):
        read_pairs(pack(tmp_path, gzip.compress(b"x\n" * 1000)[:-6]), "train")


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_UNPACKED", 1 << 20)
    with pytest.raises(UserError, match=r"train.en.gz: more than 1 MiB of text out of 2,\d\d\d packed bytes"):
        read_pairs(pack(tmp_path, gzip.compress(b"\n" * (2 << 20))), "train")


@pytest.fixture
def replies(tmp_path, monkeypatch):
    """The hub of Multi30K: its packed text is in the list that is given; the list of addresses that were asked."""
    asked, text = [], [b"a line\n"]

    def get(url, timeout):
        asked.append(url.rsplit("/", 1)[1])
        if not text:
            raise requests.ConnectionError("no route")
        reply = requests.Response()
        reply.status_code, reply._content = 200, gzip.compress(text[0])
        return reply

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(requests, "get", get)
    return asked, text


def test_a_good_download_is_kept_and_read(replies, monkeypatch):
    for language in ("en", "de"):
        monkeypatch.setitem(corpus.MULTI30K_SHA256, f"train.{language}", hashlib.sha256(b"a line\n").hexdigest())
    for _ in range(2):
        assert read_pairs(Corpus(MULTI30K, "en", "de"), "train") == [("a line", "a line")]
    assert replies[0] == ["train.en.gz", "train.de.gz"]


def test_a_download_is_verified_before_it_gets_its_name(replies):
    with pytest.raises(UserError, match="the download's SHA-256 is .* nothing was kept"):
        read_pairs(Corpus(MULTI30K, "en", "de"), "train")
    assert not MULTI30K.exists()


def test_no_network_is_one_sentence_with_the_ways_out(replies):
    replies[1].clear()
    with pytest.raises(UserError, match=r"train.en.gz: is not there and cannot be downloaded \(ConnectionError\); put "
                                        "the text into .*--data.*--data demo"):
        read_pairs(Corpus(MULTI30K, "en", "de"), "train")


def test_no_other_folder_is_filled_by_downloads(replies):
    with pytest.raises(UserError, match="mine/train.en: is not there, nor with .gz; --data names a folder with"):
        read_pairs(Corpus(Path("mine"), "en", "de"), "train")
    assert not replies[0]


@pytest.mark.parametrize(("split", "pairs"), [("train", 8000), ("val", 500), ("test_2016_flickr", 500)])
def test_the_demo_text_is_there(split, pairs):
    read = read_pairs(Corpus(DEMO, "en", "de"), split)
    assert len(read) == len(set(read)) == pairs
