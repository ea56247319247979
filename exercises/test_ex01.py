"""Checks of exercise 01: log π(y|x) is a sum over the tokens of y and no others."""

import math

import torch
from ex01_completion_logps import log_pi_in_loops
from grading import lines_run, near, normal, same_shape

B, T, V = 4, 9, 7


def draw(rng):
    """logits (B, T, V), idx (B, T), prompt_lens (B,), lengths (B,): every row has padding."""
    prompt_lens = torch.randint(2, 4, (B,), generator=rng)
    lengths = prompt_lens + torch.randint(3, T - 3, (B,), generator=rng)
    idx = torch.randint(V, (B, T), generator=rng)
    return 2 * normal(rng, B, T, V), idx, prompt_lens, lengths.clamp(max=T - 1)


def places(rng):
    """token_logps (B, T), prompt_lens (B,), lengths (B,), positions (T,)."""
    _, _, prompt_lens, lengths = draw(rng)
    return -normal(rng, B, T).abs() - 0.1, prompt_lens, lengths, torch.arange(T)


def test_one_log_prob_per_token(impl, rng):
    logits, idx, _, _ = draw(rng)
    same_shape(impl.logits_to_token_logps(logits, idx), (B, T),
               "return one log-prob per token, also for the first (0: nothing predicts it)")


def test_the_probabilities_of_all_tokens_sum_to_1(impl, rng):
    logits, idx, _, _ = draw(rng)
    total = sum(impl.logits_to_token_logps(logits, torch.full_like(idx, v))[:, 1:].exp()
                for v in range(V))
    near(total, torch.ones(B, T - 1), "at each position the probabilities of the V tokens must sum "
         "to 1: take log_softmax over the vocabulary, then the entry of the token")


def test_the_position_before_predicts(impl, rng):
    logits, idx, _, _ = draw(rng)
    sure = torch.zeros_like(logits).scatter_(-1, idx.roll(-1, 1)[..., None], 60.0)
    near(impl.logits_to_token_logps(sure, idx)[:, 1:], torch.zeros(B, T - 1),
         "the logits at position t - 1 are certain of token t, so its log-prob must be 0: "
         "logits[:, t - 1] score idx[:, t], is the shift by one there?")
    near(impl.logits_to_token_logps(logits, idx)[:, 0], torch.zeros(B),
         "column 0 must be 0: nothing predicts a first token")


def test_an_unlikely_token_has_a_finite_log_prob(impl):
    logits = torch.zeros(B, T, V)
    logits[..., 0] = 2000
    near(impl.logits_to_token_logps(logits, torch.ones(B, T, dtype=torch.long))[:, 1:],
         torch.full((B, T - 1), -2000.0), "a token whose logit is 2000 below the largest must have "
         "log-prob -2000: softmax gives 0 there, and log 0 is -inf, so use log_softmax")


def test_the_log_probs_carry_a_gradient(impl, rng):
    logits, idx, prompt_lens, lengths = draw(rng)
    logps = impl.logits_to_token_logps(logits.requires_grad_(), idx)
    total = impl.completion_logps(normal(rng, B, T).requires_grad_(), prompt_lens, lengths)
    assert logps.requires_grad and total.requires_grad, \
        "the result carries no gradient, so nothing could be trained: remove no_grad or detach"


def test_the_prompt_is_not_scored(impl, rng):
    logps, prompt_lens, lengths, t = places(rng)
    changed = torch.where(t < prompt_lens[:, None], logps - 5, logps)
    near(impl.completion_logps(changed, prompt_lens, lengths),
         impl.completion_logps(logps, prompt_lens, lengths),
         "the log-prob of a prompt token changed log π(y|x): the prompt is given, it is not "
         "scored. Eq. 7 would not show this mistake, because it cancels there")


def test_padding_is_not_scored(impl, rng):
    logps, prompt_lens, lengths, t = places(rng)
    changed = torch.where(t >= lengths[:, None], logps - 5, logps)
    near(impl.completion_logps(changed, prompt_lens, lengths),
         impl.completion_logps(logps, prompt_lens, lengths),
         "a log-prob after the end of y changed log π(y|x): padding is not scored")


def test_padding_may_be_minus_infinity(impl, rng):
    logps, prompt_lens, lengths, t = places(rng)
    changed = torch.where(t >= lengths[:, None], -math.inf, logps)
    near(impl.completion_logps(changed, prompt_lens, lengths),
         impl.completion_logps(logps, prompt_lens, lengths),
         "padding with log-prob -inf changed log π(y|x): 0 · -inf is NaN, so do not multiply by "
         "the mask; use masked_fill or torch.where")


def test_the_eos_is_scored(impl, rng):
    logps, prompt_lens, lengths, t = places(rng)
    changed = torch.where(t == lengths[:, None] - 1, logps - 5, logps)
    moved = impl.completion_logps(changed, prompt_lens, lengths) \
        - impl.completion_logps(logps, prompt_lens, lengths)
    assert (moved < 0).all(), "the last token of y did not change log π(y|x): the EOS belongs to " \
        "y, and `lengths` count it"


def test_the_first_token_is_scored(impl, rng):
    logps, prompt_lens, lengths, t = places(rng)
    changed = torch.where(t == prompt_lens[:, None], logps - 5, logps)
    moved = impl.completion_logps(changed, prompt_lens, lengths) \
        - impl.completion_logps(logps, prompt_lens, lengths)
    assert (moved < 0).all(), "the first token of y did not change log π(y|x): y begins at " \
        "t = prompt_len, for the prompt has the positions 0 to prompt_len - 1"


def test_the_chain_rule_holds(impl, rng):
    logps, prompt_lens, lengths, _ = places(rng)
    cut = prompt_lens + 2
    parts = impl.completion_logps(logps, prompt_lens, cut) \
        + impl.completion_logps(logps, cut, lengths)
    near(impl.completion_logps(logps, prompt_lens, lengths), parts,
         "log π(y₁y₂|x) must be log π(y₁|x) + log π(y₂|x y₁): sum over the tokens of y, did you "
         "average over them?")


def test_no_loop_over_the_batch(impl, rng):
    batch = draw(rng)

    def log_pi(logits, idx, prompt_lens, lengths):
        return impl.completion_logps(impl.logits_to_token_logps(logits, idx), prompt_lens, lengths)

    near(log_pi(*batch), log_pi_in_loops(*batch), "the result differs from log_pi_in_loops")
    twice = [torch.cat([x, x]) for x in batch]
    assert lines_run(log_pi, *twice) == lines_run(log_pi, *batch), \
        "twice as many sequences ran more lines of Python: there is a loop over the batch"
