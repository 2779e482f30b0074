"""A text to its top 10 as other tools have it: `python benchmarks/usual_ways.py WAY FOLDER TEXT`.

- `torch`: open_clip's text tower in torch, and plain FAISS (`IndexFlatIP`) over float32 rows from a file;
- `sqlite`: the same tower, and numpy over all rows read from SQLite, as rclip does;
- `faiss`, `numpy-sqlite`: the two searches alone, with a query vector that is there already.

`search_first.py` writes what it reads, and times it as a process of its own: it imports nothing else.
"""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

K = 10


def main() -> None:
    way, folder, text = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    query = embed(folder, text) if way in ("torch", "sqlite") else np.load(folder / "query.npy")
    search = search_faiss if way in ("torch", "faiss") else search_sqlite
    print(search(folder, query))


def embed(folder: Path, text: str) -> NDArray[np.float32]:
    import open_clip
    import torch

    weights = (folder / "weights.txt").read_text("utf-8")
    model = open_clip.create_model("ViT-B-32", pretrained=weights).eval()
    with torch.inference_mode():
        features = model.encode_text(open_clip.get_tokenizer("ViT-B-32")([text]), normalize=True)
    embedding: NDArray[np.float32] = features[0].numpy()
    return embedding


def search_faiss(folder: Path, query: NDArray[np.float32]) -> list[int]:
    import faiss

    rows: list[int] = faiss.read_index(str(folder / "rows.faiss")).search(query[None], K)[1][0].tolist()
    return rows


def search_sqlite(folder: Path, query: NDArray[np.float32]) -> list[str]:
    with sqlite3.connect(folder / "rows.sqlite") as database:
        held = database.execute("SELECT filepath, vector FROM images").fetchall()
    rows = np.stack([np.frombuffer(vector, np.float32) for _, vector in held])
    return [held[row][0] for row in np.argsort(-(rows @ query))[:K]]


if __name__ == "__main__":
    main()
