"""Demonstrations of the skills that a constitution asks of a model, on `reviews`: the grammar writes and labels them.

A principle has a measure of how well a review follows it, in [0, 1], and names the words that break it. The critique lists these;
the revision puts other words in their places, and leaves the rest as it is:

    Be kind.        the mean sentiment of its sentences                          no word blames
    Be fair.        the share of its judging words that are not harsh            harsh words (-1) give way to mild praise
    Be warm.        the share of its judging words that praise strongly          each word praises strongly (1)
    Be specific.    the share of its sentences that name a part of the film      a sentence that names none is written anew

The first is the gold reward itself, put on [0, 1], so that a quarter of the verdicts demonstrated are its own; the last has nothing to do
with it. After the demonstrations no measure is read any more.
"""
import random
import re

from data.constitution import ask_choice, ask_rating, ask_revision
from data.error import DataError
from data.reviews import NEVER, SLOTS, genre_of, parse, sentiment

NAMED = {"part", "features"}
PRINCIPLES = ("Be kind.", "Be fair.", "Be warm.", "Be specific.")


def values(sentence):
    """-> the judging words of a parsed sentence, each as (place among its slots, value in [-1, 1])"""
    text, sign, words = sentence
    return [(i, sign * SLOTS[slot][word]) for i, (slot, word) in enumerate(words) if SLOTS[slot][word] is not None]


def names_a_part(sentence):
    return any(slot in NAMED for slot, _ in sentence[2])


def follows(principle, review, genre):
    """-> how well a review of the grammar follows the principle, in [0, 1]"""
    sentences = parse(review)
    if principle == "Be kind.":
        return (1 + sum(sentiment(s, genre) for s in sentences) / len(sentences)) / 2
    if principle == "Be specific.":
        return sum(map(names_a_part, sentences)) / len(sentences)
    judged = [value for s in sentences for _, value in values(s)]
    good = (lambda v: v > -1) if principle == "Be fair." else (lambda v: v == 1)
    return sum(map(good, judged)) / len(judged)


def faults(principle, sentence):
    """-> the places among a sentence's slots whose words break the principle"""
    if principle == "Be specific.":
        return [] if names_a_part(sentence) else [values(sentence)[0][0]]
    wrong = {"Be kind.": lambda v: v < 0, "Be fair.": lambda v: v == -1, "Be warm.": lambda v: v < 1}[principle]
    return [i for i, value in values(sentence) if wrong(value)]


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
    if wrong and principle == "Be specific.":  # as good or bad, and as strongly, of a part
        text, words, value = "The {part} is {adj}.", [("part", None), ("adj", None)], values(sentence)[0][1]
        sign, wrong, fits = 1, [1], lambda v: v == value
        words[0] = ("part", rng.choice(list(SLOTS["part"])))
    elif wrong and principle == "Be warm." and sign == NEVER:  # "never awful" is no strong praise
        text, sign, fits = "The {features} are {adj}.", 1, lambda v: v == 1
    else:
        fits = {"Be kind.": lambda v: v > 0, "Be fair.": lambda v: 0 < v < 1, "Be warm.": lambda v: v == 1}.get(principle)
    words = list(words)
    for i in wrong:
        slot, used = words[i][0], {word for _, word in words}
        words[i] = slot, rng.choice([w for w, v in SLOTS[slot].items() if w not in used and fits(sign * v)])
    left = iter(words)
    return re.sub(r"{\w+}", lambda _: next(left)[1], text)


def demonstrate(task, n, seed, principles, split="skills"):
    """-> n dialogues: of six, three are an answer, its critique and revision, one is a rating, two are comparisons. Half of the answers
    that are rated or compared are revisions, so that the judge has seen both."""
    if task.name != "reviews":
        raise DataError(f"--task {task.name}: how to criticise, revise and compare is demonstrated on reviews only; give --init, a "
                        "checkpoint that has learned it")  # fmt: skip
    if unknown := [principle for principle in principles if principle not in PRINCIPLES]:
        raise DataError(f"--constitution: the grammar demonstrates {', '.join(PRINCIPLES)} only, not {unknown[0]!r}; give --init, "
                        "a checkpoint that has learned more")  # fmt: skip
    rng, prompts = random.Random(f"{task.name} skills {split} {seed}"), task.prompts(None, 0, split)
    return [_demonstrate(rng, task, *rng.choice(prompts), principles, i % 6) for i in range(n)]


def _demonstrate(rng, task, prompt, columns, principles, kind):
    genre, principle = genre_of(prompt), rng.choice(principles)

    def answer():
        review = task.respond(rng, prompt, columns)
        return revise(rng, rng.choice(principles), review) if kind > 2 and rng.random() < 0.5 else review

    a = answer()
    if kind < 3:
        critique = criticise(principle, a)
        return [*ask_revision(prompt, a, principle, critique), revise(rng, principle, a)]
    if kind == 3:
        return [*ask_rating(prompt, a, principle), str(1 + round(8 * follows(principle, a, genre)))]
    b = answer()
    while follows(principle, a, genre) == follows(principle, b, genre):
        a, b = answer(), answer()
    return [*ask_choice(prompt, a, b, principle), "A" if follows(principle, a, genre) > follows(principle, b, genre) else "B"]
