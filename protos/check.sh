#!/usr/bin/env bash
# Lints the protos, and looks for changes that would break clients of the last release, whose image is
# released.binpb. A release renews it: `bash protos/check.sh release`.
set -euo pipefail
cd "$(dirname "$0")"
buf() { npx --yes @bufbuild/buf@1.75.0 "$@"; }
buf lint
buf format --diff --exit-code
if [ "${1:-}" = release ]; then
  buf build --output released.binpb
fi
buf breaking --against released.binpb
