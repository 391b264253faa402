from quantkit.cli.main import main
from quantkit.cli.process import collect_seldom

if __name__ == "__main__":
    collect_seldom(until="transformers.modeling_utils")
    main()
