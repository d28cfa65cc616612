"""The chat template of a checkpoint: token ids of chats, compared with ids written by hand. See
folders.py for the 23 tokens."""

import json
import re

import pytest
from folders import CHATML, LETTERS, edit, folder

import data
from data import UserError
from data.chat import Chat
from export import pad_token
from hf.template import Template
from hf.weights import read_texts
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
    """t of the template and he of the text: "the" is th + e, as if it were one text; even if a
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
    edit(path / "tokenizer_config.json", pad_token="<pad>" if special else None)
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


# ---- which tokens are control tokens, and which end an answer


def token(i, content, special=False):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": special, **flags}


def add(path, *tokens):
    facts = json.loads((path / "tokenizer.json").read_text())
    edit(path / "tokenizer.json", added_tokens=[*facts["added_tokens"], *tokens])


SAYS = {  # how a file says that <x> is a control token
    "tokenizer.json": lambda path: add(path, token(23, "<x>", special=True)),
    "added_tokens_decoder": lambda path: edit(
        path / "tokenizer_config.json", added_tokens_decoder={"23": token(23, "<x>", special=True)}
    ),
    "added_tokens.json": lambda path: (path / "added_tokens.json").write_text('{"<x>": 23}'),
    "a role": lambda path: edit(path / "tokenizer_config.json", pad_token="<x>"),
    "additional": lambda path: edit(
        path / "tokenizer_config.json", additional_special_tokens=["<x>"]
    ),
    "extra": lambda path: edit(path / "tokenizer_config.json", extra_special_tokens={"q": "<x>"}),
    "the map": lambda path: (path / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": [{"content": "<x>"}]})
    ),
}


@pytest.mark.parametrize("says", SAYS)
def test_a_token_is_a_control_token_if_any_file_says_so(says, tmp_path):
    """No text spells it, and no reward reads it."""
    path = folder(tmp_path, vocab_size=24)
    if says not in ("tokenizer.json", "added_tokens_decoder", "added_tokens.json"):
        add(path, token(23, "<x>"))
    SAYS[says](path)
    tokenizer = checkpoint.tokenizer_of({"tokenizer": files_of(path)})
    assert tokenizer.controls["<x>"] == 23 and tokenizer.size == 24
    assert 23 not in tokenizer.encode("a<x>") + tokenizer.prompt("a<x>b")
    assert tokenizer.decode([ID["a"], 23, ID["b"]]) == "ab"


def files_of(path):
    return {"name": "x", "files": read_texts(path), "chat": True, "args": {}}


def test_an_added_word_is_read_in_every_text(tmp_path):
    """The template writes it too, and some file names another token of that name."""
    path = folder(tmp_path, template=CHATML.replace("{{ m.role[0] }}", "{{ m.role }}"))
    add(path, token(23, "user"))
    tokenizer = checkpoint.tokenizer_of({"tokenizer": files_of(path)})
    assert "user" not in tokenizer.controls
    assert tokenizer.prompt("a user").count(23) == 2 and 23 in tokenizer.answer("the user")
    assert tokenizer.decode([23]) == "user"


def test_padding_with_an_ordinary_letter_takes_no_letter_away(tmp_path):
    path = folder(tmp_path)
    add(path, token(ID["x"], "x", special=True))
    tokenizer = checkpoint.tokenizer_of({"tokenizer": files_of(path)})
    assert tokenizer.encode("ax") == ids("ax") and tokenizer.decode(ids("ax]")) == "ax"


LACKING = [
    ({"added_tokens_decoder": {"30": token(30, "<x>")}}, "", "gives <x> the id 30, but"),
    (
        {"added_tokens_decoder": {"22": token(22, "<s>")}},
        "",
        "tokenizer_config.json of .* gives <s> the id 22, but",
    ),
    ({"eos_token": "<x>"}, "{{ eos_token }}", "writes <x>, which its vocabulary lacks"),
    ({"eos_token": "<x>"}, "<x>", "writes <x>, which its vocabulary lacks"),
    ({}, "<|im_sep|>", r"writes <\|im_sep\|>, which its vocabulary lacks"),
]


@pytest.mark.parametrize("settings, more, why", LACKING)
def test_a_token_that_the_vocabulary_lacks_is_not_spelled_out(settings, more, why, tmp_path):
    path = folder(tmp_path, template=CHATML + more)
    edit(path / "tokenizer_config.json", **settings)
    with pytest.raises(UserError, match=why):
        checkpoint.load(path)


def test_marks_are_words_if_the_vocabulary_has_none_of_their_shape(tmp_path):
    """As Zephyr's template writes <|user|>, which is no token there."""
    path = folder(tmp_path, template="<|user|>{{ messages[0].content }}{{ eos_token }}")
    facts = json.loads((path / "tokenizer.json").read_text())
    tokens = [x | {"content": x["content"].replace("|", "")} for x in facts["added_tokens"]]
    edit(path / "tokenizer.json", added_tokens=tokens)
    assert checkpoint.load(path)[1].prompt("a")[-2:] == [ID["a"], ID["<s>"]]


@pytest.mark.parametrize(
    "chat, generation, config, ends",
    [
        (None, None, None, [22, 20]),  # the template's, and eos_token for want of an id
        (None, [21, 22], 20, [22, 21, 20]),
        (False, [21, 22], 21, [21, 22, 20]),
        (False, None, 21, [21, 20, 22]),
        (False, -1, [99, 2**70, "x", True], [20, 22]),
    ],
)
def test_end_tokens_are_a_set(chat, generation, config, ends, tmp_path):
    """The first ends what is trained: the template's or, if prompts stay bare, the folder's own."""
    path = folder(tmp_path)
    edit(path / "config.json", eos_token_id=config)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    tokenizer = checkpoint.load(path)[1].with_chat(chat, {})
    assert [*tokenizer.ends] == ends
    assert tokenizer.answer("a") == [ID["a"], ends[0]]
    assert tokenizer.decode([ID["a"], *ends]) == "a"


# ---- an answer is what the template makes of it


TEMPLATES = {  # what the template does to an answer -> the answer, and its ids
    "trims": (CHATML.replace("m.content", "m.content | trim"), " hi ", "hi]"),
    "thinks": (
        CHATML.replace(
            "{{ m.content }}", "{% if m.role == 'assistant' %}12{% endif %}{{ m.content }}"
        ),
        "hi",
        "12hi]",
    ),
    "ends otherwise": (CHATML.replace("<|im_end|>", "x"), "hi", "hi<"),
    "opens": (CHATML.replace("{% if think %}1{% endif %}", "12"), "12hi", "hi]"),
    "opens what is missing": (CHATML.replace("{% if think %}1{% endif %}", "12"), "hi", "hi]"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_what_the_template_writes_behind_the_prompt(name, tmp_path):
    template, answer, expected = TEMPLATES[name]
    tokenizer = open_tokenizer(tmp_path, template)
    rows = [("the", answer), (Chat("b", [("user", "b")]), answer)]
    encoded, note = data.encode(rows, tokenizer, 64)
    ends = ids(expected[:-1]) + [ID["<s>" if expected[-1] == "<" else "]"]]
    assert [y for _, y in encoded] == [tuple(ends)] * 2
    assert ("2 of 2 conversations" in note) == ("missing" in name), note
    assert not tokenizer.notes()


TOOLS = (
    "{% if tools %}{{ tools[0].x }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role[0] }}"
    "{% if m.reasoning_content is defined %}1{{ m.reasoning_content }}1{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}2{{ call.x }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a{% if tone %}{{ tone }}{% endif %}{% endif %}"
)


def write(path, *rows):
    """Rows, and others so that some can be held out. -> a task whose test rows are all its rows"""
    path.write_text("\n".join(map(json.dumps, rows)))
    return data.task(str(path), str(path))


def test_columns_and_keys_that_a_template_reads_reach_it(tmp_path, capsys):
    tokenizer = open_tokenizer(tmp_path, TOOLS)
    user = {"role": "user", "content": "b", "weight": 1, "name": None}
    call = {"role": "assistant", "content": None, "tool_calls": [{"x": "s"}]}
    said = {"role": "tool", "content": "y"}
    thought = {"role": "assistant", "content": "hi", "reasoning_content": "e"}
    row = {"prompt": [user, call, said], "completion": [thought], "tools": [{"x": "c"}]}
    text = {"prompt": [user], "completion": [call], "tools": json.dumps([{"x": "d"}])}
    more = {"prompt": "b", "completion": "hi", "chat_template_kwargs": {"tone": "n", "q": 1}}
    task = write(tmp_path / "x.jsonl", row, text, more)
    task.template = data.TEMPLATE | {"before": "", "reads": tokenizer.reads}
    encoded, note = data.encode(task.demonstrations(None, 0), tokenizer, 64)
    assert "writes 1 of 3 conversations so" in note
    assert [*encoded] == [
        (tuple(ids("c[ub][a2s][ty][a")), tuple(ids("1e1hi]"))),
        (tuple(ids("d[ub][a")), tuple(ids("2s]"))),
        (tuple(ids("[ub][an")), tuple(ids("hi]"))),
    ]
    noted = capsys.readouterr().out.splitlines()
    read = "the chat template reads it"
    lost = "no chat template here reads it, and it does not reach the model"
    assert noted[1:] == [
        f'{task.name}:1: the column "tools": {read}',
        f'{task.name}:1: the key "weight" of a message: {lost}',
        f'{task.name}:1: the key "tool_calls" of a message: {read}',
        f'{task.name}:1: the key "reasoning_content" of a message: {read}',
        f'{task.name}:3: the argument "tone": {read}',
        f'{task.name}:3: the argument "q": {lost}',
    ]


def test_answers_that_differ_in_what_a_template_reads_are_two(tmp_path):
    """Without a template the two are one text, and an answer of no text is useless."""
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"x": x}]} for x in "ab"]
    row = {"prompt": [{"role": "user", "content": "b"}], "chosen": calls[:1], "rejected": calls[1:]}
    task = write(tmp_path / "x.jsonl", row)
    with pytest.raises(UserError, match="no usable row"):
        task.preferences(None, 0)
    task.template = data.TEMPLATE | {"reads": ["tool_calls"]}
    tokenizer = open_tokenizer(tmp_path / "m", TOOLS)
    (pair,), _ = data.encode(task.preferences(None, 0), tokenizer, 64)
    assert pair[1:] == (tuple(ids("2a]")), tuple(ids("2b]")))


def test_no_key_and_no_column_spells_a_control_token(tmp_path):
    tokenizer = open_tokenizer(tmp_path, TOOLS)
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"x": "a<|im_end|>b"}]}]
    row = {"prompt": [{"role": "user", "content": "b"}], "completion": calls}
    task = write(tmp_path / "x.jsonl", row | {"tools": [{"x": "<|im_start|>"}]})
    task.template = data.TEMPLATE | {"before": "", "reads": tokenizer.reads}
    ((prompt, answer),), _ = data.encode(task.demonstrations(None, 0), tokenizer, 64)
    assert prompt.count(ID["["]) == 2 and prompt.count(ID["]"]) == 1
    assert answer[-1] == ID["]"] and answer.count(ID["]"]) == 1 and {*ids("ab")} <= {*answer}


@pytest.mark.parametrize("column, x", [("tools", "no"), ("chat_template_kwargs", [1])])
def test_a_column_for_the_template_has_its_kind(column, x, tmp_path):
    with pytest.raises(UserError, match=f'x.jsonl:1: "{column}" must be'):
        write(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b", column: x})


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{% generation %}"
    "{% if not loop.last %}1{% endif %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}"
    "<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def test_every_answer_of_a_conversation_can_be_trained(tmp_path, capsys):
    """As a row of its own: what the template would write if the conversation ended there or, if it
    marks its answers, what stands in the marks of the rendered conversation."""
    talk = [("system", "s"), ("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e")]
    messages = [{"role": role, "content": text} for role, text in talk]
    path = tmp_path / "x.jsonl"
    path.write_text(
        json.dumps({"messages": messages}) + "\n" + json.dumps({"prompt": "a", "completion": "b"})
    )
    task = data.task(str(path), str(path), turns="all")
    rows = task.demonstrations(None, 0)
    assert "2 train rows have 3 answers" in capsys.readouterr().out
    assert [(str(x), y) for x, y in rows] == [
        ("System: s\n\nUser: b\n\nAssistant:", " c"),
        ("System: s\n\nUser: b\n\nAssistant: c\n\nUser: d\n\nAssistant:", " e"),
        ("a", "b"),
    ]
    task.template = data.TEMPLATE | {"before": "", "reads": []}
    rows = task.demonstrations(None, 0)
    plain, _ = data.encode(rows, open_tokenizer(tmp_path / "a"), 64)
    assert plain[0] == (tuple(ids("[s\ns]\n[u\nb]\n[a\n")), tuple(ids("c]")))
    assert plain[1][1] == tuple(ids("e]"))
    marked, _ = data.encode(rows, open_tokenizer(tmp_path / "b", MARKED), 64)
    assert marked[0] == (tuple(ids("[s][b][")), tuple(ids("1c]\n")))
    assert marked[1] == (tuple(ids("[s][b][1c]\n[d][")), tuple(ids("e]\n")))
    assert marked[2] == (tuple(ids("[a][")), tuple(ids("b]")))
    assert len(data.task(str(path), str(path)).demonstrations(None, 0)) == 2
