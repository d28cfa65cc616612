"""What both peers.py and sides.py ask of TRL and of transformers: trainers, models, tokenizers."""

import importlib

MODULES = {  # of a trainer that is not in trl itself
    "CPO": "trl.experimental.cpo",
    "ORPO": "trl.experimental.orpo",
    "OnlineDPO": "trl.experimental.online_dpo",
}
WITH_REFERENCE = ("DPO", "KTO", "OnlineDPO")  # the trainers that are given a reference
COLUMNS = {  # a script -> what a row of TRL's has beside the prompt
    "sft": ("completion",),
    "kto": ("completion", "label"),
    **dict.fromkeys(("reward_model", "dpo", "simpo", "orpo"), ("chosen", "rejected")),
    **dict.fromkeys(("grpo", "dapo", "online_dpo", "ppo", "distill"), ()),
}
SETTINGS = dict(  # which every trainer is given
    lr_scheduler_type="constant",
    gradient_checkpointing=False,
    use_cpu=True,
    bf16=False,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)


def trainer(kind):
    """-> a trainer of TRL and its config, such as DPOTrainer and DPOConfig"""
    module = importlib.import_module(MODULES.get(kind, "trl"))
    return getattr(module, f"{kind}Trainer"), getattr(module, f"{kind}Config")


def gpt2(config, end, pad, scores=False):
    """-> a GPT-2 of transformers without dropout, of the sizes of a GPTConfig. end, pad: token ids.
    scores: it gives one number per text instead of logits"""
    import transformers

    theirs = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        num_labels=1,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    kind = "GPT2ForSequenceClassification" if scores else "GPT2LMHeadModel"
    return getattr(transformers, kind)(theirs)


def tokenizer(words, between, pad):
    """-> a tokenizer of transformers that gives each word its place in the list as id. "<end>" is
    one of the words, and so is `pad`, which pads. between: what stands between two words of a
    text"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=pad))
    found.pre_tokenizer = pre_tokenizers.Split(between, "removed")
    found.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>", pad_token=pad)
