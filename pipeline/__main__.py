"""``python -m pipeline`` is ``dmdd``."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
