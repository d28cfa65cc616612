"""Folders of Hugging Face: weights, tokenizer, chat template, and a vocabulary written as theirs.

Nothing here is loaded before a folder is used, and the package transformers is never imported.
"""
