"""`python -m llava_skip PROGRAM ...`, the same as `llava-skip PROGRAM ...`."""

from llava_skip_base.command import main

if __name__ == "__main__":
    main()
