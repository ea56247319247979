"""Checks of exercise 12: the margin that noise leaves, a committed order, the measured KL."""

import torch
import torch.nn.functional as F
from ex12_label_noise import QUESTION, RUNS, measured
from grading import in_order, near, predicted_order, slope, two_sentences


def test_labels_at_random_leave_no_margin(impl):
    near(impl.best_margin(0.5), 0.0, "if half of the labels are wrong, they say nothing, so "
         "the best margin is 0")


def test_the_mean_loss_is_least_there(impl, rng):
    noise = 0.05 + 0.4 * float(torch.rand((), generator=rng))
    margin = float(impl.best_margin(noise))
    m = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    falls = slope(-(1 - noise) * F.logsigmoid(m) - noise * F.logsigmoid(-m), m)
    near(falls, 0.0, f"at your margin {margin:.3f} for P = {noise:.3f} the slope of E L is "
         f"{float(falls):.3f}, and at the least value it is 0: set the derivative to 0, with "
         "weight 1 - P for the true label and P for the wrong one")


def test_the_prediction_is_an_order(impl):
    predicted_order(impl, "12", RUNS)


def test_the_measurement_agrees(impl, runs):
    said, points = predicted_order(impl, "12", RUNS), measured(runs)
    missing = [name for name in RUNS if name not in points]
    assert not missing, f"exercise 12: {runs} has no finished run of {'; '.join(missing)}: " \
        "run the commands at the head of ex12_label_noise.py, the first is  " \
        "python train.py --preset toy --stage dpo --beta 0.5 --dpo-steps 300"
    in_order(said, points, "\"{}\"", "The more labels are wrong, or are taken to be wrong, the "
             "smaller the best margin is, and the KL with it")


def test_two_sentences(impl):
    two_sentences(impl, "12", QUESTION)
