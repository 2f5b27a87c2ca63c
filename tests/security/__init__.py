"""Security and robustness tests: attacks, faults, other parsers' corpora, fuzzing, a browser, a long run."""
