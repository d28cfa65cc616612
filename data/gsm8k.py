"""Makes the three files of docs/real-models.md from GSM8K (arXiv:2110.14168), as it is published in
grade_school_math/data of github.com/openai/grade-school-math:

    python -m data.gsm8k train.jsonl example_model_solutions.jsonl

    gsm8k_sft.jsonl.gz           prompt, completion: the first 3,000 questions of train.jsonl
    gsm8k_preferences.jsonl.gz   prompt, chosen, rejected: per question the first right solution
                                 with the first wrong one, the second with the second, and so on
    gsm8k_feedback.jsonl.gz      prompt, completion, label: every solution, and whether it is right

If you give only train.jsonl, only the first is made. The same input always gives the same files, to
the byte.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

SFT = 3000  # rows
WRITERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def read(path):
    """Yields the rows of a JSONL file, with "question" as it must be. Raises ValueError."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                solved = "answer" in row or all(row[name]["solution"] for name in WRITERS)
                assert solved and row["question"]
            except (ValueError, LookupError, TypeError, AssertionError):
                raise ValueError(f"{path}:{number} is no row of GSM8K's files") from None
            yield row


def made(rows):
    """-> {file: rows} of what the rows of one file make"""
    answers = [x for x in rows if "answer" in x]
    found = {"sft": [], "preferences": [], "feedback": []}
    for row in answers[:SFT]:
        found["sft"].append({"prompt": row["question"], "completion": row["answer"]})
    for row in [x for x in rows if "answer" not in x]:
        right, wrong = [], []
        for name in WRITERS:
            text, label = row[name]["solution"], row[name]["is_correct"]
            (right if label else wrong).append([{"role": "assistant", "content": text}])
            said = {"prompt": row["question"], "completion": text, "label": label}
            found["feedback"].append(said)
        prompt = [{"role": "user", "content": row["question"]}]
        for chosen, rejected in zip(right, wrong):
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            found["preferences"].append(pair)
    return {f"gsm8k_{name}.jsonl.gz": rows for name, rows in found.items() if rows}


def main(argv=None):
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how, allow_abbrev=False)
    parser.add_argument("files", nargs="+", help="train.jsonl, example_model_solutions.jsonl")
    parser.add_argument("--to", default=".", help="folder to write (default: this one)")
    args = parser.parse_args(argv)
    try:
        files = made([row for path in args.files for row in read(path)])
        if there := [name for name in files if Path(args.to, name).exists()]:
            parser.error(f"{Path(args.to, there[0])} exists already; give another --to")
        Path(args.to).mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(args.to, name).write_bytes(gzip.compress(text.encode(), mtime=0))
            print(f"{Path(args.to, name)}: {len(rows):,} rows")
    except (OSError, ValueError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    sys.exit(main())
