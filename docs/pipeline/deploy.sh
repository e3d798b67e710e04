#!/usr/bin/env bash
# From a model to a signed bundle, for any CI system; docs/pipeline.md explains it.
#
#   deploy.sh build   calibrate, search, gate on accuracy (exit 3), export, verify: $MODES_RUN/bundle
#   deploy.sh sign    sign the bundle and check the signature: $MODES_RUN/bundle.sig
#   deploy.sh check   before it is served: the signature, then `modes verify`
#
# MODEL, TARGET, MIN_RETAINED (0.97 unless set) and MODES_RUN are what `modes` calls so. CALIBRATE_OPTIONS, SEARCH_OPTIONS,
# EVALUATE_OPTIONS and EXPORT_OPTIONS are more options of those commands, divided by blanks: "--data gqa --device cuda".
# SIGN, for `sign` and `check`, has no default:
#   sigstore  keyless, by the identity of the CI job: IDENTITY, IDENTITY_PROVIDER
#   key       an elliptic-curve key pair in PEM files: SIGNING_KEY for `sign`, VERIFYING_KEY for both
#   none      no signature is made or looked for, and the log says so
set -euo pipefail

export MODES_RUN=${MODES_RUN:-modes-run}
bundle=$MODES_RUN/bundle
signature=$bundle.sig

usage() {
  printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

build() {
  local target=${TARGET:-0.75} calibrate search evaluate export
  read -r -a calibrate <<<"${CALIBRATE_OPTIONS:-}"
  read -r -a search <<<"${SEARCH_OPTIONS:-}"
  read -r -a evaluate <<<"${EVALUATE_OPTIONS:-}"
  read -r -a export <<<"${EXPORT_OPTIONS:-}"
  rm -f "$signature" # of an older bundle
  modes calibrate "${MODEL:-digits}" "${calibrate[@]}"
  modes search --target "$target" "${search[@]}"
  modes evaluate --target "$target" --min-retained "${MIN_RETAINED:-0.97}" "${evaluate[@]}"
  modes export --target "$target" "${export[@]}"
  modes verify "$bundle"
}

# The whole folder counts, files that git would ignore too; links are refused.
sign() {
  local made=$signature.part # a signature stands under its name when it was found to be good
  case ${SIGN:-} in
    sigstore)
      model_signing sign sigstore "$bundle" --use_ambient_credentials --no-ignore-git-paths --signature "$made" ;;
    key)
      model_signing sign key "$bundle" --private_key "${SIGNING_KEY:?the private key}" --no-ignore-git-paths --signature "$made" ;;
    none)
      echo "SIGN=none: the bundle is not signed" >&2
      return ;;
    *) usage "SIGN is \`${SIGN:-}\`" "sigstore, key or none; docs/pipeline.md says what they take" ;;
  esac
  check_signature "$made"
  mv "$made" "$signature"
}

check_signature() {
  case ${SIGN:-} in
    sigstore)
      model_signing verify sigstore "$bundle" --signature "$1" --no-ignore-git-paths \
        --identity "${IDENTITY:?who signed}" --identity_provider "${IDENTITY_PROVIDER:?who vouches for IDENTITY}" ;;
    key)
      model_signing verify key "$bundle" --signature "$1" --no-ignore-git-paths --public_key "${VERIFYING_KEY:?the public key}" ;;
    none)
      echo "SIGN=none: no signature is checked" >&2 ;;
    *) usage "SIGN is \`${SIGN:-}\`" "sigstore, key or none; docs/pipeline.md says what they take" ;;
  esac
}

case ${1:-} in
  build) build ;;
  sign) sign ;;
  check)
    check_signature "$signature"
    modes verify "$bundle" ;;
  *) usage "\`${1:-}\` is no step" "deploy.sh build, sign or check" ;;
esac
