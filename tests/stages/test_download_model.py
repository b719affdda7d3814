import pytest

from common.t5 import model as models
from tests.small import refused


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
