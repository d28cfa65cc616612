"""Reads and writes folders of Hugging Face: weights, tokenizer, chat template, vocabulary.

Nothing here is loaded before a folder is used, and the package transformers is never imported.
"""
