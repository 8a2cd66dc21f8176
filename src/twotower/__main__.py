"""`python -m twotower`: the command line."""

from twotower.cli.main import main

if __name__ == "__main__":
    main()
