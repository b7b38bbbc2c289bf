"""Fuzzing of the native engine: libFuzzer targets, one .c each."""
