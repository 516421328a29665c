"""Studies of what pays: `python tools/study.py --help`; the work is done in tools/study/."""

import sys

from study.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
