"""Text in, text out: what the OpenAI and Anthropic forms of the API share.

Prompts become tokens here (tokenizer and chat template of the base model), samples become text, stops are cut off and
answers are streamed. It refuses to know how anything is sampled: the work is a sample like the SDK's, admitted, counted
and queued like any other. Neither torch nor transformers is needed.
"""
