"""Writes a tiktoken vocabulary as tokenizer.json, so that other programs read the toy models."""

import json

from data import UserError
from data.tokenizer import END

PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2 writes unchanged
SHOWN = {b: chr(b) for b in PLAIN}
SHOWN |= {b: chr(256 + i) for i, b in enumerate(x for x in range(256) if x not in SHOWN)}


def tokenizer_files(tokenizer, context):
    """-> {name: text} of tokenizer.json and tokenizer_config.json, with the same ids"""
    try:
        import tokenizers
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
    except ImportError:
        words = "writing a tokenizer needs the package tokenizers"
        raise UserError(f"{words}: pip install -r requirements-hf.txt") from None
    encoding = tokenizer.encoding
    ranks = encoding._mergeable_ranks
    vocabulary = {shown(token): rank for token, rank in ranks.items()}
    merges = [tuple(map(shown, parts)) for token in ranks if (parts := halves(token, ranks))]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    words = pre_tokenizers.Split(tokenizers.Regex(encoding._pat_str), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    if made.token_to_id(END) != tokenizer.end_id:
        raise UserError(f"{encoding.name}: its end token would get another id in tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps(settings)}


def shown(token):
    return "".join(SHOWN[b] for b in token)


def halves(token, ranks):
    """-> the two tokens whose merge makes this one; None for a single byte"""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts if len(parts) == 2 else None
