"""What must hold whatever bytes arrive: attacks, faults, other parsers' corpora, fuzzing, a browser, a long run."""
