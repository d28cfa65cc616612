"""Demonstrations of the skills that a constitution asks of a model, on `reviews`: the grammar
writes and labels them.

Each principle has a measure in [0, 1] of how well a review follows it, and a rule which words break
it. The critique lists these words. The revision puts others in their places, and leaves the rest as
it is.

                    measure                                   the revision
    Be kind.        mean sentiment of the sentences           no word blames
    Be fair.        share of judging words not harsh (-1)     harsh words give way to mild praise
    Be warm.        share of judging words that praise        each word praises strongly (1)
                    strongly
    Be specific.    share of sentences that name a part       a sentence that names none is written
                    of the film                               anew

The first measure is the gold reward itself, scaled to [0, 1], so that a quarter of the demonstrated
verdicts are its own. The last one has nothing to do with the gold reward. After the demonstrations
no measure is used any more.
"""

import random
import re

from data.constitution import ask_choice, ask_rating, ask_revision
from data.error import UserError
from data.reviews import NEVER, SLOTS, genre_of, parse, sentiment, values

NAMED = {"part", "features"}
PRINCIPLES = ("Be kind.", "Be fair.", "Be warm.", "Be specific.")
# principle -> whether a word of value v breaks it, and whether one may replace such a word
BREAKS = {"Be kind.": lambda v: v < 0, "Be fair.": lambda v: v == -1, "Be warm.": lambda v: v < 1}
MENDS = {"Be kind.": lambda v: v > 0, "Be fair.": lambda v: 0 < v < 1, "Be warm.": lambda v: v == 1}


def names_a_part(sentence):
    return any(slot in NAMED for slot, _ in sentence[2])


def follows(principle, review, genre):
    """-> how well a review of the grammar follows the principle, in [0, 1]"""
    sentences = parse(review)
    if principle == "Be kind.":
        return (1 + sum(sentiment(s, genre) for s in sentences) / len(sentences)) / 2
    if principle == "Be specific.":
        return sum(map(names_a_part, sentences)) / len(sentences)
    kept = [not BREAKS[principle](value) for s in sentences for _, value in values(s)]
    return sum(kept) / len(kept)


def faults(principle, sentence):
    """-> the places among a sentence's slots whose words break the principle"""
    if principle == "Be specific.":
        return [] if names_a_part(sentence) else [values(sentence)[0][0]]
    return [place for place, value in values(sentence) if BREAKS[principle](value)]


def criticise(principle, review):
    """-> the critique: the words that break the principle, in their order"""
    words = [s[2][i][1].rstrip(".!") for s in parse(review) for i in faults(principle, s)]
    virtue = principle.removeprefix("Be ").rstrip(".")
    return f" Not {virtue}: {', '.join(words)}." if words else f" It is {virtue}."


def revise(rng, principle, review):
    """-> the review, with other words for those that break the principle"""
    return "".join(" " + _mend(rng, principle, s) for s in parse(review))


def _mend(rng, principle, sentence):
    text, sign, words = sentence
    wrong = faults(principle, sentence)
    if wrong and principle == "Be specific.":  # one that judges a part as strongly
        value = values(sentence)[0][1]
        part = rng.choice(list(SLOTS["part"]))
        alike = [word for word, v in SLOTS["adj"].items() if v == value]
        return f"The {part} is {rng.choice(alike)}."
    if wrong and principle == "Be warm." and sign == NEVER:  # "never awful" is no strong praise
        text, sign = "The {features} are {adj}.", 1
    words = list(words)
    for place in wrong:
        slot = words[place][0]
        used = {word for _, word in words}
        fits = MENDS[principle]
        fitting = [w for w, v in SLOTS[slot].items() if w not in used and fits(sign * v)]
        words[place] = slot, rng.choice(fitting)
    left = iter(words)
    return re.sub(r"{\w+}", lambda _: next(left)[1], text)


def demonstrate(task, n, seed, principles, split="skills"):
    """-> n dialogues. Of every six, three are an answer with its critique and revision, one is a
    rating, and two are comparisons. Half of the answers that are rated or compared are revisions,
    so that the judge has seen both."""
    if task.name != "reviews":
        raise UserError(
            f"--task {task.name}: how to criticise, revise and compare is demonstrated on reviews "
            "only; give --init, a checkpoint that has learned it"
        )
    if unknown := [principle for principle in principles if principle not in PRINCIPLES]:
        raise UserError(
            f"--constitution: the grammar demonstrates {', '.join(PRINCIPLES)} only, not "
            f"{unknown[0]!r}; give --init, a checkpoint that has learned more"
        )
    rng = random.Random(f"{task.name} skills {split} {seed}")
    prompts = task.prompts(None, 0, split)
    return [_demonstrate(rng, task, *rng.choice(prompts), principles, i % 6) for i in range(n)]


def _demonstrate(rng, task, prompt, columns, principles, kind):
    genre = genre_of(prompt)
    principle = rng.choice(principles)

    def answer():
        review = task.respond(rng, prompt, columns)
        if kind > 2 and rng.random() < 0.5:
            return revise(rng, rng.choice(principles), review)
        return review

    a = answer()
    if kind < 3:
        critique = criticise(principle, a)
        return [*ask_revision(prompt, a, principle, critique), revise(rng, principle, a)]
    if kind == 3:
        return [*ask_rating(prompt, a, principle), str(1 + round(8 * follows(principle, a, genre)))]
    b = answer()
    while (ahead := follows(principle, a, genre) - follows(principle, b, genre)) == 0:
        a, b = answer(), answer()
    return [*ask_choice(prompt, a, b, principle), "A" if ahead > 0 else "B"]
