"""The chat demo; an application, run from the checkout with `python -m demo.app`."""
