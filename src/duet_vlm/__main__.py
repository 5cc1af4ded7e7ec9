"""``python -m duet_vlm``: the same as ``duet-vlm``."""

from duet_vlm.cli.main import app

if __name__ == "__main__":
    app(prog_name="duet-vlm")
