"""Checks of exercise 08: a committed order, then the measured KL of each β."""

from ex08_order_the_frontier import BETAS, QUESTION, measured
from grading import in_order, predicted_order, two_sentences


def test_the_prediction_is_an_order(impl):
    predicted_order(impl, "08", BETAS)


def test_the_measurement_agrees(impl, runs):
    said, points = predicted_order(impl, "08", BETAS), measured(runs)
    for beta in BETAS:
        assert beta in points, f"exercise 08: there is no finished run with β = {beta:g} in " \
            f"{runs}: run  python train.py --preset toy --stage dpo --beta {beta:g}"
    in_order(said, points, "β {:g}", "A larger β makes each nat of KL cost more")


def test_two_sentences(impl):
    two_sentences(impl, "08", QUESTION)
