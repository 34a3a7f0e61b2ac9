"""What is known about the benchmarks before anything is read: one table."""

from dataclasses import dataclass

from refused import Refused

RECALL_AT = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Archive:
    """A download and the md5 of its bytes."""

    url: str
    md5: str

    @property
    def file_name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Facts:
    """What is known about a benchmark before it is read.

    home is its folder under the data root; published gives (images, classes) of each split; recall_at are the K of
    R@K in its papers. Class ids that are numbers go from 1 to num_classes, and where no list file names the splits,
    those up to last_train_class train. archive is its download, by_hand says how to get it where that is not
    possible, mirrors which copies elsewhere are right or wrong. A benchmark without any of these is drawn, see
    find_home.
    """

    home: str
    published: dict[str, tuple[int, int]]
    recall_at: tuple[int, ...] = RECALL_AT
    num_classes: int | None = None
    last_train_class: int | None = None
    archive: Archive | None = None
    by_hand: str = ""
    mirrors: str = ""


AUDIT = "As an independent audit found (this project has not fetched any of these): "

BENCHMARKS = {
    "cub": Facts(
        home="CUB_200_2011",
        published={"train": (5864, 100), "test": (5924, 100)},
        num_classes=200,
        last_train_class=100,
        archive=Archive(
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78"
        ),
        mirrors=AUDIT + "bentrevett/caltech-ucsd-birds-200-2011 on Hugging Face (revision 1ef09e02) has the same "
        "11,788 JPEGs. Avoid CUB-200 of 2010: its 6,033 images are another benchmark.",
    ),
    "cars": Facts(
        home="cars196",
        published={"train": (8054, 98), "test": (8131, 98)},
        num_classes=196,
        last_train_class=98,
        by_hand="""Cars-196 cannot be downloaded: its pages are gone. Put one of these under {home}:
  1. car_ims.tgz (md5 d5c8f0aa497503f355e17dc7886c3f14), unpacked to car_ims/,
     and cars_annos.mat (md5 b407c6086d669747186bd1d764ff9dbc)
  2. cars_train/ and cars_test/, car_devkit.tgz (md5 c3b158d763b6e2245038c8ad08e45376), unpacked to devkit/,
     and cars_test_annos_withlabels.mat (md5 b0a2b23655a3edd16d84508592a98d10);
     the cars_test_annos.mat of the devkit has no labels
  3. "stanford-car-dataset-by-classes-folder" from Kaggle (user jutrera), unpacked:
     names.csv, anno_train.csv, anno_test.csv and car_data/""",
        mirrors=AUDIT + "tanganke/stanford_cars on Hugging Face (revision 9abf6cf7) has the right 8,144 + 8,041 "
        "images; their bytes were not compared. Do not rely on torchvision: its downloader raises an error.",
    ),
    "SOP": Facts(
        home="Stanford_Online_Products",
        published={"train": (59551, 11318), "test": (60502, 11316)},
        recall_at=(1, 10, 100, 1000),
        num_classes=22634,
        archive=Archive(
            "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip", "7f73d41a2f44250d4779881525aea32e"
        ),
        mirrors=AUDIT + "nyris/stanford-online-products-v1 on Hugging Face (revision 24a1b9b8) has the original sizes "
        "and the right 59,551 + 60,502 images. Avoid JamieSJS/stanford-online-products: it is reduced to 224 × 224.",
    ),
    "Inshop": Facts(
        home="Inshop_Clothes",
        published={"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)},
        recall_at=(1, 10, 20, 30, 40, 50),
        by_hand="""In-Shop Clothes cannot be downloaded: its authors give it to those who agree to their terms, on the
pages of DeepFashion (The Chinese University of Hong Kong), as "In-shop Clothes Retrieval Benchmark".
Put these under {home}:
  1. Img/img.zip, unpacked to Img/img/ (not img_highres.zip: results are not reported on it)
  2. Eval/list_eval_partition.txt""",
        mirrors=AUDIT + "no copy elsewhere is right. Avoid Marqo/deepfashion-inshop on Hugging Face: it has 52,591 "
        "images instead of 52,712, and no split.",
    ),
    "glyphs": Facts(home="glyphs", published={"train": (2000, 100), "test": (2000, 100)}),
    "emoji": Facts(
        home="emoji",
        published={"train": (4706, 602), "test": (4686, 601)},
        num_classes=1203,
        last_train_class=602,
    ),
}
DATASETS = (*BENCHMARKS, "folder")


def dataset_name(text: str) -> str:
    """The documented name of a data set, given in any letter case, with or without hyphens: In-Shop is Inshop.

    Raises ValueError with the names that there are.
    """
    names = {name.lower(): name for name in DATASETS}
    try:
        return names[text.lower().replace("-", "")]
    except KeyError:
        raise Refused(f"{text!r} is not a dataset; choose from {', '.join(DATASETS)}") from None
