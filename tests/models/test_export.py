"""The model card credits the papers whose methods the student was trained with, and no others."""

from __future__ import annotations

import re

import pytest

from ibdistill.config.methods import DIVERGENCES, HEAD_ESTIMATORS, QUESTION_ESTIMATORS
from ibdistill.config.sections import ObjectiveConfig
from ibdistill.models import export

DSS, MI, VID, VIB, INFONCE = "2305.02301", "2403.03348", "1904.05835", "1612.00410", "1807.03748"
HINTON, MINILLM, GKD = "1503.02531", "2306.08543", "2306.13649"


@pytest.mark.parametrize(
    ("settings", "papers"),
    [
        ({"method": "finetune"}, []),
        ({"method": "dss"}, [DSS]),
        ({"method": "ib", "estimator": "paper"}, [DSS, MI]),
        ({"method": "ib", "estimator": "normalized"}, [DSS, MI]),
        ({"method": "ib", "estimator": "infonce"}, [DSS, MI, INFONCE]),
        ({"method": "ib", "estimator": "vid"}, [DSS, VID]),
        ({"method": "ib", "estimator": "vib"}, [DSS, VIB]),
        ({"method": "ib", "estimator": "paper", "beta": 0.0}, [DSS]),
        ({"method": "kd", "estimator": "paper"}, [DSS, HINTON]),
        ({"method": "kd", "divergence": "reverse"}, [DSS, MINILLM]),
        ({"method": "kd", "divergence": "jsd"}, [DSS, GKD]),
        ({"method": "ib+kd", "estimator": "vid"}, [DSS, VID, HINTON]),
        ({"method": "ib+kd", "estimator": "vid", "gamma": 0.0}, [DSS, VID]),
    ],
)
def test_the_card_credits_each_method_with_its_own_papers(settings, papers):
    card = export.card(ObjectiveConfig(**{"beta": 0.1} | settings), "objective: {}\n", '{"demo": 1}')
    assert re.findall(r"arXiv\s+([\d.]+\d)", card) == papers
    assert ("explain: QUESTION" in card) == (settings["method"] != "finetune")
    assert '{"demo": 1}' in card and "```yaml\nobjective: {}\n```" in card


def test_every_estimator_and_divergence_has_a_credit():
    assert {*HEAD_ESTIMATORS, *QUESTION_ESTIMATORS} == export._ESTIMATORS.keys()
    assert set(DIVERGENCES) == export._DIVERGENCES.keys()
