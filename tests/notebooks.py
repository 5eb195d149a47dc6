"""Runs the notebooks, and renews the outputs that are kept in them.

    python -m tests.notebooks 1_hyperschedules 2_noising       # at the full size; --smoke for the small one

Kept outputs are small and of no machine: pictures with fewer colours, no warnings, no run times.
"""

import argparse
import base64
import io
import os
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "notebooks"
MAX_BYTES = 300_000
_COLORS = 64  # of a picture


def run(path: Path, smoke: bool, timeout: int = 600) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel, started in its folder; raises where a cell does.

    Args:
      path: of the notebook.
      smoke: at the small size.
      timeout: seconds for each cell.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HDLM_NOTEBOOK": "smoke" if smoke else ""}
    environment.pop("XLA_FLAGS", None)  # devices are the notebook's own affair
    folder = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=timeout, resources=folder, record_timing=False)
    client.execute(env=environment)
    return notebook


def slim(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what the machine said, with pictures of few colours."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in kept:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _fewer_colors(output.data["image/png"])
        cell.outputs, cell.metadata = kept, {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def _fewer_colors(png: str) -> str:
    from PIL import Image  # comes with matplotlib

    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    out = io.BytesIO()
    image.quantize(_COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def main() -> None:
    """Runs the named notebooks and writes them with their outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(path.stem for path in FOLDER.glob("*.ipynb")))
    parser.add_argument("--smoke", action="store_true", help="at the small size")
    args = parser.parse_args()
    for name in args.names:
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(slim(run(path, args.smoke, timeout=3600)), path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
