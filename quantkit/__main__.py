from quantkit.cli.main import main
from quantkit.cli.process import collect_seldom

if __name__ == "__main__":
    collect_seldom(until="transformers.modeling_utils")
    try:
        main()
    finally:
        # Python remembers an interrupt that leaves an exec() of text, as class builders make them, and with -m
        # ends by that signal whatever the exit code, unless another exec() comes after it.
        exec("")
