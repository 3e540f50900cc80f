"""Routers, expert budgets, dispatch and upcycling."""
