"""`python -m gpt2course.chapters refresh|check|student`, the same as `gpt2course notebooks …`."""

import argparse
import sys

from gpt2course.chapters import ChapterError, check, refresh, student


def main() -> int:
    """Run one of the three; 1 if a chapter failed."""
    parser = argparse.ArgumentParser(prog="python -m gpt2course.chapters", description=__doc__)
    parser.add_argument("action", choices=["refresh", "check", "student"])
    parser.add_argument("names", nargs="*", help="chapters by number, such as 03; all by default")
    parser.add_argument("--out", default="student", help="folder of the student edition")
    options = parser.parse_args()
    try:
        if options.action == "refresh":
            refresh(options.names)
        elif options.action == "student":
            for path in student(options.out, options.names):
                print(path)
        elif problems := check(options.names):
            print("\n".join(problems))
            return 1
    except (ChapterError, FileNotFoundError, FileExistsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
