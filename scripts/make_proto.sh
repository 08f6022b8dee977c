#!/usr/bin/env bash
# Regenerates src/treadle/wire/treadle_pb2.py and .pyi from treadle.proto.
#
# Generated code refuses runtimes older than its own compiler, so the compiler is pinned to the oldest runtime
# that pyproject.toml allows (protobuf 6.31.0), in a throw-away environment. Newer runtimes load it unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."

compiler_env="$(mktemp -d)"
trap 'rm -rf "$compiler_env"' EXIT
"${PYTHON:-python3}" -m venv "$compiler_env"
"$compiler_env/bin/pip" --quiet install "grpcio-tools==1.73.1" "setuptools<81"

"$compiler_env/bin/python" -m grpc_tools.protoc \
  --proto_path=src --python_out=src --pyi_out=src \
  src/treadle/wire/treadle.proto
echo "wrote src/treadle/wire/treadle_pb2.py and treadle_pb2.pyi"
