"""One file per family of experiments; each has get_config(arg) and returns a locked ConfigDict."""
