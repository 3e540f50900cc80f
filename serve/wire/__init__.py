"""What clients send and what the server answers."""
