"""In-Shop Clothes: Inshop_Clothes/{Img/img/..., Eval/list_eval_partition.txt}.

The list holds a count, a header, then `image_name item_id evaluation_status` in columns padded with blanks.
"""

from pathlib import Path

from layouts.reading import AUDIT, Layout, Listing, read_rows

COLUMNS = "image_name item_id evaluation_status"
ROW = r"(?P<path>\S+)\s+(?P<class>id_\d{1,9})\s+(?P<split>train|query|gallery)"


def read(home: Path) -> Listing:
    list_file = home / "Eval" / "list_eval_partition.txt"
    splits = {"train": [], "query": [], "gallery": []}
    for _, row in read_rows(list_file, ROW, COLUMNS, header=2):
        splits[row["split"]].append((f"Img/{row['path']}", row["class"]))
    return Listing(home, splits, str(list_file))


LAYOUT = Layout(
    home="Inshop_Clothes",
    read=read,
    published={"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)},
    recall_at=(1, 10, 20, 30, 40, 50),
    by_hand="""In-Shop Clothes cannot be downloaded: its authors give it to those who agree to their terms, on the
pages of DeepFashion (The Chinese University of Hong Kong), as "In-shop Clothes Retrieval Benchmark".
Put these under {home}:
  1. Img/img.zip, unpacked to Img/img/ (not img_highres.zip: results are not reported on it)
  2. Eval/list_eval_partition.txt""",
    mirrors=AUDIT + "no copy elsewhere is right. Avoid Marqo/deepfashion-inshop on Hugging Face: it has 52,591 "
    "images instead of 52,712, and no split.",
)
