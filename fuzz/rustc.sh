#!/bin/sh
# Stands before rustc (RUSTC_WRAPPER): our own crates get libFuzzer's coverage, in which dependencies
# would drown what is found, and take most of the time. All of these flags are stable ones.
rustc=$1
shift
case " $* " in
*" --crate-name wg_common "* | *" --crate-name wg_userspace "* | *" --crate-name fuzz "*)
    set -- "$@" -Cpasses=sancov-module \
        -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
        -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares \
        -Cllvm-args=-simplifycfg-branch-fold-threshold=0
    ;;
esac
exec "$rustc" "$@"
