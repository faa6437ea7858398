"""``python -m crosslight`` is the command `crosslight`."""

from crosslight.cli import main

if __name__ == "__main__":
    main()
