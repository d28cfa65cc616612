"""A cache for sampling in which all responses to a long prompt read one copy of it."""

import math

import torch

from training.cache import Cache


class SharedPromptCache(Cache):
    """The rows of a group read a long prompt from one copy, `prompt`: of each layer
    (2, P·K, L, D)."""

    def start(self, prompt_mask):
        self.prompt, self.width = [], 0
        self.prompt_mask = prompt_mask
        if len(prompt_mask) > 1:
            self.prompt_mask = prompt_mask.repeat_interleave(self.K, 0)
        self.mask = prompt_mask.new_full((1, 1, self.n), -math.inf)

    def add_prompts(self, kv):
        """kv (2, P, K, L, D), of a layer"""
        self.prompt.append(kv.flatten(1, 2))
        self.own.append(kv.new_zeros(2, self.P * self.K * self.G, self.n, kv.size(4)))

    def attend(self, layer, qkv, sizes):
        q, k, v = self.write(layer, qkv, sizes)
        scale, (k_prompt, v_prompt) = sizes[2] ** -0.5, self.prompt[layer]
        scores = torch.baddbmm(self.seen, q, k.mT, alpha=scale)
        group = q.reshape(self.P * self.K, -1, q.size(2))  # (P·K, G·H/K, D)
        before = torch.baddbmm(self.prompt_mask, group, k_prompt.mT, alpha=scale)
        weight = torch.cat([before, scores.view(*group.shape[:2], -1)], 2).softmax(2)
        before, own = weight.split((k_prompt.size(1), k.size(1)), 2)
        y = torch.bmm(before, v_prompt).reshape(q.shape)
        return self.rows(torch.baddbmm(y, own.reshape(scores.shape), v))

    def keep(self, heads, own):
        for layer, kv in enumerate(self.prompt):
            self.prompt[layer] = kv.index_select(1, heads)
        if len(self.prompt_mask) > 1:
            self.prompt_mask = self.prompt_mask[heads]
