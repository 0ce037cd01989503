import sys
from pathlib import Path

# Fakes and contracts are shared by tests and by the processes that tests start.
sys.path.insert(0, str(Path(__file__).parent))
