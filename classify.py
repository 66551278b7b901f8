"""Try a classifier on your own sentences: what `python -m compactmind.classify` does, from this folder. `python classify.py --help`"""

from compactmind.quick_start import quick_start

with quick_start():
    from compactmind.classify import main

if __name__ == "__main__":
    main()
