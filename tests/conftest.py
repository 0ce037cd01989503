import os
import sys
from pathlib import Path

# Fakes and contracts are shared by tests and by the processes that tests start.
sys.path.insert(0, str(Path(__file__).parent))

# OpenMP's threads spin while they wait; where tests share two cores, the spinning is all that happens.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
