"""Folders of Hugging Face: weights, tokenizer, chat template, and a vocabulary written as theirs.

Nothing here is loaded before a folder is asked for, and of transformers nothing is imported.
"""
