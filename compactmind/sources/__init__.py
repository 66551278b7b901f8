"""Where models, sentences and text come from, one file per source. `config` is the DownloadConfig of common.py throughout."""
