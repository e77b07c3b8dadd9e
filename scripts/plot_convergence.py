"""Draw the figures of the paper from your own runs: `--help`."""

from hf_deq.commands.plot import main

if __name__ == "__main__":
    main()
