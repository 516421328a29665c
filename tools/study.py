"""Runs and reports studies: `python tools/study.py --help`; the code is in tools/study/."""

import sys

from study.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
