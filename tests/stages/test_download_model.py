import pytest

from common.t5 import model as models
from common.text.batches import training_text
from common.text.corpus import Corpus
from tests.small import refused, write_corpus


def test_languages_prefix_and_arguments_are_in_the_file(made, tmp_path, stage):
    result = stage("download_model", "-m", made / "hub", "-o", tmp_path / "m.pth", "--source", "fr", "--target",
                   "pt_BR", "--source-prefix", "ü: ")
    assert result.code == 0 and "fr to pt_BR, prefix 'ü: '" in result.out
    model = models.load(tmp_path / "m.pth")
    assert (model.source, model.target, model.prefix) == ("fr", "pt_BR", "ü: ")
    assert model.provenance["stage"] == "download_model.py" and model.provenance["arguments"]["source"] == "fr"
    assert model.provenance["arguments"]["hub_commit"] is None


@pytest.mark.parametrize("flag", ["--source", "--target"])
def test_a_language_that_is_no_part_of_a_file_name_is_refused(stage, flag):
    refused(stage("download_model", flag, "../x"), f"argument {flag}: '../x' is not a language such as en")


def test_later_stages_read_the_text_of_the_models_languages(work, stage, monkeypatch):
    monkeypatch.chdir(work)
    for split in ("train", "val"):
        for old, new in (("en", "xx"), ("de", "yy")):
            (work / "text" / f"{split}.{old}").rename(work / "text" / f"{split}.{new}")
    for name, languages in (("other.pth", ["--source", "xx", "--target", "yy"]), ("plain.pth", [])):
        assert stage("download_model", "-m", "hub", "-o", name, *languages).code == 0
    train = ["--data", "text", "--epochs", 1, "-o", "b.pth", "--stats", "b.csv"]
    refused(stage("baseline_finetuning", "-m", "plain.pth", *train), "text/train.en: is not there")
    assert stage("baseline_finetuning", "-m", "other.pth", *train).code == 0


def test_all_stages_work_on_a_vocabulary_cut_to_the_text(made, tmp_path, stage):
    small, data = tmp_path / "m.pth", ["--data", tmp_path / "text"]
    write_corpus(tmp_path / "text", (30, 20, 10))

    def run(name, *arguments):
        result = stage(name, *arguments)
        assert result.code == 0, result.err
        return result

    result = run("download_model", "-m", made / "hub", "-o", small, "--vocabulary", "text", *data)
    full, cut = models.load(made / "origin.pth"), models.load(small)
    assert f"vocabulary: {cut.network.config.vocab_size} of 300 tokens stay; " in result.err
    assert cut.network.config.vocab_size < 280 and cut.provenance["arguments"]["vocabulary"] == "text"
    text = cut.provenance["inputs"]["training text"]
    assert (text["file"], text["sha256"]) == ("text", training_text(Corpus(tmp_path / "text", "en", "de"), full).sha256)

    run("config_generator", "-m", small, "-o", tmp_path / "c.json", "--attention", 0.25, "--linear", 0.5)
    run("prune_scheme_generator", "-i", tmp_path / "c.json", "-o", tmp_path / "s.json")
    run("prune", "-m", small, "-c", tmp_path / "s.json", "-o", tmp_path / "p.npy", "-p", tmp_path / "p.pth")
    run("block-level_finetuning", "-m", small, "-p", tmp_path / "p.npy", "-o", tmp_path / "t.npy", "--stats",
        tmp_path / "b.csv", *data)
    run("model-level_finetuning", "-m", small, "-p", tmp_path / "t.npy", "-c", tmp_path / "c.json", "-o",
        tmp_path / "f.pth", "--stats", tmp_path / "m.csv", "--epochs", 1, *data)
    run("evaluate", "-m", tmp_path / "f.pth", tmp_path / "p.pth", *data)


def test_a_vocabulary_for_text_that_is_not_there_is_refused(made, tmp_path, stage):
    refused(stage("download_model", "-m", made / "hub", "--vocabulary", "text", "--data", tmp_path, "-o",
                  tmp_path / "m.pth"), "train.en: is not there, nor with .gz; --data names a folder")
    assert not (tmp_path / "m.pth").exists()
