"""Try a language model: what `python -m compactmind.generate` does, from this folder. `python generate.py --help`"""

import gc

gc.disable()  # what importing makes stays: looking for garbage in it is a third of the time until the first answer

from compactmind.generate import main

gc.freeze()
gc.enable()

if __name__ == "__main__":
    main()
