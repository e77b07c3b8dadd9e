"""Serve models with Transformers' own server: `--help`."""

from hf_deq.commands.serve import main

if __name__ == "__main__":
    main()
