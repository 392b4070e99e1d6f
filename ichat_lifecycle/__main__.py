"""`python -m ichat_lifecycle`."""

from ichat_lifecycle.cli import main

if __name__ == "__main__":
    main()
