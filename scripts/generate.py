"""Continue a text with a trained model: `--help`."""

from hf_deq.commands.generate import main

if __name__ == "__main__":
    main()
