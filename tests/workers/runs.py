"""`python runs.py RANKS ARGUMENTS...`: what ibdistill/train.py does with these arguments on so many ranks.

The ranks are forked here after the imports: for runs of which something else than the launcher is tested.
"""

from __future__ import annotations

import sys

import ranks

from ibdistill import train


def main(arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    train.main()


if __name__ == "__main__":
    number, *arguments = sys.argv[1:]
    ranks.run(main, arguments, ranks=(int(number),))
