"""Laws of Section 5 (experiments/theory.py): `pytest -v -k lemma1` shows Lemma 1 working.

Each law is checked for r + f(x), where it must hold, and for a reward of another class, where it
must fail.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dpo
from experiments import theory
from support.runs import main_exit

EQUATIONS = dict(re.findall(  # "Eq. 8" -> "project_reward", from the contents in its docstring
    r"(Eq\. \d+|Definition 1|Lemma [12]|Theorem 1|Proposition 1)\s+(\w+)", theory.__doc__))
BETA = 0.3


def near(a, b, message, tolerance=1e-12):
    worst = float((torch.as_tensor(a) - b).detach().abs().max())
    assert worst <= tolerance, f"{message} (off by {worst:.2e})"


@pytest.fixture
def world():
    return dpo.World()


def test_def1_gap_is_zero_only_for_a_shift_by_a_function_of_the_prompt(world):
    f = world.randn(3, 1)
    near(theory.class_gap(world.r, world.r + f), 0.0, "r + f(x) is equivalent to r")
    assert (theory.class_gap(world.r, 2 * world.r) > 0.1).all(), "2 r is not"
    changed = world.r.clone()
    changed[0, 0] += 0.5
    near(theory.class_gap(world.r, changed), torch.tensor([0.5, 0, 0]), "one y of one prompt")


def test_lemma1_only_equivalent_rewards_have_equal_preferences(world):
    f = world.randn(3, 1)
    near(theory.preference_gap(world.r, world.r + f), 0.0, "same class, same preferences")
    assert (theory.preference_gap(world.r, 2 * world.r) > 1e-2).all(), "another class"


def test_lemma1_only_equivalent_rewards_have_equal_rankings(world):
    """Eq. 18 over all orders of 4 completions."""
    def rankings(r):
        return torch.stack([dpo.ranking_logps(r[:, :4], order.expand(3, 4))[0].exp()
                            for order in theory.ORDERS])  # (4!, P)

    near(rankings(world.r).sum(0), 1.0, "p of all orders sums to 1")
    near(rankings(world.r + world.randn(3, 1)), rankings(world.r), "same class, same rankings")
    assert ((rankings(2 * world.r) - rankings(world.r)).abs().amax(0) > 1e-2).all()


def test_lemma2_only_equivalent_rewards_have_equal_optima(world):
    f = world.randn(3, 1)
    near(theory.optimum_gap(world.ref, world.r, world.r + f, BETA), 0.0, "same class, same optimum")
    assert (theory.optimum_gap(world.ref, world.r, 2 * world.r, BETA) > 1e-2).all()


def test_theorem1_every_class_has_a_member_that_a_policy_represents(world):
    for scale in (0.1, 1.0, 10.0):
        member = theory.class_member(world.ref, scale * world.r, BETA)
        near(theory.class_gap(member, scale * world.r), 0.0, "the member is in the class", 1e-11)
        policy = world.ref + member / BETA
        near(policy.exp().sum(-1), 1.0, "it is β log π/π_ref of a π that sums to 1")


def test_theorem1_fails_where_the_reference_never_samples_a_completion(world):
    """Two rewards that differ only in that completion: they are in two classes, but have the same
    optimum."""
    other, zero, small = world.r.clone(), world.ref.clone(), world.ref.clone()
    other[:, 0], zero[:, 0], small[:, 0] = world.r[:, 0] + 1, -math.inf, math.log(1e-6)
    assert (theory.class_gap(world.r, other) > 0.9).all() and \
        (theory.optimum_gap(small, world.r, other, BETA) > 0).all(), "two classes, two optima"
    near(theory.optimum_gap(zero, world.r, other, BETA), 0.0, "one optimum")
    member = theory.class_member(zero, world.r, BETA)
    assert member[:, 0].isnan().all() and member[:, 1:].isfinite().all(), "no member there"


def test_eq08_a_projection_stays_in_the_class_and_a_second_one_changes_nothing(world):
    once = theory.project_reward(world.ref, world.r, BETA)
    near(theory.class_gap(once, world.r), 0.0, "f(r) ~ r")
    near(theory.project_reward(world.ref, once, BETA), once, "a second projection changes nothing")
    near(once, theory.class_member(world.ref, world.r, BETA), "f(r) is Theorem 1's member")


def test_eq09_holds_for_the_projection_and_for_no_other_member(world):
    once = theory.project_reward(world.ref, world.r, BETA)
    near(theory.normaliser(world.ref, once, BETA), 1.0, "Σ π_ref exp(f(r)/β) = 1")
    near(theory.normaliser(world.ref, once + 0.3, BETA), math.exp(0.3 / BETA), "not when shifted")


def test_prop1_a_class_has_one_projection_and_two_classes_have_two(world):
    f = world.randn(3, 1)
    near(theory.uniqueness_gap(world.ref, world.r, world.r + f, BETA), 0.0, "one per class")
    assert (theory.uniqueness_gap(world.ref, world.r, 2 * world.r, BETA) > 0.1).all()


def test_eq10_mean_is_eq03_minus_the_soft_value_and_at_pi_r_it_is_zero_for_every_y(world):
    soft = BETA * dpo.log_partition(world.ref, world.r, BETA)
    pi = world.randn(3, 16).log_softmax(-1)
    bracket = theory.soft_advantage(pi, world.ref, world.r, BETA, soft[:, None])
    near((pi.exp() * bracket).sum(-1), dpo.objective(pi, world.ref, world.r, BETA) - soft,
         "its mean is Eq. 3 minus a function of x")
    best = dpo.optimal_policy(world.ref, world.r, BETA)
    near(theory.soft_advantage(best, world.ref, world.r, BETA, soft[:, None]), 0.0,
         "at π_r it is 0 for every y, so it has no variance")


def test_eq10_sampled_gradients_have_the_enumerated_mean_and_variance(world):
    pi, n = world.randn(3, 16).log_softmax(-1), 100_000
    values, probability = world.randn(3, 2), torch.tensor([[0.3, 0.7]] * 3).double()
    mean, variance = theory.policy_gradient(world, BETA, pi, values, probability)
    y, s = (torch.multinomial(p, n, replacement=True, generator=world.generator)
            for p in (pi.exp(), probability))  # (P, n)
    bracket = theory.soft_advantage(pi, world.ref, world.r, BETA, 0).gather(1, y)
    signal = bracket - values.gather(1, s)
    grads = signal[..., None] * (F.one_hot(y, 16) - pi.exp()[:, None])
    near(grads.mean(1), mean, "the mean over samples", 6 * float(variance.max() / n) ** 0.5)
    near(grads.var(1).sum(-1) / variance, 1.0, "their total variance", 0.05)


# --- The file and its checks ---

def test_each_equation_opens_one_function_and_has_one_hit():
    source = Path(theory.__file__).read_text(encoding="utf-8")
    assert len(EQUATIONS) == 8, f"the contents name {sorted(EQUATIONS)}"
    for equation, name in EQUATIONS.items():
        assert source.count(f'"""{equation} ·') == 1, f"grep {equation!r} must have one hit"
        doc = getattr(theory, name).__doc__
        assert doc.startswith(f"{equation} · "), f"{name} must open with {equation}"


MUTANTS = {  # a plausible wrong form of every equation; the rows must detect it
    "Definition 1": (theory, "class_gap", lambda a, b: (a - b).abs().amax(-1)),
    "Lemma 1": (theory, "preference_gap", lambda a, b: (a - b).abs().amax(-1)),
    "Lemma 2": (theory, "optimum_gap",
                lambda q, a, b, beta: dpo.kl_divergence(dpo.optimal_policy(q, a, beta), q)),
    "Theorem 1": (theory, "class_member", lambda q, r, b: dpo.optimal_policy(q, r, b) * b),
    "Eq. 8": (theory, "project_reward",
              lambda q, r, b: r - dpo.log_partition(q, r, b)[..., None]),
    "Eq. 9": (theory, "normaliser", lambda q, r, b: (q + r).exp().sum(-1)),
    "Proposition 1": (theory, "uniqueness_gap", lambda q, a, b, beta: (a - b).abs().amax(-1)),
    "Eq. 10": (theory, "soft_advantage", lambda p, q, r, b, v: r - v - (p - q)),
    "Eq. 18": (dpo, "ranking_logps",
               lambda s, r: (s.sort(-1, descending=True)[0].log_softmax(-1).sum(-1), r > 9)),
    "A.3": (dpo, "plackett_luce_loss",
            lambda p, q, r, b: (dpo.ranking_logps(p.view(r.shape), r)[0], p, {})),
}


@pytest.mark.parametrize("equation", MUTANTS)
def test_checks_detect_a_wrong_equation(monkeypatch, equation):
    monkeypatch.setattr(*MUTANTS[equation])
    rows = [*theory.section5_rows(dpo.World()), *theory.ranking_rows(dpo.World())]
    assert any(tolerance is not None and not residual <= tolerance
               for _, _, residual, tolerance in rows), f"no row detects a wrong {equation}"


def test_checks_of_section_5_and_a3_all_pass_and_draw_the_frontier(tmp_path, capsys):
    figure = tmp_path / "new" / "frontier.png"
    assert theory.main(["--out", str(figure)]) == 0
    out = capsys.readouterr().out
    rows = {line[:14].strip() for line in out.splitlines() if line.endswith("pass")}
    assert rows == MUTANTS.keys(), f"a row for each equation; missing {MUTANTS.keys() - rows}"
    assert out.count("measured, no claim") == 4, "the variances under four baselines"
    assert figure.read_bytes().startswith(b"\x89PNG") and str(figure) in out


def test_checks_exit_with_one_when_an_equation_is_wrong(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(*MUTANTS["Eq. 9"])
    assert theory.main(["--out", str(tmp_path / "frontier.png")]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_figure_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code = main_exit(lambda: theory.main(["--out", str(tmp_path / "file" / "frontier.png")]))
    assert code == 2 and capsys.readouterr().err.startswith("error: cannot write")
