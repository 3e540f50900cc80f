"""Plain-torch oracles: every operation in its simplest correct form."""
