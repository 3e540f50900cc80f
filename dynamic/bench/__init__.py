"""Load tests: latency and throughput, in this process or of a running server."""
