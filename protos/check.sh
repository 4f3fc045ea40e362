#!/usr/bin/env bash
# Lints the protos and looks for breaking changes against BASE, a git reference (default: the newest tag,
# else main).
set -euo pipefail
cd "$(dirname "$0")/.."
buf() { npx --yes @bufbuild/buf@1.75.0 "$@"; }
buf lint protos
buf format --diff --exit-code protos
newest() { git describe --tags --abbrev=0 2>/dev/null || git rev-parse --verify --quiet origin/main || echo main; }
base=${BASE:-$(newest)}
if git cat-file -e "$base:protos/buf.yaml" 2>/dev/null; then
  reference="$(git rev-parse "$base^{commit}")"
  buf breaking protos --against "$(git rev-parse --git-common-dir)#ref=$reference,subdir=protos"
else
  echo "no protos at $base to compare with"
fi
