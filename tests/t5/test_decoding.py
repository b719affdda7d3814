"""Greedy and beam search find what transformers' do, sentence by sentence as in a batch."""

import pytest
import torch

from common.t5 import decoding
from common.t5.decoding import _Decoder, decode, largest
from tests.mutants import address_space
from tests.small import small_network, theirs


def batch(seed: int, count: int = 7, longest: int = 9):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (count, longest), generator=g)
    lengths = torch.randint(1, longest + 1, (count, 1), generator=g)
    lengths[0] = longest
    return ids, (torch.arange(longest) < lengths).long()


def sharp(kind: str, seed: int, **changes):
    """Return a random network that is sure enough of itself for sentences to end at different lengths."""
    network = small_network(kind, seed, **changes)
    with torch.no_grad():
        network.lm_head.weight = torch.nn.Parameter(3 * torch.randn_like(network.lm_head.weight))
        network.lm_head.weight[network.config.eos_token_id] *= 2.5
        for stack in (network.encoder, network.decoder):
            stack.positions.weight.normal_(std=2)
    return network


def reference(network, ids, mask, limit: int, beams: int) -> list[list[int]]:
    made = theirs(network).generate(input_ids=ids, attention_mask=mask, num_beams=beams, do_sample=False,
                                    max_new_tokens=limit)
    end = network.config.eos_token_id
    rows = [row[1:] for row in made.tolist()]
    return [row[:row.index(end) + 1] if end in row else row for row in rows]


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5, 6])  # with 4 the mT5 ends all at once
@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_translations_are_those_of_transformers(kind, seed, beams):
    network, (ids, mask) = sharp(kind, seed, num_layers=2 + seed % 2), batch(seed)
    made = decode(network, ids, mask, 12, beams)
    assert made == reference(network, ids, mask, 12, beams)
    assert len({len(row) for row in made}) > 1, "they all end at once"


@pytest.mark.parametrize("changes", [{"decoder_start_token_id": 1}, {"pad_token_id": 1}, {"eos_token_id": 7}], ids=str)
def test_start_end_and_padding_may_be_the_same_token(changes):
    network, (ids, mask) = sharp("t5", 3, **changes), batch(3)
    for beams in (1, 3):
        assert decode(network, ids, mask, 12, beams) == reference(network, ids, mask, 12, beams)


@pytest.mark.parametrize("beams", [1, 4])
def test_sentences_encoded_in_parts_are_translated_as_together(beams, monkeypatch):
    network, (ids, mask) = sharp("t5", 1), batch(1)
    together = decode(network, ids, mask, 12, beams)
    monkeypatch.setattr(decoding, "_ENCODED", 2)
    assert decode(network, ids, mask, 12, beams) == together


@pytest.mark.parametrize("width, k", [(1, 1), (7, 3), (16, 2), (40, 5), (47, 5), (1003, 8)])
def test_largest_are_those_of_topk(width, k):
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    x[1:4, -2:] += 5  # in the last columns, of no group
    for ours, theirs_ in zip(largest(x, k), x.topk(k), strict=True):
        assert torch.equal(ours, theirs_)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_sentence_alone_is_translated_as_in_a_batch(beams):
    network, (ids, mask) = sharp("t5", 1), batch(1)
    alone = [decode(network, i[None, :n], m[None, :n], 12, beams)[0]
             for i, m, n in zip(ids, mask, mask.sum(dim=1), strict=True)]
    assert alone == decode(network, ids, mask, 12, beams)


def test_the_logits_of_each_step_are_those_of_the_whole_sentence_also_after_others_left():
    network, (ids, mask) = sharp("t5", 0), batch(0)
    tokens = torch.randint(3, 50, (len(ids), 6), generator=torch.Generator().manual_seed(0))
    decoder, kept, rows = _Decoder(network, ids, mask, 1, 6), torch.tensor([1, 4, 6]), torch.arange(len(ids))
    with torch.no_grad():
        whole = network(ids, tokens, mask)
        for at in range(6):
            torch.testing.assert_close(decoder.step(tokens[rows, at]), whole[rows, at], rtol=1e-5, atol=1e-5)
            if at == 2:
                decoder.keep(kept)
                rows = kept


@pytest.mark.parametrize("beams", [1, 3])
def test_the_limit_counts_the_end_token(beams):
    network, (ids, mask) = sharp("t5", 2), batch(2)
    for limit in (1, 2, 30):
        assert max(map(len, decode(network, ids, mask, limit, beams))) <= limit


def test_a_high_limit_takes_memory_in_proportion():
    network, (ids, mask) = sharp("t5", 2), batch(2)
    with torch.no_grad(), address_space(1 << 30):  # a bias for every pair of 20,000 steps would take 6.4 GB
        decoder = _Decoder(network, ids, mask, 2, 20_000)
        assert decoder.step(torch.zeros(2 * len(ids), dtype=torch.long)).shape == (2 * len(ids), 50)


def test_beams_may_be_more_than_the_vocabulary():
    network = small_network(vocab_size=1, eos_token_id=0)
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert decode(network, ids, torch.ones_like(ids), 4, 3) == [[0], [0]]
