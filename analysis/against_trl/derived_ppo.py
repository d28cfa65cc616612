"""PPO token by token, on the logits of transformers: the other side of ppo.py in analysis.parity.

TRL has no PPO trainer any more. So its equations stand here once more, as plain loops over the
tokens of one response after the other, with models of transformers and torch's AdamW. Nothing of
ours is used.
"""

import copy
import math
from statistics import fmean

import torch


def train(steps, rollout, folder, parts, passes, beta, gamma, lam, eps, eps_v, vf_coef, penalty):
    """Trains on a rollout, in so many passes of `parts` minibatches, in order. steps: the
    Steps that it fills and gives back. penalty: what a response without an end loses"""
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

    policy, reference = (
        GPT2LMHeadModel.from_pretrained(f"{folder}/{name}") for name in ("policy", "reference")
    )
    judge = GPT2ForSequenceClassification.from_pretrained(f"{folder}/reward")
    critic, bias = copy.deepcopy(judge), torch.zeros((), dtype=torch.float64, requires_grad=True)
    weights = dict(policy.named_parameters())
    weights |= {f"critic.{name}": p for name, p in critic.named_parameters()}
    optimizer = torch.optim.AdamW(
        [*weights.values(), bias], lr=0.003, betas=(0.9, 0.95), weight_decay=0.0
    )
    steps.watch(optimizer, lambda: {name: p.grad.clone() for name, p in weights.items()})

    how = beta, gamma, lam, penalty
    texts, old, scores, totals, kls = before(policy, reference, judge, critic, bias, rollout, *how)
    A = [token[2] for tokens in old for token in tokens]
    R = [token[3] for tokens in old for token in tokens]
    mean, scale = fmean(A), math.sqrt(variance(A) + 1e-8)

    lines = []
    with steps.watching_losses():
        for _ in range(passes):
            for rows in torch.arange(len(texts)).tensor_split(parts):
                loss, figures = 0.0, []
                for i in rows.tolist():
                    logp, entropy = log_probs(policy, *texts[i])
                    V = values(critic, bias, *texts[i])
                    for t, (logp_old, V_old, A_t, R_t) in enumerate(old[i]):
                        white = (A_t - mean) / scale
                        one, figure = token(logp[t], logp_old, white, V[t], V_old, R_t, eps, eps_v)
                        loss = loss + one[0] + vf_coef * one[1]
                        figures.append(figure | {"entropy": entropy[t].item()})
                (loss / len(figures)).backward()
                lines.append({name: fmean(x[name] for x in figures) for name in figures[0]})
                grads = [p.grad.square().sum() for p in [*weights.values(), bias]]
                lines[-1]["grad_norm"] = sum(grads).sqrt().item()
                optimizer.step()
                optimizer.zero_grad()
    steps.logged(lines)
    steps.figures |= {
        "loss": fmean(loss for loss, _ in steps),
        "lr": 0.003,
        "reward": fmean(scores),
        "rlhf_reward": fmean(totals),
        "kl": fmean(kls),
        "explained_variance": 1 - variance(A) / (variance(R) + 1e-5),
        "completions/mean_length": fmean(len(y) for _, y in texts),
        "completions/clipped_ratio": 1 - rollout.finished.double().mean().item(),
    }
    return steps


def before(policy, reference, judge, critic, bias, rollout, beta, gamma, lam, penalty):
    """What is fixed before the first step. -> the responses (x, y), (log π_old, V_old, A, R) of
    each of their tokens, scores, sums of the rewards, and KLs"""
    texts, old, scores, totals, kls = [], [], [], [], []
    with torch.no_grad():
        for ids, mask, ended in zip(rollout.ids, rollout.mask, rollout.finished.tolist()):
            first, n = int(mask.int().argmax()), int(mask.sum())
            x, y = ids[:first].tolist(), ids[first : first + n].tolist()
            logp, ref_logp = (log_probs(model, x, y)[0].tolist() for model in (policy, reference))
            V = values(critic, bias, x, y).tolist()
            score = judge(torch.tensor([x + y])).logits[0, 0].item() - (0 if ended else penalty)
            r = [-beta * (a - b) for a, b in zip(logp, ref_logp)]
            r[-1] += score
            A, ahead = [0.0] * n, 0.0
            for t in reversed(range(n)):
                V_next = V[t + 1] if t + 1 < n else 0.0
                ahead = r[t] + gamma * V_next - V[t] + gamma * lam * ahead
                A[t] = ahead
            texts.append((x, y))
            old.append([(logp[t], V[t], A[t], A[t] + V[t]) for t in range(n)])
            scores.append(score)
            totals.append(sum(r))
            kls.append(sum(logp) - sum(ref_logp))
    return texts, old, scores, totals, kls


def token(logp, logp_old, A, V, V_old, R, eps, eps_v):
    """-> (L_π, L_V) of a token, and its figures"""
    ratio = (logp - logp_old).exp()
    inside = 1 - eps <= ratio.item() <= 1 + eps
    bounded = ratio if inside else min(max(ratio.item(), 1 - eps), 1 + eps)
    L_pi = -A * ratio if -A * ratio >= -A * bounded else -A * bounded + 0 * ratio
    near = V_old + min(max(V.item() - V_old, -eps_v), eps_v)
    moved = near != V.item() and (near - R) ** 2 > (V.item() - R) ** 2
    L_V = 0.5 * (near - R) ** 2 + 0 * V if moved else 0.5 * (V - R) ** 2
    return (L_pi, L_V), {
        "loss/policy_avg": L_pi.item(),
        "loss/value_avg": L_V.item(),
        "policy/approxkl_avg": 0.5 * (logp.item() - logp_old) ** 2,
        "policy/clipfrac_avg": float(not inside and -A * bounded > -A * ratio.item()),
        "val/clipfrac_avg": float(moved),
    }


def log_probs(model, x, y):
    """-> log π(y_t | x, y_<t) of every token, and the entropies of these distributions"""
    logits = model(torch.tensor([x + y])).logits[0, len(x) - 1 : -1]
    log_p = logits.log_softmax(-1)
    return log_p[range(len(y)), y], -(log_p.exp() * log_p).sum(-1)


def values(critic, bias, x, y):
    """-> V(x, y_<t) of every token"""
    states = critic.transformer(torch.tensor([x + y])).last_hidden_state[0, len(x) - 1 : -1]
    return critic.score(states)[:, 0] + bias


def variance(x):
    return fmean((a - fmean(x)) ** 2 for a in x)
