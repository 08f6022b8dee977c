"""Every bound in treadle, with its unit and the reason for its value.

Bounds an operator may change live in config/tree.py and take their defaults from here.
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
# Log-probabilities of one sample request beside those of its own tokens: 128 at each of 131,072 positions. 8 bytes each
# where the token is part of the answer, and held in memory several times on the way.
MAX_LOGPROB_CELLS = 2**24
# Stop sequences of one request, and the length of each in characters.
MAX_STOP_SEQUENCES = 64
MAX_STOP_CHARS = 1_024
# How long a retrieve call is held. The SDK gives up at 45 s.
HOLD_S = 30.0
# How long a hole in a model's sequence is waited for once a later step, save or load is queued.
GAP_WAIT_S = 30.0
# Sequenced ops read per model and cycle: more than one step's worth of any known client.
MAX_HEADS_PER_MODEL = 64
# Ops of one cycle, over all models: ops without tokens are outside the token budget, but each costs some milliseconds.
MAX_OPS_PER_CYCLE = 256
# How far an op may be ahead of its run's first open seq id: every id between that never comes costs a row. More ops
# than any client has had in flight.
MAX_SEQ_ID_LEAD = 65_536
# Missing seq ids of a model given up per cycle: a client that jumps ahead must not make us write a million rows.
MAX_GAP_IDS_PER_CYCLE = 1_024
# A run without an op for this long leaves device memory: longer than a client's pause between steps, sampling included.
PARK_AFTER_S = 60.0
# Encoded snapshots that wait for the disk, in bytes: beside these the next run waits for its turn, and training goes
# on. A snapshot larger than this waits alone.
MAX_UNWRITTEN_SNAPSHOT_BYTES = 256 * 2**20
# Sampler versions that one worker keeps in shared memory of its machine: one of an 8B model at rank 32 (350 MB). A
# larger one waits alone; without room a save is answered when its blob is durable. Each that waits holds a file open.
MAX_STAGED_BYTES = 512 * 2**20
MAX_STAGED_FILES = 256
# How long weights that neither memory nor the blob store has may be on their way from another machine.
WEIGHTS_ON_THEIR_WAY_S = 30.0
# A worker that has work and says nothing for this long is hung, unless it was predicted to take a tenth of it or more.
HANG_AFTER_S = 60.0
# So much longer than predicted may a cycle take before its worker counts as hung.
HANG_FACTOR = 10.0
# How often a worker says that it makes progress: often beside any bound on silence, rarely beside its units of work.
PROGRESS_EVERY_S = 1.0
# How often a worker that is awake says what memory it takes: within two scrapes of Prometheus.
VITALS_EVERY_S = 10.0
# Device seconds that training or sampling may be ahead of the other before the rest is forgotten. Above the longest
# unit of work, so that the split stays 50:50; short enough that a side that was idle cannot hold the device for long.
MAX_SHARE_CREDIT_S = 1.0
# A login that the SDK gets in exchange for a key. It renews it at half its life.
JWT_LIFE_S = 3_600.0
# A URL that works without a key: time for a download to start, or for a person to paste it.
SIGNED_URL_LIFE_S = 3_600.0
# An id, path or base model name in a request: longer than any that treadle makes, short enough for an index.
MAX_ID_CHARS = 512
# A request's id, and the number of the sequence behind it.
MAX_SEQUENCE_ID_CHARS = 2 * MAX_ID_CHARS
# Free text of a request (display name, project, finish detail).
MAX_TEXT_CHARS = 4_096
# Metadata dictionaries sent by clients, as JSON.
MAX_METADATA_BYTES = 16 * 2**10
# Keys that the files of one export are encrypted to (SDK 0.38).
MAX_AGE_RECIPIENTS = 10
# What a download reads and sends at a time: far above the cost of a call, far below what many of them could fill.
DOWNLOAD_CHUNK_BYTES = 2**20
# TTL of a checkpoint: one hour to ten years (SDK 0.38).
MIN_TTL_S = 3_600
MAX_TTL_S = 10 * 365 * 24 * 3_600
# Writes committed together. Enough that a full batch costs one flush per hundreds of requests, few enough that a batch
# (of inline payloads at most) stays near 16 MiB and a read of its rows waits milliseconds.
MAX_WRITES_PER_COMMIT = 256
# Writes that may wait for the database before further ones are refused as StoreUnavailable: seconds of its work.
MAX_PENDING_WRITES = 10_000
# Rows of one page of a listing; the SDK's command line asks for up to 1,000.
MAX_PAGE_ROWS = 1_000
# Rows of a listing without pages (checkpoints of a run, runs of a session): what one answer may cost.
MAX_UNPAGED_ROWS = 10_000
# Queue heads read per cycle over all models: 10 ms of reading. Of many models the first few ops of each are read.
MAX_HEAD_ROWS = 4_096
# Ids in one query: below the 32,766 bound variables that SQLite takes, and the 32,767 of PostgreSQL.
MAX_IDS_PER_QUERY = 10_000
# Finished rows touched by one sweep, which shares the writer with admissions.
MAX_ROWS_PER_SWEEP = 1_000
# A result may be fetched again for this long after its first delivery: answers get lost on the way.
RESULT_KEPT_AFTER_DELIVERY_S = 600.0
# A result that nobody fetched: a client that comes back after a night still finds it.
RESULT_KEPT_UNDELIVERED_S = 24 * 3600.0
SWEEP_INTERVAL_S = 60.0
# What may wait, samples and training apart. A token of a training request is stored in 12 (supervised) to 24 bytes
# (RL), so these bytes are the 20 to 40 million tokens that a laptop works on for hours; all are a tenth of its disk.
MAX_QUEUED_BYTES_PER_TENANT = 512 * 2**20
MAX_QUEUED_BYTES = 4 * 2**30
# Samples are small and long: a batch of 256 prompts x 16 sequences of up to 2,048 tokens counts 8.4 million.
MAX_QUEUED_TOKENS_PER_TENANT = 64_000_000
MAX_QUEUED_TOKENS = 512_000_000
# Bodies being read, decompressed and decoded in one gateway: eight of the largest as they are sent. Decoding copies
# what it needs, so a gateway's memory peaks at about three times this.
MAX_BODY_BYTES_IN_MEMORY = 512 * 2**20
# Silence after which a client counts as gone: sixty missed heartbeats (the SDK beats every 10 s and warns after 12).
# What follows costs one snapshot and, if the client does come back, one restore.
SESSION_SILENCE_S = 600.0
# The training state behind a session that its client finished: long enough for what was queued to run, and for an
# operator who is asked at once.
FINISHED_SESSION_KEPT_S = 3_600.0
# Rows of finished requests: what a client that comes back after a night may still ask about.
FINISHED_REQUEST_KEPT_S = 24 * 3600.0
# What was sampled with record_stability_info, behind the last pass that used it: the day that the API promises.
STABILITY_RECORD_KEPT_S = 24 * 3600.0
# Recorded sequences that one pass may name, tokens and log-probabilities: 32 million tokens, far over any body.
MAX_STABILITY_BYTES_PER_PASS = 256 * 2**20
# Unnamed sampler versions per run: RL clients sample the newest one, asynchronous ones a few steps back.
SAMPLER_VERSIONS_KEPT = 4
SAMPLER_VERSION_KEPT_S = 3_600.0
# A blob is written before the row that names it: far longer than any such commit is tried again.
UNNAMED_BLOB_KEPT_S = 3_600.0
# An expired checkpoint that a request found while it was alive: far longer than the way from there to its row.
CHECKPOINT_GRACE_S = 600.0
# Blobs looked at by one query of a sweep, and remembered from one sweep to the next. Later ones wait for their turn.
MAX_BLOBS_PER_QUERY = 500
MAX_UNNAMED_BLOBS = 100_000
# Payloads of one run that a transaction retires: some 50 ms of the writer's time. The rest goes later.
MAX_RETIRED_ROWS = 1_000
# Requests remembered because a worker died under them: several cycles' worth. Beyond it the oldest count as cleared.
MAX_SUSPECTS = 4_096
# Payloads that one run's replay may need before a snapshot is taken whatever it costs: seconds of reading.
MAX_REPLAY_BYTES = 256 * 2**20
# Runs that a leader reads for one cycle, some milliseconds each: with thousands waiting, the first one starts at once.
MAX_RUNS_READ_PER_CYCLE = 64
# Worker seconds of ops of one run that a restore may have to run again, as far as snapshots for that stay cheap.
MAX_REPLAY_S = 2.0
# A custom loss: what its graph may have, and what one datum of it may cost in a worker that others share.
# The SDK allows 16 inputs. Losses people write have 10 to 100 nodes; at some 20 us a node this many take 10 ms a datum.
MAX_CUSTOM_LOSS_INPUTS = 16
MAX_CUSTOM_LOSS_NODES = 512
MAX_CUSTOM_LOSS_METRICS = 64
# Numbers and references written out in one node, and how deep they are nested.
MAX_CUSTOM_LOSS_ARGUMENTS = 64
MAX_CUSTOM_LOSS_DEPTH = 4
# The definition as it is stored, with the loss and with every pass that uses it.
MAX_CUSTOM_LOSS_BYTES = 64 * 2**10
# Sessions end; a client that makes a loss per step reuses none of them.
MAX_CUSTOM_LOSSES_PER_SESSION = 256
# Numbers of one tensor (all pairs of 2,896 tokens), and of all that one datum's graph makes: 256 MiB at eight bytes.
MAX_CUSTOM_LOSS_NUMBERS = 2**23
MAX_CUSTOM_LOSS_NUMBERS_PER_DATUM = 2**25
# Work in units of about a quarter of a nanosecond: so much for each datum and each of its tokens, 30 us a token. Each
# node counts as 1 us even if it does nothing.
CUSTOM_LOSS_WORK_PER_NODE = 2**12
CUSTOM_LOSS_WORK_PER_DATUM = 2**22
CUSTOM_LOSS_WORK_PER_TOKEN = 2**17
# Seconds of processor time for the custom loss on one quantum. Ordinary losses take tenths of one for 2,048 tokens: it
# is against long graphs on short datums, and keeps a pack full of such quanta below HANG_AFTER_S.
MAX_CUSTOM_LOSS_S = 5.0
# What one question about usage may cover: the API's fourteen days.
MAX_USAGE_WINDOW_S = 14 * 24 * 3_600
# Rows of usage per hour: long enough to bill a quarter of a year.
USAGE_KEPT_S = 100 * 24 * 3_600
# Rows of usage of one answer to an operator's SDK, which has no pages: some 20 MB of JSON.
MAX_ADMIN_USAGE_ROWS = 50_000
# Events of one answer of the audit log, which is asked for by the day.
MAX_AUDIT_ROWS = 100_000
# Ops of one session's trace, newest first: some 10 MB of JSON, which the viewers still draw.
MAX_TRACE_OPS = 20_000
# The file of a named loss, of any form: a graph of that size is the largest that runs.
MAX_NAMED_LOSS_BYTES = 64 * 2**10
# Named losses of one tenant that wait for an operator, who reads each of them.
MAX_PENDING_LOSSES_PER_TENANT = 8
# Tenants that an approval may list.
MAX_TENANTS_PER_LOSS = 1_000
# A review from its start to its report, all its children and a slow hub included: later it counts as ended by the death
# of its server.
MAX_REVIEW_S = 300.0
# Before anybody is known. The head of a request: proxies send a few kB, tokens of identity providers are the largest.
MAX_HEADER_BYTES = 64 * 2**10
MAX_URL_BYTES = 16 * 2**10
MAX_HEADERS = 128
# A head fits into one packet or a few: this is for the slowest networks.
HEADER_TIMEOUT_S = 15.0
# Bodies are measured over so long, so that a stall of some seconds, as networks have, ends none.
BODY_WINDOW_S = 20.0
MIN_BODY_BYTES_PER_S = 1_024.0
# How long, and for how many bytes, a connection whose request was answered before its body came is read on, so that
# its client gets to read the answer: more than the SDK's chunk of 5 MB.
LINGER_S = 5.0
LINGER_BYTES = 8 * 2**20
# How long a client may take nothing of an answer that waits for it.
UNREAD_ANSWER_S = 60.0
# Requests on one connection behind one that is not answered yet. The SDK sends none.
MAX_PIPELINED = 16
MAX_CONNECTIONS = 10_000
# All clients of one office share an address, and one SDK that waits for many samples opens up to 1,000 connections.
MAX_CONNECTIONS_PER_ADDRESS = 4_096
MAX_FAILED_LOGINS_PER_MINUTE = 100
# Addresses that are remembered for their failed logins: beyond them the oldest are forgotten.
MAX_REMEMBERED_ADDRESSES = 10_000
# Shared projects that one tenant owns, and tenants in one of them: far above any team, small enough for one answer.
MAX_PROJECTS_PER_TENANT = 1_000
MAX_MEMBERS_PER_PROJECT = 1_000
# Pools added at run time: each is a worker process with a base model.
MAX_ADDED_POOLS = 64
# Commands of operators that wait for one leader: they are carried out between cycles, one after another.
MAX_OPEN_COMMANDS = 256
# How long one waits for a run that is in the middle of a pass at the end of every cycle.
COMMAND_PATIENCE_S = 60.0

# Workers of one pool, and as many again that only sample: each holds the whole base model.
MAX_WORKERS_PER_POOL = 256
