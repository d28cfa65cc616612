"""What AI feedback is worth, by the gold reward where a task has one: the figures of rlaif.py, read after its phases and never in them."""
from collections import namedtuple
from statistics import fmean

Revision = namedtuple("Revision", "prompt answer principle critique revised columns")
Pair = namedtuple("Pair", "prompt a b principle columns")  # two answers to a prompt, and what they are compared by


def gold_agreement(task, pairs, a_wins):
    """The share of pairs whose better answer by a_wins, a bool each, is that of the gold reward, of those that it tells apart; None
    without any"""
    reward = [[task.reward(pair.prompt, y, **pair.columns) for y in (pair.a, pair.b)] for pair in pairs if task.has_reward]
    told = [(a > b) == wins for (a, b), wins in zip(reward, a_wins.tolist()) if a != b]
    return fmean(told) if told else None


def label_figures(task, pairs, label, first, second):
    """label, first, second: (N,) P(a is better), of both orders, where a stands as A, and as B. -> figures, {} of no pair"""
    entropy = -(label.xlogy(label) + (1 - label).xlogy(1 - label))
    figures = {"order_consistency": (first > 0.5) == (second > 0.5), "position_bias": (first - second) / 2, "label_mean": label,
               "label_entropy": entropy}  # fmt: skip
    figures = {name: x.float().mean().item() for name, x in figures.items() if len(x)}
    agreement = [gold_agreement(task, pairs, x > 0.5) for x in (label, first, second)]
    if agreement[0] is not None:
        figures |= {"label_agreement": agreement[0], "one_order_agreement": fmean(agreement[1:])}
    return figures


def revision_figures(task, revisions):
    """-> how the gold reward of the revisions compares with that of the answers"""
    if not task.has_reward or not revisions:
        return {}
    gain = [task.reward(r.prompt, r.revised, **r.columns) - task.reward(r.prompt, r.answer, **r.columns) for r in revisions]
    return {"revision_better": fmean(x > 0 for x in gain), "revision_equal": fmean(x == 0 for x in gain), "revision_gain": fmean(gain)}


def skills_text(task, pairs, label, revisions, figures):
    """-> the figures of both as lines to read, and the agreement under each principle"""
    lines = [f"the skills, on {len(pairs)} pairs and {len(revisions)} revisions of answers to held-out prompts"]
    for text, key in (("AI labels that agree with the gold reward", "label_agreement"), ("  of one order alone", "one_order_agreement"),
                      ("both orders prefer the same answer", "order_consistency"),
                      ("  mean P(A) less ½, the bias of position", "position_bias"),
                      ("revisions with a higher gold reward", "revision_better"), ("  with the same", "revision_equal"),
                      ("  gold reward gained, mean", "revision_gain")):  # fmt: skip
        if key in figures:
            lines.append(f"  {text:<44}{figures[key]:>7.3f}")
    for principle in dict.fromkeys(pair.principle for pair in pairs):
        rows = [i for i, pair in enumerate(pairs) if pair.principle == principle]
        agreement = gold_agreement(task, [pairs[i] for i in rows], label[rows] > 0.5)
        if agreement is not None:
            lines.append(f"  agreement under {principle!r:<28}{agreement:>7.3f}")
    return "\n".join(lines)
