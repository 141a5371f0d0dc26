"""`python -m p2d_cli` and the `p2d` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line; ends the process with a documented exit code."""
    from p2d_cli.cli.ranks import silent_follower

    with silent_follower():
        from p2d_cli.cli.app import app

        app()


if __name__ == "__main__":
    main()
