"""`python -m modes_cli` is `modes`."""

from modes_cli.app import main

if __name__ == "__main__":
    main()
