"""Greet whoever is named."""

import getpass
import json
import os
import sys
from pathlib import Path

greeting = f"{os.environ['GREETING']} {' '.join(sys.argv[1:])}"
print(json.dumps({"greeting": greeting, "user": getpass.getuser(), "folder": str(Path.cwd())}))
