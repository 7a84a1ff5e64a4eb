"""Run the command line as `python -m trackstar`."""

from trackstar.cli import main

if __name__ == "__main__":
    main()
