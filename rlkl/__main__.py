"""``python -m rlkl``, also under a launcher."""

import sys

from rlkl.cli import main

sys.exit(main())
