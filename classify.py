"""Try a classifier on your own sentences: what `python -m compactmind.classify` does, from this folder. `python classify.py --help`"""

import gc

gc.disable()  # what importing makes stays: looking for garbage in it is a third of the time until the first answer

from compactmind.classify import main

gc.freeze()
gc.enable()

if __name__ == "__main__":
    main()
