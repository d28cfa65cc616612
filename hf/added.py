"""The tokens that a checkpoint's files add to its vocabulary.

A token is a control token if one of these files says so: tokenizer.json, tokenizer_config.json (in
its `added_tokens_decoder`, or by the name of a role, such as eos_token), special_tokens_map.json.
It is also one if only added_tokens.json names it. A token that tokenizer.json lacks is added if
another file gives it the next free id. Every other added token is an ordinary word, which any text
may contain.
"""

import re

from data import UserError

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
MORE = ("additional_special_tokens", "extra_special_tokens")  # lists, or {name: token}
PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
ADDED = "added_tokens.json"
SHAPED = re.compile(r"<\|[^\s|<>]+\|>")  # how most vocabularies spell a control token


def text_of(token):
    """-> a token as text: files write it so, or as {"content": text, …}; "" for anything else"""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def roles(files):
    """files: the contents of tokenizer_config.json and special_tokens_map.json -> {role: token}"""
    said = {role: [text_of(file.get(role)) for file in files] for role in ROLES}
    return {role: next(filter(None, texts), "") for role, texts in said.items() if any(texts)}


def named(files):
    """-> every token that the two files call special"""
    found = list(roles(files).values())
    for file in files:
        for key in MORE:
            tokens = file.get(key) or []
            tokens = tokens.values() if isinstance(tokens, dict) else tokens
            found += map(text_of, tokens) if not isinstance(tokens, str) else []
        decoder = file.get("added_tokens_decoder")
        tokens = decoder.values() if isinstance(decoder, dict) else ()
        found += [text_of(x) for x in tokens if isinstance(x, dict) and x.get("special")]
    return {token for token in found if token}


def ids(settings, added):
    """-> {token: (id, file)} of the files beside tokenizer.json. settings: tokenizer_config.json;
    added: added_tokens.json"""
    decoder = settings.get("added_tokens_decoder")
    decoder = decoder.items() if isinstance(decoder, dict) else ()
    found = {text_of(token): (int(i), "tokenizer_config.json") for i, token in decoder}
    return {token: (i, ADDED) for token, i in added.items()} | found


def complete(facts, special, ids):
    """facts: tokenizer.json, to which the tokens of the other files are added. -> {token: its entry
    there} of all added tokens"""
    known = {token["content"]: token for token in facts.get("added_tokens") or []}
    vocabulary = facts["model"].get("vocab") or {}
    if isinstance(vocabulary, list):
        vocabulary = {piece: i for i, (piece, *_) in enumerate(vocabulary)}
    for token, (i, file) in sorted(ids.items(), key=lambda one: one[1][0]):
        facts_of = {"id": vocabulary.get(token, i), "special": file == ADDED, "content": token}
        known.setdefault(token, PLAIN | facts_of)
    for token in special - known.keys():
        if token in vocabulary:
            known[token] = PLAIN | {"id": vocabulary[token], "content": token}
    for text, token in known.items():
        token["special"] = bool(token.get("special")) or text in special
        if token["special"]:
            token["normalized"] = False
    facts["added_tokens"] = sorted(known.values(), key=lambda token: token["id"])
    return known


def refuse_others(made, facts, ids, name):
    """Refuses a vocabulary whose files disagree about a token. made: the tokenizer of `facts`"""
    said = [(x["content"], x["id"], "tokenizer.json") for x in facts["added_tokens"]]
    for token, i, file in [(token, *there) for token, there in ids.items()] + said:
        if (found := made.token_to_id(token)) != i:
            words = f"{file} of {name} gives {token} the id {i}, but its vocabulary"
            raise UserError(f"{words} {found}; save the tokenizer again")


def refuse_unknown(made, said, tokens, name):
    """Refuses a template that writes a token which the vocabulary lacks, because it would be read
    letter by letter. said: the text that it writes around short messages. tokens: those that the
    files name. If no token has the shape of <|user|>, such marks are words."""
    shaped = set(SHAPED.findall(said)) if any(map(SHAPED.fullmatch, tokens)) else set()
    unknown = shaped | {token for token in tokens if token in said}
    for token in sorted(token for token in unknown if made.token_to_id(token) is None):
        words = f"the chat template of {name} writes {token}, which its vocabulary lacks"
        raise UserError(f"{words}; take the template of another folder, or add the token")
