"""Perplexity of a trained model, and what the equilibrium contributes: `--help`."""

from hf_deq.commands.evaluate import main

if __name__ == "__main__":
    main()
