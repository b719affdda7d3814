import json
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.files import jsonfile
from common.files.jsonfile import is_sealed, parse_json, read_json, sealed, write_json
from tests.mutants import cpu_limit, examples

TEXT = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
                    lambda x: st.lists(x) | st.dictionaries(TEXT, x), max_leaves=20)


@examples(200)
@given(JSON)
def test_json_is_read_as_it_was_written(value):
    assert parse_json(json.dumps(value).encode(), "x") == value


@examples(300)
@given(st.binary(max_size=300) | st.text('{}[]",:\\0e-u.').map(str.encode))
def test_any_bytes_are_json_or_refused(data):
    try:
        value = parse_json(data, "x")
    except UserError:
        return
    assert value == json.loads(data.decode("utf-8-sig"))


@pytest.mark.skipif(not hasattr(signal, "ITIMER_PROF"), reason="needs a timer of CPU time")
@pytest.mark.parametrize(("data", "message"), [
    (b'["' + b'\\"' * 200_000, "is not valid JSON"), (b'"' * 200_001, "is not valid JSON"),
    (b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b',"99999":0}', "the key '99999' stands twice"),
    (b"[" * 200_000, "nested more than 100 deep"), (b"9" * 5000, "is not valid JSON")],
    ids=["quotes without end", "open quotes", "many keys, one twice", "deep", "long number"])
def test_costly_json_is_refused_without_quadratic_work(data, message):
    with pytest.raises(UserError, match=message), cpu_limit(10):
        parse_json(data, "x")


def test_brackets_inside_strings_are_not_depth():
    assert parse_json(b'["' + b"[" * 300 + b'"]', "x") == ["[" * 300]


def test_half_a_character_is_refused_and_two_halves_are_one():
    with pytest.raises(UserError, match="x: is not valid JSON"):
        parse_json(b'["\\ud800"]', "x")
    assert parse_json(b'["\\ud83d\\ude00"]', "x") == ["\U0001f600"]


def test_a_byte_order_mark_is_read_over():
    assert parse_json(b"\xef\xbb\xbf[1]", "x") == [1]


def test_json_larger_than_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonfile, "MAX_JSON_BYTES", 1 << 20)
    (tmp_path / "c.json").write_text("[" + " " * (1 << 20) + "]")
    with pytest.raises(UserError, match="c.json: JSON of more than 1 MiB is not read"):
        read_json(tmp_path / "c.json")


def test_figures_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(UserError, match="s.json: not written, for JSON has no word for a number that is not finite"):
        write_json(tmp_path / "s.json", [{"loss": float("nan")}])
    assert not list(tmp_path.iterdir())


def test_a_seal_holds_for_the_bytes_alone(tmp_path):
    path, data = tmp_path / "s.json", sealed({"a": ["ä", 1]})
    path.write_bytes(data)
    assert is_sealed(path) and read_json(path)["a"] == ["ä", 1]
    for changed in (data.replace(b"1", b"2", 1), data + b"\n", data.replace(b'"a"', b'"b"')):
        path.write_bytes(changed)
        assert not is_sealed(path)
