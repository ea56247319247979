"""Checks of exercise 01: log π(y|x), a sum over the tokens of y and no others."""

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


def test_one_log_prob_a_token(impl, rng):
    logits, idx, _, _ = draw(rng)
    same_shape(impl.logits_to_token_logps(logits, idx), (B, T),
               "one log-prob a token, the first one's too (0: nothing predicts it)")


def test_the_chances_of_all_tokens_sum_to_1(impl, rng):
    logits, idx, _, _ = draw(rng)
    total = sum(impl.logits_to_token_logps(logits, torch.full_like(idx, v))[:, 1:].exp()
                for v in range(V))
    near(total, torch.ones(B, T - 1), "exp of the V tokens' log-probs at a place must sum to 1: "
         "log_softmax over the vocabulary, then the token's own entry")


def test_the_position_before_predicts(impl, rng):
    logits, idx, _, _ = draw(rng)
    sure = torch.zeros_like(logits).scatter_(-1, idx.roll(-1, 1)[..., None], 60.0)
    near(impl.logits_to_token_logps(sure, idx)[:, 1:], torch.zeros(B, T - 1),
         "position t - 1 bet all on token t, so its log-prob must be 0: logits[:, t - 1] scores "
         "idx[:, t], is the shift by one there?")
    near(impl.logits_to_token_logps(logits, idx)[:, 0], torch.zeros(B),
         "column 0 must be 0: nothing predicts a first token")


def test_the_prompt_is_not_scored(impl, rng):
    logps, prompt_lens, lengths, t = places(rng)
    changed = torch.where(t < prompt_lens[:, None], logps - 5, logps)
    near(impl.completion_logps(changed, prompt_lens, lengths),
         impl.completion_logps(logps, prompt_lens, lengths),
         "a prompt token's log-prob changed log π(y|x): the prompt is given, it is not scored. "
         "Eq. 7 would not show it, for it cancels there")


def test_padding_is_not_scored(impl, rng):
    logps, prompt_lens, lengths, t = places(rng)
    changed = torch.where(t >= lengths[:, None], logps - 5, logps)
    near(impl.completion_logps(changed, prompt_lens, lengths),
         impl.completion_logps(logps, prompt_lens, lengths),
         "what follows the completion changed log π(y|x): padding is not scored")


def test_the_eos_is_scored(impl, rng):
    logps, prompt_lens, lengths, t = places(rng)
    changed = torch.where(t == lengths[:, None] - 1, logps - 5, logps)
    moved = impl.completion_logps(changed, prompt_lens, lengths) \
        - impl.completion_logps(logps, prompt_lens, lengths)
    assert (moved < 0).all(), "the last token of y had no effect on log π(y|x): its EOS belongs " \
        "to it, `lengths` count it"


def test_the_chain_rule_holds(impl, rng):
    logps, prompt_lens, lengths, _ = places(rng)
    cut = prompt_lens + 2
    parts = impl.completion_logps(logps, prompt_lens, cut) \
        + impl.completion_logps(logps, cut, lengths)
    near(impl.completion_logps(logps, prompt_lens, lengths), parts,
         "log π(y₁y₂|x) must be log π(y₁|x) + log π(y₂|x y₁): a sum of all tokens of y, did you "
         "average over them?")


def test_no_loop_over_the_batch(impl, rng):
    batch = draw(rng)

    def log_pi(logits, idx, prompt_lens, lengths):
        return impl.completion_logps(impl.logits_to_token_logps(logits, idx), prompt_lens, lengths)

    near(log_pi(*batch), log_pi_in_loops(*batch), "not what log_pi_in_loops gives")
    twice = [torch.cat([x, x]) for x in batch]
    assert lines_run(log_pi, *twice) == lines_run(log_pi, *batch), \
        "twice the sequences ran more lines of Python: there is a loop over the batch"


def places(rng):
    logits, idx, prompt_lens, lengths = draw(rng)
    return -normal(rng, B, T).abs() - 0.1, prompt_lens, lengths, torch.arange(T)
