"""The embedded corpus: a seeded grammar of short film reviews whose sentiment is a known function.

This file knows nothing about tokens, models or training, and needs only the standard library. All
text is our own. Three functions read the same grammar independently:
    reviews      expands it at random: n, seed -> texts
    sentiment    scores any text exactly: text -> r* = σ(κ · score)
    grammatical  compiles it to a regular expression: which sentences are in the language?
The score of a text is a sum. Each polar word adds its strength, with its sign. An intensifier
before it multiplies that by 1.5, "not" before it by -0.7. A clause before "but", or after
"although", counts half.
"""

import argparse
import json
import math
import random
import re
import statistics
import textwrap
from functools import cache

KAPPA = 1.0          # r* = σ(κ · score) is monotone: no κ changes which of two texts is preferred
INTENSIFIED, NEGATED, LESSER = 1.5, -0.7, 0.5
INTENSIFIERS = "truly really thoroughly genuinely simply".split()

# The polar symbols. Each has a pool of good phrases (+1) and one of bad phrases (-1). A starred
# word carries the sentiment and occurs nowhere else in the grammar. Adjectives and verdicts can
# follow "a": none needs "an".
STRENGTH = {"adjective": 0.8, "superlative": 1.3, "verdict": 1.1, "verb": 1.0, "feeling": 0.9}
POLAR = {
    "adjective": {
        +1: "*charming *clever *funny *moving *witty *tender *lively *fresh *graceful *polished "
            "*gripping *vivid *memorable *touching *thoughtful".split(),
        -1: "*dull *clumsy *bland *tired *messy *shallow *stale *lazy *tedious *muddled "
            "*pointless *lifeless *forgettable *predictable *careless".split()},
    "superlative": {
        +1: "*superb *wonderful *brilliant *magnificent *dazzling *perfect".split(),
        -1: "*dreadful *terrible *horrible *pathetic *wretched *hopeless".split()},
    "verdict": {
        +1: "*triumph *joy *gem *treat *delight".split(),
        -1: "*disaster *bore *chore *failure *mistake".split()},
    "verb": {
        +1: ["*captivated me from start to finish", "*lifted the whole film", "*won me over",
             "*rewarded my patience", "*impressed even my {companion}"],
        -1: ["*irritated me from start to finish", "*spoiled the whole film", "*wore me out",
             "*exhausted my patience", "*bothered even my {companion}"]},
    "feeling": {
        +1: ["I *loved every minute", "I left the cinema *smiling", "I *laughed all the way home",
             "I was *hooked within minutes", "I would *gladly watch it again"],
        -1: ["I *hated every minute", "I left the cinema *yawning", "I *grumbled all the way home",
             "I was *asleep within minutes", "I *wasted a whole evening"]},
}

# All other symbols. {symbol} is expanded with the sentence's polarity, {-symbol} with the opposite
# one; {symbol:x} multiplies its score by x. A template that is listed k times is k times as likely.
# No symbol contains itself, so the language is finite and one regular expression can describe it.
START = ("opener", "body", "closer")         # what may stand as a sentence
GRAMMAR = {
    "opener": 7 * ["{fact}"] + 3 * ["{judgement}"],
    "fact": [
        "{title} is a {genre} about {role} who {deed}.",
        "{title} tells of {role} who {deed}.",
        "{title} is the {count} {genre} by {person}.",
        "{title} was made by {person} in {place}.",
        "this {genre} follows {role} who {deed}.",
        "this is a {genre} about {role} in {place}.",
        "in {title}, {person} plays {role} who {deed}.",
        "{person} plays {role} in this {genre}.",
        "I saw {title} on {day} with my {companion}.",
        "my {companion} and I watched {title} on {day}.",
        "set in {place}, {title} is about {role}."],
    "judgement": [
        "{title} is {quality}.", "I found {title} {quality}.",
        "{title} by {person} is a {praise} {genre}.",
        "this {genre} by {person} is a {verdict}."],
    "body": 2 * ["{clause}.", "{-clause:0.5}, but {clause}.", "although {-clause:0.5}, {clause}."]
            + ["{remark}, and {feeling}.", "{lead}, {clause}."],
    "clause": 6 * ["{remark}"] + ["{feeling}"],
    "remark": 3 * ["the {aspect} was {quality}", "the {aspects} were {quality}"] + [
        "the {writing} and the {craft} were {quality}",
        "the {aspect} was a {verdict}",
        "the {aspect} {verb}", "the {aspects} {verb}",
        "it was {quality}", "it {verb}",
        "{person} was {quality}", "{person} gave a {praise} performance"],
    "closer": [
        "{lead}, {feeling}.",
        "{lead}, this is a {praise} film.",
        "my {companion} called it {quality}.",
        "{praise} from the first scene to the last.",
        "what a {verdict}!", "what a {praise} film!"],
    "quality": 3 * ["{praise}"] + ["not {-adjective:-0.7} at all"],
    "praise": 2 * ["{adjective}"] + ["{superlative}", "{intensifier} {adjective:1.5}"],
    "intensifier": INTENSIFIERS,
    "lead": "in the end, on the whole, to be honest, all in all, in short".split(", "),
    "aspect": ["{writing}", "{craft}"],
    "writing": "plot script story dialogue ending opening humour romance suspense mood".split(),
    "craft": "acting music editing camerawork lighting direction pacing design sound cast".split(),
    "aspects": "characters jokes scenes costumes songs twists effects chases speeches sets "
               "villains dances".split(),
    "genre": "thriller comedy western musical drama mystery documentary fantasy cartoon biopic "
             "sequel remake".split(),
    "person": ["{first} {last}"],
    "first": "Anna Marcus Helen Victor Clara Samuel Nora Felix Diana Oscar Irene Hugo Laura Simon "
             "Vera Leon".split(),
    "last": "Hale Morrow Castell Lindgren Okafor Duarte Petrov Marsh Keller Novak Sato Rossi "
            "Brandt Delgado Whitlock Nguyen".split(),
    "title": ["The {shade} {thing}", "{shade} {thing}"],
    "shade": "Hollow Crimson Silent Second Northern Paper Marble Hidden Amber Distant Velvet Iron "
             "Midnight Secret".split(),
    "thing": "Garden River Mirror Station Harbour Orchard Letter Bridge Tower Lantern Island "
             "Valley Kingdom".split(),
    "role": "a retired spy, a young baker, a village doctor, a lighthouse keeper, a piano teacher, "
            "an old sailor, a night nurse, a chess player, a train driver".split(", "),
    "deed": "finds a buried map, inherits a castle, searches for a missing brother, joins a bank "
            "robbery, returns after twenty years, writes to a stranger, buys an empty hotel, "
            "hides a suitcase of money, learns to fly".split(", "),
    "place": "a fishing port, Vienna, Lisbon, a desert town, a mountain hotel, Ohio, outer space, "
             "rural Japan".split(", "),
    "day": "a Friday night, a rainy Sunday, a long flight, a day off, New Year's Eve".split(", "),
    "companion": "sister brother neighbour mother father cousin uncle class".split(),
    "count": "first third fourth fifth latest".split(),
}

# Words for prompts that no review contains. These symbols replace those of the grammar. The polar
# words are the same, so the score is still exact. The lists hold single words; none needs "an".
UNSEEN = {
    "unseen words": {
        "shade": "Broken Golden Frozen Winter Purple Copper Scarlet Burning Stolen Savage".split(),
        "thing": "Compass Forest Window Feather Clock Palace Ocean Shadow Candle Market".split(),
        "first": "Peter Julia Martin Sarah Daniel Emma Robert Paula Ruth Ivan".split(),
        "last": "Fisher Porter Moreau Santos Larsen Tanaka Becker Carter Murphy Holm".split(),
        "genre": "slasher parody farce tragedy melodrama satire romcom pastiche".split(),
        "place": "Norway Cairo Texas Berlin Brazil Madrid Prague Boston".split(),
        "companion": "nephew niece wife husband boss barber landlord roommate".split()},
    "another domain": {
        "fact": [
            "this {venue} serves {dish} and {dish}.",
            "this {venue} has a {room} and a {room}.",
            "the {dish} at this {venue} came with {dish}.",
            "we ate {dish} at a {venue} in {place}.",
            "I stayed at a {venue} with my {companion}.",
            "my {companion} booked a {venue} with a {room}."],
        "judgement": [
            "the {dish} at this {venue} was {quality}.",
            "I found the {room} of this {venue} {quality}.",
            "this {venue} with a {room} is a {verdict}."],
        "venue": "restaurant bistro tavern diner hostel guesthouse lodge motel".split(),
        "dish": "soup curry bread salad coffee steak breakfast dessert".split(),
        "room": "terrace lobby pool kitchen shower mattress bathroom garage".split()},
}

LEXICON = {word: sign * STRENGTH[symbol]     # polar word -> its score without modifiers
           for symbol, pools in POLAR.items() for sign, phrases in pools.items()
           for word in re.findall(r"\*(\w+)", " ".join(phrases))}


# --- Expansion: from the grammar to a text and its intended score ------------------------------

@cache
def parse_template(template: str) -> tuple[str, list[tuple[str, int, float, str]]]:
    """The text before the first slot, and for each slot: symbol, sign, factor, the text after it.
    """
    head, *rest = re.split(r"\{(-?)(\w+):?([-.\d]*)\}", template.replace("*", ""))
    slots = zip(rest[0::4], rest[1::4], rest[2::4], rest[3::4])
    return head, [(symbol, -1 if minus else 1, float(factor or 1), tail)
                  for minus, symbol, factor, tail in slots]


def expand(symbol: str, sign: int, rng: random.Random, used: set[str],
           grammar: dict[str, list[str]] = GRAMMAR) -> tuple[str, float]:
    """A random text of `symbol` with polarity `sign` (+1 or -1), and its intended score.

    `used` holds the words and judgements that the review has already. They are not used again
    while there are others.
    """
    if symbol in POLAR:
        options, intended = POLAR[symbol][sign], sign * STRENGTH[symbol]
    else:
        options, intended = grammar[symbol], 0.0
    options = [option for option in options if option not in used] or options
    # random() draws the same numbers in every Python version; choice() may not
    option = options[int(rng.random() * len(options))]
    text, slots = parse_template(option)
    if symbol in POLAR or not slots:
        used.add(option)
    for child, flip, factor, tail in slots:
        words, value = expand(child, sign * flip, rng, used, grammar)
        text += words + tail
        intended += factor * value
    return text, intended


def compose(rng: random.Random) -> tuple[str, float]:
    """One review and its intended score: an opener, one or two body sentences, perhaps a closer.

    A review draws a number p, which is often near 0 or 1. Each sentence is positive with
    probability p. A closer sums up the review: it is positive if p > 1/2.
    """
    p = math.sin(math.pi / 2 * rng.random()) ** 2
    parts = ["opener", "body"] + ["body"] * (rng.random() < 0.5) + ["closer"] * (rng.random() < 0.6)
    sentences, total, used = [], 0.0, set()
    for part in parts:
        positive = p > 0.5 if part == "closer" else rng.random() < p
        text, intended = expand(part, 1 if positive else -1, rng, used)
        sentences.append(text[0].upper() + text[1:])
        total += intended
    return " ".join(sentences), total


def reviews(n: int, seed: int) -> list[str]:
    """n reviews. The same seed gives the same list, and a longer list begins with a shorter one."""
    rng = random.Random(seed)
    return [compose(rng)[0] for _ in range(n)]


def dialogue(rng: random.Random) -> dict[str, str]:
    """A preference in Anthropic-HH's form: a human asks once or twice about a film. An answer is a
    review without its opener. Of two answers, the one with the higher score is chosen."""
    def random_text(symbol):
        return expand(symbol, 1 if rng.random() < 0.5 else -1, rng, set())[0]

    ask = "\n\nHuman: How was {}?\n\nAssistant:".format
    shared = ask(f"{random_text('title')} by {random_text('person')}") if rng.random() < 0.5 else \
        (ask(random_text("title")) + f" It was {random_text('adjective')}."
         + ask(f"the {random_text('aspect')}"))
    worse, better = sorted((" " + compose(rng)[0].partition(". ")[2] for _ in range(2)), key=score)
    if score(worse) == score(better):
        return dialogue(rng)
    return {"chosen": shared + better, "rejected": shared + worse}


# --- The score of any text ---------------------------------------------------------------------

SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+")      # ends with . ! ? or with the text
ALTHOUGH = re.compile(r"\balthough\b[^,]*")
POLAR_WORD = re.compile(rf"\b(not )?((?:{'|'.join(INTENSIFIERS)}) )?({'|'.join(LEXICON)})\b")


def score(text: str) -> float:
    """The sum of the polar words of `text`, each scaled by its modifiers and by its clause.

    A word counts half if a "but" follows it in its sentence, or if it stands between "although"
    and the next comma. Defined for every string; 0 where there is no polar word.
    """
    total = 0.0
    for sentence in SENTENCE.findall(" ".join(text.lower().split())):
        but = sentence.rfind(" but ")
        although = ALTHOUGH.search(sentence)
        start, end = although.span() if although else (0, 0)
        for match in POLAR_WORD.finditer(sentence):
            negation, intensifier, word = match.groups()
            value = LEXICON[word]
            if intensifier:
                value *= INTENSIFIED
            if negation:
                value *= NEGATED
            if match.start() < but or start <= match.start() < end:
                value *= LESSER
            total += value
    return round(total, 6) + 0.0     # equal sums are equal in any order of terms; no -0.0


def sentiment(text: str) -> float:
    """r*(text) = σ(κ · score(text)), in (0, 1): the ground-truth reward. 0.5 is neutral or empty.

    The score is clipped at ±30 so that no text, however long, rounds to 0 or 1 or overflows.
    """
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, KAPPA * score(text)))))


# --- The language: the grammar as one regular expression ---------------------------------------

def pattern(symbol: str, capital: bool = False) -> str:
    """The regular expression of all texts of `symbol`, of either polarity."""
    pools = POLAR.get(symbol)
    alternatives = []
    for template in dict.fromkeys(pools[+1] + pools[-1] if pools else GRAMMAR[symbol]):
        head, slots = parse_template(template)
        expression = re.escape(head[:1].upper() + head[1:] if capital else head)
        for i, (child, _, _, tail) in enumerate(slots):
            expression += pattern(child, capital and not head and i == 0) + re.escape(tail)
        alternatives.append(expression)
    return f"(?:{'|'.join(alternatives)})"


@cache
def language() -> re.Pattern[str]:
    """A regular expression for one sentence. The first call compiles it, which takes a moment."""
    return re.compile("|".join(pattern(symbol, capital=True) for symbol in START))


def grammatical(text: str) -> tuple[int, int]:
    """(number of sentences in the language, number of sentences). Polarity does not matter here.

    A sentence ends at . ! or ?; a last sentence that was cut off is not in the language.
    """
    sentences = [s.strip() for s in SENTENCE.findall(text) if s.strip()]
    return sum(bool(language().fullmatch(s)) for s in sentences), len(sentences)


def main(argv: list[str] | None = None) -> None:
    """Print n reviews from worst to best, then a histogram of r* over 2,000 reviews."""
    parser = argparse.ArgumentParser(description="Print toy reviews and their true sentiment.")
    parser.add_argument("-n", type=int, default=5, help="how many reviews (5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the reviews (0)")
    parser.add_argument("--dialogues", type=int, default=0, metavar="N", help="in place of reviews "
                        "print N preferences between answers about a film, as JSON lines")
    args = parser.parse_args(argv)
    if args.dialogues:
        rng = random.Random(args.seed)
        for _ in range(args.dialogues):
            print(json.dumps(dialogue(rng)))
        return
    for text in sorted(reviews(args.n, args.seed), key=score):
        print(f"r* = {sentiment(text):.3f}   score {score(text):+.2f}")
        print(textwrap.indent(textwrap.fill(text, 88), "    ") + "\n")
    rewards = [sentiment(text) for text in reviews(2000, args.seed)]
    print(f"r* of 2000 reviews: mean {statistics.mean(rewards):.3f}, "
          f"standard deviation {statistics.stdev(rewards):.3f}")
    for i in range(10):
        share = sum(int(10 * r) == i for r in rewards) / len(rewards)
        print(f"    {i / 10:.1f} to {(i + 1) / 10:.1f}  {share:6.1%}  {'█' * round(200 * share)}")


if __name__ == "__main__":
    main()
