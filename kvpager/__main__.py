"""`python -m kvpager`: the same as the command `kvpager`."""

from kvpager.cli import main

if __name__ == "__main__":
    main()
