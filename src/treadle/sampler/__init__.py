"""Samplers: they turn prompts into tokens with the weights of a pool.

The built-in one shares the worker's base model. A sampler needs torch, tokenizers and numpy, and of treadle only
`domain`, `errors` and `engine`; it knows no requests' transport, no queue on disk and no files but the tokenizer's.
"""
