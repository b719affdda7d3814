from common.files.atomic import digest
from common.pruning.scheme import read_scheme
from tests.small import refused


def test_it_writes_each_variant_once_and_names_the_configurations(work, stage):
    (work / "conf.json").write_text('[{"encoder.block.0.layer.1.DenseReluDense.wi": 0.5}, '
                                    '{"encoder.block.0.layer.1.DenseReluDense.wi": 0.5}]')
    result = stage("prune_scheme_generator", "-i", work / "conf.json", "-o", work / "n.json")
    assert "1 variants of 1 blocks serve 2 configurations (2 without sharing)" in result.out
    scheme, told = read_scheme(work / "n.json")
    assert scheme == {"encoder.block.0.layer.1.DenseReluDense.wi": [(0.5,)]}
    assert told["inputs"]["configurations"]["sha256"] == digest((work / "conf.json").read_bytes())


def test_nothing_to_prune_is_refused(work, stage):
    (work / "conf.json").write_text('[{"encoder.block.0.layer.1.DenseReluDense.wi": 0.0}]')
    refused(stage("prune_scheme_generator", "-i", work / "conf.json", "-o", work / "n.json"),
            "conf.json: every rate is 0, there is nothing to prune")
    assert not (work / "n.json").exists()
