"""Checks of exercise 06: a constant weight, a prediction committed, then the measurement."""

from ex06_swap_the_weight import ALSO, QUANTITIES, QUESTION, measured
from grading import committed, near, normal, same_shape, two_sentences

RUN = "python train.py --preset toy --stage degenerate"


def test_one_weight_a_pair(impl, rng):
    m = normal(rng, 5)
    same_shape(impl.constant_weight(m, 0.1), (5,), "a weight is a tensor, one number a pair")


def test_the_weight_ignores_the_margin(impl, rng):
    m = 3 * normal(rng, 5)
    w = impl.constant_weight(m, 0.1)
    near(w, w[0].expand(5), "a constant weight is the same for each pair, however well it is "
         "ordered already")
    assert w[0] > 0, "a weight below 0 pushes the winner down"


def test_the_prediction_is_complete(impl):
    said = prediction(impl)
    for name, meaning in QUANTITIES.items():
        assert said.get(name) in ("dpo", "constant"), f"PREDICTION says {said.get(name)!r} of " \
            f"{name}, {meaning}: \"dpo\" or \"constant\", the run that ends higher"


def test_the_prediction_meets_the_measurement(impl, runs):
    said, rows = prediction(impl), measured(runs)
    assert len(rows) == 2, f"exercise 06: no two runs in {runs / 'degenerate'}: first  {RUN}"
    dpo, constant = rows["dpo"], rows["constant"]
    known = [name for name in (*QUANTITIES, *ALSO) if dpo[name] is not None]  # IMDb has no grammar
    table = "\n".join(f"  {name:<14} dpo {dpo[name]:>10.4g}   constant {constant[name]:>10.4g}"
                      f"   you said {said.get(name, '-')}" for name in known)
    missed = [name for name in known if name in QUANTITIES
              and said.get(name) != ("dpo" if dpo[name] > constant[name] else "constant")]
    assert not missed, f"not as predicted: {', '.join(missed)}. Leave the prediction, and say in " \
        f"EXPLANATION what you had not thought of. At the end:\n{table}"


def test_two_sentences(impl):
    two_sentences(impl, "06", QUESTION)


def prediction(impl) -> dict:
    return committed(impl, "PREDICTION", "06", "commit which run ends higher in each of "
                     f"{', '.join(QUANTITIES)}, before you train")
