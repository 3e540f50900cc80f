"""Becomes the launcher of so many processes, one thread each, on the loopback interface; or runs the command alone."""

from __future__ import annotations

import os
import sys

processes, *command = sys.argv[1:]
environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "PYTHONUNBUFFERED": "1"}
launcher = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
launcher += ["--local-addr", "127.0.0.1", "--nproc-per-node", processes]
arguments = [sys.executable, *(launcher if int(processes) > 1 else []), *command]
os.execve(sys.executable, arguments, environment)
