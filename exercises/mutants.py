"""Plausible wrong answers. Each names the check that must be the first to fail, and words of its
message.

Add a new mistake from a class here first, then a check that names it, if none does.
`python -m pytest exercises/test_ex03.py -x --tb=short --impl mutant:no_reference` shows what a
student with that mistake sees.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ex07_preference_pairs import pairs_in_loops
from ex09_sequence_kl import sample, sequence_kl_in_loops


class Mutant(NamedTuple):
    exercise: str
    hole: str  # the name in the exercise's file that it fills
    function: Callable

    @property
    def value(self):
        """What fills the hole: the function, or for a constant what it returns."""
        return self.function() if self.hole.isupper() else self.function


MUTANTS: dict[str, Mutant] = {}


def wrong(exercise: str, hole: str):
    def register(function):
        MUTANTS[function.__name__] = Mutant(exercise, hole, function)
        return function
    return register


# ------------------------------------------------------------------------------ 01


def next_token(logits, idx):
    return logits[:, :-1].gather(-1, idx[:, 1:, None])[..., 0]


def inside(token_logps, prompt_lens, lengths):
    t = torch.arange(token_logps.size(1))
    return (t >= prompt_lens[:, None]) & (t < lengths[:, None])


@wrong("01", "logits_to_token_logps")
def no_first_column(logits, idx):
    """T - 1 columns. Caught by test_one_log_prob_per_token: "also for the first"."""
    return next_token(logits.log_softmax(-1), idx)


@wrong("01", "logits_to_token_logps")
def logits_as_logps(logits, idx):
    """No softmax. Caught by test_the_probabilities_of_all_tokens_sum_to_1: "log_softmax"."""
    return F.pad(next_token(logits, idx), (1, 0))


@wrong("01", "logits_to_token_logps")
def softmax_over_positions(logits, idx):
    """dim=1. Caught by test_the_probabilities_of_all_tokens_sum_to_1: "vocabulary"."""
    return F.pad(next_token(logits.log_softmax(1), idx), (1, 0))


@wrong("01", "logits_to_token_logps")
def no_shift(logits, idx):
    """t scores t. Caught by test_the_position_before_predicts: "the shift by one"."""
    return logits.log_softmax(-1).gather(-1, idx[..., None])[..., 0]


@wrong("01", "logits_to_token_logps")
def log_of_softmax(logits, idx):
    """-inf. Caught by test_an_unlikely_token_has_a_finite_log_prob: "use log_softmax"."""
    return F.pad(next_token(logits.softmax(-1).log(), idx), (1, 0))


@wrong("01", "logits_to_token_logps")
def token_logps_without_gradient(logits, idx):
    """Caught by test_the_log_probs_carry_a_gradient: "remove no_grad"."""
    with torch.no_grad():
        return F.pad(next_token(logits.log_softmax(-1), idx), (1, 0))


@wrong("01", "completion_logps")
def sum_without_gradient(token_logps, prompt_lens, lengths):
    """Caught by test_the_log_probs_carry_a_gradient: "remove no_grad"."""
    with torch.no_grad():
        return token_logps.masked_fill(~inside(token_logps, prompt_lens, lengths), 0).sum(1)


@wrong("01", "completion_logps")
def prompt_counted(token_logps, prompt_lens, lengths):
    """Scores x as well. Caught by test_the_prompt_is_not_scored: "the prompt is given"."""
    return token_logps.masked_fill(torch.arange(token_logps.size(1)) >= lengths[:, None], 0).sum(1)


@wrong("01", "completion_logps")
def padding_counted(token_logps, prompt_lens, lengths):
    """To the row's end. Caught by test_padding_is_not_scored: "padding is not scored"."""
    return token_logps.masked_fill(torch.arange(token_logps.size(1)) < prompt_lens[:, None],
                                   0).sum(1)


@wrong("01", "completion_logps")
def multiplied_by_the_mask(token_logps, prompt_lens, lengths):
    """Caught by test_padding_may_be_minus_infinity: "do not multiply by"."""
    return (token_logps * inside(token_logps, prompt_lens, lengths)).sum(1)


@wrong("01", "completion_logps")
def eos_dropped(token_logps, prompt_lens, lengths):
    """Stops one short. Caught by test_the_eos_is_scored: "the EOS belongs to"."""
    return token_logps.masked_fill(~inside(token_logps, prompt_lens, lengths - 1), 0).sum(1)


@wrong("01", "completion_logps")
def first_token_dropped(token_logps, prompt_lens, lengths):
    """Starts one late. Caught by test_the_first_token_is_scored: "y begins at t = prompt_len"."""
    return token_logps.masked_fill(~inside(token_logps, prompt_lens + 1, lengths), 0).sum(1)


@wrong("01", "completion_logps")
def mean_for_sum(token_logps, prompt_lens, lengths):
    """Per token. Caught by test_the_chain_rule_holds: "did you average"."""
    mask = inside(token_logps, prompt_lens, lengths)
    return token_logps.masked_fill(~mask, 0).sum(1) / mask.sum(1)


@wrong("01", "completion_logps")
def completion_in_a_loop(token_logps, prompt_lens, lengths):
    """Row by row. Caught by test_no_loop_over_the_batch: "a loop over the batch"."""
    return torch.stack([row[p:n].sum() for row, p, n in zip(token_logps, prompt_lens.tolist(),
                                                             lengths.tolist())])


# ------------------------------------------------------------------------------ 02


@wrong("02", "preference_probability")
def log_probability(r1, r2):
    """The log of Eq. 1. Caught by test_the_two_probabilities_sum_to_1: "not its log"."""
    return F.logsigmoid(r1 - r2)


@wrong("02", "preference_probability")
def share_of_reward(r1, r2):
    """r₁/(r₁ + r₂). Caught by test_only_the_difference_counts: "takes exp of"."""
    return r1 / (r1 + r2)


@wrong("02", "preference_probability")
def worse_is_likelier(r1, r2):
    """Swapped. Caught by test_the_better_one_is_likelier: "are r₁ and r₂ swapped?"."""
    return torch.sigmoid(r2 - r1)


@wrong("02", "preference_probability")
def thurstone(r1, r2):
    """Normal, not logistic. Caught by test_log_odds_are_the_difference: "logistic"."""
    return torch.special.ndtr(r1 - r2)


@wrong("02", "preference_probability")
def ratio_of_exps(r1, r2):
    """Eq. 1 as printed. Caught by test_large_rewards_do_not_overflow: "exp overflows"."""
    return r1.exp() / (r1.exp() + r2.exp())


@wrong("02", "reward_model_loss")
def mean_over_pairs(rewards, yw_idxs, yl_idxs):
    """One number. Caught by test_one_loss_per_pair: "the mean is taken later"."""
    return -F.logsigmoid(rewards[yw_idxs] - rewards[yl_idxs]).mean()


@wrong("02", "reward_model_loss")
def probability_for_log(rewards, yw_idxs, yl_idxs):
    """-σ(m). Caught by test_the_loss_is_minus_a_log: "is the log missing?"."""
    return -torch.sigmoid(rewards[yw_idxs] - rewards[yl_idxs])


@wrong("02", "reward_model_loss")
def loser_preferred(rewards, yw_idxs, yl_idxs):
    """Swapped. Caught by test_raising_the_winner_lowers_the_loss: "indices swapped?"."""
    return -F.logsigmoid(rewards[yl_idxs] - rewards[yw_idxs])


@wrong("02", "reward_model_loss")
def log_of_sigmoid(rewards, yw_idxs, yl_idxs):
    """Infinite. Caught by test_a_badly_wrong_pair_has_a_finite_loss: "logsigmoid(x) is x"."""
    return -torch.sigmoid(rewards[yw_idxs] - rewards[yl_idxs]).log()


# ------------------------------------------------------------------------------ 03


def eq_7(h, yw_idxs, yl_idxs, beta):
    return -F.logsigmoid(beta * (h[yw_idxs] - h[yl_idxs]))


@wrong("03", "dpo_loss")
def mean_of_losses(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """One number. Caught by test_losses_of_pairs_and_rewards_of_completions: "not their mean"."""
    h = pi_logps - ref_logps
    return eq_7(h, yw_idxs, yl_idxs, beta).mean(), (beta * h).detach()


@wrong("03", "dpo_loss")
def losses_alone(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Caught by test_losses_of_pairs_and_rewards_of_completions: "return two results"."""
    return eq_7(pi_logps - ref_logps, yw_idxs, yl_idxs, beta)


@wrong("03", "dpo_loss")
def rewards_of_pairs(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Caught by test_losses_of_pairs_and_rewards_of_completions: "not one per pair"."""
    h = pi_logps - ref_logps
    return eq_7(h, yw_idxs, yl_idxs, beta), beta * (h[yw_idxs] - h[yl_idxs]).detach()


@wrong("03", "dpo_loss")
def no_reference(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """log π_θ alone. Caught by test_the_reference_is_in_the_loss: "is π_ref in the loss?"."""
    return eq_7(pi_logps, yw_idxs, yl_idxs, beta), (beta * (pi_logps - ref_logps)).detach()


@wrong("03", "dpo_loss")
def beta_outside(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """β log σ(h). Caught by test_the_reference_costs_log_2: "β scales the margin inside σ"."""
    h = pi_logps - ref_logps
    return beta * eq_7(h, yw_idxs, yl_idxs, 1.0), (beta * h).detach()


@wrong("03", "dpo_loss")
def beta_on_the_policy_alone(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Caught by test_the_reference_costs_log_2: "subtract first and then multiply by β"."""
    h = beta * pi_logps - ref_logps
    return eq_7(h, yw_idxs, yl_idxs, 1.0), h.detach()


@wrong("03", "dpo_loss")
def halves_of_the_batch(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Chosen, then rejected. Caught by test_pairs_go_by_their_indices: "not halves"."""
    h = pi_logps - ref_logps
    chosen, rejected = h.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)), (beta * h).detach()


@wrong("03", "dpo_loss")
def ratio_for_log_ratio(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """π_θ/π_ref. Caught by test_only_the_difference_of_log_probs_counts: "nor its exp"."""
    h = (pi_logps - ref_logps).exp()
    return eq_7(h, yw_idxs, yl_idxs, beta), (beta * h).detach()


@wrong("03", "dpo_loss")
def quotient_of_log_probs(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Caught by test_only_the_difference_of_log_probs_counts: "neither a quotient"."""
    h = pi_logps / ref_logps
    return eq_7(h, yw_idxs, yl_idxs, beta), (beta * h).detach()


@wrong("03", "dpo_loss")
def swapped_pair(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Caught by test_raising_the_winner_lowers_the_loss: "sign or indices swapped?"."""
    h = pi_logps - ref_logps
    return eq_7(h, yl_idxs, yw_idxs, beta), (beta * h).detach()


@wrong("03", "dpo_loss")
def no_beta(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Caught by test_beta_multiplies_the_margin: "is β missing"."""
    h = pi_logps - ref_logps
    return eq_7(h, yw_idxs, yl_idxs, 1.0), (beta * h).detach()


@wrong("03", "dpo_loss")
def reward_without_beta(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Caught by test_rewards_are_those_of_the_loss: "is β in the rewards?"."""
    h = pi_logps - ref_logps
    return eq_7(h, yw_idxs, yl_idxs, beta), h.detach()


@wrong("03", "dpo_loss")
def negated_rewards(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """The loss is right. Caught by test_rewards_are_those_of_the_loss: "is the sign right?"."""
    h = pi_logps - ref_logps
    return eq_7(h, yw_idxs, yl_idxs, beta), -(beta * h).detach()


@wrong("03", "dpo_loss")
def rewards_not_detached(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Caught by test_losses_have_a_gradient_and_rewards_have_none: "the rewards carry"."""
    h = pi_logps - ref_logps
    return eq_7(h, yw_idxs, yl_idxs, beta), beta * h


@wrong("03", "dpo_loss")
def detached_too_early(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Caught by test_losses_have_a_gradient_and_rewards_have_none: "losses have no gradient"."""
    h = (pi_logps - ref_logps).detach()
    return eq_7(h, yw_idxs, yl_idxs, beta), beta * h


@wrong("03", "dpo_loss")
def loser_detached(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Half a gradient. Caught by test_winner_and_loser_are_pushed_equally: "detached?"."""
    r = beta * (pi_logps - ref_logps)
    return -F.logsigmoid(r[yw_idxs] - r[yl_idxs].detach()), r.detach()


@wrong("03", "dpo_loss")
def dpo_log_of_sigmoid(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Infinite. Caught by test_a_badly_wrong_pair_has_a_finite_loss: "logsigmoid(x) is x"."""
    r = beta * (pi_logps - ref_logps)
    return -torch.sigmoid(r[yw_idxs] - r[yl_idxs]).log(), r.detach()


@wrong("03", "dpo_loss")
def log_of_sigmoid_plus_epsilon(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Stops at 18. Caught by test_a_badly_wrong_pair_has_a_finite_loss: "number that you added"."""
    r = beta * (pi_logps - ref_logps)
    return -(torch.sigmoid(r[yw_idxs] - r[yl_idxs]) + 1e-8).log(), r.detach()


# ------------------------------------------------------------------------------ 04


@wrong("04", "optimal_policy")
def no_partition(ref_logp, rewards, beta):
    """No Z. Caught by test_the_policy_sums_to_1: "divide by Z(x)"."""
    return ref_logp + rewards / beta


@wrong("04", "optimal_policy")
def one_partition_for_all(ref_logp, rewards, beta):
    """Z over all prompts. Caught by test_the_policy_sums_to_1: "the responses of a prompt"."""
    tilted = ref_logp + rewards / beta
    return tilted - tilted.flatten().logsumexp(0)


@wrong("04", "optimal_policy")
def softmax_of_rewards(ref_logp, rewards, beta):
    """No π_ref. Caught by test_equal_rewards_leave_the_reference: "is π_ref there?"."""
    return (rewards / beta).log_softmax(-1)


@wrong("04", "optimal_policy")
def times_beta(ref_logp, rewards, beta):
    """β r for r/β. Caught by test_beta_divides_the_reward: "divided by β, not"."""
    return (ref_logp + rewards * beta).log_softmax(-1)


@wrong("04", "optimal_policy")
def away_from_reward(ref_logp, rewards, beta):
    """exp(-r/β). Caught by test_beta_divides_the_reward: "is the sign of r right?"."""
    return (ref_logp - rewards / beta).log_softmax(-1)


@wrong("04", "objective")
def kl_without_beta(logp, ref_logp, rewards, beta):
    """Caught by test_beta_is_the_price_of_kl: "β multiplies the KL"."""
    return (logp.exp() * (rewards - (logp - ref_logp))).sum(-1)


@wrong("04", "objective")
def kl_as_a_bonus(logp, ref_logp, rewards, beta):
    """Plus for minus. Caught by test_beta_is_the_price_of_kl: "subtracted from the reward"."""
    return (logp.exp() * (rewards + beta * (logp - ref_logp))).sum(-1)


@wrong("04", "objective")
def reversed_kl_in_eq_3(logp, ref_logp, rewards, beta):
    """KL(π_ref ‖ π). Caught by test_the_policy_weighs_the_kl: "the two reversed?"."""
    return (logp.exp() * rewards - beta * ref_logp.exp() * (ref_logp - logp)).sum(-1)


@wrong("04", "optimal_policy")
def whitened_rewards(ref_logp, rewards, beta):
    """As PPO codes do. Caught by test_no_policy_is_better: "with r exactly as it is given"."""
    r = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-8)
    return (ref_logp + r / beta).log_softmax(-1)


@wrong("04", "implicit_reward")
def log_ratio_for_reward(pi_logps, ref_logps, beta, log_z=0.0):
    """No β. Caught by test_the_policy_gives_its_reward_back: "is β there?"."""
    return pi_logps - ref_logps + beta * log_z


@wrong("04", "implicit_reward")
def log_z_without_beta(pi_logps, ref_logps, beta, log_z=0.0):
    """Caught by test_log_z_gives_the_level: "its last term is β log Z(x)"."""
    return beta * (pi_logps - ref_logps) + log_z


# ------------------------------------------------------------------------------ 05


@wrong("05", "PREDICTION")
def predicted_in_words():
    """Caught by test_the_prediction_is_a_number: "give the weight as a number"."""
    return "one half"


@wrong("05", "PREDICTION")
def every_pair_weighs_1():
    """Caught by test_the_measurement_agrees: "every margin is 0"."""
    return 1.0


@wrong("05", "sigmoid_weight")
def weight_of_the_margin(margin, beta):
    """σ(m). Caught by test_a_pair_in_the_wrong_order_weighs_more: "is the sign of m right?"."""
    return torch.sigmoid(margin)


@wrong("05", "sigmoid_weight")
def beta_twice(margin, beta):
    """σ(-β m). Caught by test_the_weight_is_a_slope: "β is already in the margin"."""
    return torch.sigmoid(-beta * margin)


@wrong("05", "sigmoid_weight")
def beta_in_the_weight(margin, beta):
    """β σ(-m). Caught by test_the_weight_is_a_slope: "does not belong to the weight"."""
    return beta * torch.sigmoid(-margin)


@wrong("05", "sigmoid_weight")
def weight_by_exp(margin, beta):
    """NaN. Caught by test_large_margins_do_not_overflow: "exp overflows"."""
    return (-margin).exp() / (1 + (-margin).exp())


def surrogate(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight):
    """The right one, in parts: w, β (log π_w - log π_l), r̂."""
    r = beta * (pi_logps - ref_logps)
    push = beta * (pi_logps[yw_idxs] - pi_logps[yl_idxs])
    return weight(r[yw_idxs] - r[yl_idxs], beta), push, r.detach()


@wrong("05", "weighted_loss")
def surrogate_alone(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight):
    """Caught by test_losses_of_pairs_and_rewards_of_completions: "return two results"."""
    w, push, _ = surrogate(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight)
    return -w.detach() * push


@wrong("05", "weighted_loss")
def mean_of_surrogates(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight):
    """Caught by test_losses_of_pairs_and_rewards_of_completions: "not their mean"."""
    w, push, r = surrogate(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight)
    return -(w.detach() * push).mean(), r


@wrong("05", "weighted_loss")
def margin_without_reference(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight):
    """Caught by test_the_weight_sees_the_margin: "is π_ref in it?"."""
    w, push, _ = surrogate(pi_logps, 0 * ref_logps, yw_idxs, yl_idxs, beta, weight)
    return -w.detach() * push, (beta * (pi_logps - ref_logps)).detach()


@wrong("05", "weighted_loss")
def uphill(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight):
    """No minus. Caught by test_the_winner_is_pushed_up: "is the minus there?"."""
    w, push, r = surrogate(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight)
    return w.detach() * push, r


@wrong("05", "weighted_loss")
def no_push_on_the_loser(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight):
    """Caught by test_the_loser_is_pushed_down: "is its term there?"."""
    w, _, r = surrogate(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight)
    return -w.detach() * beta * pi_logps[yw_idxs], r


@wrong("05", "weighted_loss")
def surrogate_without_beta(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight):
    """Caught by test_a_constant_weight_pushes_with_beta: "is β before the weight missing?"."""
    w, push, r = surrogate(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight)
    return -w.detach() * push / beta, r


@wrong("05", "weighted_loss")
def weight_not_detached(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight):
    """Caught by test_the_weight_has_no_gradient: "detach it"."""
    w, push, r = surrogate(pi_logps, ref_logps, yw_idxs, yl_idxs, beta, weight)
    return -w * push, r


# ------------------------------------------------------------------------------ 06


@wrong("06", "constant_weight")
def one_for_all(margin, beta):
    """A number. Caught by test_one_weight_per_pair: "one number per pair"."""
    return 1.0


@wrong("06", "constant_weight")
def still_the_sigmoid(margin, beta):
    """Caught by test_the_weight_ignores_the_margin: "the same for every pair"."""
    return torch.sigmoid(-margin)


@wrong("06", "constant_weight")
def constant_but_negative(margin, beta):
    """Caught by test_the_weight_ignores_the_margin: "pushes the winner down"."""
    return -torch.ones_like(margin)


@wrong("06", "PREDICTION")
def predicted_in_part():
    """Caught by test_the_prediction_is_complete: "the run that ends higher"."""
    return dict(kl="constant")


@wrong("06", "PREDICTION")
def both_logps_rise():
    """Caught by test_the_measurement_agrees: "not as predicted: logp_chosen"."""
    return dict(kl="constant", ref_ppl="constant", grammatical="dpo", logp_chosen="constant",
                logp_rejected="dpo")


@wrong("06", "EXPLANATION")
def one_word_for_06():
    """Caught by test_two_sentences: "must have two sentences"."""
    return "Because."


# ------------------------------------------------------------------------------ 07


def select(rewards, better):
    """The pairs (i, j) of each group where better(r_i, r_j), and no ties."""
    G, K = rewards.shape
    g, w, l = better(rewards[:, :, None], rewards[:, None, :]).nonzero(as_tuple=True)
    return g * K + w, g * K + l, G * K * (K - 1) // 2 - len(g)


@wrong("07", "preference_pairs")
def indices_within_the_group(rewards):
    """0 to K - 1. Caught by test_indices_run_through_all_groups: "is g*K + k"."""
    yw, yl, ties = select(rewards, torch.gt)
    return yw % rewards.size(1), yl % rewards.size(1), ties


@wrong("07", "preference_pairs")
def indices_by_column(rewards):
    """Caught by test_indices_run_through_all_groups: "your indices are k*G + g"."""
    G, K = rewards.shape
    yw, yl, ties = select(rewards, torch.gt)
    return yw % K * G + yw // K, yl % K * G + yl // K, ties


@wrong("07", "preference_pairs")
def pairs_across_prompts(rewards):
    """Caught by test_pairs_stay_within_a_prompt: "of two prompts"."""
    return select(rewards.flatten()[None], torch.gt)


@wrong("07", "preference_pairs")
def paired_with_itself(rewards):
    """Caught by test_nothing_is_paired_with_itself: "paired with itself"."""
    return select(rewards, torch.ge)


@wrong("07", "preference_pairs")
def worse_first(rewards):
    """Caught by test_the_better_one_comes_first: "the better one comes first"."""
    return select(rewards, torch.lt)


@wrong("07", "preference_pairs")
def ties_kept(rewards):
    """The earlier one wins. Caught by test_a_tie_has_no_winner: "a tie has no winner"."""
    return select(rewards - 1e-6 * torch.arange(rewards.size(1)), torch.gt)


@wrong("07", "preference_pairs")
def pairs_twice(rewards):
    """Caught by test_no_pair_comes_twice: "listed twice"."""
    yw, yl, ties = select(rewards, torch.gt)
    return torch.cat([yw, yw]), torch.cat([yl, yl]), ties


@wrong("07", "preference_pairs")
def best_against_worst(rewards):
    """One pair a prompt. Caught by test_four_completions_give_six_pairs: "is only one of them"."""
    start = torch.arange(len(rewards)) * rewards.size(1)
    yw, yl = start + rewards.argmax(1), start + rewards.argmin(1)
    apart = yw != yl
    return yw[apart], yl[apart], int((~apart).sum())


@wrong("07", "preference_pairs")
def always_four(rewards):
    """K = 4. Caught by test_any_number_of_completions: "K is rewards.size(1)"."""
    i, j = torch.triu_indices(4, 4, 1)
    start, first = 4 * torch.arange(len(rewards))[:, None], rewards[:, i] > rewards[:, j]
    yw, yl = start + torch.where(first, i, j), start + torch.where(first, j, i)
    apart = rewards[:, i] != rewards[:, j]
    return yw[apart], yl[apart], int((~apart).sum())


@wrong("07", "preference_pairs")
def ties_by_tolerance(rewards):
    """Caught by test_close_rewards_are_no_tie: "without a tolerance"."""
    return select(rewards, lambda a, b: (a > b) & ~torch.isclose(a, b))


@wrong("07", "preference_pairs")
def groups_with_a_tie_dropped(rewards):
    """Caught by test_a_tie_leaves_the_other_pairs: "leave out the tied pair, not its group"."""
    equal = (rewards[:, :, None] == rewards[:, None, :]).sum((1, 2)) > rewards.size(1)
    yw, yl, ties = select(rewards, torch.gt)
    kept = ~equal[yw // rewards.size(1)]
    return yw[kept], yl[kept], ties


@wrong("07", "preference_pairs")
def ties_counted_twice(rewards):
    """Both orders. Caught by test_ties_are_counted_once: "count an unordered pair "."""
    yw, yl, ties = select(rewards, torch.gt)
    return yw, yl, 2 * ties


@wrong("07", "preference_pairs")
def pairs_in_a_loop(rewards):
    """The specification. Caught by test_no_loop_over_the_groups: "a loop over them"."""
    K, found, ties = rewards.size(1), [], 0
    for g, group in enumerate(rewards):
        pairs, equal = pairs_in_loops([group.tolist()])
        found += [(g * K + w, g * K + l) for w, l in pairs]
        ties += equal
    yw, yl = torch.tensor(found).T
    return yw, yl, ties


# ------------------------------------------------------------------------------ 08


@wrong("08", "PREDICTION")
def one_beta_twice():
    """Caught by test_the_prediction_is_an_order: "once, from the least KL"."""
    return [0.25, 0.25, 0.5, 1.0]


@wrong("08", "PREDICTION")
def larger_beta_goes_further():
    """Caught by test_the_measurement_agrees: "A larger β makes each nat"."""
    return [0.25, 0.5, 1.0, 2.0]


@wrong("08", "EXPLANATION")
def one_word_for_08():
    """Caught by test_two_sentences: "must have two sentences"."""
    return "Because."


# ------------------------------------------------------------------------------ 09


@wrong("09", "kl_divergence")
def cross_entropy(logp, logq, dim=-1):
    """No log π. Caught by test_no_distance_to_itself: "subtracted from log π?"."""
    return -(logp.exp() * logq).sum(dim)


@wrong("09", "kl_divergence")
def kl_in_bits(logp, logq, dim=-1):
    """Caught by test_the_unit_is_the_nat: "log2 gives bits"."""
    return (logp.exp() * (logp - logq)).sum(dim) / math.log(2)


@wrong("09", "kl_divergence")
def kl_of_zero_is_nan(logp, logq, dim=-1):
    """As printed. Caught by test_a_token_of_probability_0_adds_nothing: "0 · -inf is NaN"."""
    return (logp.exp() * (logp - logq)).sum(dim)


@wrong("09", "kl_divergence")
def reversed_kl(logp, logq, dim=-1):
    """KL(q ‖ p). Caught by test_the_policy_weighs_the_ratio: "are the two reversed?"."""
    return (logq.exp() * (logq - logp)).sum(dim)


def both_kls(logp, logq, idx, mask):
    """Sums over mask (B, T - 1), where position t decides token t + 1."""
    exact = (logp.exp() * (logp - logq)).sum(-1)[:, :-1]
    sampled = next_token(logp, idx) - next_token(logq, idx)
    return tuple(x.masked_fill(~mask, 0).sum(1) for x in (exact, sampled))


@wrong("09", "sequence_kl")
def padding_in_the_kl(logp, logq, idx, prompt_lens, lengths):
    """Caught by test_prompt_and_padding_are_left_out: "neither prompt nor padding"."""
    return both_kls(logp, logq, idx, inside(idx, prompt_lens, 0 * lengths + idx.size(1))[:, 1:])


@wrong("09", "sequence_kl")
def kl_not_shifted(logp, logq, idx, prompt_lens, lengths):
    """Caught by test_prompt_and_padding_are_left_out: "prompt_len - 1 to length - 2"."""
    return both_kls(logp, logq, idx, inside(idx, prompt_lens, lengths)[:, :-1])


@wrong("09", "sequence_kl")
def end_left_out(logp, logq, idx, prompt_lens, lengths):
    """Caught by test_the_end_counts: "the EOS "."""
    return both_kls(logp, logq, idx, inside(idx, prompt_lens, lengths - 1)[:, 1:])


@wrong("09", "sequence_kl")
def kl_per_token(logp, logq, idx, prompt_lens, lengths):
    """Caught by test_it_adds_up_over_the_steps: "did you average over tokens?"."""
    exact, sampled = both_kls(logp, logq, idx, inside(idx, prompt_lens, lengths)[:, 1:])
    return exact / (lengths - prompt_lens), sampled / (lengths - prompt_lens)


@wrong("09", "sequence_kl")
def exact_one_reversed(logp, logq, idx, prompt_lens, lengths):
    """Caught by test_the_exact_one_is_kl_divergence: "are its arguments "."""
    mask = inside(idx, prompt_lens, lengths)[:, 1:]
    return both_kls(logq, logp, idx, mask)[0], both_kls(logp, logq, idx, mask)[1]


@wrong("09", "sequence_kl")
def exact_for_sampled(logp, logq, idx, prompt_lens, lengths):
    """Caught by test_the_sampled_one_is_of_the_token: "not the exact value"."""
    exact, _ = both_kls(logp, logq, idx, inside(idx, prompt_lens, lengths)[:, 1:])
    return exact, exact


@wrong("09", "sequence_kl")
def sampled_clamped(logp, logq, idx, prompt_lens, lengths):
    """At 0. Caught by test_the_sampled_one_is_of_the_token: "do not clamp it"."""
    exact, sampled = both_kls(logp, logq, idx, inside(idx, prompt_lens, lengths)[:, 1:])
    return exact, sampled.clamp(min=0)


@wrong("09", "sequence_kl")
def k3_estimator(logp, logq, idx, prompt_lens, lengths):
    """exp(-r) - 1 + r. Caught by test_the_sampled_one_is_of_the_token: "such as k3"."""
    mask = inside(idx, prompt_lens, lengths)[:, 1:]
    r = next_token(logp, idx) - next_token(logq, idx)
    return both_kls(logp, logq, idx, mask)[0], ((-r).exp() - 1 + r).masked_fill(~mask, 0).sum(1)


@wrong("09", "sequence_kl")
def sampled_upside_down(logp, logq, idx, prompt_lens, lengths):
    """log π_ref - log π. Caught by test_both_have_one_mean: "is the sign right?"."""
    exact, sampled = both_kls(logp, logq, idx, inside(idx, prompt_lens, lengths)[:, 1:])
    return exact, -sampled


@wrong("09", "estimate")
def samples_of_the_reference(policy, reference, n, rng):
    """Caught by test_the_samples_are_the_policys: "sampled from π, not from π_ref"."""
    idx, lengths = sample(reference, n, rng)
    mask = inside(idx, torch.ones_like(lengths), lengths)[:, 1:]
    return both_kls(policy[idx], reference[idx], idx, mask)


@wrong("09", "estimate")
def exact_one_twice(policy, reference, n, rng):
    """Caught by test_the_samples_are_the_policys: "not the exact KL again"."""
    idx, lengths = sample(policy, n, rng)
    mask = inside(idx, torch.ones_like(lengths), lengths)[:, 1:]
    exact, _ = both_kls(policy[idx], reference[idx], idx, mask)
    return exact, exact


@wrong("09", "negative_token")
def likeliest_token(logp, logq):
    """Where π gains most. Caught by test_a_sample_can_be_negative: "π is below π_ref"."""
    return int((logp - logq).argmax())


@wrong("09", "sequence_kl")
def kl_in_a_loop(logp, logq, idx, prompt_lens, lengths):
    """The specification. Caught by test_no_loop_over_the_batch: "a loop over the batch"."""
    return sequence_kl_in_loops(logp, logq, idx, prompt_lens, lengths)


@wrong("09", "EXPLANATION")
def one_word_for_09():
    """Caught by test_two_sentences: "must have two sentences"."""
    return "Because."


# ------------------------------------------------------------------------------ 10


@wrong("10", "pairs")
def pairs_in_both_orders(K):
    """K(K - 1). Caught by test_pairs: "so it counts once"."""
    return K * (K - 1)


@wrong("10", "policy_passes")
def two_passes_a_pair(method, K, epochs):
    """For every DPO. Caught by test_a_group_goes_once: "however many pairs"."""
    passes = K * (K - 1) * epochs
    return (K * (1 + epochs), K * epochs) if method == "ppo" else (passes, passes)


@wrong("10", "policy_passes")
def completions_shared_by_pairs(method, K, epochs):
    """Once everywhere. Caught by test_a_pair_goes_by_itself: "K - 1 of them"."""
    return (K * (1 + epochs), K * epochs) if method == "ppo" else (K * epochs, K * epochs)


@wrong("10", "policy_passes")
def ppo_without_old_logps(method, K, epochs):
    """Caught by test_ppo_goes_before_it_updates: "before the update"."""
    passes = K * epochs * (K - 1 if method == "dpo_by_pair" else 1)
    return passes, passes


@wrong("10", "frozen_passes")
def reference_every_epoch(method, K, epochs):
    """Caught by test_the_frozen_models_go_forward: "computed once, not once per epoch"."""
    return {"dpo_by_group": (K * epochs, 0), "dpo_by_pair": (K * (K - 1) * epochs, 0),
            "ppo": (K, K)}[method]


@wrong("10", "forwards_per_pair")
def two_forwards_a_pair(K):
    """Caught by test_more_pairs_share_a_forward: "a pair costs less"."""
    return 2.0


@wrong("10", "models_in_memory")
def ppo_without_the_reward_model(method):
    """Caught by test_models_in_memory: "PPO also holds π_ref and r_φ"."""
    return {"dpo_by_group": (1, 0), "dpo_by_pair": (1, 1), "ppo": (1, 1)}[method]


@wrong("10", "training_bytes")
def weights_and_moments_alone(params, trained, frozen, moments):
    """No gradient. Caught by test_bytes: "has weights, a gradient and the optimizer's moments"."""
    return 4 * params * (trained * (1 + moments) + frozen)


@wrong("10", "training_bytes")
def frozen_as_dear_as_trained(params, trained, frozen, moments):
    """Caught by test_bytes: "a frozen one has weights only"."""
    return 4 * params * (trained + frozen) * (2 + moments)


# ------------------------------------------------------------------------------ 11


def eq_18(scores, rewards, below=torch.le):
    """Σ over j with below(reward j, reward k), and over k; ties have no special part."""
    rest = below(rewards[:, None, :], rewards[:, :, None])
    return (scores - scores[:, None, :].masked_fill(~rest, -math.inf).logsumexp(-1)).sum(-1)


def tied_in(rewards):
    return (rewards[:, :, None] == rewards[:, None, :]).sum(-1) > 1


def untied(scores, rewards):
    """Eq. 18 with ties left out: they lie far below all others, and add nothing."""
    tied = tied_in(rewards)
    rest = (rewards[:, None, :] <= rewards[:, :, None]) & ~tied[:, None, :]
    rest = rest | torch.eye(rewards.size(1), dtype=torch.bool)
    logps = scores - scores[:, None, :].masked_fill(~rest, -math.inf).logsumexp(-1)
    return logps.masked_fill(tied, 0).sum(-1), tied


@wrong("11", "ranking_logps")
def suffix_off_by_one(scores, rewards):
    """The sum runs over j > k. Caught by test_all_orders_sum_to_1: "k itself included"."""
    rest = rewards[:, None, :] < rewards[:, :, None]
    sums = scores[:, None, :].masked_fill(~rest, -math.inf).logsumexp(-1)
    return (scores - sums).masked_fill(~rest.any(-1), 0).sum(-1), tied_in(rewards)


@wrong("11", "ranking_logps")
def worst_chosen_first(scores, rewards):
    """Caught by test_the_best_comes_first: "best first"."""
    return eq_18(scores, rewards, torch.ge), tied_in(rewards)


@wrong("11", "ranking_logps")
def log_of_a_sum_of_exp(scores, rewards):
    """Caught by test_scores_may_be_large: "logsumexp, not log of a sum"."""
    rest = rewards[:, None, :] <= rewards[:, :, None]
    sums = (scores.exp()[:, None, :] * rest).sum(-1).log()
    return (scores - sums).sum(-1), tied_in(rewards)


@wrong("11", "ranking_logps")
def ties_ranked(scores, rewards):
    """Caught by test_tied_completions_leave: "must leave the ranking"."""
    return eq_18(scores, rewards), tied_in(rewards)


@wrong("11", "ranking_logps")
def later_tie_only(scores, rewards):
    """The first is unmarked. Caught by test_tied_completions_leave: "and for no others"."""
    logps, tied = untied(scores, rewards)
    return logps, tied & (torch.arange(rewards.size(1)) > 0)


def ranking_loss(scores, r_hat, rewards, keep=None):
    logps, tied = untied(scores.view(rewards.shape), rewards)
    left = (~tied).sum(-1) >= 2
    counts = dict(tied=int(tied.sum()), skipped=int((~left).sum()))
    return -logps[left if keep is None else keep], r_hat.detach(), counts


@wrong("11", "plackett_luce_loss")
def ranking_without_reference(pi_logps, ref_logps, rewards, beta):
    """Caught by test_the_reference_costs_log_of_K_factorial: "is π_ref in the loss?"."""
    return ranking_loss(beta * pi_logps, beta * (pi_logps - ref_logps), rewards)


@wrong("11", "plackett_luce_loss")
def ranking_without_beta(pi_logps, ref_logps, rewards, beta):
    """Caught by test_two_completions_are_eq_7: "is β in r̂?"."""
    h = pi_logps - ref_logps
    return ranking_loss(h, beta * h, rewards)


@wrong("11", "plackett_luce_loss")
def skipped_groups_cost_0(pi_logps, ref_logps, rewards, beta):
    """Caught by test_groups_without_an_order_are_skipped: "would count in the mean"."""
    r_hat = beta * (pi_logps - ref_logps)
    return ranking_loss(r_hat, r_hat, rewards, slice(None))


@wrong("11", "plackett_luce_loss")
def ties_not_counted(pi_logps, ref_logps, rewards, beta):
    """Caught by test_groups_without_an_order_are_skipped: "completions are tied"."""
    r_hat = beta * (pi_logps - ref_logps)
    return *ranking_loss(r_hat, r_hat, rewards)[:2], dict(tied=0, skipped=0)


# ------------------------------------------------------------------------------ 12


@wrong("12", "best_margin")
def log_of_the_true_share(noise):
    """Caught by test_labels_at_random_leave_no_margin: "they say nothing"."""
    return math.log(1 - noise)


@wrong("12", "best_margin")
def margin_of_the_wrong_label(noise):
    """log P/(1 - P). Caught by test_the_mean_loss_is_least_there: "1 - P for the true label"."""
    return math.log(noise / (1 - noise))


@wrong("12", "PREDICTION")
def three_of_the_four_runs():
    """Caught by test_the_prediction_is_an_order: "once, from the least KL"."""
    return ["true labels", "noise", "noise, cDPO"]


@wrong("12", "PREDICTION")
def noise_goes_further():
    """Caught by test_the_measurement_agrees: "the smaller the best margin is"."""
    return ["true labels", "true labels, cDPO", "noise", "noise, cDPO"]


@wrong("12", "EXPLANATION")
def one_word_for_12():
    """Caught by test_two_sentences: "must have two sentences"."""
    return "Because."
