from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # small networks: threads cost more than they bring, and pytest-xdist uses the cores
