"""Trains a byte-pair vocabulary and writes it as a file that --tokenizer takes.

The first command makes the committed data/vocab.tiktoken from the toy tasks, the second one a
vocabulary from your own text:

    python -m data.make_vocab
    python -m data.make_vocab my.jsonl.gz --size 2048 --out my.tiktoken

Byte-pair encoding (arXiv:1508.07909) begins with the 256 bytes. Again and again, the most frequent
pair of neighbours becomes a new token.
"""

import argparse
import base64
import os
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

from data.error import UserError
from data.ours import refuse_others
from data.shapes import texts
from data.tasks import task
from data.tokenizer import DEFAULT, PATTERN


def toy_texts():
    """Yields the texts of which the committed vocabulary is made: 20,000 reviews, as many sums, and
    one in four of their prompts, because a model only reads these."""
    for name in ("reviews", "arithmetic:2"):
        rows = task(name).demonstrations(20_000, seed=0)
        yield from (completion for _, completion in rows)
        yield from (prompt for prompt, _ in rows[::4])


def train(chunks, size):
    """texts -> {token: rank}: the 256 bytes first, then size - 257 merges. One place is left for
    the end token."""
    counts = Counter(word for text in chunks for word in re.findall(PATTERN, text))
    words = [[[bytes([b]) for b in word.encode()], n] for word, n in counts.items()]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size - 1:
        pairs = Counter()
        for parts, n in words:
            for pair in pairwise(parts):
                pairs[pair] += n
        if not pairs:
            break
        # the pair itself breaks ties, so that the same text gives the same file
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(b"".join(best), len(ranks))
        for word in words:
            word[0] = merge(word[0], best)
    return ranks


def merge(parts, pair):
    """Joins each occurrence of `pair` in `parts`, from the left."""
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    read = "a JSONL file, .gz too; every string in its rows is read (default: the toy tasks)"
    parser.add_argument("file", nargs="?", help=read)
    count = "tokens in all, the 256 bytes and the end token included"
    parser.add_argument("--size", type=int, default=768, help=count)
    parser.add_argument(
        "--out", help="the file to write (default: data/vocab.tiktoken for the toy tasks)"
    )
    args = parser.parse_args(argv)
    if args.size < 257:
        parser.error(f"--size must be at least 257 (256 bytes and the end token), not {args.size}")
    if args.file and not args.out:
        parser.error(
            "--out is needed with a file of your own, or it would replace the committed vocabulary"
        )
    out = Path(os.path.realpath(args.out or DEFAULT))
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text("")  # a path that cannot be written is refused before the work
        temporary.unlink()
    except OSError as e:
        parser.error(f"--out {args.out} cannot be written ({e.strerror}); give another path")
    if out.is_dir():
        parser.error(f"--out {args.out} is a directory; give a file in it")
    try:
        refuse_others("--out", out, ".tiktoken")
        ranks = train(texts(args.file) if args.file else toy_texts(), args.size)
    except UserError as e:
        parser.error(str(e))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    temporary.write_text("".join(lines))
    os.replace(temporary, out)
    print(f"{args.out or DEFAULT}: {len(ranks)} tokens and the end token")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.reconfigure(errors="replace")
    sys.exit(main())
