"""What the model families are: one table per line of descent, and the rules that they share."""
