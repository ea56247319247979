"""Laws of the toy corpus: the generator, the score and the regular expression agree."""

import math
import random
import re
import statistics
from collections import Counter

import pytest

import support.toy_reviews as toy
from support.toy_reviews import INTENSIFIED, LESSER, LEXICON, NEGATED, grammatical, score, sentiment

GOOD, BAD = LEXICON["witty"], LEXICON["dull"]     # an adjective of each pool
SUPERB = LEXICON["superb"]
JUNK = [
    "", " ", "\n\n", ".", "...", "?!", ",", "not", "although", "but", "not but although",
    "but but.", "Although", "although, although, but", "not truly", "not not superb",
    "\x00\ufffd\ud800", "🎬🎬", "sup erb", "superbdull", "SUPERB", "{quality}", "*superb",
    "İ" * 50 + " superb but dull", "superb " * 20000, "dull! " * 20000, "a" * 50000,
    "although " * 3000, "but " * 3000, "." * 9999,
]


@pytest.fixture(scope="module")
def many() -> list[tuple[str, float]]:
    """5,000 reviews with their intended scores."""
    rng = random.Random(0)
    return [toy.compose(rng) for _ in range(5000)]


@pytest.fixture(scope="module")
def sentences(many) -> list[str]:
    return [s.strip() for text, _ in many[:500] for s in toy.SENTENCE.findall(text)]


# --- The generator ---

def test_same_seed_same_reviews_and_a_longer_list_begins_with_the_shorter(many):
    long = toy.reviews(300, 7)
    assert long == toy.reviews(300, 7), "the same (n, seed) must give the same list"
    for k in (0, 1, 17, 299):
        assert toy.reviews(k, 7) == long[:k], f"reviews({k}, s) must begin reviews(300, s)"
    assert not set(long) & set(toy.reviews(300, 8)), "another seed must give other reviews"
    assert toy.reviews(50, 0) == [text for text, _ in many[:50]]


def test_global_random_state_is_neither_read_nor_changed():
    random.seed(1)
    state = random.getstate()
    first = toy.reviews(5, 0)
    assert random.getstate() == state, "reviews must own its generator"
    random.seed(2)
    assert toy.reviews(5, 0) == first


def test_reviews_are_distinct_and_of_the_promised_length(many):
    share = len({text for text, _ in many}) / len(many)
    assert share > 0.999, f"only {share:.4f} of 5,000 reviews are distinct"
    chars = statistics.mean(len(text) for text, _ in many)
    assert 140 < chars < 180, f"{chars:.0f} characters per review: about 35 tokens were meant"


def test_reward_covers_the_unit_interval(many):
    rewards = [sentiment(text) for text, _ in many]
    mean, sd = statistics.mean(rewards), statistics.stdev(rewards)
    assert abs(mean - 0.5) < 0.015, f"the pools are symmetric, but mean r* = {mean:.3f}"
    assert 0.32 < sd < 0.35, f"sd of r* is {sd:.3f}"
    for i in range(10):
        share = sum(int(10 * r) == i for r in rewards) / len(rewards)
        assert 0.04 < share < 0.18, f"{share:.3f} of the rewards lie in decile {i}"
    best = statistics.mean(max(rewards[i:i + 64]) for i in range(0, 4992, 64))
    assert best > 0.975, f"best of 64 reaches only {best:.3f}: is kappa too small?"
    ties = sum((k / len(rewards)) ** 2 for k in Counter(rewards).values())
    assert ties < 0.02, f"{ties:.3f} of random pairs tie and would be dropped"


def test_an_all_positive_review_is_near_one():
    rng = random.Random(0)
    rewards = []
    for _ in range(500):
        used = set()
        parts = [toy.expand(part, 1, rng, used)[0] for part in ("opener", "body", "body", "closer")]
        rewards.append(sentiment(" ".join(parts)))
    assert min(rewards) > 0.5, "a review of positive sentences must be positive"
    assert statistics.median(rewards) > 0.93, f"median r* is only {statistics.median(rewards):.3f}"


def signs(text: str) -> list[int]:
    """+1 or -1 for each sentence with a score."""
    return [1 if worth > 0 else -1 for worth in map(score, toy.SENTENCE.findall(text)) if worth]


def test_sentences_of_a_review_mostly_agree(many):
    reviews = [signs(text) for text, _ in many]
    mixed = statistics.mean(len(set(each)) > 1 for each in reviews)
    assert 0.2 < mixed < 0.3, f"{mixed:.2f} of the reviews contradict themselves"
    agree = statistics.mean(a == b for each in reviews for a, b in zip(each, each[1:]))
    assert 0.74 < agree < 0.8, f"{agree:.2f} of neighbouring sentences agree"


def test_a_closer_has_the_sign_of_the_review():
    """A closer agrees with most sentences before it, because one p decides them all."""
    rng, right = random.Random(1), []
    closer = re.compile(toy.pattern("closer", capital=True))
    for text in (toy.compose(rng)[0] for _ in range(3000)):
        *body, last = [s.strip() for s in toy.SENTENCE.findall(text)]
        before = sum(signs(" ".join(body)))
        if closer.fullmatch(last) and abs(before) >= 2 and score(last):
            right.append((score(last) > 0) == (before > 0))
    assert len(right) > 300 and statistics.mean(right) > 0.89, statistics.mean(right)


def test_no_review_uses_a_noun_or_a_judgement_twice(many):
    nouns = {word for symbol in ("writing", "craft", "aspects") for word in toy.GRAMMAR[symbol]}
    for text, _ in many:
        words = Counter(re.findall(r"\w+", text.lower()))
        twice = [w for w in words if words[w] > 1 and w in nouns | LEXICON.keys()]
        assert not twice, f"{twice} in {text!r}"


def test_if_every_word_of_a_list_is_used_words_are_used_again():
    used = set(toy.INTENSIFIERS)
    assert toy.expand("intensifier", 1, random.Random(0), used)[0] in toy.INTENSIFIERS


def test_the_first_words_rarely_show_the_polarity(many):
    polar = sum(score(" ".join(text.split()[:8])) != 0 for text, _ in many) / len(many)
    assert polar < 0.35, f"{polar:.2f} of the reviews show their polarity within eight words"


def test_articles_are_right(many):
    for text, _ in many:
        wrong = re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text)
        assert not wrong, f"wrong article: {text!r}"


# --- The lexicon ---

def test_lexicon_words_occur_nowhere_else():
    starred = [w for pools in toy.POLAR.values() for phrases in pools.values()
               for w in re.findall(r"\*(\w+)", " ".join(phrases))]
    assert len(starred) == len(set(starred)) == len(LEXICON), "a polar word is listed twice"
    templates = [t for options in toy.GRAMMAR.values() for t in options]
    templates += [p for pools in toy.POLAR.values() for ps in pools.values() for p in ps]
    plain = " ".join(re.sub(r"\{[^}]*\}|\*\w+", " ", t) for t in templates).lower()
    clash = set(re.findall(r"\w+", plain)) & (set(LEXICON) | set(starred))
    assert not clash, f"polar words that are also titles, names or plots: {clash}"


def test_every_polar_phrase_has_one_polar_word_and_pools_have_equal_size():
    for symbol, pools in toy.POLAR.items():
        assert len(pools[+1]) == len(pools[-1]), f"the pools of {symbol} differ in size"
        for sign, phrases in pools.items():
            for phrase in phrases:
                assert phrase.count("*") == 1, f"{phrase!r} needs exactly one star"
                plain = phrase.replace("*", "")
                assert score(plain) == sign * toy.STRENGTH[symbol], plain


def test_modifiers_occur_only_where_a_rule_means_them():
    for symbol, options in toy.GRAMMAR.items():
        for template in options:
            words = set(re.findall(r"\w+", re.sub(r"\{[^}]*\}", " ", template).lower()))
            assert ("not" in words) == (f":{NEGATED}" in template), template
            assert bool({"but", "although"} & words) == (f":{LESSER}" in template), template
            assert symbol == "intensifier" or not words & set(toy.INTENSIFIERS), template


# --- The score ---

def test_the_score_of_a_text_is_its_intended_score(many):
    for text, intended in many:
        assert score(text) == pytest.approx(intended, abs=1e-9), text
        assert sentiment(text) == pytest.approx(1 / (1 + math.exp(-toy.KAPPA * intended))), text


def test_equal_scores_tie_exactly(many):
    values = sorted({score(text) for text, _ in many})
    gap = min(b - a for a, b in zip(values, values[1:]))
    assert gap > 1e-4, f"two scores differ by {gap}: rounding made a tie a preference"


@pytest.mark.parametrize("text, expected", [
    ("The plot was witty.", GOOD),
    ("The plot was dull.", BAD),
    ("The plot was superb.", SUPERB),
    ("The plot was truly witty.", INTENSIFIED * GOOD),
    ("The plot was not witty at all.", NEGATED * GOOD),
    ("The plot was not dull at all.", NEGATED * BAD),
    ("The plot was not truly dull at all.", NEGATED * INTENSIFIED * BAD),
    ("The plot was dull, but the cast was superb.", LESSER * BAD + SUPERB),
    ("Although the plot was dull, the cast was superb.", LESSER * BAD + SUPERB),
    ("Although the plot was superb, the cast was dull.", LESSER * SUPERB + BAD),
    ("The plot was not witty at all, but the cast was truly witty.",
     LESSER * NEGATED * GOOD + INTENSIFIED * GOOD),
    ("The plot was dull, and the cast was superb.", BAD + SUPERB),
    ("The plot was dull. But the cast was superb.", BAD + SUPERB),
    ("The plot was dull. Although the cast was superb. Dull.", 2 * BAD + LESSER * SUPERB),
    ("Although the plot was dull, the cast was witty, but the end was superb.",
     LESSER * BAD + LESSER * GOOD + SUPERB),
    ("I left the cinema smiling. What a gem!", LEXICON["smiling"] + LEXICON["gem"]),
    ("Hidden Garden tells of a retired spy who learns to fly.", 0),
    ("was superb. The plot was not", SUPERB),
    ("witty witty witty dull", 3 * GOOD + BAD),
    ("wittyly superbdull un-wittier", 0),
])
def test_score_by_hand(text, expected):
    assert score(text) == pytest.approx(expected), text
    assert sentiment(text) == pytest.approx(1 / (1 + math.exp(-toy.KAPPA * expected))), text


def test_score_adds_over_sentences_and_ignores_case_and_spacing(many):
    texts = [text for text, _ in many[:400]]
    for a, b in zip(texts, texts[1:]):
        assert score(f"{a} {b}") == pytest.approx(score(a) + score(b)), (a, b)
        assert score(a.upper()) == score(a) == score("\n " + a.replace(" ", "\n  ")), a


def test_the_other_polarity_has_the_negative_score():
    for seed in range(1000):
        part = toy.START[seed % 3]
        good, up = toy.expand(part, +1, random.Random(seed), set())
        bad, down = toy.expand(part, -1, random.Random(seed), set())
        assert up == -down and score(good) == -score(bad), (good, bad)
        mixed = "but " in good or "although " in good   # "dreadful, but not dull at all": -0.09
        assert mixed or up > 0 or good == bad, f"intended to be positive: {good!r}"
        assert score(f"{good} {bad}") == 0, (good, bad)


# --- The language ---

def test_every_sentence_of_a_review_is_in_the_language(many):
    for text, _ in many[:2000]:
        inside, total = grammatical(text)
        assert 2 <= inside == total <= 4, f"{inside} of {total} sentences recognised: {text!r}"


def test_any_polar_word_fits_a_polar_slot(sentences):
    """Polarity does not matter: "witty, but superb" is odd, but grammatical."""
    rng = random.Random(0)
    pools = [[w.strip("*") for w in p[+1] + p[-1]] for s, p in toy.POLAR.items()
             if s in ("adjective", "superlative", "verdict")]
    pool_of = {w: pool for pool in pools for w in pool}
    for s in sentences:
        swapped = re.sub(r"\w+", lambda m: rng.choice(pool_of.get(m[0], [m[0]])), s)
        assert grammatical(swapped) == (1, 1), f"{swapped!r}, from {s!r}"


def test_shuffled_sentences_are_not_in_the_language(sentences):
    rng = random.Random(0)
    inside = 0
    for s in sentences:
        words = s[:-1].split()
        rng.shuffle(words)
        inside += grammatical(" ".join(words) + s[-1])[0]
    assert inside < 0.03 * len(sentences), f"{inside} of {len(sentences)} are grammatical"


def test_a_truncated_last_sentence_is_not_in_the_language(many):
    for text, _ in many[:100]:
        ends = [m.end() for m in re.finditer(r"[.!]", text)]
        for cut in range(1, len(text) + 1):
            inside, total = grammatical(text[:cut])
            whole = sum(end <= cut for end in ends)
            torn = text[:cut].rstrip()[-1] not in ".!"
            assert (inside, total) == (whole, whole + torn), text[:cut]


@pytest.mark.parametrize("text, expected", [
    ("", (0, 0)),
    ("  \n", (0, 0)),
    ("The plot was dull.", (1, 1)),
    ("The plot was dull.\n\nWhat a gem!", (2, 2)),
    ("The plot was dull, but the cast was tedious.", (1, 1)),
    ("the plot was dull.", (0, 1)),
    ("The plot was dull", (0, 1)),
    ("The plot was dull!", (0, 1)),
    ("The plot was dull...", (0, 1)),
    ("The plot was was dull.", (0, 1)),
    ("The plot  was dull.", (0, 1)),
    ("The plot were dull.", (0, 1)),
    ("The Plot was dull.", (0, 1)),
    ("The plot was not truly dull at all.", (0, 1)),
    ("The plot was twocumenty. The plot was dull. The", (1, 3)),
])
def test_grammatical_by_hand(text, expected):
    assert grammatical(text) == expected, text


# --- Any text ---

def test_junk_is_scored_and_counted(many):
    rng = random.Random(0)
    words = [w for text, _ in many[:500] for w in re.findall(r"\w+|[.,!]", text)]
    salad = [" ".join(rng.choices(words, k=rng.randrange(1, 60))) for _ in range(300)]
    torn = [text[rng.randrange(40):rng.randrange(60, 200)] for text, _ in many[:300]]
    for text in JUNK + salad + torn:
        assert 0 < sentiment(text) < 1, f"r* must lie inside (0, 1): {text[:60]!r}"
        assert sentiment(text) == sentiment(text)
        inside, total = grammatical(text)
        assert 0 <= inside <= total <= len(text), text[:60]
    assert sentiment("") == 0.5 == sentiment("Nothing polar here."), "neutral is one half"


def test_main_prints_from_worst_to_best(capsys):
    toy.main(["-n", "6", "--seed", "3"])
    out = capsys.readouterr().out
    shown = [float(x) for x in re.findall(r"r\* = ([\d.]+)", out)]
    truth = sorted(sentiment(text) for text in toy.reviews(6, 3))
    assert shown == sorted(shown) and shown == pytest.approx(truth, abs=6e-4)
    assert out.count("%") == 10, "ten bars of the histogram were expected"
