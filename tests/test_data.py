"""Tasks, files, the tokenizer and batches; also the enumerable world and its tables."""

import gzip
import json
import math
import re
import statistics
import tracemalloc
from collections import Counter, namedtuple
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import data
from data.exact import kl, star, tv
from data.make_vocab import main as make_vocab
from data.reviews import READERS
from data.shapes import texts
from data.toy import Graded, Labelled

TOKENIZER = data.tokenizer()
WORLD = data.task("exact")
SYMBOLS = data.tokenizer(own=WORLD.tokenizer)
R = torch.from_numpy(WORLD.r)
LOG_D = torch.from_numpy(WORLD.d).log()


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def pairs(n=40):
    return [dict(prompt=f"question {i}", chosen=f"good {i}", rejected=f"bad {i}") for i in range(n)]


def options(seed=0, **more):
    return SimpleNamespace(batch_size=8, seed=seed, truncate=False, **more)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- tokenizer


@pytest.mark.parametrize("again", [False, True])
def test_any_text_comes_back(again):
    """One that spells the end token stays text. The tokenizer is rebuilt from its meta."""
    tokenizer = data.Tokenizer(json.loads(json.dumps(TOKENIZER.meta))) if again else TOKENIZER
    texts = "", "naïve 東京 🎬\n\ttabs", "\x00\x7f", "no <|endoftext|> here", "The plot is superb."
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids == TOKENIZER.encode(text)
        assert tokenizer.end_id not in ids
    assert tokenizer.size < 1024 and tokenizer.meta["name"] == "vocab.tiktoken"
    assert len(tokenizer.encode("4711")) == 4  # digits stand alone


def test_a_vocabulary_from_one_s_own_file(tmp_path):
    """260 tokens leave three merges: " z", "yx" and " zyx" in some order."""
    row = {"prompt": "zyx zyx zyx", "chosen": [{"role": "assistant", "content": "zyx q"}]}
    source = write(tmp_path / "my.jsonl", [row] * 3)
    assert set(texts(source)) == {"zyx zyx zyx", "zyx q"}
    out = str(tmp_path / "my.tiktoken")
    make_vocab([source, "--size", "260", "--out", out])
    own = data.tokenizer(out)
    assert own.size == 260 and len(own.encode(" zyx")) == 1


def test_the_committed_vocabulary_is_what_its_script_makes(tmp_path):
    out = str(tmp_path / "again.tiktoken")
    make_vocab(["--out", out])
    assert data.tokenizer(out).meta["vocab"] == TOKENIZER.meta["vocab"]


# ---- the toy tasks


TOYS = "reviews arithmetic:1 arithmetic:2 arithmetic:3 tokens:6+10".split()


@pytest.mark.parametrize("name", TOYS)
def test_splits_are_disjoint_and_draws_are_the_seed_s(name):
    task = data.task(name)
    train, test = ({x for x, _ in task.prompts(5000, 0, split)} for split in ("train", "test"))
    assert train and test and not train & test
    for draw in (task.demonstrations, task.preferences, task.feedback, task.prompts):
        rows = draw(20, 7)
        assert rows == draw(20, 7) != draw(20, 8) and len(rows) == 20
        assert {row[0] for row in draw(200, 1, split="test")} <= test
    assert all(w != l for _, w, l in task.preferences(200, 0))


def test_tokens_have_one_length():
    """Every prompt P tokens, every response C with its end token, on which the committed vocabulary
    agrees."""
    task = data.task("tokens:6+10")
    rows, note = data.encode(task.preferences(50, 0), TOKENIZER, 16)
    assert not note and {tuple(map(len, row)) for row in rows} == {(6, 10, 10)}
    assert task.reward("", "2468") == 1.0 and task.reward("", "12") == 0.5
    assert not task.correct("", "12") and task.correct("", "224")
    least = "at least one token"
    for name, said in (("6", r": tokens:32\+96"), ("0+4", least), ("4+1", least)):
        with pytest.raises(data.UserError, match=said):
            data.task("tokens:" + name)


def test_gold_reward_by_hand():
    """3 × the mean sentiment per sentence: superb 1, wooden -2/3, "never wooden" -1/2 · -2/3. What
    cannot be read counts -1."""
    task, prompt = data.task("reviews"), "A western, The Lost Road:"
    for text, reward in (
        ("The plot is superb.", 3.0),
        ("The plot is superb. The plot is superb.", 3.0),
        ("The plot is superb. The cast is wooden.", 0.5),
        ("The plot is superb, but the cast feels wooden.", 0.5),
        ("The jokes are never wooden.", 1.0),
        ("By the end I was moved. Stay away!", 0.0),
        ("What a superb western!", 3.0),
        ("What a superb comedy!", -3.0),
        ("The plot superb is.", -3.0),
        ("The plot is superb. And so", 0.0),
        ("The plot is superb. . .", -1.0),
        ("", -3.0),
    ):
        assert task.reward(prompt, text) == pytest.approx(reward, abs=1e-12), text
        assert task.reward(prompt, " " + text, ended=False) == -3.0
    assert task.correct(prompt, "The plot is fresh.")
    assert not task.correct(prompt, "The plot is stale.")


def test_demonstrations_are_grammatical_and_their_mean_reward_is_0():
    """3,000 rewards of standard deviation below 2: the mean is within 4 standard errors, 0.15, of
    0. They vary, as the test prompts do."""
    task = data.task("reviews")
    rows = task.demonstrations(3000, 0)
    rewards = [task.reward(*row) for row in rows]
    assert abs(statistics.fmean(rewards)) < 0.15 and all(-3 <= r <= 3 for r in rewards)
    for _, y in rows[:500]:
        for sentence in re.findall("[^.!]+[.!]", y):
            assert any(pattern.fullmatch(sentence.strip()) for pattern, _ in READERS), sentence
    assert len({y for _, y in rows[:1000]}) > 950
    assert len({x for x, _ in task.prompts(512, 0, split="test")}) == 512


def test_labels_follow_bradley_terry():
    """Of 4,000 pairs the expected number whose chosen answer is the better one is
    Σ σ(|r_w - r_l|); observed within 5 standard errors."""
    task = data.task("reviews")
    gaps = [task.reward(x, w) - task.reward(x, l) for x, w, l in task.preferences(4000, 0)]
    p = [sigmoid(abs(gap)) for gap in gaps if gap]
    right = sum(gap > 0 for gap in gaps)
    assert abs(right - sum(p)) < 5 * sum(x * (1 - x) for x in p) ** 0.5
    assert right < len(p)  # some labels are wrong
    labels = [label for _, _, label in task.feedback(4000, 0)]
    assert 0.45 < statistics.fmean(labels) < 0.55


def test_arithmetic():
    """Of 2,000 demonstrations 40 % are wrong, within 3.6 standard errors, in one digit each."""
    task = data.task("arithmetic:2")

    def right(prompt):
        a, b = prompt.rstrip("=").split("+")
        assert 10 <= int(a) <= 99
        return str(int(a) + int(b))

    prompt, columns = task.prompts(1, 0)[0]
    assert columns == {"answer": right(prompt)}
    assert task.reward("47+85=", "132", answer="132") == 1.0 == task.reward("47+85=", "132")
    assert task.reward("47+85=", "132", ended=False) == 0.0 == task.reward("47+85=", "0132")
    wrong = [(right(x), y) for x, y in task.demonstrations(2000, 0) if not task.correct(x, y)]
    assert abs(len(wrong) / 2000 - 0.4) < 0.04
    for x, y in wrong:
        assert len(y) == len(x) and sum(a != b for a, b in zip(x, y)) == 1


def test_length_says_nothing_about_quality_in_reviews():
    """Chosen and rejected reviews are equally long: over 8,000 pairs within three standard errors,
    3 · √2 · 9 / √8000 = 0.43 tokens."""
    answers = zip(*(row[1:] for row in data.task("reviews").preferences(8000, 0)))
    chosen, rejected = (statistics.fmean(len(TOKENIZER.answer(y)) for y in ys) for ys in answers)
    assert abs(chosen - rejected) < 0.43 and 14 < chosen < 20


# ---- the enumerable world


def test_forty_outcomes_and_four_tokens():
    assert len(WORLD.outcomes) == len(set(WORLD.outcomes)) == 1 + 3 + 9 + 27
    assert WORLD.r.shape == WORLD.d.shape == (4, 40)
    assert SYMBOLS.size == 4 and SYMBOLS.end_id == 3
    assert [SYMBOLS.answer(y) for y in ("", "ab", "abc")] == [[3], [0, 1, 3], [0, 1, 2]]
    assert not any(a != b and b.startswith(a) for a in WORLD.contexts for b in WORLD.contexts)
    small = data.task("exact:1")
    assert len(small.outcomes) == len(small.contexts) == 4
    assert data.tokenizer(own=small.tokenizer).answer("a") == [0]
    again = data.task("exact")
    assert (again.r == WORLD.r).all() and (again.d == WORLD.d).all()
    assert (small.r[0] != WORLD.r[0, :4]).any()


def test_the_distribution_of_demonstrations():
    """Every outcome has at least 0.2/40. KL(d‖uniform) is far from 0. π* of d lies 0.5 to 2 nats
    from d."""
    assert WORLD.d.sum(1) == pytest.approx([1.0] * 4) and WORLD.d.min() >= 0.2 / 40
    assert 0.2 < kl(LOG_D, torch.full_like(LOG_D, -math.log(40))).mean() < 1
    best = star(LOG_D, R, 0.5)
    assert 0.5 < kl(best, LOG_D).mean() < 2
    assert ((best.exp() - LOG_D.exp()) * R).sum(1).mean() > 1


def test_pairs_are_two_different_demonstrations_with_bradley_terry_labels():
    """Row (x, y, z) by hand: 1/4 of a prompt, shown as (y, z) or (z, y), the second drawn until it
    differs, then σ(r_y - r_z)."""
    x, y, z = 1, 7, 30
    d, r = WORLD.d[x], WORLD.r[x]
    shown = d[y] * d[z] / (1 - d[y]) + d[z] * d[y] / (1 - d[z])
    assert WORLD.pairs[x, y, z] == pytest.approx(shown * sigmoid(r[y] - r[z]) / 4)
    assert WORLD.pairs.sum() == pytest.approx(1)
    assert (WORLD.pairs[:, range(40), range(40)] == 0).all()
    p = sum(d[other] * sigmoid(r[y] - r[other]) for other in range(40))
    assert WORLD.labels[x, y].tolist() == pytest.approx([d[y] * (1 - p) / 4, d[y] * p / 4])


@pytest.mark.parametrize(
    "draw, table, axes",
    [
        (WORLD.demonstrations, WORLD.d / 4, [WORLD.outcomes]),
        (WORLD.preferences, WORLD.pairs, [WORLD.outcomes, WORLD.outcomes]),
        (WORLD.feedback, WORLD.labels, [WORLD.outcomes, (False, True)]),
    ],
)
def test_rows_are_drawn_from_the_tables(draw, table, axes):
    """Of 200,000 rows, each cell within six standard errors (chance of a false alarm below 1e-4),
    and a function of the seed."""
    n = 200_000
    counts = Counter(draw(n, 0))
    for row, p in zip(product(WORLD.contexts, *axes), table.flatten()):
        assert abs(counts.pop(row, 0) - n * p) <= 6 * math.sqrt(n * p) + 1, row
    assert not counts
    assert draw(9, 1) == draw(9, 1) != draw(9, 2)


def test_rewards_and_prompts():
    reward = WORLD.r[1, WORLD.outcomes.index("bab")]
    assert WORLD.reward("bb", "bab") == reward == WORLD.reward("bb", "bab", ended=False)
    for split in ("train", "test"):
        assert {x for x, _ in WORLD.prompts(4, 0, split)} == set(WORLD.contexts)
    with pytest.raises(data.UserError, match="abcd"):
        WORLD.reward("bb", "abcd")
    with pytest.raises(data.UserError, match="'z'"):
        SYMBOLS.encode("az")


def test_kl_tv_and_star_by_hand():
    """π_ref = (1/2, 1/2), r = (0, β log 3): π* = (1/4, 3/4), TV 1/4,
    KL(π*‖π_ref) = 3/4 log 3/2 - 1/4 log 2."""
    ref = torch.tensor([0.5, 0.5]).double().log()
    best = star(ref, torch.tensor([0.0, 0.5 * math.log(3)]).double(), 0.5)
    assert best.exp().tolist() == pytest.approx([0.25, 0.75])
    assert kl(best, ref).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    assert tv(best, ref).item() == pytest.approx(0.25)
    assert kl(torch.tensor([0.0, -torch.inf]), ref).item() == pytest.approx(math.log(2))


# ---- files


def said(role, text):
    return {"role": role, "content": text}


def parts(role, *texts):
    """A message as OpenAI's interface has it."""
    return said(role, [{"type": "text", "text": text} for text in texts])


USER, YES, NO = said("user", "Q?"), said("assistant", "yes"), said("assistant", "no")
SYSTEM = said("system", "Be kind.")
HUMAN = "\n\nHuman: Q?\n\nAssistant:"
CHAT = "User: Q?\n\nAssistant: yes\n\nUser: Q?\n\nAssistant:"
SHAPES = [  # a row as public sets have it -> the pair, or the demonstration
    ({"prompt": "Q?", "chosen": "yes", "rejected": "no"}, ("Q?", "yes", "no")),
    ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, ("Q?", "yes", "no")),
    ({"chosen": [USER, YES], "rejected": [USER, NO]}, ("Q?", "yes", "no")),
    (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        ("The sky is", " blue.", " black."),
    ),
    (
        {"prompt": [SYSTEM, USER], "chosen": [YES], "rejected": [NO]},
        ("System: Be kind.\n\nUser: Q?\n\nAssistant:", " yes", " no"),
    ),
    ({"prompt": "Q?", "chosen": [USER, YES], "rejected": [USER, NO]}, ("Q?", "yes", "no")),
    ({"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}, ("Q?", "yes", "no")),
    (
        {"prompt": "Q?", "chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]},
        (CHAT, " yes", " no"),
    ),
    ({"chosen": f"{HUMAN} No way.", "rejected": f"{HUMAN} No."}, (HUMAN, " No way.", " No.")),
    ({"messages": [USER, YES]}, ("Q?", "yes")),
    ({"messages": [USER, YES, USER, NO]}, (CHAT, " no")),
    ({"prompt": [USER, YES], "completion": [NO]}, ("User: Q?\n\nAssistant: yes", "no")),
    ({"prompt": [parts("user", "Q", "?")], "chosen": [YES], "rejected": [NO]}, ("Q?", "yes", "no")),
    ({"chosen": [parts("user", "Q?"), YES], "rejected": [USER, NO]}, ("Q?", "yes", "no")),
    ({"messages": [parts("user", "Q?"), parts("assistant", "yes")]}, ("Q?", "yes")),
]


@pytest.mark.parametrize("row, read", SHAPES)
def test_shapes_of_a_row(row, read, tmp_path):
    """Strings and messages of one row give one text; a longer chat is rendered by the template.
    UltraFeedback's whole chats beside a prompt, HH's transcripts; a prompt that ends in the
    assistant's turn goes on with it."""
    other = {"prompt": "other", "completion": "a", "chosen": "a", "rejected": "b"}
    held_out = write(tmp_path / "e.jsonl", [other])
    task = data.task(write(tmp_path / "a.jsonl.gz", [row]), held_out)
    draw = task.preferences if len(read) == 3 else task.demonstrations
    assert draw(None, 0) == [read] and not task.has_reward
    assert draw(None, 0, split="test") == [("other", "a", "b")[: len(read)]]
    assert task.graded(None, 0, split="test") == [("other", "a", "b", 0.0, 1.0)]


def test_what_becomes_of_each_row_is_said(tmp_path):
    """One answer of HH is empty after the cut, and the others stand twice, once as equal answers;
    --strict refuses both. Half of a feedback file is undesirable to sft.py. With --eval-file each
    file has its line."""
    rows = [
        {
            "chosen": f"\n\nHuman: {i}?\n\nAssistant:{' Yes' * (i > 0)}",
            "rejected": f"\n\nHuman: {i}?\n\nAssistant: No",
        }
        for i in range(200)
    ]
    equal = [row | {"rejected": row["chosen"]} for row in rows[1:]]
    path = write(tmp_path / "hh.jsonl", rows + equal)
    task = data.task(path)
    train, test = (task.preferences(None, 0, split) for split in ("train", "test"))
    assert len(train) + len(test) == 199 and all(y in (" Yes", " No") for _, y, _ in train)
    start, held = f"{path}: 399 rows:", f"{len(test)} held out ({len(test)} prompts)"
    assert train.account == f"{start} {len(train)} train, {held}, 200 dropped (1 empty, 199 equal)"
    n, some = len(train) - 20, task.preferences(20, 0)
    dropped = f"{n + 200} dropped (1 empty, 199 equal, {n} not drawn)"
    assert some.account == f"{start} 20 train, {held}, {dropped}" and len(some) == 20
    with pytest.raises(data.UserError, match=r"1 rows with an empty answer and \d+ .*--strict"):
        data.task(path, strict=True).preferences(None, 0)

    labels = [{"prompt": f"p{i}", "completion": "c", "label": i % 2} for i in range(100)]
    held_out = [{"prompt": f"q{i}", "completion": "c", "label": True} for i in range(9)]
    held_out.append({"prompt": "p1", "completion": " ", "label": True})
    paths = write(tmp_path / "k.jsonl", labels), write(tmp_path / "e.jsonl", held_out)
    task = data.task(*paths)
    assert "1 of the 10 prompts" in task.notes[0] and "are trained on" in task.notes[0]
    desirable = task.demonstrations(None, 0)
    assert desirable.account.splitlines() == [
        f"{paths[0]}: 100 rows: 50 train, 50 dropped (50 undesirable)",
        f"{paths[1]}: 10 rows: 9 held out (9 prompts), 1 dropped (1 empty)",
    ]
    assert all(int(x[1:]) % 2 for x, _ in desirable) and "desirable" in task.notes[1]
    assert {row.label for row in task.feedback(None, 0)} == {True, False}  # 0 and 1 are labels too
    assert task.unpaired


def test_an_account_is_said_before_what_is_cut(tmp_path, capsys):
    """Prompts of 3 and of 13 digits, 20 each, with room for 10 tokens."""
    rows = [{"prompt": f"{i}" + "0" * (1 + i % 2 * 10), "completion": "1"} for i in range(20, 60)]
    held_out = write(tmp_path / "e.jsonl", [{"prompt": "1", "chosen": "2", "rejected": "3"}])
    path, o = write(tmp_path / "a.jsonl", rows), options(max_new_tokens=4)
    o.truncate = True
    data.Prompts(data.task(path, held_out), TOKENIZER, 14, o)
    account, *_, cut = capsys.readouterr().out.splitlines()
    assert account == f"{path}: 40 rows: 40 train"
    assert cut.startswith("20 of 40 training prompts are cut to 10 tokens")


def test_rows_of_one_prompt_stay_apart(tmp_path):
    """29 prompts with three answers each are 87 rows, even if only prompts are wanted."""
    rows = [{"prompt": f"{i}?", "answer": a} for i in range(29) for a in "abc"]
    task = data.task(write(tmp_path / "q.jsonl", rows))
    train, test = (task.prompts(None, 0, split) for split in ("train", "test"))
    found = sorted((x, columns["answer"]) for x, columns in train + test)
    assert found == sorted(tuple(row.values()) for row in rows)
    assert train.account.startswith(f"{tmp_path}/q.jsonl: 87 rows: ")


@pytest.mark.parametrize(
    "train, test, said", [(4, 1, ", 1 held out"), (3, 40, "warning: 3 to train")]
)
def test_a_lopsided_split_is_warned_of(train, test, said, tmp_path):
    rows = [{"prompt": f"{i}", "completion": "c"} for i in range(train + test)]
    paths = write(tmp_path / "a.jsonl", rows[:train]), write(tmp_path / "e.jsonl", rows[train:])
    account = data.task(*paths).demonstrations(None, 0).account
    assert said in account and "warning: " in account and "--eval-file" in account


@pytest.mark.parametrize(
    "answer, right, wrong",
    [
        ("5", ["5", " 5 ", "5.0"], ["6", "nan"]),
        ("5.0", ["5", "5.00", "5e0"], ["5.1", "five", ""]),
        ("5e0", ["5", "5.0"], ["4"]),
        ('"5"', ["5"], ["5.0"]),
        ("12345678901234567890", ["12345678901234567890"], ["12345678901234567891"]),
    ],
)
def test_a_number_is_a_number_however_it_is_spelled(answer, right, wrong, tmp_path):
    row = '{{"prompt": "{}", "completion": " c", "answer": {}}}'
    rows = [row.format(prompt, answer) for prompt in "ab"]
    task = data.task(write(tmp_path / "a.jsonl", rows))
    columns = task.prompts(1, 0)[0][1]
    assert columns["reference"] == "c" and task.has_reward
    found = [[task.reward("a", y, **columns) for y in answers] for answers in (right, wrong)]
    assert found == [[1.0] * len(right), [0.0] * len(wrong)]


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = write(tmp_path / "a.jsonl", ["\ufeff" + json.dumps(pairs(1)[0]), *pairs(30)])
    assert len(data.task(path).preferences(None, 0)) > 20


def test_a_text_that_the_library_cannot_take_is_a_mistake(monkeypatch):
    """tiktoken panics with an exception that is not even an Exception."""

    class Panic(BaseException):
        pass

    def panic(text):
        raise Panic("a stack\noverflow")

    tokenizer = data.tokenizer()
    with pytest.raises(data.UserError, match="500,000 spaces or new lines in a row"):
        tokenizer.encode("a" + " " * 1_000_000 + "b")
    assert len(tokenizer.encode("a" * 1_000_000)) > 1000
    tokenizer.encoding = SimpleNamespace(encode_ordinary=panic)
    with pytest.raises(data.UserError, match=r"200 characters that begins with .* \(a stack\)"):
        tokenizer.encode("a" * 200)


def test_test_split_of_a_file(tmp_path):
    """5 % of 1,000 prompts: 50 ± 7."""
    task = data.task(write(tmp_path / "a.jsonl", pairs(1000) * 2))
    train, test = ({row[0] for row in task.preferences(None, 0, x)} for x in ("train", "test"))
    assert not train & test and len(train | test) == 1000 and 20 <= len(test) <= 90
    two = data.task(write(tmp_path / "b.jsonl", pairs(2)))
    assert len(two.preferences(None, 0)) == len(two.preferences(None, 0, split="test")) == 1
    with pytest.raises(data.UserError, match="one prompt only.*--eval-file"):
        data.task(write(tmp_path / "c.jsonl", pairs(1)))


def test_a_file_of_pairs_is_split_for_kto(tmp_path):
    task = data.task(write(tmp_path / "p.jsonl", pairs(60)))
    kept, rows, some = task.preferences(None, 0), task.feedback(None, 0), task.feedback(10, 0)
    assert set(rows) == {(x, y, y == w) for x, w, l in kept for y in (w, l)}
    assert len(rows) == 2 * len(kept) and not task.unpaired
    assert f"{len(kept)} pairs are split into {len(rows)} examples" in task.notes[0]
    assert len({x for x, _, _ in some}) == sum(row.label for row in some) == 5  # whole pairs


# ---- batches


def test_the_mask_covers_the_response_and_its_end_token():
    ((x, y),) = data.encode([("12+34=", "46")], TOKENIZER, 32)[0]
    assert y[-1] == TOKENIZER.end_id and TOKENIZER.decode(y) == "46"
    batch = data.pad([(x, y), (x[:2], y[:1])])
    assert [tuple(row[mask].tolist()) for row, mask in zip(batch.ids, batch.mask)] == [y, y[:1]]
    assert batch.mask.sum() == len(y) + 1 and not batch.mask[:, 0].any()
    assert (batch.ids[1, 3:] == 0).all()
    row, column = batch.mask[:, 1:].nonzero().T
    assert (batch.packed.places == row * batch.ids.size(1) + column).all()
    assert batch.tokens == len(x) + len(y) - 1  # the second row begins as the first
    both = data.pad_pairs([Graded(x, y, y[:1], 0.5), Graded(x, y, x, p=0.0)])
    columns = {name: column.tolist() for name, column in both.columns.items()}
    assert both.inverse.tolist() == [0, 0, 1, 2]
    assert columns == {"margin": [0.5, 0.0], "p": [1.0, 0.0]}


def test_truncation_cuts_the_prompt_first_then_the_answers_alike():
    end, decode = TOKENIZER.end_id, TOKENIZER.decode
    rows, n = [("0123456789", "abcdefgh", "ab")], len(TOKENIZER.answer("abcdefgh"))
    said = r"1 of 1 rows do not fit in 12 tokens \(the longest has 1\d\)"
    with pytest.raises(data.UserError, match=said):
        data.encode(rows, TOKENIZER, 12)
    ((x, w, l),), note = data.encode(rows, TOKENIZER, n + 4, truncate=True)
    assert note == f"1 of 1 rows are cut to {n + 4} tokens"
    assert decode(x) == "6789" and w[-1] == l[-1] == end
    rows = [("0123456789", "11111111", "11"), ("0", "1111112", "1111113")]
    ((x, w, l),), note = data.encode(rows, TOKENIZER, 5, truncate=True)
    assert [decode(ids) for ids in (x, w, l)] == ["9", "1111", "11"]
    assert end not in w and l[-1] == end
    dropped = "1 of them dropped because their answers became equal: 1 rows are left"
    assert note == f"2 of 2 rows are cut to 5 tokens, {dropped}"


def test_batches_are_a_function_of_step_and_seed(tmp_path):
    """300 rows make 37 batches of 8 and one of 4 per epoch."""
    held_out = write(tmp_path / "e.jsonl", pairs(1))
    task = data.task(write(tmp_path / "a.jsonl", pairs(300)), held_out)
    assert task.kind == "file" and task.outcomes is None

    def batches(task, seed):
        return data.Batches(task.preferences, task.size, TOKENIZER, 128, options(seed))

    fixed, again = batches(task, 3), batches(task, 3)
    seen = [tuple(map(str, row)) for step in range(fixed.per_epoch) for row in fixed[step]]
    assert fixed.per_epoch == 38 and len(seen) == len(set(seen)) == 300
    assert again[50] == fixed[50] != fixed[12]  # another epoch, another order
    assert sorted(fixed[0]) != sorted(batches(task, 4)[0])
    fresh, task = batches(data.task("reviews"), 3), data.task("reviews")
    assert fresh[5] == batches(task, 3)[5] != fresh[6]
    assert fresh[5] != batches(task, 4)[5]


@pytest.mark.parametrize(
    "n, sizes", [(16, [8, 8]), (17, [8, 9]), (18, [8, 8, 2]), (5, [5]), (9, [9])]
)
def test_the_last_batch_never_holds_one_row(n, sizes):
    batches = data.Batches(data.task("reviews").preferences, n, TOKENIZER, 128, options())
    assert [len(batches[i]) for i in range(batches.per_epoch)] == sizes


def test_a_batch_that_is_larger_than_the_set_is_said(capsys):
    for n in (8, 7):
        batches = data.Batches(data.task("reviews").preferences, n, TOKENIZER, 128, options())
        assert len(batches[0]) == n
    (said,) = capsys.readouterr().out.splitlines()
    words = "more than the 7 rows of the set, so every step takes all of them"
    assert said == f"--batch-size 8 is {words}"


def test_prompts_pass_over_the_training_split():
    """Every training prompt once a pass, in another order the next. The state goes on where it
    stood. Test prompts never."""
    task, o = data.task("arithmetic:1"), options(max_new_tokens=6)
    prompts, again = (data.Prompts(task, TOKENIZER, 256, o) for _ in range(2))
    n = prompts.per_epoch
    first, second = ([row for _ in range(n) for row in next(prompts)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(prompts.rows)
    assert first != second and len(first) == len(prompts.rows) and prompts.longest == 6
    ids, prompt, columns = first[0]
    assert TOKENIZER.decode(ids) == prompt
    assert columns == {"answer": str(eval(prompt.rstrip("=")))}
    assert not {x for _, x, _ in first} & {x for x, _ in task.prompts(None, 0, split="test")}
    again.load_state_dict(prompts.state_dict())
    assert next(again) == next(prompts)


def test_a_mismatched_answer_belongs_to_another_prompt():
    """The next row, around the end, whose prompt differs: a a b c a -> answers of b b c a(4) b. The
    labels stay behind."""
    rows = [((x,), (y,), True) for x, y in ((1, 10), (1, 11), (2, 12), (3, 13), (1, 14))]
    found = [(x, y) for (x,), (y,) in data.mismatched(rows, 8)]
    assert found == [(1, 12), (1, 12), (2, 13), (3, 14), (1, 12)]
    assert data.mismatched(rows[:2], 8) == [] and data.mismatched([], 8) == []
    rows = [((1, 2, 3), (4,), True), ((5,), (6, 7, 8), False)]
    assert data.mismatched(rows, 4) == [((1, 2, 3), (6,)), ((5,), (4,))]


def test_rows_held_flat_are_the_rows():
    """As a list has them: by number, in slices, one after the other, whatever the size of an id."""
    rows = ((1, 2), (3,), True), ((70_000,), (), False), ((4,), (5, 6, 7), True)
    rows = [Labelled(*row) for row in rows]
    held = data.Rows(rows)
    assert list(held) == rows and held[1:] == rows[1:] and held[-1] == rows[-1]
    assert len(held) == 3 and held.tokens.itemsize == 4
    assert data.Rows(rows[::2]).tokens.itemsize == 2
    with pytest.raises(IndexError):
        held[3]
    kind = namedtuple("Scored", [*Labelled._fields, "score"])
    wide = held.with_columns(kind, [(9.0,), (8.0,), (7.0,)])
    assert list(wide) == [(*row, x) for row, x in zip(rows, (9.0, 8.0, 7.0))]
    assert wide[1].score == 8.0 and held[0].label and list(held) == rows


def test_a_large_file_takes_two_bytes_per_token(tmp_path):
    """5,000 rows of 80 tokens and more: what is held of them is near 2 bytes per token, not the 36
    of a list of numbers."""
    words = " the plot is slow, but the cast feels superb and the music is warm." * 4
    rows = [{"prompt": f"A drama, number {i}:", "completion": f"{words} {i}"} for i in range(5000)]
    drawn = data.task(write(tmp_path / "large.jsonl", rows)).demonstrations(None, 0)
    tracemalloc.start()
    rows, _ = data.encode(drawn, TOKENIZER, 512, many=True)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    tokens = sum(len(x) + len(y) for x, y in rows)
    assert tokens > 80 * len(rows) and kept < 6 * tokens
