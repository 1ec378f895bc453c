"""`python -m clipmill` is the `pipeline` command."""

from clipmill.cli import main

if __name__ == "__main__":
    main()
