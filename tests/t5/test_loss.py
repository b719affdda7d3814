import pytest
import torch

from common.t5 import model as models
from common.t5.loss import DISTILLATION, Teacher, TranslationLoss, evaluate, shift_right, token_loss
from common.text.batches import rows
from tests.small import Text, small_network, theirs


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_the_loss_is_the_librarys_own_and_a_sum_over_tokens(kind):
    network, batch = small_network(kind), next(Text().fixed())
    loss, tokens = TranslationLoss(network)(batch)
    assert tokens == (batch["labels"] >= 0).sum() and batch["labels"].min() == -100
    assert float((loss / tokens).detach()) == pytest.approx(theirs(network)(**batch).loss.item(), rel=1e-5)


def test_the_decoder_reads_the_start_token_and_no_label_padding():
    network = small_network(decoder_start_token_id=7, pad_token_id=2)
    labels = torch.tensor([[5, 6, 1], [8, -100, -100]])
    expected = torch.tensor([[7, 5, 6], [7, 8, 2]])
    assert torch.equal(shift_right(labels, network.config), expected)
    assert torch.equal(theirs(network)._shift_right(labels), expected)


def test_a_start_token_that_pads_is_read_too():
    assert shift_right(torch.tensor([[5]]), small_network().config).tolist() == [[0]]


def test_evaluation_weighs_tokens_not_batches_without_dropout_and_leaves_the_mode():
    network, text = small_network(dropout_rate=0.5), Text(pairs=11, batch=4)
    library = theirs(network)
    alone = [library(input_ids=s[None], labels=t[None]).loss.item() * len(t) for s, t in text.pairs]
    expected = sum(alone) / sum(len(t) for _, t in text.pairs)
    objective = TranslationLoss(network.train())
    assert evaluate(objective, text, "cpu") == pytest.approx(expected, rel=1e-5)
    assert objective.training and network.training
    assert not TranslationLoss(network.eval()).training


def test_a_distilled_target_is_the_reference_and_the_teachers_distribution_by_shares():
    g = torch.Generator().manual_seed(0)
    logits, aims = torch.randn(2, 3, 9, generator=g)
    tokens = torch.tensor([1, 4, 8])
    expected = 0.0
    for i, token in enumerate(tokens):
        log_p, teacher = logits[i].log_softmax(0), aims[i].softmax(0)
        expected -= (1 - DISTILLATION) * log_p[token] + DISTILLATION * (teacher * log_p).sum()
    loss, tokens = token_loss(logits, tokens, aims)
    assert tokens == 3 and float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_teacher_counts_in_training_only():
    network, batch = small_network(dropout_rate=0.0), next(Text().fixed())
    plain, distilling = TranslationLoss(network), TranslationLoss(network, Teacher(small_network(seed=1)))
    assert torch.equal(distilling.eval()(batch)[0], plain(batch)[0])
    assert not torch.allclose(distilling.train()(batch)[0], plain(batch)[0], rtol=1e-3)


def test_a_teacher_that_has_read_the_text_says_what_it_says_of_every_batch(made, text):
    network = models.load(made / "origin.pth").network
    asked, knowing = Teacher(network), Teacher(network)
    knowing.read(text[0], "cpu")
    assert knowing.size(text[0]) == knowing._states.nbytes
    network.encode = None  # it is not run again
    for batch in map(text[0].collate, text[0].epoch(1)):
        logits = knowing(batch)
        assert len(logits) == (batch["labels"] >= 0).sum()
        del network.encode
        assert torch.allclose(logits, asked(batch), rtol=1e-4, atol=1e-4)
        network.encode = None
    part, _ = rows(batch, 1, 3)
    assert torch.equal(knowing(part), logits[torch.repeat_interleave(
        torch.arange(len(batch["labels"])) % 3 == 1, (batch["labels"] >= 0).sum(dim=1))])


def test_a_teacher_is_neither_trained_nor_saved():
    network, teacher = small_network(dropout_rate=0.0), small_network(seed=1)
    objective = TranslationLoss(network, Teacher(teacher)).train()
    objective(next(Text().fixed()))[0].backward()
    assert all(p.grad is None for p in teacher.parameters()) and network.shared.weight.grad is not None
    assert objective.state_dict().keys() == {f"network.{name}" for name in network.state_dict()}
