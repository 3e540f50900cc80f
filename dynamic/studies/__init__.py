"""Studies of what quality costs: one setting measured, many swept, pairs compared."""
