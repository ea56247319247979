"""Checks of exercise 06: a constant weight, a committed prediction, then the measurement."""

from ex06_swap_the_weight import ALSO, QUANTITIES, QUESTION, measured
from grading import committed, near, normal, same_shape, two_sentences

RUN = "python train.py --preset toy --stage degenerate"


def test_one_weight_per_pair(impl, rng):
    m = normal(rng, 5)
    same_shape(impl.constant_weight(m, 0.1), (5,), "return a tensor with one number per pair")


def test_the_weight_ignores_the_margin(impl, rng):
    m = 3 * normal(rng, 5)
    w = impl.constant_weight(m, 0.1)
    near(w, w[0].expand(5), "a constant weight is the same for every pair, whatever its margin "
         "is")
    assert w[0] > 0, "a weight below 0 pushes the winner down: return a positive one"


def test_the_prediction_is_complete(impl):
    said = prediction(impl)
    for name, meaning in QUANTITIES.items():
        assert said.get(name) in ("dpo", "constant"), f"PREDICTION has " \
            f"{said.get(name)!r} for {name}, {meaning}: give \"dpo\" or \"constant\", the run " \
            "that ends higher"


def test_the_measurement_agrees(impl, runs):
    said, rows = prediction(impl), measured(runs)
    assert len(rows) == 2, f"exercise 06: there are no two runs in " \
        f"{runs / 'degenerate'}: run  {RUN}"
    dpo, constant = rows["dpo"], rows["constant"]
    known = [name for name in (*QUANTITIES, *ALSO) if dpo[name] is not None]  # IMDb has no grammar
    table = "\n".join(f"  {name:<14} dpo {dpo[name]:>10.4g}   constant {constant[name]:>10.4g}"
                      f"   predicted {said.get(name, '-')}" for name in known)
    missed = [name for name in known if name in QUANTITIES
              and said.get(name) != ("dpo" if dpo[name] > constant[name] else "constant")]
    assert not missed, f"not as predicted: {', '.join(missed)}. Leave the prediction as it is, " \
        f"and say in EXPLANATION what you had not thought of. At the end:\n{table}"


def test_two_sentences(impl):
    two_sentences(impl, "06", QUESTION)


def prediction(impl) -> dict:
    return committed(impl, "PREDICTION", "06", "before you train, commit which run ends "
                     f"higher in each of {', '.join(QUANTITIES)}")
