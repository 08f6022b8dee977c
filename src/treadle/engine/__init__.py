"""The training engine: one frozen base model, many tenants' LoRA adapters, one pass.

It needs torch, transformers, safetensors and numpy, and of treadle only `domain` and `errors`, because it also
runs on accelerator machines that have nothing else installed. It knows no requests, queues, files or clocks.
"""
