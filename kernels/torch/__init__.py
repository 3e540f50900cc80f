"""The backend made of torch's own operations, and those that replace its experts."""
