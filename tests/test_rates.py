"""Laws of experiments/rates.py: which rate is chosen, tested on numbers without any run."""

import pytest

from experiments.rates import candidates, chosen_rates, rate_table, report_rates, share
from experiments.sweep import methods_of
from support.settings import PRESETS

CURVE = [dict(kl=0.0, reward=0.5), dict(kl=1.0, reward=0.8), dict(kl=4.0, reward=1.0)]


def points(*pairs):
    return [dict(valid_kl=kl, valid_reward=reward) for kl, reward in pairs]


@pytest.mark.parametrize("preset", PRESETS)
def test_four_rates_are_tried_at_one_setting_of_each_method(preset):
    cfg = PRESETS[preset]
    methods = methods_of(cfg)
    for name, m in methods.items():
        mine = [(setting, rate) for method, setting, rate in candidates(cfg, methods)
                if method == name]
        assert {setting for setting, _ in mine} == {m.central} and m.central in m.settings
        rates = [rate for _, rate in mine]
        assert len(set(rates)) == 4 and getattr(cfg, m.rate) in rates


def test_the_share_is_a_mean_over_the_second_half_of_the_points():
    run = points((0.5, 0.0), (1.0, 0.0), (1.0, 0.8), (2.5, 0.7), (3.1, 0.9))  # 3.1 is past 3
    assert share(run, CURVE, 1, 3) == pytest.approx((0.3 / 0.3 + 0.2 / 0.4) / 2)


def test_points_near_the_reference_do_not_count():
    """Near π_ref, a rate that is far too small has a share near 1."""
    assert share(points((0.2, 0.5), (0.2, 0.56)), CURVE, 1, 3) == pytest.approx(-0.8)
    assert share(points((0.2, 0.56), (1.2, 0.7)), CURVE, 1, 3) < 0.7


def test_if_no_run_ends_at_the_compared_kl_the_nearest_has_the_largest_share():
    assert share(points((1.0, 0.5), (3.5, 1.0)), CURVE, 1, 3) == pytest.approx(-0.5)
    assert share(points((9.0, 1.0), (9.0, 1.0)), CURVE, 1, 3) == -6


def test_the_largest_share_is_chosen_and_never_a_diverged_candidate():
    table = rate_table({("dpo", "beta=1", 1e-3): 0.4, ("dpo", "beta=1", 2e-3): 0.6,
                        ("dpo", "beta=1", 4e-3): None, ("ppo", "target=1", 1e-3): -4.0,
                        ("ppo", "target=1", 2e-3): -5.0, ("unlikelihood", "alpha=1", 1e-3): None})
    assert [row["chosen"] for row in table] == [False, True, False, True, False, False]
    assert chosen_rates(table) == {"dpo": 2e-3, "ppo": 1e-3}


def test_the_report_says_if_the_choice_is_the_smallest_or_largest_rate(capsys):
    report_rates(rate_table({("dpo", "", 1e-3): 0.4, ("dpo", "", 2e-3): 0.6, ("dpo", "", 4e-3): 0.5,
                             ("ppo", "", 1e-3): 0.2, ("ppo", "", 2e-3): 0.1}))
    dpo, ppo = capsys.readouterr().out.splitlines()
    assert "rate 0.002 (tried: 0.001, 0.002, 0.004): 0.600" in dpo and "edge" not in dpo
    assert "at the edge" in ppo
