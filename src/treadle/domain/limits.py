"""Every bound in treadle, with its unit and the reason for its value.

Bounds an operator may change live in config.py and take their defaults from here.
"""

from __future__ import annotations

# A request body on the wire. The SDK aims at 5 MB per chunk, but one datum may exceed it.
MAX_BODY_BYTES = 64 * 2**20
# What a compressed body may decompress to. zstd frames can declare any size, so this is enforced on the stream.
MAX_DECOMPRESSED_BYTES = 256 * 2**20
# Payloads up to this size live in a side table; larger ones are blobs written before the row.
MAX_INLINE_PAYLOAD_BYTES = 64 * 2**10
# Datums of one request. The SDK's chunks hold 1,024.
MAX_DATUMS_PER_REQUEST = 8_192
# Target columns per position, [T, K] targets.
MAX_TARGETS_PER_POSITION = 128
# A quantum: whole datums up to this many tokens together (a longer datum alone). The unit of reduction.
QUANTUM_TOKENS = 2_048
# Packed batches are padded to a multiple of this, so that rows of a GEMM do not depend on the company.
PACK_MULTIPLE = 16
# LoRA rank; the hosted service this descends from allows 32.
MAX_LORA_RANK = 32
# The API sends no alpha; scale = alpha / rank.
LORA_ALPHA = 32.0
# A sample request's sequences.
MAX_NUM_SAMPLES = 1_024
# top-k logprobs per position.
MAX_TOPK_LOGPROBS = 128
# Stop sequences of one request, and the length of each in characters.
MAX_STOP_SEQUENCES = 64
MAX_STOP_CHARS = 1_024
# How long a retrieve call is held. The SDK gives up at 45 s.
HOLD_S = 30.0
# How long a hole in a model's sequence is waited for once a later step, save or load is queued.
GAP_WAIT_S = 30.0
# Sequenced ops read per model and cycle: more than one step's worth of any known client.
MAX_HEADS_PER_MODEL = 64
# Ephemeral sampler versions kept in memory per model, newest first.
MAX_RESIDENT_VERSIONS_PER_MODEL = 4
# Metadata dictionaries sent by clients, as JSON.
MAX_METADATA_BYTES = 16 * 2**10
# TTL of a checkpoint: one hour to ten years (SDK 0.38).
MIN_TTL_S = 3_600
MAX_TTL_S = 10 * 365 * 24 * 3_600
