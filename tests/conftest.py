import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # small networks: threads cost more than they bring, and pytest-xdist uses the cores
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
HOOKS = {module: module.excepthook for module in (sys, threading)}


@pytest.fixture(autouse=True)
def handlers():
    """A script that runs in this process sets its own handlers and hooks, which would outlive it."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    for module, hook in HOOKS.items():
        module.excepthook = hook
