"""Make an Attractor model of a pretrained decoder: `--help`."""

from hf_deq.commands.retrofit import main

if __name__ == "__main__":
    main()
