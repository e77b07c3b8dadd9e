"""Train a deep equilibrium language model: `accelerate launch scripts/train.py --help`."""

from hf_deq.commands.train import main

if __name__ == "__main__":
    main()
