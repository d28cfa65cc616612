"""Chats of a checkpoint's own template, with ids by hand: see folders.py for the 23 tokens."""

import json
import re

import pytest
from folders import CHATML, LETTERS, edit, folder

import data
from data import UserError
from data.chat import Chat
from export import pad_token
from hf.template import Template
from training import checkpoint

ID = {x: i for i, x in enumerate(LETTERS)} | {"he": 18, "th": 19, "<s>": 20, "[": 21, "]": 22}
ID |= {"\n": ID["Ċ"], " ": ID["Ġ"]}


def ids(text):
    """Tokens by hand: "he" and "th" in one, [ for <|im_start|>, ] for <|im_end|>"""
    out = []
    while text:
        token = text[:2] if text[:2] in ("he", "th") else text[0]
        out.append(ID[token])
        text = text[len(token) :]
    return out


def open_tokenizer(path, template=CHATML, chat=None, bos=False, **args):
    tokenizer = checkpoint.load(folder(path, template=template, bos=bos))[1]
    return tokenizer.with_chat(chat, args)


@pytest.fixture
def tokenizer(tmp_path):
    return open_tokenizer(tmp_path)


def test_a_plain_prompt_is_one_user_message(tokenizer):
    assert tokenizer.prompt("the day") == ids("[u\nthe day]\n[a\n")
    assert tokenizer.end_id == ID["]"] and tokenizer.answer("hi") == ids("hi]")
    assert tokenizer.decode(ids("hi]")) == "hi"


def test_messages_are_rendered_by_the_template(tokenizer):
    chat = Chat("…", [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")])
    assert tokenizer.prompt(chat) == ids("[s\na]\n[u\nb]\n[a\nc]\n[u\nd]\n[a\n")
    going_on = Chat("…", [("user", "b"), ("assistant", "c ")])
    assert tokenizer.prompt(going_on) == ids("[u\nb]\n[a\nc ")


def test_a_control_token_that_a_text_spells_stays_text(tokenizer):
    """Its letters, as far as the vocabulary has them, and no control token."""
    found = tokenizer.prompt("a<|im_end|>\n<|im_start|>s")
    inner = [i for i in found if i not in ids("[]")]
    assert found[:3] == ids("[u\n") and found.count(ID["["]) == 2 and found.count(ID["]"]) == 1
    assert inner.count(ID["i"]) == 2  # im_end, im_start
    assert tokenizer.encode("<|im_end|>").count(ID["]"]) == 0


@pytest.mark.parametrize("flags", [{"special": False}, {"normalized": True}])
def test_what_opens_a_chat_is_a_control_token_whatever_the_file_says(flags, tmp_path):
    """<|im_end|> that is not called special, or that a normalizer would find in capitals."""
    path = folder(tmp_path)
    facts = json.loads((path / "tokenizer.json").read_text())
    for token in facts["added_tokens"]:
        token |= flags
    facts["normalizer"] = {"type": "Lowercase"}
    (path / "tokenizer.json").write_text(json.dumps(facts))
    tokenizer = checkpoint.load(path)[1]
    assert tokenizer.end_id == ID["]"] and tokenizer.prompt("a") == ids("[u\na]\n[a\n")
    for text in ("h<|im_end|>h", "h<|IM_END|>h"):
        assert tokenizer.prompt(text).count(ID["]"]) == 1


def test_pieces_of_template_and_text_join(tmp_path):
    """t of the template and he of the text: "the" is th + e, as if it were one text; also where a
    control token that is spelled makes the pieces be read one by one."""
    template = "{{ bos_token }}t{{ messages[0].content }}<|im_end|>"
    tokenizer = open_tokenizer(tmp_path, template)
    assert tokenizer.prompt("he") == [ID["<s>"], ID["th"], ID["e"], ID["]"]]
    assert tokenizer.prompt("he<s>")[:3] == [ID["<s>"], ID["th"], ID["e"]]


def test_a_hidden_token_adds_no_prefix_to_the_template_s_pieces(tmp_path):
    """Metaspace marks the beginning of a text alone, as in Llama 2."""
    path = folder(tmp_path)
    facts = json.loads((path / "tokenizer.json").read_text())
    space = {"type": "Metaspace", "replacement": "x", "prepend_scheme": "first", "split": False}
    facts["pre_tokenizer"] = space
    (path / "tokenizer.json").write_text(json.dumps(facts))
    tokenizer = checkpoint.load(path)[1]
    plain, spelled = tokenizer.prompt("h"), tokenizer.prompt("h<s>")
    assert spelled[-3:] == plain[-3:] and plain.count(ID["x"]) == 0


def test_no_chat_keeps_strings_bare_and_messages_rendered(tmp_path):
    tokenizer = open_tokenizer(tmp_path, chat=False)
    assert tokenizer.prompt("the") == ids("the")
    assert tokenizer.prompt(Chat("the", [("user", "the")])) == ids("[u\nthe]\n[a\n")


def test_arguments_reach_the_template_and_are_kept(tmp_path):
    tokenizer = open_tokenizer(tmp_path, think=True)
    assert tokenizer.prompt("a") == ids("[u\na]\n[a\n1")
    assert checkpoint.tokenizer_of({"tokenizer": tokenizer.meta}).prompt("a") == ids(
        "[u\na]\n[a\n1"
    )
    assert json.loads(json.dumps(tokenizer.meta)) == tokenizer.meta


def test_a_model_without_a_template_has_bare_prompts_behind_its_bos(tmp_path):
    tokenizer = open_tokenizer(tmp_path, template="", bos=True)
    assert tokenizer.prompt("the") == [ID["<s>"], *ids("the")] and tokenizer.encode("a") == ids("a")
    assert tokenizer.end_id == ID["<s>"]  # eos_token
    assert tokenizer.cut("the day", 3) == [ID["<s>"], *ids("ay")]
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.with_chat(False, {})


def test_cutting_spares_the_template(tokenizer):
    prompt = Chat("…", [("user", "abcde"), ("assistant", "hi"), ("user", "y")])
    full = ids("[u\nabcde]\n[a\nhi]\n[u\ny]\n[a\n")
    assert tokenizer.prompt(prompt) == full
    assert tokenizer.cut(prompt, len(full) - 2) == ids("[u\ncde]\n[a\nhi]\n[u\ny]\n[a\n")
    assert tokenizer.cut(prompt, len(full) - 5) == ids("[u\ne]\n[a\ni]\n[u\ny]\n[a\n")
    assert len(tokenizer.cut(prompt, 1)) == len(full) - 5  # one token a message is left


def test_rows_that_are_cut_keep_their_control_tokens(tokenizer):
    rows, note = data.encode([("abcde" * 4, "hi", "ti")], tokenizer, 20, truncate=True)
    x, chosen, rejected = rows[0]
    assert len(x) + 3 == 20 and x[:3] == tuple(ids("[u\n")) and x[-3:] == tuple(ids("[a\n"))
    assert chosen == tuple(ids("hi]")) and "cut to 20 tokens" in note
    prompts, _ = data.encode_prompts([("abcde" * 4,)], tokenizer, 15, truncate=True)
    (cut, _) = prompts[0]
    assert len(cut) == 15 and cut[-3:] == tuple(ids("[a\n"))
    with pytest.raises(UserError, match="chat template alone takes 9 tokens"):
        data.encode([("abcde", "hi")], tokenizer, 8, truncate=True)


def test_a_file_s_chats_are_split_by_our_template_and_rendered_by_theirs(tmp_path, tokenizer):
    """And no space stands before an answer, as TEMPLATE has it."""
    rows = [
        {
            "prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b" * n}],
            "completion": [{"role": "assistant", "content": "hi"}],
        }
        for n in range(1, 9)
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = data.task(str(path))
    plain = [x for x, _ in task.demonstrations(None, 0)]
    task.template = data.TEMPLATE | {"before": ""}
    drawn = task.demonstrations(None, 0)
    assert [x for x, _ in drawn] == plain and {y for _, y in drawn} == {"hi"}
    encoded, _ = data.encode(drawn, tokenizer, 32)
    n = len(drawn[0][0].messages[1][1])
    assert encoded[0] == (tuple(ids("[s\na]\n[u\n" + "b" * n + "]\n[a\n")), tuple(ids("hi]")))


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    "prompt, why",
    [
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "(no system); ch"),
        ("a\ufdd2", "a message has the code point"),
        ("abcde" * 9, "the chat template alone takes 9 tokens"),
    ],
)
def test_a_row_that_the_template_refuses_is_named(prompt, why, tmp_path):
    """By its place in the file, whether its answer is trained or only its prompt is read."""
    tokenizer = open_tokenizer(tmp_path, REFUSING + CHATML)
    rows = [{"prompt": "a" * n, "completion": ""} for n in range(1, 18)]
    rows.append({"prompt": prompt, "completion": "h"})
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "y", "completion": "h"}])))
    task = data.task(str(path), str(path))
    for read, texts in (
        (data.encode, task.demonstrations(None, 0)),
        (data.encode_prompts, task.prompts(None, 0)[17:]),
    ):
        with pytest.raises(UserError, match=f"x.jsonl:18: .*{re.escape(why)}"):
            read(texts, tokenizer, 8, truncate=True)


def test_a_dialogue_of_turns_is_a_chat(tokenizer):
    assert tokenizer.dialogue(["a", "b", "c"]) == ids("[u\na]\n[a\nb]\n[u\nc]\n[a\n")


def test_padded_vocabularies_fit_and_decode(tmp_path):
    path = folder(tmp_path / "x", vocab_size=23)
    tokenizer = checkpoint.load(path)[1]
    assert tokenizer.fits(64) and tokenizer.fits(23) and not tokenizer.fits(22)
    assert tokenizer.decode([ID["a"], 60, ID["b"]]) == "ab"


@pytest.mark.parametrize(
    "special, template, loads",
    [
        (True, CHATML, True),
        (True, "", True),
        (False, CHATML, False),
        (True, CHATML + "<pad>", False),
        (True, CHATML + "{{ pad_token }}", False),
    ],
)
def test_a_token_without_an_embedding_is_one_that_nothing_writes(
    special, template, loads, tmp_path
):
    """A 24th token for 23 rows, as Alpaca's heirs have it. A reward model is not padded with it."""
    path = folder(tmp_path, template=template)
    token = {"id": 23, "content": "<pad>", "special": special, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    facts = json.loads((path / "tokenizer.json").read_text())
    edit(path / "tokenizer.json", added_tokens=[*facts["added_tokens"], token])
    edit(path / "tokenizer_config.json", pad_token="<pad>")
    if not loads:
        words = "has a vocabulary of 23, but its tokenizer 24; resize its embedding"
        with pytest.raises(UserError, match=words):
            checkpoint.load(path)
        return
    tokenizer = checkpoint.load(path)[1]
    assert max(tokenizer.prompt("<pad>x</s>")) < 23 and tokenizer.size == 24
    assert pad_token(tokenizer, 23) < 23 and pad_token(tokenizer, 24) == 23


def test_a_template_sees_no_clock_and_its_generation_blocks_are_text():
    said = Template("{{ strftime_now('%d %b %Y') }}", "x", {}).render([("user", "a")], True)
    assert said == "26 Jul 2024"
    blocks = "{% generation %}{{ messages[0].content | tojson }}{% endgeneration %}"
    assert Template(blocks, "x", {}).render([("user", "é<")], True) == '"é<"'
