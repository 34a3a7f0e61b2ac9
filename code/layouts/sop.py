"""Stanford Online Products: Stanford_Online_Products/{Ebay_train.txt, Ebay_test.txt, *_final/*.JPG}."""

from pathlib import Path

from layouts.reading import AUDIT, Layout, Listing, read_rows

COLUMNS = "image_id class_id super_class_id path"
ROW = r"\d{1,9}\s+(?P<class>0*[1-9]\d{0,8})\s+\d{1,9}\s+(?P<path>\S+)"


def read(home: Path) -> Listing:
    splits = {}
    for split in ("train", "test"):
        list_file = home / f"Ebay_{split}.txt"
        splits[split] = [(row["path"], int(row["class"])) for _, row in read_rows(list_file, ROW, COLUMNS, header=1)]
    return Listing(home, splits, str(home / "Ebay_*.txt"))


LAYOUT = Layout(
    home="Stanford_Online_Products",
    read=read,
    published={"train": (59551, 11318), "test": (60502, 11316)},
    recall_at=(1, 10, 100, 1000),
    archive=("http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip", "7f73d41a2f44250d4779881525aea32e"),
    mirrors=AUDIT + "nyris/stanford-online-products-v1 on Hugging Face (revision 24a1b9b8) has the original sizes "
    "and the right 59,551 + 60,502 images. Avoid JamieSJS/stanford-online-products: it is reduced to 224 × 224.",
)
