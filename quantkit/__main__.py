from quantkit.cli.process import run

if __name__ == "__main__":
    run()
