"""`accelerate launch -m hf_deq.training` trains as `accelerate launch scripts/train.py` does."""

from ..commands.train import main

if __name__ == "__main__":
    main()
