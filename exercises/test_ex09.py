"""Checks of exercise 09: two estimates of one KL, in nats per completion."""

import math

import torch
from ex09_sequence_kl import QUESTION, sequence_kl_in_loops
from grading import lines_run, near, normal, two_sentences

B, T, V = 4, 8, 5
TOLERANCE = 1e-4  # float32


def draw(rng):
    """logp, logq (B, T, V), idx (B, T), prompt_lens (B,), lengths (B,): all rows have padding."""
    prompt_lens = torch.randint(1, 3, (B,), generator=rng)
    lengths = prompt_lens + torch.randint(3, 5, (B,), generator=rng)
    logp, logq = normal(rng, 2, B, T, V).log_softmax(-1)
    return logp, logq, torch.randint(V, (B, T), generator=rng), prompt_lens, lengths


def one_token(rng):
    """Every completion of one token, V in all: logp, logq (V, 2, V), idx (V, 2), lengths."""
    logp, logq = normal(rng, 2, 1, 2, V).log_softmax(-1).expand(2, V, 2, V)
    idx = torch.stack([torch.zeros(V, dtype=torch.long), torch.arange(V)], 1)
    one = torch.ones(V, dtype=torch.long)
    return logp, logq, idx, one, 2 * one


def test_no_distance_to_itself(impl, rng):
    logp, *_ = draw(rng)
    near(impl.kl_divergence(logp, logp), torch.zeros(B, T), "KL(π ‖ π) must be 0: is log π_ref "
         "subtracted from log π?", TOLERANCE)


def test_the_unit_is_the_nat(impl):
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    near(impl.kl_divergence(p.log(), p.flip(0).log()), math.log(3) / 2, "KL of (3/4, 1/4) to "
         "(1/4, 3/4) is 0.549 nats: use the natural log, for log2 gives bits", TOLERANCE)


def test_the_policy_weighs_the_ratio(impl, rng):
    logq = normal(rng, V).log_softmax(-1)
    sure = torch.full_like(logq, -60.0)
    sure[0] = 0
    near(impl.kl_divergence(sure, logq), -logq[0], "where π always gives one token, the KL is "
         "-log π_ref of it: the log-ratio is weighed by π, not by π_ref, are the two reversed?",
         TOLERANCE)


def test_a_token_of_probability_0_adds_nothing(impl, rng):
    logq = normal(rng, V).log_softmax(-1)
    sure = torch.full_like(logq, -math.inf)
    sure[0] = 0
    near(impl.kl_divergence(sure, logq), -logq[0], "a token with π = 0 must add 0 to the KL: "
         "0 · -inf is NaN, so such terms need torch.where", TOLERANCE)


def test_prompt_and_padding_are_left_out(impl, rng):
    logp, logq, idx, prompt_lens, lengths = draw(rng)
    t = torch.arange(T)
    decides = (t >= prompt_lens[:, None] - 1) & (t < lengths[:, None] - 1)
    other = torch.where(decides[..., None], logp, normal(rng, B, T, V).log_softmax(-1))
    moved = impl.sequence_kl(other, logq, idx, prompt_lens, lengths)
    for name, a, b in zip(("exact", "sampled"), moved,
                          impl.sequence_kl(logp, logq, idx, prompt_lens, lengths)):
        near(a, b, f"the {name} KL changed with a position that predicts no token of y: positions "
             "prompt_len - 1 to length - 2 do, neither prompt nor padding", TOLERANCE)


def test_the_end_counts(impl, rng):
    logp, logq, idx, prompt_lens, lengths = draw(rng)
    last = torch.arange(T) == lengths[:, None] - 2
    other = torch.where(last[..., None], logq, logp)  # there the two agree
    exact, _ = impl.sequence_kl(logp, logq, idx, prompt_lens, lengths)
    assert (impl.sequence_kl(other, logq, idx, prompt_lens, lengths)[0] < exact).all(), \
        "the KL stayed the same where π was made equal to π_ref at the last token of y: the EOS " \
        "is a token of y too"


def test_the_sampled_one_is_of_the_token(impl, rng):
    _, sampled = impl.sequence_kl(*one_token(rng))
    assert sampled.std() > TOLERANCE, "the sampled KL is the same for every token that may be " \
        "drawn: it is log π - log π_ref of the drawn token, not the exact value"
    assert (sampled < 0).any(), "the sampled KL is never negative, but log π - log π_ref is, on " \
        "a token that π_ref finds likelier: do not clamp it, and use no other estimator such as k3"


def test_it_adds_up_over_the_steps(impl, rng):
    logp, logq, idx, prompt_lens, lengths = draw(rng)
    cut = prompt_lens + 1
    whole, head, tail = (impl.sequence_kl(logp, logq, idx, a, b) for a, b in
                         ((prompt_lens, lengths), (prompt_lens, cut), (cut, lengths)))
    for name, w, h, t in zip(("exact", "sampled"), whole, head, tail):
        near(w, h + t, f"the {name} KL of y₁y₂ must be that of y₁ plus that of y₂: it is a sum, in "
             "nats per completion, did you average over tokens?", TOLERANCE)


def test_the_exact_one_is_kl_divergence(impl, rng):
    logp, logq, *rest = one_token(rng)
    exact, _ = impl.sequence_kl(logp, logq, *rest)
    near(exact, impl.kl_divergence(logp[:, 0], logq[:, 0]), "for a y of one token the exact KL "
         "must be kl_divergence(log π, log π_ref) at the position before: are its arguments "
         "reversed?", TOLERANCE)


def test_both_have_one_mean(impl, rng):
    logp, logq, *rest = one_token(rng)
    exact, sampled = impl.sequence_kl(logp, logq, *rest)
    near((logp[0, 0].exp() * sampled).sum(), exact[0], "the mean of the sampled KL over y ~ π must "
         "be the exact KL: it is log π(y|x) - log π_ref(y|x), is the sign right?", TOLERANCE)


def test_the_samples_are_the_policys(impl, rng):
    policy, reference = (1.5 * normal(rng, 2, V, V)).log_softmax(-1)
    wanted, at = 0.0, torch.eye(V, dtype=policy.dtype)[0]  # where a text is, before each step
    for _ in range(1, 6):
        wanted += float(at @ (policy.exp() * (policy - reference)).sum(-1))
        at = at @ policy.exp()
        at[0] = 0  # ended
    exact, sampled = impl.estimate(policy, reference, 4000, rng)
    assert (exact != sampled).any(), "both results of estimate are equal on every text: the " \
        "second is log π(y|x) - log π_ref(y|x) of the text, not the exact KL again"
    for name, values in ("exact", exact), ("sampled", sampled):
        se = float(values.std()) / 4000**0.5
        assert abs(float(values.mean()) - wanted) < 5 * se, f"by enumeration the KL is " \
            f"{wanted:.3f}, and the {name} estimate gives {float(values.mean()):.3f} ± {se:.3f}: " \
            "the texts must be sampled from π, not from π_ref"


def test_a_sample_can_be_negative(impl, rng):
    logp, logq = normal(rng, 2, V).log_softmax(-1)
    token = impl.negative_token(logp, logq)
    assert logp[token] < logq[token], f"on token {token} log π - log π_ref is " \
        f"{float(logp[token] - logq[token]):.2f}, not negative: both sum to 1, so there is a " \
        "token on which π is below π_ref"


def test_no_loop_over_the_batch(impl, rng):
    batch = draw(rng)
    for got, wanted in zip(impl.sequence_kl(*batch), sequence_kl_in_loops(*batch)):
        near(got, wanted, "the result differs from sequence_kl_in_loops", TOLERANCE)
    twice = [torch.cat([x, x]) for x in batch]
    assert lines_run(impl.sequence_kl, *twice) == lines_run(impl.sequence_kl, *batch), \
        "twice as many sequences ran more lines of Python: there is a loop over the batch"


def test_two_sentences(impl):
    two_sentences(impl, "09", QUESTION)
