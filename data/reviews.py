"""reviews: short film reviews from a small grammar, and a gold reward that reads them back with the
same grammar.

    A western, The Crooked Harbor:                                                  the prompt
     The ending is superb, but the dialogue feels wooden. Bring a friend.           the completion

A sentence is a shape with its slots filled. Each word that judges has a value in [-1, 1]. The
sentiment of a sentence is the mean of these values, and the reward of a review is 3 × the mean
sentiment of its sentences. So it is in [-3, 3] and does not depend on length. A sentence that the
grammar cannot read, or that names another genre than the prompt, has the sentiment -1. A review
that is empty or does not end has the reward -3. Good and bad words have the same number and
strength, so the mean reward of the demonstrations is 0.
"""

import re

from data.toy import Toy

FIRST = (
    "Broken Burning Crooked Distant Empty Frozen Golden Hidden Last Lonely Lost Midnight Painted "
    "Quiet Red Second Silent Silver Winter"
).split()
LAST = (
    "Bridge Carnival Garden Harbor Horizon Hour Island Letter Mirror Orchard Promise Railway River "
    "Road Sailor Season Station Summer Tower Witness"
).split()
GENRES = "comedy drama musical romance thriller western".split()

PARTS = (
    "acting camera cast dialogue direction ending humor lighting music opening pacing plot romance "
    "script setting story villain"
).split()
FEATURES = "actors colors costumes dialogues jokes characters scenes songs twists".split()


def worth(value, words):
    return dict.fromkeys(words.split(), value)


MILD = 2 / 3  # a strong word is worth 3 points of reward, a mild one 2
GOOD = worth(1, "superb brilliant dazzling masterful wonderful unforgettable gripping beautiful")
GOOD |= worth(MILD, "fresh charming pleasant solid warm clever tidy amusing")
BAD = worth(-1, "dreadful hopeless unbearable lifeless painful insulting ridiculous awful")
BAD |= worth(-MILD, "slow wooden clumsy stale thin noisy uneven confused")
ADJECTIVES = GOOD | BAD
SLOTS = {
    "part": dict.fromkeys(PARTS),
    "features": dict.fromkeys(FEATURES),
    "genre": dict.fromkeys(GENRES),
    "adj": ADJECTIVES,
    "other": ADJECTIVES,
    "a_adj": {("an " if x[0] in "aeiou" else "a ") + x: v for x, v in ADJECTIVES.items()},
    "liked": dict(loved=1, enjoyed=MILD, admired=MILD, disliked=-MILD, hated=-1, endured=-MILD),
    "felt": worth(1, "smiling moved")
    | worth(MILD, "humming content")
    | worth(-MILD, "restless bored")
    | worth(-1, "asleep angry"),
    "verdict": dict.fromkeys(("Unmissable!", "Pure joy!"), 1)
    | dict.fromkeys(("Worth a ticket.", "Bring a friend."), MILD)
    | dict.fromkeys(("Stay away!", "Pure misery!"), -1)
    | dict.fromkeys(("Skip it.", "Once was enough."), -MILD),
}
NEVER = -0.5  # "never dull" is mild praise: the opposite, at half strength
SHAPES = (
    ("The {part} is {adj}.", 1),
    ("The {part} is {adj} and the {part} is {adj}.", 1),
    ("The {part} is {other}, but the {part} feels {adj}.", 1),
    ("The {features} are {adj}.", 1),
    ("The {features} are never {adj}.", NEVER),
    ("I {liked} the {part}.", 1),
    ("I {liked} the {features} and the {part}.", 1),
    ("What {a_adj} {genre}!", 1),
    ("This is {a_adj} {genre} with {adj} {features}.", 1),
    ("For a {genre}, the {part} is {adj}.", 1),
    ("From the first scene on, the {part} feels {adj}.", 1),
    ("By the end I was {felt}.", 1),
    ("{verdict}", 1),
)


class Reviews(Toy):
    name = "reviews"
    max_new_tokens = 96
    bound = 3.0  # the reward lies in [-bound, bound]

    def all_prompts(self):
        titles = [f"The {first} {last}" for first in FIRST for last in LAST]
        return [(f"A {genre}, {title}:", {}) for title in titles for genre in GENRES]

    def respond(self, rng, prompt, columns):
        """-> a kind or an unkind review of one to three sentences, no shape twice"""
        genre, kind = genre_of(prompt), rng.random() < 0.5
        shapes = rng.sample(SHAPES, rng.choice((1, 2, 2, 3, 3)))
        return "".join(" " + self._fill(rng, text, sign, genre, kind) for text, sign in shapes)

    def _fill(self, rng, text, sign, genre, kind):
        used = []

        def word(match):
            slot = match[1]
            side = sign if kind != (slot == "other") else -sign
            fitting = [
                word
                for word, value in SLOTS[slot].items()
                if word not in used and (value is None or value * side > 0)
            ]
            used.append(genre if slot == "genre" else rng.choice(fitting))
            return used[-1]

        return re.sub(r"{(\w+)}", word, text)

    def reward(self, prompt, completion, ended=True):
        text = completion.strip()
        if not ended or not text:
            return -self.bound
        genre, sentences = genre_of(prompt), parse(text)
        return self.bound * sum(sentiment(s, genre) for s in sentences) / len(sentences)

    def correct(self, prompt, completion, ended=True):
        return self.reward(prompt, completion, ended) >= 1


def genre_of(prompt):
    return prompt.removeprefix("A ").partition(",")[0]


def _pattern(text):
    """A shape -> a regular expression with one group per slot, and the slots' names. It reads any
    word that fits, kind or not."""
    slots = re.findall(r"{(\w+)}", text)
    parts = re.split(r"{\w+}", text)
    groups = [f"({'|'.join(map(re.escape, SLOTS[slot]))})" for slot in slots]
    pattern = "".join(re.escape(part) + group for part, group in zip(parts, [*groups, ""]))
    return re.compile(pattern), slots


READERS = [_pattern(text) for text, _ in SHAPES]


def parse(review):
    """-> the sentences of a review, each (shape, sign, [(slot, word)]), or None if no shape fits"""
    return [_read(s.strip()) for s in re.findall(r"[^.!?]+[.!?]*|[.!?]+", review)]


def _read(sentence):
    for (pattern, slots), (text, sign) in zip(READERS, SHAPES):
        if match := pattern.fullmatch(sentence):
            return text, sign, list(zip(slots, match.groups()))
    return None


def values(sentence):
    """-> the judging words of a parsed sentence, each (index of its slot, value in [-1, 1])"""
    _, sign, words = sentence
    return [
        (place, sign * value)
        for place, (slot, word) in enumerate(words)
        if (value := SLOTS[slot][word]) is not None
    ]


def sentiment(sentence, genre):
    """-> the sentiment of a parsed sentence, in [-1, 1]. It is -1 without a shape, or if the genre
    is another."""
    if not sentence or any(slot == "genre" and word != genre for slot, word in sentence[2]):
        return -1.0
    judged = [value for _, value in values(sentence)]
    return sum(judged) / len(judged)
