"""``python -m trainer``: one trial by itself (`trainer.alone`)."""

from trainer.alone.command import main

if __name__ == "__main__":
    main()
