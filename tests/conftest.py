from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # the networks here are small: threads cost more than they bring, and pytest-xdist has the cores
