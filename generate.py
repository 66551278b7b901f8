"""Try a language model: what `python -m compactmind.generate` does, from this folder. `python generate.py --help`"""

from compactmind.quick_start import quick_start

with quick_start():
    from compactmind.generate import main

if __name__ == "__main__":
    main()
