"""Checks of exercise 08: an order committed, then the measured KL of each β."""

from ex08_order_the_frontier import BETAS, QUESTION, measured
from grading import committed, two_sentences


def test_the_prediction_is_an_order(impl):
    said = prediction(impl)
    assert sorted(said) == sorted(BETAS), f"PREDICTION is {said}: name each of {list(BETAS)} " \
        "once, from the least KL to the most"


def test_the_order_is_the_measured_one(impl, runs):
    said, points = prediction(impl), measured(runs)
    for beta in BETAS:
        assert beta in points, f"exercise 08: no finished run with β = {beta:g} in {runs}: first " \
            f" python train.py --preset toy --stage dpo --beta {beta:g}"
    table = ", ".join(f"β {beta:g}: {points[beta]['kl']:.2f} ± {points[beta]['kl_se']:.2f}"
                      for beta in sorted(points, key=lambda beta: points[beta]["kl"]))
    for less, more in zip(said, said[1:]):
        noise = 2 * (points[less]["kl_se"] + points[more]["kl_se"])
        assert points[less]["kl"] <= points[more]["kl"] + noise, \
            f"you said that β = {less:g} ends closer to π_ref than β = {more:g}. Measured KL, " \
            f"nats: {table}. A larger β makes each nat dearer. Leave the prediction, and say in " \
            "EXPLANATION what you had not thought of"


def test_two_sentences(impl):
    two_sentences(impl, "08", QUESTION)


def prediction(impl) -> list:
    return committed(impl, "PREDICTION", "08", f"commit the order of {list(BETAS)} by KL, from the "
                     "least to the most, before you train")
