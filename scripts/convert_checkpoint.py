"""Turn a checkpoint of the authors' code into a model folder: `--help`."""

from hf_deq.commands.convert import main

if __name__ == "__main__":
    main()
