"""P0, the stock PEFT loop that servers are measured against: one tenant, padded batch, one intra-op thread.

    python scripts/bench/peft_baseline.py MODEL_DIR --steps 30

Prints JSON: trained tokens per CPU-second of whole steps (forward, cross-entropy, backward, AdamW). LoRA on every
projection and lm_head, as the SDK sends it by default.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=args.rank, lora_alpha=32, target_modules=TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.randint(10, model.config.vocab_size - 10, (args.batch, args.seqlen + 1))

    def step() -> None:
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    started = time.process_time()
    for _ in range(args.steps):
        step()
    cpu_s = time.process_time() - started
    print(json.dumps({"tokens_per_cpu_s": args.steps * args.batch * args.seqlen / cpu_s}))


if __name__ == "__main__":
    main()
