"""`python -m twotower.cli`: the command line, as `python -m twotower`."""

from twotower.cli.main import main

if __name__ == "__main__":
    main()
