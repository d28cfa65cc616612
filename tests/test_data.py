"""Tasks, files, tokenizer, batches."""
import gzip
import json
import math
import statistics

import pytest

import data
from data.jsonl import Jsonl, texts
from data.make_vocab import main as make_vocab

TOKENIZER = data.tokenizer()


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def pairs(n=40):
    return [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(n)]


# ---- tokenizer


def test_any_text_comes_back():
    for text in ("", "The plot is superb.", "naïve 東京 🎬\n\ttabs", "\x00\x7f", "12+34=46"):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.size < 1024 and TOKENIZER.meta["name"] == "vocab.tiktoken"


def test_a_text_that_spells_the_end_token_stays_text():
    text = "no <|endoftext|> here"
    assert TOKENIZER.end_id not in TOKENIZER.encode(text)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_digits_stand_alone():
    assert len(TOKENIZER.encode("4711")) == 4


def test_a_tokenizer_is_rebuilt_from_its_meta():
    again = data.Tokenizer(json.loads(json.dumps(TOKENIZER.meta)))
    assert again.encode("The plot is superb.") == TOKENIZER.encode("The plot is superb.") and again.end_id == TOKENIZER.end_id


def test_a_vocabulary_from_one_s_own_file(tmp_path):
    source = write(tmp_path / "my.jsonl", [{"prompt": "zyx zyx zyx", "chosen": [{"role": "assistant", "content": "zyx q"}]}] * 3)
    assert set(texts(source)) == {"zyx zyx zyx", "zyx q"}
    make_vocab([source, "--size", "260", "--out", str(tmp_path / "my.tiktoken")])
    own = data.tokenizer(str(tmp_path / "my.tiktoken"))
    assert own.size == 260 and len(own.encode(" zyx")) == 1  # three merges: " z", "yx", " zyx" in some order


def test_the_committed_vocabulary_is_what_its_script_makes(tmp_path):
    make_vocab(["--out", str(tmp_path / "again.tiktoken")])
    assert data.tokenizer(str(tmp_path / "again.tiktoken")).meta["vocab"] == TOKENIZER.meta["vocab"]


# ---- the toy tasks


@pytest.mark.parametrize("name", ["reviews", "arithmetic:1", "arithmetic:2", "arithmetic:3", "tokens:6+10"])
def test_splits_are_disjoint_and_draws_are_the_seed_s(name):
    task = data.task(name)
    train, test = ({p for p, _ in task.prompts(5000, 0, split=split)} for split in ("train", "test"))
    assert train and test and not train & test
    for draw in (task.demonstrations, task.preferences, task.feedback, task.prompts):
        assert draw(20, 7) == draw(20, 7) != draw(20, 8)
        assert len(draw(20, 7)) == 20
        assert {row[0] for row in draw(200, 1, split="test")} <= test
    assert all(w != l for _, w, l in task.preferences(200, 0))


def test_tokens_have_one_length():
    """Every prompt P tokens, every response C with its end token, on which the committed vocabulary agrees."""
    task = data.task("tokens:6+10")
    rows, note = data.encode(task.preferences(50, 0), TOKENIZER, 16)
    assert not note and {tuple(map(len, row)) for row in rows} == {(6, 10, 10)}
    assert task.reward("", "2468") == 1.0 and task.reward("", "12") == 0.5 and not task.correct("", "12") and task.correct("", "224")
    for name, said in (("tokens:6", "such as tokens:32+96"), ("tokens:0+4", "at least one token"), ("tokens:4+1", "at least one token")):
        with pytest.raises(data.DataError, match=said.replace("+", r"\+")):
            data.task(name)


def test_reviews_have_enough_test_prompts_and_variety():
    task = data.task("reviews")
    assert len({p for p, _ in task.prompts(512, 0, split="test")}) == 512
    assert len({c for _, c in task.demonstrations(1000, 0)}) > 950


def test_gold_reward_by_hand():
    """3 × the mean sentiment per sentence: superb 1, wooden -2/3, "never wooden" -1/2 · -2/3; what cannot be read counts -1."""
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
    assert task.correct(prompt, "The plot is fresh.") and not task.correct(prompt, "The plot is stale.")


def test_demonstrations_are_grammatical_and_their_mean_reward_is_0():
    """3,000 rewards of standard deviation below 2: the mean is within 4 standard errors, 0.15, of 0."""
    task = data.task("reviews")
    rewards = [task.reward(*row) for row in task.demonstrations(3000, 0)]
    assert abs(statistics.fmean(rewards)) < 0.15 and all(-3 <= r <= 3 for r in rewards)
    from data.reviews import READERS

    sentences = [s.strip() + end for _, c in task.demonstrations(500, 1) for s, end in split_sentences(c)]
    assert all(any(pattern.fullmatch(s) for pattern, _ in READERS) for s in sentences)


def split_sentences(text):
    out, start = [], 0
    for i, c in enumerate(text):
        if c in ".!":
            out.append((text[start:i], c))
            start = i + 1
    return out


def test_labels_follow_bradley_terry():
    """Of 4,000 pairs the expected number whose chosen answer is the better one is Σ σ(|r_w - r_l|); observed within 5 standard errors."""
    task = data.task("reviews")
    gaps = [task.reward(p, w) - task.reward(p, l) for p, w, l in task.preferences(4000, 0)]
    p = [1 / (1 + math.exp(-abs(g))) for g in gaps if g]
    right = sum(g > 0 for g in gaps)
    assert abs(right - sum(p)) < 5 * sum(x * (1 - x) for x in p) ** 0.5
    assert right < len(p)  # some labels are wrong
    labels = [label for _, _, label in task.feedback(4000, 0)]
    assert 0.45 < statistics.fmean(labels) < 0.55


def test_arithmetic():
    task = data.task("arithmetic:2")
    prompt, columns = task.prompts(1, 0)[0]
    a, b = prompt.rstrip("=").split("+")
    assert columns == {"answer": str(int(a) + int(b))} and 10 <= int(a) <= 99
    assert task.reward("47+85=", "132", answer="132") == 1.0 == task.reward("47+85=", "132")
    assert task.reward("47+85=", "132", ended=False) == 0.0 == task.reward("47+85=", "0132")
    wrong = [(p, c) for p, c in task.demonstrations(2000, 0) if not task.correct(p, c)]
    assert abs(len(wrong) / 2000 - 0.4) < 0.04  # 3.6 standard errors
    for p, c in wrong:
        right = str(sum(map(int, p.rstrip("=").split("+"))))
        assert len(c) == len(right) and sum(x != y for x, y in zip(c, right)) == 1


# ---- files


def test_shapes_of_a_file(tmp_path):
    """String and message forms of the same row give the same text; a longer chat is rendered by the template."""
    user, assistant = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})
    rows = [
        {"prompt": "Hello?", "chosen": "Hi.", "rejected": "No."},
        {"prompt": [user("Hello?")], "chosen": [assistant("Hi.")], "rejected": [assistant("No.")]},
        {"chosen": [user("Hello?"), assistant("Hi.")], "rejected": [user("Hello?"), assistant("No.")]},
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"prompt": [{"role": "system", "content": "Be kind."}, user("Hello?")], "chosen": [assistant("Hi.")],
         "rejected": [assistant("No.")]},
    ]
    other = {"prompt": "other", "chosen": "a", "rejected": "b"}
    task = Jsonl(write(tmp_path / "a.jsonl.gz", rows), write(tmp_path / "eval.jsonl", [other]))
    assert task.preferences(None, 0) == [
        ("Hello?", "Hi.", "No."),
        ("Hello?", "Hi.", "No."),
        ("Hello?", "Hi.", "No."),
        ("The sky is", " blue.", " black."),
        ("System: Be kind.\n\nUser: Hello?\n\nAssistant:", " Hi.", " No."),
    ]
    assert task.demonstrations(None, 0)[0] == ("Hello?", "Hi.")
    assert task.preferences(None, 0, split="test") == [("other", "a", "b")] and not task.has_reward


def test_test_split_of_a_file(tmp_path):
    task = data.task(write(tmp_path / "a.jsonl", pairs(1000) + pairs(1000)))
    train, test = ({p for p, _, _ in task.preferences(None, 0, split=split)} for split in ("train", "test"))
    assert not train & test and len(train | test) == 1000 and 20 <= len(test) <= 90  # 5 %: 50 ± 7
    two = data.task(write(tmp_path / "b.jsonl", pairs(2)))
    assert len(two.preferences(None, 0)) == len(two.preferences(None, 0, split="test")) == 1
    with pytest.raises(data.DataError, match="one prompt only.*--eval-file"):
        data.task(write(tmp_path / "c.jsonl", pairs(1)))


def test_useless_rows_are_dropped_aloud_or_refused(tmp_path):
    rows = pairs(100) + [{"prompt": "p", "chosen": "same", "rejected": "same"}] * 2 + [{"prompt": "p", "chosen": " ", "rejected": "x"}]
    path = write(tmp_path / "a.jsonl", rows)
    task = data.task(path)
    n = len(task.preferences(None, 0)) + len(task.preferences(None, 0, split="test"))
    assert n == 100 and "1 rows with an empty answer and 2 whose two answers are equal" in task.notes[0]
    with pytest.raises(data.DataError, match="--strict"):
        data.task(path, strict=True).preferences(None, 0)


def test_feedback_and_answers(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c", "label": i % 2 == 0, "answer": "c", "n": i} for i in range(40)]
    task = data.task(write(tmp_path / "a.jsonl", rows))
    assert {label for _, _, label in task.feedback(None, 0)} == {True, False}
    prompt, columns = task.prompts(1, 0)[0]
    assert columns["reference"] == "c" and task.has_reward
    assert task.reward(prompt, " c ", **columns) == 1.0 and task.reward(prompt, "d", **columns) == 0.0


# ---- batches


def test_the_mask_covers_the_response_and_its_end_token():
    (x, y), = data.encode([("12+34=", "46")], TOKENIZER, 32)[0]
    assert y[-1] == TOKENIZER.end_id and TOKENIZER.decode(y) == "46"
    batch = data.pad([(x, y), (x[:2], y[:1])])
    assert tuple(batch.ids[0][batch.mask[0]].tolist()) == y and tuple(batch.ids[1][batch.mask[1]].tolist()) == y[:1]
    assert batch.mask.sum() == len(y) + 1 and not batch.mask[:, 0].any() and (batch.ids[1, 3:] == 0).all()
    assert batch.index.tolist() == batch.mask[:, 1:].flatten().nonzero()[:, 0].tolist()
    assert batch.tokens == len(x) + len(y) + 3


def test_truncation_cuts_the_prompt_first_then_the_answers_alike():
    rows = [("0123456789", "abcdefgh", "ab")]
    with pytest.raises(data.DataError, match=r"1 of 1 rows do not fit in 12 tokens \(the longest has 1\d\)"):
        data.encode(rows, TOKENIZER, 12)
    n = len(TOKENIZER.encode("abcdefgh")) + 1
    ((x, w, l),), note = data.encode(rows, TOKENIZER, n + 4, truncate=True)
    assert note == f"1 of 1 rows are cut to {n + 4} tokens"
    assert TOKENIZER.decode(x) == "6789" and w[-1] == l[-1] == TOKENIZER.end_id
    ((x, w, l),), _ = data.encode([("0123456789", "11111111", "11")], TOKENIZER, 5, truncate=True)
    assert TOKENIZER.decode(x) == "9" and TOKENIZER.decode(w) == "1111" and TOKENIZER.end_id not in w
    assert TOKENIZER.decode(l) == "11" and l[-1] == TOKENIZER.end_id
    rows, note = data.encode([("0", "1111112", "1111113"), ("0", "1", "2")], TOKENIZER, 5, truncate=True)
    assert len(rows) == 1 and note.endswith("1 of them dropped because their answers became equal")


def test_batches_are_a_function_of_step_and_seed(tmp_path):
    task = data.task(write(tmp_path / "a.jsonl", pairs(300)), eval_file=write(tmp_path / "e.jsonl", pairs(1)))
    batches, again = (data.Batches(task.preferences, None, 8, 3, TOKENIZER, 64) for _ in range(2))
    seen = [tuple(map(str, row)) for step in range(batches.per_epoch) for row in batches[step]]
    assert batches.per_epoch == 38 and len(seen) == len(set(seen)) == 300  # 37 of 8 and one of 4
    assert again[50] == batches[50] != batches[12]  # another epoch, another order
    toy = data.Batches(data.task("reviews").preferences, 0, 8, 3, TOKENIZER, 128)
    assert toy[5] == data.Batches(data.task("reviews").preferences, 0, 8, 3, TOKENIZER, 128)[5] != toy[6]


@pytest.mark.parametrize("n, sizes", [(16, [8, 8]), (17, [8, 9]), (18, [8, 8, 2]), (5, [5]), (9, [9])])
def test_the_last_batch_never_holds_one_row(n, sizes):
    batches = data.Batches(data.task("reviews").preferences, n, 8, 0, TOKENIZER, 128)
    assert [len(batches[i]) for i in range(batches.per_epoch)] == sizes


def test_a_mismatched_answer_belongs_to_another_prompt():
    """The next row, around the end, whose prompt differs: a a b c a -> answers of b b c a(4) b; the labels stay behind."""
    rows = [((x,), (y,), True) for x, y in ((1, 10), (1, 11), (2, 12), (3, 13), (1, 14))]
    assert data.mismatched(rows, 8) == [((1,), (12,)), ((1,), (12,)), ((2,), (13,)), ((3,), (14,)), ((1,), (12,))]
    assert data.mismatched(rows[:2], 8) == [] and data.mismatched([], 8) == []
    assert data.mismatched([((1, 2, 3), (4,), True), ((5,), (6, 7, 8), False)], 4) == [((3,), (6, 7, 8)), ((5,), (4,))]


def test_a_file_of_pairs_is_split_for_kto(tmp_path):
    task = data.task(write(tmp_path / "p.jsonl", pairs(60)))
    kept = task.preferences(None, 0)
    rows = task.feedback(None, 0)
    assert len(rows) == 2 * len(kept) and set(rows) == {(x, y, label) for x, w, l in kept for y, label in ((w, True), (l, False))}
    assert any(f"{len(kept)} pairs are split into {2 * len(kept)} examples" in note for note in task.notes) and not task.unpaired
    some = task.feedback(10, 0)
    assert len(some) == 10 and sum(label for _, _, label in some) == 5 and len({x for x, _, _ in some}) == 5  # whole pairs


def test_demonstrations_of_a_feedback_file_are_the_desirable_answers(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0} for i in range(60)]
    task = data.task(write(tmp_path / "f.jsonl", rows))
    assert task.unpaired and all(int(y[1:]) % 2 == 0 for _, y in task.demonstrations(None, 0)) and "desirable" in task.notes[0]


def test_length_says_nothing_about_quality_in_reviews():
    """Chosen and rejected reviews are equally long: over 8,000 pairs within three standard errors, 3 · √2 · 9 / √8000 = 0.43 tokens."""
    rows = data.task("reviews").preferences(8000, 0)
    chosen, rejected = (statistics.fmean(len(TOKENIZER.answer(row[i])) for row in rows) for i in (1, 2))
    assert abs(chosen - rejected) < 0.43 and 14 < chosen < 20
