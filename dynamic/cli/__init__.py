"""The ``dynamoe`` command: its table, help, errors and configurations."""
