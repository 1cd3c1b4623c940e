"""`python -m mmv1 ...` is `mmv1 ...`."""

from mmv1.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
