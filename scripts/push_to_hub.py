"""Put a trained model on the Hub, with its code and a card: `--help`."""

from hf_deq.commands.push import main

if __name__ == "__main__":
    main()
